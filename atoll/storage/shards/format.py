"""What writer and reader of shards agree on."""

from pathlib import Path
from typing import Literal

from torch import Tensor

from atoll.errors import AtollError
from atoll.storage.cards import ColumnEntry

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")
INDEX = "index.json"
MANIFEST = "manifest.parquet"
TEXT = ("key", "caption", "split")  # the manifest's columns


def refuse_foreign(path: Path, marker: str) -> None:
    """Raises AtollError if `path` holds something, but no former result (the file `marker`) that may be replaced."""
    if path.exists() and not (path / marker).is_file() and (path.is_file() or any(path.iterdir())):
        raise AtollError(f"{path}: exists and is no former result (it has no {marker}); name an empty or new directory")


def describe(column: Tensor) -> ColumnEntry:
    """The dtype and shape of one row of a column [rows, ...]."""
    return ColumnEntry(dtype=str(column.dtype).removeprefix("torch."), shape=column.shape[1:])
