"""Read a directory of shards."""

import copy
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from atoll.errors import AtollError
from atoll.storage.artifact import sha256_file
from atoll.storage.cards import (
    CardRecord,
    ClusterShardsCard,
    EncodedCard,
    FileEntry,
    RecordT,
    ShardEntry,
    parse_record,
)
from atoll.storage.memory import refuse_out_of_memory
from atoll.storage.shards.captions import OTHERS, Weighted, unpack
from atoll.storage.shards.format import (
    INDEX,
    LATENTS,
    MANIFEST,
    Split,
    describe,
    read_index,
    rewritten,
    with_shapes,
    wrong_size,
)
from atoll.storage.shards.manifest import ManifestFile
from atoll.storage.shards.mapped import LatentMap, MappedColumns
from atoll.storage.shards.shard import Shard
from atoll.storage.verified import sha256_once


class Shards:
    """A directory of shards, opened for reading. Tensors stay on disk until their rows are read.

    The hash of every file is compared with the index before its first row is used, once per file and process.

    Args:
        directory: the directory.
        verify: compare the hashes of all files now, even if this process has compared them before; default False.

    Attributes:
        columns: the names of the tensor columns.
        keys, captions, splits: one string per row. An image with several captions has its first one here.

    Raises:
        AtollError: a file is missing, truncated, of another format or altered. The message names the file and its
            first key.
    """

    def __init__(self, directory: str | Path, verify: bool = False):
        # The index says which files must be there.
        self.path = Path(directory)
        self._index = read_index(self.path)
        self.columns: tuple[str, ...] = tuple(sorted(self._index.columns))
        self._files: tuple[ShardEntry, ...] = self._index.shards
        # A hash of another file would leave the manifest unchecked, and a shard that repeats would claim rows for free.
        names = [file.file for file in self._files]
        if self._index.manifest.file != MANIFEST or len(set(names)) != len(names):
            raise self._broken(INDEX, f"it names another manifest than {MANIFEST}, or a shard twice")
        # Check the manifest before the shards: their error messages take keys from it.
        if wrong := wrong_size(self.path / MANIFEST, self._index.manifest) or self._altered(
            self._index.manifest, verify
        ):
            raise self._broken(MANIFEST, wrong)
        self._manifest = self._open_manifest()
        # ends[i] is the first row after shard i.
        self._ends = torch.tensor([file.rows for file in self._files]).cumsum(0)
        for number, file in enumerate(self._files):
            # The hashes of shards are compared when they are opened, since a process may need a few of them only.
            if wrong := wrong_size(self.path / file.file, file) or (self._altered(file, verify) if verify else ""):
                raise self._broken(file.file, wrong, number)
        self._open: dict[int, dict[str, Tensor]] = {}
        self._cards: dict[type[CardRecord], CardRecord] = {}
        self._latent_map: LatentMap | None = None
        self._without: frozenset[str] = frozenset()  # keys

    def __len__(self) -> int:
        return self._index.rows

    def card(self, kind: type[RecordT]) -> RecordT:
        """Return the writer's card as `kind`. Raises AtollError if it is another kind or a value is out of bounds."""
        # Validate once per kind: callers read the card often.
        card = self._cards.get(kind)
        if not isinstance(card, kind):
            card = parse_record(kind, self._index.card, f"{self.path / INDEX}: card", self._index.remedy)
            self._cards[kind] = card
        return card

    @property
    def data_card(self) -> EncodedCard | ClusterShardsCard:
        """The card of training data: encoded images, or rows with known clusters."""
        return self.card(ClusterShardsCard) if "assignment" in self._index.card else self.card(EncodedCard)

    def with_latents(self, latent_map: LatentMap, card: EncodedCard | ClusterShardsCard) -> "Shards":
        """Return these shards with other latents, computed while they are read, and the card that describes them."""
        view = copy.copy(self)
        # A map after a map, if there is one already.
        before = self._latent_map
        view._latent_map = latent_map if before is None else lambda latents: latent_map(before(latents))
        view._cards = {type(card): card}
        return view

    def without(self, keys: Collection[str]) -> "Shards":
        """Return these shards without the rows of some keys: `rows` leaves them out. Row numbers stay as they are."""
        view = copy.copy(self)
        view._without = frozenset(keys) if not self._without else self._without.union(keys)
        view.__dict__.pop("_left_out", None)
        return view

    @cached_property
    def _left_out(self) -> dict[int, str]:
        """The keys of the rows that are left out, by their numbers."""
        if not self._without:
            return {}
        # Shard by shard: all keys as Python strings would take gigabytes.
        starts = map(self._start, range(len(self._files)))
        groups = zip(starts, self.keys_by_shard(), strict=True)
        return {start + i: key for start, keys in groups for i, key in enumerate(keys) if key in self._without}

    @property
    def left_out_keys(self) -> list[str]:
        """The keys of the rows that are left out."""
        return list(self._left_out.values())

    @cached_property
    def keys(self) -> list[str]:
        # Python strings, decoded at first use.
        value: list[str] = self._text("key").to_pylist()
        return value

    @cached_property
    def captions(self) -> list[str]:
        value: list[str] = self._text("caption").to_pylist()
        return value

    def captions_of(self, rows: Tensor) -> list[str]:
        """Return the first captions of these rows [n] int64, in their order. The first call loads all captions."""
        # Only the captions of these rows become Python strings.
        value: list[str] = self._captions.take(rows.numpy()).to_pylist()
        return value

    @property
    def has_several_captions(self) -> bool:
        """Whether some image has more than one caption."""
        return OTHERS in self._manifest.names

    def other_captions_of(self, rows: Tensor) -> list[list[Weighted]]:
        """Return the captions after the first one of these rows [n] int64, with weights over the first one's.

        Raises:
            AtollError: the manifest holds something else.
        """
        if not self.has_several_captions:
            return [[] for _ in range(len(rows))]
        try:
            return [unpack(text) for text in self._others.take(rows.numpy()).to_pylist()]
        except ValueError as error:
            raise self._broken(MANIFEST, f"{OTHERS}: {error}") from error

    @cached_property
    def _captions(self) -> Any:
        return self._array("caption")

    @cached_property
    def _others(self) -> Any:
        return self._array(OTHERS)

    def _array(self, column: str) -> Any:
        """Read a column as one pyarrow array, which takes about half the memory of Python strings."""
        import pyarrow as pa

        # large_string has 64-bit offsets: one array may hold more than 2 GiB of text.
        return self._text(column).cast(pa.large_string()).combine_chunks()

    @cached_property
    def splits(self) -> list[str]:
        value: list[str] = self._text("split").to_pylist()
        return value

    @cached_property
    def sha256(self) -> str:
        """The hash of the index. The index holds the hash of every file, so this identifies the whole content."""
        return sha256_file(self.path / INDEX)

    def shape(self, column: str) -> tuple[int, ...]:
        """Return the shape of one row of a column; the main one, if shards differ."""
        return self._index.columns[self._known(column)].shape

    def shapes(self, column: str) -> tuple[tuple[int, ...], ...]:
        """Return the shapes that rows of a column have: the main one first if some have it, then the others sorted."""
        there = {self._shape_in(number, column) for number in range(len(self._files))}
        return tuple(sorted(there, key=lambda shape: (shape != self.shape(column), shape)))

    def shape_numbers(self, column: str) -> Tensor:
        """Return each row's shape as its position in `shapes`, [n] int16."""
        shapes = self.shapes(column)
        numbers = [shapes.index(self._shape_in(number, column)) for number in range(len(self._files))]
        rows = torch.tensor([file.rows for file in self._files])
        return torch.tensor(numbers, dtype=torch.int16).repeat_interleave(rows)

    def alike(self, column: str, rows: Tensor) -> list[Tensor]:
        """Divide row numbers [n] int64 into groups that have one shape in a column, each in its order."""
        if len(self.shapes(column)) == 1:
            return [rows]
        numbers = self.shape_numbers(column)[rows]
        return [rows[numbers == number] for number in numbers.unique()]

    def rows(self, split: Split | None = None, main: str | None = None) -> Tensor:
        """Return row numbers, [n] int64, ascending, without those that are left out.

        Args:
            split: of this split alone; None: of both.
            main: only rows that have the main shape in this column; None: all.
        """
        import pyarrow.compute as pc

        chosen = torch.ones(len(self), dtype=torch.bool) if main is None else self.has_main_shape(main)
        if split is not None:
            # The comparison runs on the column, without Python strings.
            chosen &= torch.from_numpy(pc.equal(self._text("split"), split).to_numpy().copy())
        chosen[list(self._left_out)] = False
        return chosen.nonzero().flatten()

    def has_main_shape(self, column: str) -> Tensor:
        """Return which rows have the main shape in a column, [n] bool."""
        if self.shape(column) not in self.shapes(column):
            return torch.zeros(len(self), dtype=torch.bool)
        return self.shape_numbers(column) == 0  # the main shape comes first

    def read(self, column: str, rows: Tensor | slice) -> Tensor:
        """Copy rows of a column into memory.

        Args:
            column: its name.
            rows: row numbers [n] int64 in any order, or a slice; of one shape.

        Returns:
            The rows [n, ...], in the order of `rows`.

        Raises:
            IndexError: a row does not exist.
            AtollError: the column is unknown, a shard is broken, or the rows have several shapes.
        """
        # Row numbers, all within the directory.
        self._known(column)
        if isinstance(rows, slice):
            rows = torch.from_numpy(np.arange(*rows.indices(len(self))))  # torch.arange refuses some empty ranges
        if len(rows) and (int(rows.min()) < 0 or int(rows.max()) >= len(self)):
            raise IndexError(f"rows must lie in 0..{len(self) - 1}; got {int(rows.min())}..{int(rows.max())}")
        # The shard of each row. One shard is the common case and needs one copy only.
        shard = torch.searchsorted(self._ends, rows, right=True)  # [n]
        used = shard.unique().tolist()
        if len(used) == 1:
            return self._computed(column, self._shard(used[0])[column][rows - self._start(used[0])])
        # Several shards: fill the result shard by shard.
        shapes = {self._shape_in(number, column) for number in used} or {self.shape(column)}
        if len(shapes) > 1:
            raise AtollError(
                f"{self.path}: rows of the shapes {', '.join(map(str, sorted(shapes)))} in {column!r}; read rows of "
                "one shape at a time"
            )
        result = torch.empty(len(rows), *shapes.pop(), dtype=getattr(torch, self._index.columns[column].dtype))
        for number in used:
            here = (shard == number).nonzero().flatten()
            result[here] = self._shard(number)[column][rows[here] - self._start(number)]
        return self._computed(column, result)

    def _computed(self, column: str, rows: Tensor) -> Tensor:
        """Map rows [n, ...] of a column, if it holds latents and there is a map."""
        return rows if self._latent_map is None or column not in LATENTS else self._latent_map(rows)

    def keys_by_shard(self) -> Iterator[list[str]]:
        """Yield the keys of each shard; no tensor is read."""
        for number in range(len(self._files)):
            yield self._group(number, ("key",))["key"]

    def parts(self) -> Iterator[Shard]:
        """Yield shard by shard, so that memory does not grow with the rows. Raises AtollError as `read` does."""
        for number in range(len(self._files)):
            # One row group and one mapped file at a time.
            text = self._group(number, self._manifest.names)
            others = text.get(OTHERS) or [""] * len(text["key"])
            columns: Mapping[str, Tensor] = self._map(number)
            if self._latent_map is not None:
                columns = MappedColumns(columns, self._latent_map)
            yield Shard(number, self._start(number), text["key"], text["caption"], text["split"], columns, others)

    def _known(self, column: str) -> str:
        if column not in self.columns:
            # The message lists the columns that exist.
            raise AtollError(f"{self.path} has no column {column!r}; it has {', '.join(self.columns)}")
        return column

    def _shape_in(self, number: int, column: str) -> tuple[int, ...]:
        """The shape of a column's rows in a shard."""
        return (self._files[number].shapes or {}).get(self._known(column), self.shape(column))

    def _start(self, number: int) -> int:
        return int(self._ends[number]) - self._files[number].rows

    def _first_key(self, number: int) -> str:  # for error messages only
        return str(self._group(number, ("key",))["key"][0])

    def _text(self, column: str) -> Any:
        """Read a whole column of the manifest as a pyarrow ChunkedArray."""
        import pyarrow as pa

        try:
            return self._manifest.column(column)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise self._broken(MANIFEST, error) from error

    def _group(self, number: int, columns: tuple[str, ...]) -> dict[str, list[str]]:
        """Read some columns of the manifest for one shard, which is one row group."""
        import pyarrow as pa

        try:
            return self._manifest.group(number, columns)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise self._broken(MANIFEST, error) from error

    def _shard(self, number: int) -> dict[str, Tensor]:
        """Return the memory-mapped columns of a shard, opened at first use and cached."""
        if number not in self._open:
            self._open[number] = self._map(number)
        return self._open[number]

    def _map(self, number: int) -> dict[str, Tensor]:
        """Compare the hash of a shard and map its columns. Raises AtollError if they differ from the index."""
        from safetensors import SafetensorError, safe_open

        entry = self._files[number]
        if wrong := self._altered(entry):
            raise self._broken(entry.file, wrong, number)
        try:
            with safe_open(self.path / entry.file, framework="pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in self.columns}
            actual = {name: describe(tensor) for name, tensor in tensors.items()}
        # ValueError: a dtype that no column has.
        except (OSError, SafetensorError, ValueError, MemoryError, RuntimeError) as error:
            raise self._broken(entry.file, error, number) from error
        # A right size and a wrong layout would otherwise fail much later, in `read`.
        if actual != with_shapes(self._index.columns, entry.shapes):
            described = ", ".join(f"{name} {what.dtype} {list(what.shape)}" for name, what in actual.items())
            raise self._broken(entry.file, f"its columns are {described}", number)
        return tensors

    def _open_manifest(self) -> ManifestFile:
        """Open the manifest. Only the footer is read."""
        import pyarrow as pa

        try:
            return ManifestFile(self.path / MANIFEST, [file.rows for file in self._files])
        except (OSError, ValueError, pa.ArrowException) as error:
            raise self._broken(MANIFEST, error) from error

    def _altered(self, file: FileEntry, anew: bool = False) -> str:
        """Describe how the hash of a file differs from its entry in the index; "" if it is equal.

        Args:
            file: the entry.
            anew: compute the hash even if this process has computed it before.
        """
        try:
            path = self.path / file.file
            actual = sha256_file(path) if anew else sha256_once(path)
        except OSError as error:
            raise self._broken(file.file, error) from error
        if actual == file.sha256:
            return ""
        return f"its contents are not what {INDEX} says (sha256 {actual[:12]}..., expected {file.sha256[:12]}...)"

    def _broken(self, file: str, why: str | BaseException, number: int | None = None) -> AtollError:
        """Create the error for a file that cannot be read, with the command that writes it anew.

        Args:
            file: its name.
            why: the reason, or what the reader raised.
            number: of the shard, whose first key the message names; None for the manifest.
        """
        # A file that is too large for the memory is intact: rewriting it would not help.
        if isinstance(why, BaseException):
            refuse_out_of_memory(why, self.path / file)
            why = " ".join(str(why).split())
        holds = f" (rows from key {self._first_key(number)!r} on)" if number is not None else ""
        return AtollError(f"{self.path / file}{holds} is corrupt: {why}; {rewritten(self.path, self._index)}")
