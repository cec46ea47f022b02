"""Find the columns of a parquet file that hold images, captions, keys, splits and boxes."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from atoll.data.captions import caption_columns, like_captions
from atoll.data.names import clean, listed
from atoll.data.parquet_lists import is_caption_list, is_list, is_number_list, wrong_list
from atoll.data.parquet_rows import holds_bytes, is_text
from atoll.errors import AtollError
from atoll.manifest import DataSettings


class Columns(NamedTuple):
    """The columns that are read; None for one that is not used.

    `status` and `error` are written by img2dataset and give the reason why a link has no image.
    """

    image: str
    captions: tuple[str, ...]
    key: str | None
    split: str | None
    focus: str | None = None
    status: str | None = None
    error: str | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """The columns that are read beside the image, each once."""
        others = (self.key, self.split, self.focus, self.status, self.error)
        names = (*self.captions, *(name for name in others if name is not None))
        return tuple(name for name in dict.fromkeys(names) if name != self.image)


def find_columns(schema: Any, data: DataSettings, where: str) -> Columns:
    """Find the columns to read.

    Args:
        schema: a pyarrow.Schema.
        data: the settings, which may name columns.
        where: the file, for messages.

    Raises:
        AtollError: a column is not there, holds something else, or is there twice; none or several hold bytes; or
            captions are in columns that are not read.
    """
    import pyarrow.types as kinds

    where = clean(where)
    types = dict(zip(schema.names, schema.types, strict=True))
    there = listed([f"{name} ({kind})" for name, kind in types.items()], 20)
    # Columns that the settings name must exist exactly once.
    named = [name for name, _ in data.captions if name is not None]
    settings = [(setting, getattr(data, setting)) for setting in ("image", "key", "split", "focus")]
    for setting, name in [*settings, *(("caption", name) for name in named)]:
        if name is not None and schema.names.count(name) != 1:
            many = "more than one column" if name in types else "no column"
            raise AtollError(f"{where}: {many} {name!r}, which data.{setting} names; it has {there}")
    # The images.
    images = [
        name for name in types if holds_bytes(types[name]) and name not in (*named, data.key, data.split, data.focus)
    ]
    if data.image is None and len(images) != 1:
        many = "no column that holds" if not images else f"{len(images)} columns that hold"
        raise AtollError(f"{where}: {many} bytes; it has {there}; name the one of the images as data.image")
    image = data.image or images[0]
    if not holds_bytes(types[image]):
        raise AtollError(
            f"{where}: column {image!r} is {clean(str(types[image]))}, expected bytes, or a struct with bytes"
        )
    # The captions: the first usual column of text; refuse a file where only unusual columns look like captions.
    usual = [name for name in caption_columns(types) if schema.names.count(name) == 1 and name != image]
    readable = [name for name in usual if is_text(types[name]) or is_caption_list(types[name])]
    captions = tuple(named) or tuple(readable[:1] or usual[:1])
    # Captions, keys and splits must be text; a key may also be a whole number, and captions may be lists.
    texts = [("key", data.key), ("split", data.split), *(("caption", name) for name in captions)]
    for setting, name in texts:
        if name is None or is_text(types[name]):
            continue
        if (setting == "key" and kinds.is_integer(types[name])) or (
            setting == "caption" and is_caption_list(types[name])
        ):
            continue
        kind = clean(str(types[name]))
        wrong = f", {wrong_list(types[name])}" if is_list(types[name]) else ""
        expected = "text, or a list of texts or of {text, weight}" if setting == "caption" else "text"
        raise AtollError(
            f"{where}: column {name!r} is {kind}{wrong}, expected {expected}; set data.{setting} to another"
        )
    if data.focus is not None and not (is_text(types[data.focus]) or is_number_list(types[data.focus])):
        raise AtollError(
            f"{where}: column {data.focus!r} is {clean(str(types[data.focus]))}, expected a list of four numbers; set "
            "data.focus to another"
        )
    unread = [name for name in like_captions(types) if is_text(types[name]) and name != image]
    if not captions and unread and not data.allow_uncaptioned:
        raise AtollError(
            f"{where}: no column with a usual name of captions, but {listed(unread)}; name one as data.caption, or go "
            "on without captions: --allow-uncaptioned"
        )
    # The status of img2dataset distinguishes dead links from damage.
    plain = {name: types[name] for name in ("status", "error_message") if schema.names.count(name) == 1}
    status, error = (name if name in plain and is_text(plain[name]) else None for name in ("status", "error_message"))
    return Columns(image, captions, data.key, data.split, data.focus, status, error)


def unread_notes(schema: Any, columns: Columns, data: DataSettings) -> list[str]:
    """Return notes on columns that may hold captions and are not read."""
    if data.caption is not None:
        return []
    if not columns.captions:
        used = (columns.image, *columns.texts)
        text = [name for name in schema.names if is_text(schema.field(name).type) and name not in used]
        return (
            [f"no column has a usual name of captions; {listed(text, 6)} not read; data.caption names one"]
            if text
            else []
        )
    used = (columns.image, *columns.texts)
    others = [n for n in (*caption_columns(schema.names), *like_captions(schema.names)) if n not in used]
    if not others:
        return []
    return [
        f"captions are in the column {columns.captions[0]}; {listed(others)} not read; data.caption chooses another"
    ]


def split_name(names: Sequence[str]) -> str | None:
    return next((name for name in names if name.lower() == "split"), None)


def split_range(facts: Any) -> tuple[str, ...]:
    """Return the extreme values of a column called split in all row groups; empty if the footer has none."""
    ends: set[str] = set()
    for group in map(facts.row_group, range(facts.num_row_groups)):
        chunks = [
            chunk for chunk in map(group.column, range(group.num_columns)) if chunk.path_in_schema.lower() == "split"
        ]
        for chunk in chunks:
            statistics = chunk.statistics
            # Without statistics for every row group the values are unknown.
            if statistics is None or not statistics.has_min_max:
                return ()
            if not isinstance(statistics.min, str) or not isinstance(statistics.max, str):
                return ()
            ends |= {statistics.min, statistics.max}
    return tuple(sorted(ends))
