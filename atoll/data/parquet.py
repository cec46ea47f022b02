"""Parquet files with a column of image files, such as Hugging Face data sets with an Image feature."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from atoll.data.locate import (
    Files,
    Unfit,
    caption_of,
    check_encoding,
    config_of,
    fingerprint,
    key_of,
    locate,
    open_file,
    printable,
    shown,
    split_of,
    told,
)
from atoll.data.types import Block, Raw, Skipped, Source
from atoll.errors import AtollError
from atoll.manifest import DataSettings
from atoll.storage.shards import split_by_hash

_ROWS = 32  # that are decoded together
_BUFFER = 1 << 20  # bytes of a column that are read at a time
_CAPTIONS = ("caption", "text")  # where data.caption names none


class Columns(NamedTuple):
    """The columns that are read; None where the source does without."""

    image: str
    caption: str | None
    key: str | None
    split: str | None


@dataclass(frozen=True)
class _Footer:
    """What the end of a parquet file says. groups: rows of each row group. damage: why there is nothing else."""

    schema: Any = None  # pyarrow.Schema
    groups: tuple[int, ...] = ()
    damage: str = ""


@dataclass(frozen=True)
class _Part:
    """Rows `start` to `stop` of a file, which are those of some whole row groups, or lie within one.

    before: rows of the first of the row groups that come before `start`.
    """

    url: str
    name: str
    groups: tuple[int, ...] = ()
    before: int = 0
    start: int = 0
    stop: int = 0
    columns: Columns | None = None
    damage: str = ""


class Parquet(Source):
    """Parquet files; a block is at most `data.block` rows: some row groups, or a part of one.

    A row group that is larger than a block is decoded from its start for each of its blocks; write groups of some
    thousand rows at most. In memory is one page of each column, which as a rule holds at most 1,024 rows.

    Images: the column `data.image`, else the only one that holds bytes, or a struct with `bytes` (as the Hugging Face
    Image feature). Captions: `data.caption`, else caption or text. Keys: `data.key`, else "<relative path>:<row>".
    Splits: `data.split`, else by a hash of the key.

    Skipped are rows whose image is null, and what cannot be read of a damaged file.

    Raises AtollError if there are no files, a column is not there, holds something else or differs between files.
    """

    name = "parquet"

    def __init__(self, data: DataSettings):
        check_encoding(data.encoding)
        self._data = data
        self._files: Files = locate(data.path or (), "parquet files", (".parquet", ".parq", ".pq"))
        names = list(self._files.sizes)
        with ThreadPoolExecutor(16) as pool:
            footers = list(pool.map(self._footer, names))
        self._blocks = list(self._cut(names, footers, self._columns(names, footers)))

    def __getstate__(self) -> dict[str, Any]:
        """Without the list of files: a block tells a worker all that it needs."""
        return {"_data": self._data}

    def blocks(self) -> list[Block]:
        return self._blocks

    def read(self, block: Block) -> Iterator[Raw | Skipped]:
        part: _Part = block.content
        row = part.start
        try:
            if part.damage:
                raise _Damaged(part.damage)
            for cells in islice(_rows(part), part.before, part.before + part.stop - part.start):
                yield self._decode(part, row, cells)
                row += 1
            if row < part.stop:
                raise _Damaged("the rows end too early")
        except _Damaged as error:
            lost = (
                f"; {row - part.start:,} of {part.stop - part.start:,} rows were read before that" if part.stop else ""
            )
            yield Skipped(printable(block.name), f"parquet: {error}{lost}")

    def config(self) -> dict[str, Any]:
        return config_of(self.name, self._data)

    def fingerprint(self) -> str:
        """The sha256 over the relative name and the size of every file."""
        return fingerprint(self._files.sizes.items())

    def _footer(self, name: str) -> _Footer:
        import pyarrow.parquet as pq

        try:
            with open_file(self._files.url(name)) as file, pq.ParquetFile(file) as opened:
                facts = opened.metadata
                groups = tuple(facts.row_group(i).num_rows for i in range(facts.num_row_groups))
                schema = opened.schema_arrow
        except AtollError:
            raise
        except Exception as error:  # Arrow raises several kinds over damaged bytes
            return _Footer(damage=told(error))
        # A row of images takes a bit at the very least; a footer that says otherwise would give endless blocks.
        if min(groups, default=0) < 0 or sum(groups) > 8 * self._files.sizes[name]:
            return _Footer(damage=f"its footer tells of {sum(groups):,} rows in {self._files.sizes[name]:,} bytes")
        return _Footer(schema, groups)

    def _columns(self, names: Sequence[str], footers: Sequence[_Footer]) -> Columns | None:
        """The columns of all files. None if no file can be read."""
        columns: Columns | None = None
        first = ""
        for name, footer in zip(names, footers, strict=True):
            if footer.damage:
                continue
            if columns is None:
                columns, first, schema = find_columns(footer.schema, self._data, name), name, footer.schema
            for column in filter(None, columns):
                here = footer.schema.field(column).type if column in footer.schema.names else "missing"
                if here != schema.field(column).type:
                    raise AtollError(
                        f"{name}: column {column!r} is {shown(str(here))}, "
                        f"in {first} it is {shown(str(schema.field(column).type))}; "
                        "give each kind of file its own data.path"
                    )
        return columns

    def _cut(self, names: Sequence[str], footers: Sequence[_Footer], columns: Columns | None) -> Iterator[Block]:
        for name, footer in zip(names, footers, strict=True):
            url = self._files.url(name)
            if footer.damage:
                yield Block(name, None, _Part(url, name, damage=footer.damage))
            for groups, before, start, stop in cut(footer.groups, self._data.block):
                part = _Part(url, name, groups, before, start, stop, columns)
                yield Block(f"{name}:{start}-{stop}", stop - start, part)

    def _decode(self, part: _Part, row: int, cells: "_Cells") -> Raw | Skipped:
        key = f"{part.name}:{row}"
        try:
            if printable(key) != key:
                raise Unfit("key: the file's name is not utf-8; rename it")
            if self._data.key is not None:
                key = key_of(_text(cells.key))
            if not isinstance(cells.image, bytes):
                raise Unfit("image: null" if cells.path is None else f"image: a path ({cells.path}), no bytes")
            caption = caption_of(cells.caption, self._data.encoding)
            named = self._data.split is not None
            split = split_of(cells.split) if named else split_by_hash(key, self._data.validation)
            return Raw(key, cells.image, caption, split)
        except Unfit as error:
            return Skipped(printable(key), str(error))


class _Damaged(Exception):
    """Here a file cannot be read further; its text says why."""


class _Cells(NamedTuple):
    """One row. path: of an image that is not in the file. Text comes as bytes, as not all of it is utf-8."""

    image: Any
    path: str | None
    caption: Any
    key: Any
    split: Any


def find_columns(schema: Any, data: DataSettings, where: str) -> Columns:
    """The columns that the settings ask for.

    Args:
        schema: a pyarrow.Schema.

    Raises:
        AtollError: a column is not there, holds something else, or is there twice; or none or several hold bytes.
    """
    import pyarrow.types as kinds

    types = dict(zip(schema.names, schema.types, strict=True))
    there = ", ".join(shown(f"{name} ({kind})") for name, kind in types.items())
    for setting in ("image", "caption", "key", "split"):
        if (name := getattr(data, setting)) is not None and schema.names.count(name) != 1:
            many = "more than one column" if name in types else "no column"
            raise AtollError(f"{where}: {many} {name!r}, which data.{setting} names; it has {there}")
    images = [name for name in types if _holds_bytes(types[name]) and name not in (data.caption, data.key, data.split)]
    if data.image is None and len(images) != 1:
        many = "no column that holds" if not images else f"{len(images)} columns that hold"
        raise AtollError(f"{where}: {many} bytes; it has {there}; name the one of the images as data.image")
    image = data.image or images[0]
    if not _holds_bytes(types[image]):
        raise AtollError(
            f"{where}: column {image!r} is {shown(str(types[image]))}, expected bytes, or a struct with bytes"
        )
    caption = data.caption or next((name for name in _CAPTIONS if schema.names.count(name) == 1), None)
    texts = {"caption": caption, "key": data.key, "split": data.split}
    for setting, name in texts.items():
        if name is not None and not (_is_text(types[name]) or (setting == "key" and kinds.is_integer(types[name]))):
            raise AtollError(
                f"{where}: column {name!r} is {shown(str(types[name]))}, expected text; set data.{setting} to another"
            )
    return Columns(image, caption, data.key, data.split)


def cut(groups: Sequence[int], block: int) -> Iterator[tuple[tuple[int, ...], int, int, int]]:
    """Cuts a file at its row groups, and row groups of more than `block` rows within.

    Yields (row groups, rows of the first one to leave out, first row, row after the last) for each part.
    """
    together: list[int] = []
    start, rows = 0, 0
    for number, count in enumerate([*groups, None]):
        if together and (count is None or rows + count > block):
            yield tuple(together), 0, start, start + rows
            start, together, rows = start + rows, [], 0
        if count is not None and count > block:
            for before in range(0, count, block):
                yield (number,), before, start + before, start + min(before + block, count)
            start += count
        elif count:
            together, rows = [*together, number], rows + count


def _rows(part: _Part) -> Iterator[_Cells]:
    """The rows of the row groups of a part. Raises _Damaged where they cannot be read further."""
    import pyarrow.parquet as pq

    assert part.columns is not None
    wanted = list(dict.fromkeys(filter(None, part.columns)))
    try:
        with open_file(part.url) as file:
            # Without these two options Arrow reads all of a column's bytes in the row group at once.
            options = {"pre_buffer": False, "buffer_size": _BUFFER, "page_checksum_verification": True}
            with pq.ParquetFile(file, **options) as opened:
                for batch in opened.iter_batches(_ROWS, row_groups=part.groups, columns=wanted, use_threads=False):
                    batch.validate(full=False)
                    yield from _cells(batch, part.columns)
    except AtollError:
        raise
    except Exception as error:  # Arrow raises several kinds over damaged bytes
        raise _Damaged(told(error)) from error


def _cells(batch: Any, columns: Columns) -> Iterator[_Cells]:
    import pyarrow as pa
    import pyarrow.compute as pc

    none = [None] * len(batch)
    image, paths = batch.column(columns.image), none
    if pa.types.is_struct(image.type):
        names = {field.name for field in image.type}
        paths = _values(pc.struct_field(image, "path")) if "path" in names else none
        image = pc.struct_field(image, "bytes")
    texts = [_values(batch.column(name)) if name is not None else none for name in columns[1:]]
    for data, path, *rest in zip(_values(image), paths, *texts, strict=True):
        name = shown(path.decode("utf-8", "surrogateescape")) if isinstance(path, bytes) else None
        yield _Cells(data, name, *rest)


def _values(column: Any) -> list[Any]:
    """The cells of a column, text as bytes; Arrow has seen to it that text in a dictionary is utf-8."""
    import pyarrow as pa

    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        column = column.cast(pa.large_binary() if pa.types.is_large_string(kind) else pa.binary())
    return column.to_pylist()


def _text(value: Any) -> Any:
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value


def _holds_bytes(kind: Any) -> bool:
    import pyarrow.types as kinds

    if kinds.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    plain = (kinds.is_binary, kinds.is_large_binary, kinds.is_binary_view, kinds.is_fixed_size_binary)
    return any(is_one(kind) for is_one in plain)


def _is_text(kind: Any) -> bool:
    import pyarrow.types as kinds

    if kinds.is_dictionary(kind):
        kind = kind.value_type
    plain = (kinds.is_string, kinds.is_large_string, kinds.is_string_view, kinds.is_binary, kinds.is_large_binary)
    return any(is_one(kind) for is_one in plain)
