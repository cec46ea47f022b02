"""Find the columns of a parquet file that hold images, captions, keys and splits."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from atoll.data.captions import caption_columns, like_captions
from atoll.data.names import clean, listed
from atoll.data.parquet_rows import holds_bytes, is_text
from atoll.errors import AtollError
from atoll.manifest import DataSettings


class Columns(NamedTuple):
    """The columns that are read; None for one that is not used.

    `status` and `error` are written by img2dataset and give the reason why a link has no image.
    """

    image: str
    caption: str | None
    key: str | None
    split: str | None
    status: str | None = None
    error: str | None = None


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
    for setting in ("image", "caption", "key", "split"):
        if (name := getattr(data, setting)) is not None and schema.names.count(name) != 1:
            many = "more than one column" if name in types else "no column"
            raise AtollError(f"{where}: {many} {name!r}, which data.{setting} names; it has {there}")
    # The images.
    images = [name for name in types if holds_bytes(types[name]) and name not in (data.caption, data.key, data.split)]
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
    caption = data.caption or next((name for name in usual if is_text(types[name])), None) or next(iter(usual), None)
    # Captions, keys and splits must be text; a key may also be a whole number.
    texts = {"caption": caption, "key": data.key, "split": data.split}
    for setting, name in texts.items():
        if name is not None and not (is_text(types[name]) or (setting == "key" and kinds.is_integer(types[name]))):
            several = "; several captions of one image are not supported" if kinds.is_nested(types[name]) else ""
            kind = clean(str(types[name]))
            raise AtollError(
                f"{where}: column {name!r} is {kind}, expected text; set data.{setting} to another{several}"
            )
    unread = [name for name in like_captions(types) if is_text(types[name]) and name != image]
    if caption is None and unread and not data.allow_uncaptioned:
        raise AtollError(
            f"{where}: no column with a usual name of captions, but {listed(unread)}; name one as data.caption, or go "
            "on without captions: --allow-uncaptioned"
        )
    # The status of img2dataset distinguishes dead links from damage.
    plain = {name: types[name] for name in ("status", "error_message") if schema.names.count(name) == 1}
    status, error = (name if name in plain and is_text(plain[name]) else None for name in ("status", "error_message"))
    return Columns(image, caption, data.key, data.split, status, error)


def unread_notes(schema: Any, columns: Columns, data: DataSettings) -> list[str]:
    """Return notes on columns that may hold captions and are not read."""
    if data.caption is not None:
        return []
    if columns.caption is None:
        text = [name for name in schema.names if is_text(schema.field(name).type) and name not in columns]
        return (
            [f"no column has a usual name of captions; {listed(text, 6)} not read; data.caption names one"]
            if text
            else []
        )
    others = [n for n in (*caption_columns(schema.names), *like_captions(schema.names)) if n not in columns]
    if not others:
        return []
    return [f"captions are in the column {columns.caption}; {listed(others)} not read; data.caption chooses another"]


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
