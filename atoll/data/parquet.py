"""Source for parquet files with a column of image files, such as Hugging Face data sets with an Image feature."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from atoll.data.caption_lists import captions_of, combined, first_and_others
from atoll.data.captions import check_encoding, joined_tags, key_of, split_of
from atoll.data.fingerprint import Listing, content_fingerprint, fingerprint
from atoll.data.focus import box_of
from atoll.data.limits import MAX_IMAGE_BYTES
from atoll.data.locate import Files, config_of, locate
from atoll.data.names import clean, listed, message_of, printable
from atoll.data.opening import open_file
from atoll.data.parquet_columns import Columns, find_columns, split_name, split_range, unread_notes
from atoll.data.parquet_rows import batches, values
from atoll.data.splits import HELD_OUT, TRAIN, NamedSplits, named_splits
from atoll.data.types import Block, Damaged, Raw, Skipped, Source, Unfit
from atoll.errors import AtollError
from atoll.manifest import DataSettings
from atoll.storage.memory import refuse_out_of_memory
from atoll.storage.shards import Split, split_by_hash

SUFFIXES = (".parquet", ".parq", ".pq")
# `Dataset.to_parquet` of an imagefolder writes paths; pushing to the hub, or the advice below, writes the bytes.
EMBED = (
    'embed the files with datasets: ds.with_format("arrow").map(datasets.table.embed_table_storage, batched=True)'
    ".to_parquet(...); or name the folder of images itself as data.path, with data.source: folder"
)


@dataclass(frozen=True)
class _Footer:
    """Facts from the footer of a parquet file.

    Attributes:
        schema: a pyarrow.Schema.
        groups: rows of each row group.
        splits: smallest and greatest value of a column called split; empty if unknown.
        damage: why the footer cannot be used; "" if it can.
    """

    schema: Any = None
    groups: tuple[int, ...] = ()
    splits: tuple[str, ...] = ()
    damage: str = ""


@dataclass(frozen=True)
class _Part:
    """Rows `start` to `stop` of a file: some whole row groups, or a part of one.

    Attributes:
        url: path or URL of the file.
        name: relative to the root.
        groups: numbers of the row groups to read.
        before: rows of the first row group to drop before `start`.
        start: first row.
        stop: row after the last.
        columns: the columns to read.
        damage: why the file is not opened; "" if it is.
        split: split that the file's name implies, if any.
    """

    url: str
    name: str
    groups: tuple[int, ...] = ()
    before: int = 0
    start: int = 0
    stop: int = 0
    columns: Columns | None = None
    damage: str = ""
    split: Split | None = None


class Parquet(Source):
    """Read parquet files; a block is at most `data.block` rows: some row groups, or a part of one.

    A row group that is larger than a block is decoded from its start for each of its blocks; write groups of a
    few thousand rows at most. One page of each column is in memory; it usually holds at most 1,024 rows.

    Images: the column `data.image`, else the only one that holds bytes, or a struct with `bytes` (as the Hugging Face
    Image feature). Captions: `data.caption`, else the usual names in their order. Keys: `data.key`, else
    "<relative path>:<row>". Splits: `data.split`, else a column called split, else names of folders and files such as
    test-00000-of-00001.parquet, else a hash of the key. What stays inside the crop: `data.focus`, lists of numbers.

    Rows whose image is null and the unreadable rest of a damaged file are skipped. A null beside a status (as
    img2dataset writes it for a dead link) is not a failure.

    Raises:
        AtollError: there are no files; a column is missing, has the wrong type or differs between files; or columns
            with captions are not read.
    """

    name = "parquet"

    def __init__(self, data: DataSettings):
        check_encoding(data.encoding)
        self._data = data
        self._files: Files = locate(data.path or (), "parquet files", SUFFIXES, gaps=data.missing_shards)
        self.root = self._files.root
        self._notes: list[str] = []
        names = list(self._files.sizes)
        # Footers are small; on a remote store the latency dominates, so they are read in parallel.
        with ThreadPoolExecutor(16) as pool:
            footers = list(pool.map(self._footer, names))
        columns = self._columns(names, footers)
        if columns is not None and columns.split is None:
            columns = self._split_column(columns, footers)
        # Names of files imply splits only if neither the settings nor a column decide.
        splits: NamedSplits = NamedSplits({})
        if columns is not None and columns.split is None and data.splits == "auto":
            splits = named_splits(names, "files")
            self._notes += splits.notes
        if self._files.missing:
            self._notes.append(
                f"{len(self._files.missing):,} files of a range are not there: {listed(list(self._files.missing))}"
            )
        self._blocks = list(self._cut(names, footers, columns, splits.splits))
        # A link or pipe still gets a block, so that it is reported as skipped.
        for name, reason in self._files.unopened.items():
            self._blocks.append(Block(name, None, _Part(self._files.url(name), name, damage=f"it is {reason}")))

    def __getstate__(self) -> dict[str, Any]:
        """Drop the list of files: a block carries all that a worker needs."""
        return {"_data": self._data, "root": self.root}

    def blocks(self) -> list[Block]:
        return self._blocks

    def notes(self) -> list[str]:
        return self._notes

    def read(self, block: Block) -> Iterator[Raw | Skipped]:
        part: _Part = block.content
        row = part.start
        try:
            if part.damage:
                raise Damaged(part.damage)
            # Parts of one large row group decode it from its start and drop the rows of earlier parts.
            for cells in islice(_rows(part), part.before, part.before + part.stop - part.start):
                yield self._decode(part, row, cells)
                row += 1
            # Fewer rows than the footer claims: the file was cut or its footer is wrong.
            if row < part.stop:
                raise Damaged("the rows end too early")
        except Damaged as error:
            total = part.stop - part.start
            lost = f"; {row - part.start:,} of {total:,} rows were read before that" if part.stop else ""
            yield Skipped(printable(block.name), f"parquet: {error}{lost}")

    def config(self) -> dict[str, Any]:
        return config_of(self.name, self._data)

    def fingerprint(self) -> str:
        """Return the sha256 over the relative name and the size of every file."""
        if self._data.fingerprint == "content":
            return content_fingerprint(self.root, list(self._files.sizes))
        return fingerprint(self._files.sizes.items())

    def listing(self) -> Listing:
        return self._files.listing(self._files.sizes)

    def _footer(self, name: str) -> _Footer:
        import pyarrow.parquet as pq

        try:
            with open_file(self._files.url(name)) as file, pq.ParquetFile(file) as opened:
                facts = opened.metadata
                groups = tuple(facts.row_group(i).num_rows for i in range(facts.num_row_groups))
                schema, splits = opened.schema_arrow, split_range(facts)
        except AtollError:
            raise
        except Exception as error:  # Arrow raises several kinds over damaged bytes
            refuse_out_of_memory(error, self._files.url(name))
            return _Footer(damage=message_of(error))
        # A row with an image takes at least a bit; a footer that claims more rows would yield endless blocks.
        if min(groups, default=0) < 0 or sum(groups) > 8 * self._files.sizes[name]:
            return _Footer(damage=f"its footer claims {sum(groups):,} rows in {self._files.sizes[name]:,} bytes")
        return _Footer(schema, groups, splits)

    def _columns(self, names: Sequence[str], footers: Sequence[_Footer]) -> Columns | None:
        """Return the columns of all files; None if no file can be read."""
        columns: Columns | None = None
        first = ""
        for name, footer in zip(names, footers, strict=True):
            if footer.damage:
                continue
            # The first readable file decides; all others must agree with it.
            if columns is None:
                columns, first, schema = find_columns(footer.schema, self._data, name), name, footer.schema
                self._notes += unread_notes(schema, columns, self._data)
            for column in (columns.image, *columns.texts):
                # Only the columns that are read are compared; others may differ.
                here = footer.schema.field(column).type if column in footer.schema.names else "missing"
                if here != schema.field(column).type:
                    raise AtollError(
                        f"{clean(name)}: column {column!r} is {clean(str(here))}, "
                        f"in {clean(first)} it is {clean(str(schema.field(column).type))}; "
                        "give each kind of file its own data.path"
                    )
        return columns

    def _split_column(self, columns: Columns, footers: Sequence[_Footer]) -> Columns:
        """Add the column called split, if its smallest and greatest values are names of splits."""
        # The statistics in the footers decide without reading any row.
        good = [footer for footer in footers if not footer.damage]
        ends = {value.lower() for footer in good for value in footer.splits}
        # Both ends must be known words, in all files, and some rows must train and some be held out.
        known = ends <= {*TRAIN, *HELD_OUT} and all(footer.splits for footer in good if footer.groups)
        if self._data.splits != "auto" or not known or not ends & set(HELD_OUT) or not ends & set(TRAIN):
            return columns
        name = split_name(good[0].schema.names)
        self._notes.append(f"held out by the column {name!r}; data.splits: hash ignores it")
        return columns._replace(split=name)

    def _cut(
        self, names: Sequence[str], footers: Sequence[_Footer], columns: Columns | None, splits: dict[str, Split]
    ) -> Iterator[Block]:
        for name, footer in zip(names, footers, strict=True):
            url = self._files.url(name)
            files: tuple[str, ...] = (name,)
            if footer.damage:
                yield Block(name, None, _Part(url, name, damage=footer.damage), files)
            for groups, before, start, stop in cut(footer.groups, self._data.block):
                part = _Part(url, name, groups, before, start, stop, columns, split=splits.get(name))
                yield Block(f"{name}:{start}-{stop}", stop - start, part, files)
                # Only the first block of a file records it, so that its content is hashed once.
                files = ()

    def _decode(self, part: _Part, row: int, cells: "_Cells") -> Raw | Skipped:
        key = f"{part.name}:{row}"
        try:
            if printable(key) != key:
                raise Unfit("key: the file's name is not utf-8; rename it")
            # Resolve the key first: all reasons for skipping are reported under it.
            if self._data.key is not None:
                key = key_of(_text(cells.key))
            if not isinstance(cells.image, bytes):
                return _without_image(key, cells)
            if len(cells.image) > MAX_IMAGE_BYTES:
                raise Unfit(f"too large: {len(cells.image):,} bytes, expected at most {MAX_IMAGE_BYTES:,}")
            caption, others = self._captions(part, row, cells)
            # A column beats the name of the file, and a hash of the key decides for the rest.
            split = part.split
            if part.columns is not None and part.columns.split is not None:
                split = split_of(cells.split)
            split = split or split_by_hash(key, self._data.validation)
            return Raw(key, cells.image, caption, split, others=others, focus=box_of(cells.focus))
        except Unfit as error:
            return Skipped(printable(key), str(error))

    def _captions(self, part: _Part, row: int, cells: "_Cells") -> tuple[str, str]:
        """Return the first caption of a row, and its others."""
        assert part.columns is not None
        try:
            read = []
            weights = [weight for _, weight in self._data.captions]
            for name, value, weight in zip(part.columns.captions, cells.captions, weights, strict=False):
                read.append((captions_of(joined_tags(name, value), self._data), weight))
            return first_and_others(combined(read))
        except Unfit as error:
            # The row is in the key, unless a column holds the key.
            raise Unfit(
                f"{error} (row {row} of {clean(part.name)})" if self._data.key is not None else str(error)
            ) from None


class _Cells(NamedTuple):
    """One row. Text is bytes, because not all of it is utf-8; `path` is set for an image outside the file."""

    image: Any
    path: str | None
    captions: tuple[Any, ...]
    key: Any
    split: Any
    focus: Any
    status: Any
    error: Any


def _without_image(key: str, cells: _Cells) -> Skipped:
    """Return the reason for a row without an image: a dead link by its status, a path, or a null."""
    status, why = _text(cells.status), _text(cells.error)
    if cells.path is not None:
        return Skipped(printable(key), f"image: a path ({cells.path}), no bytes; {EMBED}")
    failed = status.lower() != "success" if isinstance(status, str) and status else bool(why)
    if failed:
        why = why or status
        return Skipped(printable(key), f"dead link: {clean(str(why))}", failed=False)
    return Skipped(printable(key), "image: null")


def cut(groups: Sequence[int], block: int) -> Iterator[tuple[tuple[int, ...], int, int, int]]:
    """Cut a file at its row groups, and row groups of more than `block` rows within.

    Args:
        groups: rows of each row group.
        block: most rows of a part.

    Yields:
        (row groups, rows of the first one to leave out, first row, row after the last) for each part.
    """
    together: list[int] = []
    start, rows = 0, 0
    # The final None flushes the last part.
    for number, count in enumerate([*groups, None]):
        if together and (count is None or rows + count > block):
            yield tuple(together), 0, start, start + rows
            start, together, rows = start + rows, [], 0
        # A row group larger than a block is cut by rows.
        if count is not None and count > block:
            for before in range(0, count, block):
                yield (number,), before, start + before, start + min(before + block, count)
            start += count
        # Small row groups are joined until a block is full.
        elif count:
            together, rows = [*together, number], rows + count


def _rows(part: _Part) -> Iterator[_Cells]:
    """Yield the rows of the row groups of a part. Raises Damaged where they cannot be read further."""
    import pyarrow as pa
    import pyarrow.compute as pc

    columns = part.columns
    assert columns is not None
    # Columns may coincide, for example key and caption; each is read once.
    text, others = columns.texts, (columns.key, columns.split, columns.focus, columns.status, columns.error)
    used = [name for name in others if name is not None]
    for batch in batches(part.url, part.groups, (columns.image, *text), text):
        try:
            none = [None] * len(batch)
            image, paths = batch.column(columns.image), none
            # Hugging Face's Image feature is a struct with the fields bytes and path.
            if pa.types.is_struct(image.type):
                fields = {field.name for field in image.type}
                paths = values(pc.struct_field(image, "path")) if "path" in fields else none
                image = pc.struct_field(image, "bytes")
            cells = {name: values(batch.column(name)) for name in dict.fromkeys((*columns.captions, *used))}
            images = image.to_pylist()
        except Exception as error:  # Arrow raises several kinds over damaged bytes
            refuse_out_of_memory(error, part.url)
            raise Damaged(message_of(error)) from error
        for row, (data, path) in enumerate(zip(images, paths, strict=True)):
            name = clean(path.decode("utf-8", "surrogateescape")) if isinstance(path, bytes) else None
            captions = tuple(cells[column][row] for column in columns.captions)
            yield _Cells(data, name, captions, *(None if column is None else cells[column][row] for column in others))


def _text(value: Any) -> Any:
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value
