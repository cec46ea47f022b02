"""Constants and helpers that the writer and the reader of shards share."""

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
    """Refuse to overwrite foreign data.

    Args:
        path: the directory to write.
        marker: the file that identifies an earlier result, which may be replaced.

    Raises:
        AtollError: `path` is a file, or a directory that is not empty and lacks `marker`.
    """
    # An empty directory is as good as a new one.
    if path.exists() and not (path / marker).is_file() and (path.is_file() or any(path.iterdir())):
        raise AtollError(f"{path}: exists and is no former result (it has no {marker}); name an empty or new directory")


def describe(column: Tensor) -> ColumnEntry:
    """Return the dtype and the shape of one row of a column [rows, ...]."""
    # The rows vary between shards, the rest must not.
    return ColumnEntry(dtype=str(column.dtype).removeprefix("torch."), shape=column.shape[1:])
