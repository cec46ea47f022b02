"""Write a directory of shards, row by row or shard by shard."""

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from atoll.errors import AtollError
from atoll.storage.artifact import sha256_file, whole_directory, write_bytes, write_card
from atoll.storage.bounds import MAX_CAPTION_BYTES
from atoll.storage.cards import CardRecord, ColumnEntry, FileEntry, ShardEntry, ShardsIndex, SplitCounts
from atoll.storage.memory import refuse_out_of_memory
from atoll.storage.shards.captions import OTHERS
from atoll.storage.shards.format import INDEX, MANIFEST, SPLITS, TEXT, describe, own_shapes, refuse_foreign
from atoll.storage.shards.repeated import repeats

_BUFFERED = (*TEXT, OTHERS)  # the texts of a row

Shapes = tuple[tuple[str, tuple[int, ...]], ...]  # of the columns whose shape is not the index's, hashable


@dataclass
class _Buffer:
    """The rows of the next shard of one shape: tensors by column, and text of the same rows."""

    columns: dict[str, list[Tensor]] = field(default_factory=dict)
    text: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in _BUFFERED})

    def __len__(self) -> int:
        return len(self.text["key"])


class ShardWriter:
    """Write rows into a directory, which appears on `close`. As a context manager it removes everything on an error.

    Memory: `shard_rows` rows of each shape, plus those of one call.

    Args:
        directory: the directory to write; an existing one is replaced only if it holds shards or is empty.
        card: the card that `Shards.card` returns; `self.card` may be replaced until `close`.
        shard_rows: rows per shard, default 4096.
        shapes: main shapes, which the index names, of the columns that may have others; default: none may.

    Raises:
        AtollError: the directory holds other files.
    """

    def __init__(
        self,
        directory: str | Path,
        card: CardRecord | Mapping[str, Any],
        shard_rows: int = 4096,
        shapes: Mapping[str, Sequence[int]] | None = None,
    ):
        self.card, self._shard_rows = card, shard_rows
        self._main = {name: tuple(shape) for name, shape in (shapes or {}).items()}
        refuse_foreign(Path(directory), INDEX)
        # Entered by hand, because it stays open from here to `close`.
        self._whole = whole_directory(Path(directory))
        self._path = self._whole.__enter__()
        self._waiting: dict[Shapes, _Buffer] = {}
        self._columns: dict[str, ColumnEntry] = {}
        self._splits = dict.fromkeys(SPLITS, 0)
        self._files: list[ShardEntry] = []
        self._attached: list[FileEntry] = []
        self._manifest: Any = None  # a pyarrow ParquetWriter, from the first shard on
        self._several = False  # whether some image has several captions

    def append(
        self,
        keys: Sequence[str],
        captions: Sequence[str],
        splits: Sequence[str],
        columns: Mapping[str, Tensor],
        others: Sequence[str] = (),
    ) -> None:
        """Append rows.

        Args:
            keys: one unique key per row.
            captions: one caption per row.
            splits: "train" or "val" per row.
            columns: tensors [rows, ...] by name, with the same names, dtypes and shapes at every call; another shape
                only where the writer was told a main one.
            others: the further captions of each row (`Shard.others`); empty if no row has any.

        Raises:
            ValueError: lengths, columns or split names do not fit.
        """
        # Check everything before the first row is buffered.
        shapes = self._fit({name: describe(column) for name, column in columns.items()})
        text = self._fit_text(keys, captions, splits, others, {len(column) for column in columns.values()})
        # Buffer copies: the caller may reuse its tensors.
        buffer = self._waiting.setdefault(shapes, _Buffer())
        for name, rows in text.items():
            buffer.text[name] += rows
        for name, column in columns.items():
            buffer.columns.setdefault(name, []).append(column.detach().to("cpu", copy=True))
        # One call may bring more rows than a shard holds.
        while len(buffer) >= self._shard_rows:
            self._flush(shapes, self._shard_rows)

    def adopt(
        self,
        file: Path,
        keys: Sequence[str],
        captions: Sequence[str],
        splits: Sequence[str],
        others: Sequence[str] = (),
    ) -> None:
        """Append a finished safetensors file as the next shard. It is hard-linked if possible, else copied.

        Args:
            file: the file, one tensor [rows, ...] per column.
            keys, captions, splits, others: one per row, as in `append`.

        Raises:
            ValueError: as in `append`.
            AtollError: the file cannot be read.
        """
        from safetensors import SafetensorError, safe_open

        # Check that its columns fit.
        try:
            with safe_open(file, framework="pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no dict)
        except (OSError, SafetensorError, MemoryError) as error:
            refuse_out_of_memory(error, file)
            raise AtollError(f"{file}: cannot be read ({error})") from error
        shapes = self._fit({name: describe(tensor) for name, tensor in tensors.items()})
        text = self._fit_text(keys, captions, splits, others, {len(tensor) for tensor in tensors.values()})
        # Write the buffered rows of this shape first, so that their order is the order of calls.
        self._flush(shapes)
        place = self._path / self._next_name()
        # A hard link takes no space and no time; across file systems it fails.
        try:
            os.link(file, place)
        except OSError:
            shutil.copyfile(file, place)
        self._count(place, place.stat().st_size, sha256_file(place), text, shapes)

    def attach(self, file: Path) -> None:
        """Copy a file into the directory under its own name. The index lists it with its hash."""
        # Its own name, so that readers find it.
        place = self._path / file.name
        shutil.copyfile(file, place)
        self._attached.append(_entry(place))

    def close(self) -> ShardsIndex:
        """Write the buffered rows, the manifest and the index, move the directory into place, and return the index.

        Raises:
            AtollError: there are no rows, or two rows have the same key.
        """
        try:
            for shapes in self._waiting:
                self._flush(shapes)
            index = self._write_index()
        # Also after Ctrl-C: no half directory may remain.
        except BaseException as error:
            self._abandon(error)
            raise
        self._whole.__exit__(None, None, None)
        return index

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # An error inside the block removes the directory.
        if error is not None:
            self._abandon(error)
        else:
            self.close()

    def _abandon(self, error: BaseException) -> None:
        """Close the manifest and remove the temporary directory."""
        if self._manifest is not None:
            self._manifest.close()
        self._whole.__exit__(type(error), error, error.__traceback__)

    def _fit(self, described: dict[str, ColumnEntry]) -> Shapes:
        """Return the shapes that are not the index's. Raises ValueError for other columns than the first rows'."""
        # The first rows define the columns, but for main shapes.
        if not self._columns:
            main = {name: self._main.get(name, entry.shape) for name, entry in described.items()}
            self._columns = {name: entry.model_copy(update={"shape": main[name]}) for name, entry in described.items()}
        same = described.keys() == self._columns.keys()
        shapes = own_shapes(described, self._columns) if same else {}
        kinds = {name: (entry.dtype, len(entry.shape)) for name, entry in described.items()}
        expected = {name: (entry.dtype, len(entry.shape)) for name, entry in self._columns.items()}
        if not same or kinds != expected or not shapes.keys() <= self._main.keys():
            raise ValueError(f"these columns are {described}, the first ones were {self._columns}")
        return tuple(sorted(shapes.items()))

    def _fit_text(
        self,
        keys: Sequence[str],
        captions: Sequence[str],
        splits: Sequence[str],
        others: Sequence[str],
        rows: set[int],
    ) -> dict[str, Sequence[str]]:
        """Return the texts of some rows by column, once they are checked."""
        others = others or [""] * len(keys)
        # One value per row in every column.
        if len(lengths := {len(keys), len(captions), len(splits), len(others), *rows}) != 1:
            raise ValueError(f"keys, captions, splits and columns differ in length: {sorted(lengths)}")
        # A reader would refuse the whole directory.
        for text in (*keys, *captions, *others):
            # A letter has up to 4 bytes, so most texts need not be encoded.
            if len(text) > MAX_CAPTION_BYTES // 4 and (size := len(text.encode())) > MAX_CAPTION_BYTES:
                raise AtollError(f"a key or caption of {size:,} bytes; expected at most {MAX_CAPTION_BYTES:,}")
        if unknown := set(splits) - set(SPLITS):
            raise ValueError(f"a split is one of {SPLITS}; got {sorted(unknown)}")
        return dict(zip(_BUFFERED, (keys, captions, splits, others), strict=True))

    def _next_name(self) -> str:
        # Numbered in the order of writing, which is the order of rows.
        return f"shard-{len(self._files):05d}.safetensors"

    def _flush(self, shapes: Shapes, rows: int | None = None) -> None:
        """Write the first `rows` buffered rows of one shape, or all, as a shard; nothing if there are none."""
        from safetensors.torch import save

        buffer = self._waiting.get(shapes, _Buffer())
        if not len(buffer):
            return
        rows = len(buffer) if rows is None else rows
        # Split the buffer into this shard and the rest.
        shard = {}
        for name, chunks in buffer.columns.items():
            column = torch.cat(chunks)
            shard[name] = column[:rows].contiguous()
            buffer.columns[name] = [column[rows:]] if len(column) > rows else []
        text = {name: values[:rows] for name, values in buffer.text.items()}
        buffer.text = {name: values[rows:] for name, values in buffer.text.items()}
        # Hash the bytes in memory rather than read the file back.
        file, content = self._path / self._next_name(), save(shard)
        write_bytes(file, content)
        self._count(file, len(content), hashlib.sha256(content).hexdigest(), text, shapes)

    def _count(self, file: Path, size: int, sha256: str, text: Mapping[str, Sequence[str]], shapes: Shapes) -> None:
        """Add a written shard to the list, and its rows to the manifest as one row group."""
        import pyarrow as pa

        # The index gets the shard's hash, the manifest its rows.
        own = {"shapes": dict(shapes)} if shapes else {}
        self._files.append(ShardEntry(file=file.name, bytes=size, sha256=sha256, rows=len(text["key"]), **own))
        for split in SPLITS:
            self._splits[split] += list(text["split"]).count(split)
        # Without an image of several captions there is no column for them.
        if any(text[OTHERS]) and not self._several:
            self._several = True
            self._add_column()
        names = _BUFFERED if self._several else TEXT
        self._write_rows(pa.table({name: pa.array(text[name], pa.string()) for name in names}))

    def _write_rows(self, table: Any) -> None:
        import pyarrow.parquet as pq

        # Opened with the first shard, so that a writer without rows creates no file.
        if self._manifest is None:
            self._manifest = pq.ParquetWriter(self._path / MANIFEST, table.schema, compression="zstd")
        self._manifest.write_table(table, row_group_size=len(table))

    def _add_column(self) -> None:
        """Write the manifest so far again, with an empty column of further captions; one row group at a time."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self._manifest is None:
            return
        self._manifest.close()
        self._manifest = None
        before = (self._path / MANIFEST).rename(self._path / f"{MANIFEST}.before")
        with pq.ParquetFile(before) as file:
            for number in range(file.num_row_groups):
                table = file.read_row_group(number)
                self._write_rows(table.append_column(OTHERS, pa.array([""] * len(table), pa.string())))
        before.unlink()

    def _write_index(self) -> ShardsIndex:
        if not self._files:
            raise AtollError("there are no rows to write: the source holds no images")
        # The Parquet footer must be complete before the manifest is hashed and read.
        self._manifest.close()
        manifest, rows = self._path / MANIFEST, sum(file.rows for file in self._files)
        _refuse_repeated_keys(manifest, rows)
        # The index lists every file with its hash.
        index = ShardsIndex(
            rows=rows,
            splits=SplitCounts(**self._splits),
            columns=dict(sorted(self._columns.items())),
            shards=self._files,
            manifest=_entry(manifest),
            attached=self._attached,
            card=self.card.plain() if isinstance(self.card, CardRecord) else dict(self.card),
        )
        write_card(self._path / INDEX, index)
        self._path.chmod(0o755)  # a temporary directory allows only the owner
        return index


def _entry(file: Path) -> FileEntry:
    # Read back from disk: these files were not written from memory.
    return FileEntry(file=file.name, bytes=file.stat().st_size, sha256=sha256_file(file))


def _refuse_repeated_keys(manifest: Path, rows: int) -> None:
    """Raise AtollError if a key occurs twice in the manifest."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(manifest) as file:

        def keys() -> Any:
            for number in range(file.num_row_groups):
                yield file.read_row_group(number, columns=["key"])["key"].to_pylist()

        # The first repeated row ends the search: find its key for the message.
        for row in repeats(keys, rows):
            for part in keys():
                if row < len(part):
                    raise AtollError(f"two rows have the key {part[row]!r}; keys must be unique")
                row -= len(part)
