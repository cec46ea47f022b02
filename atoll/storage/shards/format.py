"""Constants and helpers that the writer and the reader of shards share."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from torch import Tensor

from atoll.errors import AtollError
from atoll.storage.cards import ColumnEntry

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")
INDEX = "index.json"
MANIFEST = "manifest.parquet"
LATENTS = ("latent", "latent_flip")  # of the image and of its mirror image: [rows, C, H, W], of several shapes
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


def own_shapes(columns: Mapping[str, ColumnEntry], main: Mapping[str, ColumnEntry]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the columns of a shard that differ from the index's, `main`."""
    return {name: column.shape for name, column in columns.items() if column.shape != main[name].shape}


def with_shapes(
    main: Mapping[str, ColumnEntry], shapes: Mapping[str, tuple[int, ...]] | None
) -> dict[str, ColumnEntry]:
    """Return the columns of a shard with its own shapes: the inverse of `own_shapes`."""
    own = shapes or {}
    return {name: entry.model_copy(update={"shape": own.get(name, entry.shape)}) for name, entry in main.items()}
