"""The directories between the stages: columns of tensors, a manifest, an index that describes and seals them.

    shard-00000.safetensors   one tensor [rows, ...] per column, memory-mapped
    manifest.parquet          key, caption, split ("train" or "val"), shard, row: one line per row, in order
    index.json                format, kind, rows, columns, bytes and sha256 of each file, the writer's card

The same input gives the same bytes. A directory appears whole or not at all.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor

from atoll.artifact import FORMAT, check_card, read_json, sha256_file, whole_directory, write_bytes, write_json
from atoll.errors import AtollError

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")
INDEX = "index.json"
MANIFEST = "manifest.parquet"


class ShardWriter:
    """Writes rows into a directory, which appears when it is closed; a context manager, gone after an error.

    An existing directory is replaced only if it holds shards or nothing; anything else is an AtollError.
    """

    def __init__(self, directory: str | Path, card: Mapping[str, Any], shard_rows: int = 4096):
        self._card, self._shard_rows = dict(card), shard_rows
        refuse_foreign(Path(directory), INDEX)
        self._whole = whole_directory(Path(directory))
        self._path = self._whole.__enter__()
        self._waiting: dict[str, list[Tensor]] = {}  # rows of the next shard, by column
        self._columns: dict[str, dict[str, Any]] = {}
        self._manifest: dict[str, list[str]] = {"key": [], "caption": [], "split": []}
        self._files: list[dict[str, Any]] = []

    def append(
        self,
        keys: Sequence[str],
        captions: Sequence[str],
        splits: Sequence[str],
        columns: Mapping[str, Tensor],
    ) -> None:
        """Adds rows: `columns` holds tensors [rows, ...], of the same names, dtypes and shapes at every call.

        Raises ValueError if lengths, columns or split names do not fit.
        """
        described = {name: _describe(column) for name, column in columns.items()}
        self._columns = self._columns or described
        if described != self._columns:
            raise ValueError(f"these columns are {described}, the first ones were {self._columns}")
        lengths = {len(keys), len(captions), len(splits), *(len(column) for column in columns.values())}
        if len(lengths) != 1:
            raise ValueError(f"keys, captions, splits and columns differ in length: {sorted(lengths)}")
        if unknown := set(splits) - set(SPLITS):
            raise ValueError(f"a split is one of {SPLITS}; got {sorted(unknown)}")
        self._manifest["key"] += keys
        self._manifest["caption"] += captions
        self._manifest["split"] += splits
        for name, column in columns.items():
            self._waiting.setdefault(name, []).append(column.detach().to("cpu", copy=True))
        while self._waiting_rows() >= self._shard_rows:
            self._flush(self._shard_rows)

    def close(self) -> dict[str, Any]:
        """Writes what is left, the manifest and the index; the directory takes its place. Returns the index.

        Raises AtollError if there are no rows, or if two have the same key.
        """
        try:
            if self._waiting_rows():
                self._flush(self._waiting_rows())
            index = self._write_index()
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
        if error is not None:
            self._abandon(error)
        else:
            self.close()

    def _abandon(self, error: BaseException) -> None:
        self._whole.__exit__(type(error), error, error.__traceback__)

    def _waiting_rows(self) -> int:
        return sum(len(column) for column in next(iter(self._waiting.values()), []))

    def _flush(self, rows: int) -> None:
        from safetensors.torch import save

        shard = {}
        for name, chunks in self._waiting.items():
            column = torch.cat(chunks)
            shard[name] = column[:rows].contiguous()
            self._waiting[name] = [column[rows:]] if len(column) > rows else []
        file = f"shard-{len(self._files):05d}.safetensors"
        self._files.append({**_write(self._path / file, save(shard)), "rows": rows})

    def _write_index(self) -> dict[str, Any]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        keys = self._manifest["key"]
        if not keys:
            raise AtollError("there are no rows to write: the source holds no images")
        if len(set(keys)) < len(keys):
            twice = Counter(keys).most_common(1)[0][0]
            raise AtollError(f"two rows have the key {twice!r}; keys must be unique")
        shard = [number for number, file in enumerate(self._files) for _ in range(file["rows"])]
        row = [i for file in self._files for i in range(file["rows"])]
        places = {"shard": pa.array(shard, pa.int32()), "row": pa.array(row, pa.int32())}
        table = pa.table({**self._manifest, **places})
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        index = {
            "format": FORMAT,
            "kind": "shards",
            "rows": len(keys),
            "splits": {split: self._manifest["split"].count(split) for split in SPLITS},
            "columns": self._columns,
            "shards": self._files,
            "manifest": _write(self._path / MANIFEST, sink.getvalue().to_pybytes()),
            "card": self._card,
        }
        write_json(self._path / INDEX, index)
        self._path.chmod(0o755)  # a temporary directory is its owner's alone
        return index


class Shards:
    """A directory of shards, opened for reading: tensors stay on the disk until their rows are read.

    Raises AtollError, naming the file and the first key it holds, if a file is missing, cut or of another
    format; with `verify=True` also if any byte differs from what was written (this reads everything once).

    card: what the writer put there. columns: their names. keys, captions, splits: lists of one str per row.
    """

    def __init__(self, directory: str | Path, verify: bool = False):
        self.path = Path(directory)
        self._index = _read_index(self.path)
        self.card: dict[str, Any] = self._index["card"]
        self.columns: tuple[str, ...] = tuple(sorted(self._index["columns"]))
        self._files: list[dict[str, Any]] = self._index["shards"]
        _check(self.path, self._index["manifest"], verify, "")
        self._table = _read_manifest(self.path / MANIFEST, self._index["rows"])
        # ends[i] is the first row that no longer lies in shard i
        self._ends = torch.tensor([file["rows"] for file in self._files]).cumsum(0)
        for number, file in enumerate(self._files):
            _check(self.path, file, verify, self._first_key(number))
        self._open: dict[int, dict[str, Tensor]] = {}

    def __len__(self) -> int:
        return int(self._index["rows"])

    @cached_property
    def keys(self) -> list[str]:
        return self._table["key"].to_pylist()

    @cached_property
    def captions(self) -> list[str]:
        return self._table["caption"].to_pylist()

    @cached_property
    def splits(self) -> list[str]:
        return self._table["split"].to_pylist()

    @cached_property
    def sha256(self) -> str:
        """The hash of the index; as that holds the hash of every file, it names the content."""
        return sha256_file(self.path / INDEX)

    def shape(self, column: str) -> tuple[int, ...]:
        """The shape of one row of a column."""
        return tuple(self._index["columns"][self._known(column)]["shape"])

    def rows(self, split: Split) -> Tensor:
        """The row numbers of a split [n] int64, ascending."""
        import pyarrow.compute as pc

        return torch.from_numpy(pc.equal(self._table["split"], split).to_numpy().copy()).nonzero().flatten()

    def read(self, column: str, rows: Tensor | slice) -> Tensor:
        """The given rows ([n] int64 in any order, or a slice) of a column, [n, ...], copied into memory.

        Raises IndexError for rows that do not exist, AtollError for an unknown column or a broken shard.
        """
        self._known(column)
        if isinstance(rows, slice):
            rows = torch.arange(*rows.indices(len(self)))
        if len(rows) and (int(rows.min()) < 0 or int(rows.max()) >= len(self)):
            raise IndexError(f"rows must lie in 0..{len(self) - 1}; got {int(rows.min())}..{int(rows.max())}")
        shard = torch.searchsorted(self._ends, rows, right=True)  # [n]
        used = shard.unique().tolist()
        if len(used) == 1:
            return self._shard(used[0])[column][rows - self._start(used[0])]
        what = self._index["columns"][column]
        result = torch.empty(len(rows), *what["shape"], dtype=getattr(torch, what["dtype"]))
        for number in used:
            here = (shard == number).nonzero().flatten()
            result[here] = self._shard(number)[column][rows[here] - self._start(number)]
        return result

    def _known(self, column: str) -> str:
        if column not in self.columns:
            raise AtollError(f"{self.path} has no column {column!r}; it has {', '.join(self.columns)}")
        return column

    def _start(self, number: int) -> int:
        return int(self._ends[number]) - int(self._files[number]["rows"])

    def _first_key(self, number: int) -> str:
        return str(self._table["key"][self._start(number)])

    def _shard(self, number: int) -> dict[str, Tensor]:
        """The memory-mapped columns of a shard, opened at first use."""
        from safetensors import SafetensorError, safe_open

        if number not in self._open:
            file = self.path / self._files[number]["file"]
            try:
                with safe_open(file, framework="pt") as opened:
                    tensors = {name: opened.get_tensor(name) for name in self.columns}
                found = {name: _describe(tensor) for name, tensor in tensors.items()}
            except (OSError, SafetensorError) as error:
                raise _broken(file, self._first_key(number), str(error)) from error
            if found != self._index["columns"]:
                raise _broken(file, self._first_key(number), f"its columns are {found}")
            self._open[number] = tensors
        return self._open[number]


def refuse_foreign(path: Path, marker: str) -> None:
    """Raises AtollError if `path` holds something, but no former result (the file `marker`) that may be replaced."""
    if path.exists() and not (path / marker).is_file() and (path.is_file() or any(path.iterdir())):
        raise AtollError(f"{path}: exists and is no former result (it has no {marker}); name an empty or new directory")


def _describe(column: Tensor) -> dict[str, Any]:
    return {"dtype": str(column.dtype).removeprefix("torch."), "shape": list(column.shape[1:])}


def _write(path: Path, content: bytes) -> dict[str, Any]:
    write_bytes(path, content)
    return {"file": path.name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _read_index(directory: Path) -> dict[str, Any]:
    path = directory / INDEX
    if not path.is_file():
        raise AtollError(f"{directory} is not a directory of shards: it has no {INDEX}")
    index = check_card(read_json(path), "shards", path)
    if missing := {"rows", "columns", "shards", "manifest", "card"} - index.keys():
        raise AtollError(f"{path}: lacks {', '.join(sorted(missing))}; write the directory again")
    if index["rows"] != sum(file["rows"] for file in index["shards"]):
        raise AtollError(f"{path}: its shards do not add up to its {index['rows']} rows; write the directory again")
    return index


def _read_manifest(path: Path, rows: int) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, columns=["key", "caption", "split"], use_threads=False)
    except (OSError, pa.ArrowException) as error:
        raise AtollError(f"{path} is corrupt ({error}): write the directory again") from error
    if len(table) != rows:
        raise AtollError(f"{path} has {len(table)} rows, the index has {rows}: write the directory again")
    return table.combine_chunks()


def _check(directory: Path, file: Mapping[str, Any], verify: bool, first_key: str) -> None:
    """Compares a file with its line in the index: that it exists, its size and, if asked, its hash."""
    path = directory / file["file"]
    if not path.is_file():
        raise _broken(path, first_key, "it is missing")
    if path.stat().st_size != file["bytes"]:
        raise _broken(path, first_key, f"it has {path.stat().st_size} bytes instead of {file['bytes']}")
    if verify and sha256_file(path) != file["sha256"]:
        raise _broken(path, first_key, "its sha256 is not the one in the index")


def _broken(path: Path, first_key: str, why: str) -> AtollError:
    holds = f" (rows from key {first_key!r} on)" if first_key else ""
    return AtollError(f"{path}{holds} is corrupt: {why}; write the directory again")
