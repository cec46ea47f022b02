"""Constants and helpers that the writer and the reader of shards share."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from torch import Tensor

from atoll.errors import AtollError
from atoll.storage.artifact import load_card
from atoll.storage.cards import ColumnEntry, FileEntry, ShardsIndex

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")
INDEX = "index.json"
MANIFEST = "manifest.parquet"
LATENTS = ("latent", "latent_flip")  # of the image and of its mirror image: [rows, C, H, W], of several shapes
TARGET = "target"  # targets of representation of the image: [rows, dims, grid, grid]
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


def wrong_size(path: Path, file: FileEntry) -> str:
    """Describe how a file differs from its entry in the index without reading it: missing or size; "" if equal."""
    if not path.is_file():
        return "it is missing"
    # The size costs nothing, and notices truncated copies when the directory is opened.
    size = path.stat().st_size
    return f"it has {size} bytes instead of {file.bytes}" if size != file.bytes else ""


def rewritten(path: Path, index: ShardsIndex) -> str:
    """Say how to repair a directory of shards; the stage that wrote it writes it again."""
    stage = "encode"
    if index.is_drawn:
        stage = "synthesize"
    # Rows with known clusters, or those of a clustering's report.
    elif index.card.keys() & {"assignment", "kept"}:
        stage = "cluster"
    return f"copy {path} again from where it is intact, or write it anew with `atoll {stage} --force`"


def read_index(directory: Path) -> ShardsIndex:
    """Read the index of a directory of shards. Raises AtollError if there is none, or it is damaged."""
    path = directory / INDEX
    if not path.is_file():
        raise AtollError(f"{directory} is not a directory of shards: it has no {INDEX}")
    return load_card(path, ShardsIndex)
