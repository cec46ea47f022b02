"""Opens a directory of shards for reading."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from atoll.errors import AtollError
from atoll.storage.artifact import load_card, sha256_file
from atoll.storage.cards import (
    CardRecord,
    ClusterShardsCard,
    EncodedCard,
    FileEntry,
    RecordT,
    ShardEntry,
    ShardsIndex,
    parse_record,
)
from atoll.storage.content import is_out_of_memory
from atoll.storage.shards.format import INDEX, MANIFEST, TEXT, Split, describe

AGAIN = "make it again: `atoll encode --force`, or `atoll cluster --force` for what is below clusters/"


@dataclass(frozen=True, eq=False)
class Shard:
    """One shard: its number, the number of its first row, and keys, captions, splits: lists of one str per row."""

    number: int
    start: int
    keys: list[str]
    captions: list[str]
    splits: list[str]
    columns: dict[str, Tensor]  # [rows, ...] each, memory-mapped; to be read, not to be changed

    def __len__(self) -> int:
        return len(self.keys)


class Shards:
    """A directory of shards, opened for reading: tensors stay on the disk until their rows are read.

    Raises AtollError, naming the file and the first key it holds, if a file is missing, cut or of another
    format; with `verify=True` also if any byte differs from what was written (this reads everything once).

    columns: their names. keys, captions, splits: lists of one str per row.
    """

    def __init__(self, directory: str | Path, verify: bool = False):
        self.path = Path(directory)
        self._index = _read_index(self.path)
        self.columns: tuple[str, ...] = tuple(sorted(self._index.columns))
        self._files: tuple[ShardEntry, ...] = self._index.shards
        if wrong := _wrong(self.path / MANIFEST, self._index.manifest, verify):
            raise _broken(self.path / MANIFEST, "", wrong)
        self._manifest = _open_manifest(self.path / MANIFEST, [file.rows for file in self._files])
        # ends[i] is the first row that no longer lies in shard i
        self._ends = torch.tensor([file.rows for file in self._files]).cumsum(0)
        for number, file in enumerate(self._files):
            if wrong := _wrong(self.path / file.file, file, verify):
                raise _broken(self.path / file.file, self._first_key(number), wrong)
        self._open: dict[int, dict[str, Tensor]] = {}
        self._cards: dict[type[CardRecord], CardRecord] = {}

    def __len__(self) -> int:
        return self._index.rows

    def card(self, kind: type[RecordT]) -> RecordT:
        """The writer's card as `kind`. Raises AtollError where it is another one, or a value is out of bounds."""
        card = self._cards.get(kind)
        if not isinstance(card, kind):
            card = parse_record(kind, self._index.card, f"{self.path / INDEX}: card", self._index.remedy)
            self._cards[kind] = card
        return card

    @property
    def data_card(self) -> EncodedCard | ClusterShardsCard:
        """The card of rows that can be trained on: encoded images, or rows whose clusters are known."""
        return self.card(ClusterShardsCard) if "assignment" in self._index.card else self.card(EncodedCard)

    @cached_property
    def keys(self) -> list[str]:
        value: list[str] = self._text("key").to_pylist()
        return value

    @cached_property
    def captions(self) -> list[str]:
        value: list[str] = self._text("caption").to_pylist()
        return value

    def captions_of(self, rows: Tensor) -> list[str]:
        """The captions of the given rows ([n] int64), in their order; all captions are held in memory from then on."""
        value: list[str] = self._captions.take(rows.numpy()).to_pylist()
        return value

    @cached_property
    def _captions(self) -> Any:
        """As one pyarrow array: about half of what Python strings take."""
        import pyarrow as pa

        return self._text("caption").cast(pa.large_string()).combine_chunks()

    @cached_property
    def splits(self) -> list[str]:
        value: list[str] = self._text("split").to_pylist()
        return value

    @cached_property
    def sha256(self) -> str:
        """The hash of the index; as that holds the hash of every file, it names the content."""
        return sha256_file(self.path / INDEX)

    def shape(self, column: str) -> tuple[int, ...]:
        """The shape of one row of a column."""
        return self._index.columns[self._known(column)].shape

    def rows(self, split: Split) -> Tensor:
        """The row numbers of a split [n] int64, ascending."""
        import pyarrow.compute as pc

        return torch.from_numpy(pc.equal(self._text("split"), split).to_numpy().copy()).nonzero().flatten()

    def read(self, column: str, rows: Tensor | slice) -> Tensor:
        """The given rows ([n] int64 in any order, or a slice) of a column, [n, ...], copied into memory.

        Raises IndexError for rows that do not exist, AtollError for an unknown column or a broken shard.
        """
        self._known(column)
        if isinstance(rows, slice):
            rows = torch.from_numpy(np.arange(*rows.indices(len(self))))  # torch.arange knows no empty ranges
        if len(rows) and (int(rows.min()) < 0 or int(rows.max()) >= len(self)):
            raise IndexError(f"rows must lie in 0..{len(self) - 1}; got {int(rows.min())}..{int(rows.max())}")
        shard = torch.searchsorted(self._ends, rows, right=True)  # [n]
        used = shard.unique().tolist()
        if len(used) == 1:
            return self._shard(used[0])[column][rows - self._start(used[0])]
        what = self._index.columns[column]
        result = torch.empty(len(rows), *what.shape, dtype=getattr(torch, what.dtype))
        for number in used:
            here = (shard == number).nonzero().flatten()
            result[here] = self._shard(number)[column][rows[here] - self._start(number)]
        return result

    def parts(self) -> Iterator[Shard]:
        """Shard by shard, so that memory does not grow with the number of rows. Raises AtollError as `read` does."""
        for number in range(len(self._files)):
            text = self._group(number, TEXT)
            yield Shard(number, self._start(number), text["key"], text["caption"], text["split"], self._map(number))

    def _known(self, column: str) -> str:
        if column not in self.columns:
            raise AtollError(f"{self.path} has no column {column!r}; it has {', '.join(self.columns)}")
        return column

    def _start(self, number: int) -> int:
        return int(self._ends[number]) - self._files[number].rows

    def _first_key(self, number: int) -> str:
        return str(self._group(number, ("key",))["key"][0])

    def _text(self, column: str) -> Any:
        """A whole column of the manifest, as a pyarrow ChunkedArray."""
        import pyarrow as pa

        try:
            return self._manifest.read(columns=[column], use_threads=False)[column]
        except (OSError, pa.ArrowException) as error:
            raise _broken(self.path / MANIFEST, "", str(error)) from error

    def _group(self, number: int, columns: tuple[str, ...]) -> dict[str, list[str]]:
        """Some columns of the manifest for one shard."""
        import pyarrow as pa

        try:
            value: dict[str, list[str]] = self._manifest.read_row_group(
                number, columns=list(columns), use_threads=False
            ).to_pydict()
            return value
        except (OSError, pa.ArrowException) as error:
            raise _broken(self.path / MANIFEST, "", str(error)) from error

    def _shard(self, number: int) -> dict[str, Tensor]:
        """The memory-mapped columns of a shard, opened at first use and kept."""
        if number not in self._open:
            self._open[number] = self._map(number)
        return self._open[number]

    def _map(self, number: int) -> dict[str, Tensor]:
        from safetensors import SafetensorError, safe_open

        file = self.path / self._files[number].file
        try:
            with safe_open(file, framework="pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in self.columns}
            found = {name: describe(tensor) for name, tensor in tensors.items()}
        except (OSError, SafetensorError, ValueError) as error:  # ValueError: a dtype that no column has
            raise _broken(file, self._first_key(number), " ".join(str(error).split())) from error
        if found != self._index.columns:
            described = ", ".join(f"{name} {what.dtype} {list(what.shape)}" for name, what in found.items())
            raise _broken(file, self._first_key(number), f"its columns are {described}")
        return tensors


def _read_index(directory: Path) -> ShardsIndex:
    path = directory / INDEX
    if not path.is_file():
        raise AtollError(f"{directory} is not a directory of shards: it has no {INDEX}")
    return load_card(path, ShardsIndex)


def _open_manifest(path: Path, rows: list[int]) -> Any:
    """The manifest as a pyarrow ParquetFile, of which nothing but the footer is read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        found = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    except (OSError, pa.ArrowException) as error:
        raise _broken(path, "", str(error)) from error
    if found != rows:
        raise AtollError(f"{path} has {sum(found)} rows, the index has {sum(rows)}, or they are cut otherwise")
    return file


def _wrong(path: Path, file: FileEntry, verify: bool) -> str:
    """What tells a file from its line in the index: that it is missing, its size or, if asked, its hash. "" if none."""
    if not path.is_file():
        return "it is missing"
    if path.stat().st_size != file.bytes:
        return f"it has {path.stat().st_size} bytes instead of {file.bytes}"
    return "its sha256 is not the one in the index" if verify and sha256_file(path) != file.sha256 else ""


def _broken(path: Path, first_key: str, why: str) -> AtollError:
    if is_out_of_memory(why):
        return AtollError(f"{path}: does not fit into memory ({why}); free some, or use a machine with more")
    holds = f" (rows from key {first_key!r} on)" if first_key else ""
    return AtollError(f"{path}{holds} is corrupt: {why}; {AGAIN}")
