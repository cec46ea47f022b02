"""The captions that are drawn: a list for each cluster, and the caption of each row."""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from atoll.errors import AtollError
from atoll.randomness import ShuffledPasses, cpu_generator, hashed_seed
from atoll.storage.artifact import sha256_file
from atoll.storage.cards import ClusterShardsCard, DrawnCaptions
from atoll.storage.layout import CLUSTER_PREFIX, cluster_name, cluster_path
from atoll.storage.shards import INDEX, Shards, hash_of_keys


class Captions(Protocol):
    """The captions of one cluster."""

    @property
    def sha256(self) -> str:
        """The hash of their file."""

    def __len__(self) -> int: ...

    def at(self, numbers: Tensor) -> list[str]:
        """Return the captions with the given numbers [n] int64."""


@dataclass(frozen=True)
class ListedCaptions:
    """Captions of a text file."""

    lines: Sequence[str]
    sha256: str

    def __len__(self) -> int:
        return len(self.lines)

    def at(self, numbers: Tensor) -> list[str]:
        """Return the captions with the given numbers [n] int64."""
        return [self.lines[number] for number in numbers.tolist()]


class ClusterCaptions:
    """The captions of a cluster's training rows; nothing else is read of its shards.

    Args:
        shards: the cluster's, without the rows that are left out.
    """

    def __init__(self, shards: Shards):
        self._shards, self._rows, self.sha256 = shards, shards.rows("train"), shards.sha256
        # Other rows that are left out mean other captions.
        if left_out := shards.left_out_keys:
            self.sha256 = hashlib.sha256(f"{shards.sha256} without {hash_of_keys(left_out)}".encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    def at(self, numbers: Tensor) -> list[str]:
        """Return the captions with the given numbers [n] int64."""
        return self._shards.captions_of(self._rows[numbers])


class CaptionOrder:
    """The caption of each row: pass after pass through the list, each in another order, so all come equally often."""

    def __init__(self, captions: Captions, seed: int, cluster: int):
        self._captions = captions
        # The seed of each pass includes the cluster, so clusters that share a list order it differently.
        self._passes = ShuffledPasses(
            len(captions), lambda number: cpu_generator(hashed_seed("captions", seed, cluster, number))
        )

    def __call__(self, rows: range) -> list[str]:
        """Return the captions of rows."""
        return self._captions.at(self._passes.items(rows.start, rows.stop))


def load_captions(
    path: Path | None, clusters: Path, k: int, assignment: str, skip: Collection[str] = ()
) -> tuple[list[Captions], DrawnCaptions]:
    """Load the captions of each cluster.

    Args:
        path: a text file for all clusters, one caption per line; or a directory with one file per cluster
            (cluster-000.txt, ...); None for the captions of the training rows in `clusters`, which shares captions but
            no images.
        clusters: the run's clusters/; needed only if path is None.
        k: the number of clusters.
        assignment: its hash; shards of another one are refused.
        skip: keys of rows whose captions are left out; for no path.

    Returns:
        (captions of each cluster, the card's record of their origin).

    Raises:
        AtollError: a file that is missing, cannot be read, or has no caption; an empty line among others; a file of a
            cluster that does not exist; no path and no clusters.
    """
    if path is None:
        # The clusters' own captions: each cluster is drawn with those of its training rows.
        paths = [cluster_path(clusters, number) for number in range(k)]
        captions: list[Captions] = [_cluster_captions(directory, assignment, skip) for directory in paths]
        origin = "of the clusters' shards: captions shared, images not"
    elif path.is_dir():
        # A file with a wrong number would be ignored silently: refuse it.
        names = [f"{cluster_name(number)}.txt" for number in range(k)]
        if unknown := sorted({file.name for file in path.glob(f"{CLUSTER_PREFIX}*.txt")} - set(names)):
            raise AtollError(f"{path / unknown[0]}: belongs to no cluster; expected {names[0]} to {names[-1]}")
        captions, origin = [_listed(path / name) for name in names], "a list for each cluster"
    else:
        # One object for all clusters: the file is read once.
        captions, origin = [_listed(path)] * k, "one list for all clusters"
    # The hashes identify the captions without containing them.
    about = DrawnCaptions(origin=origin, counts=[len(one) for one in captions], sha256=[one.sha256 for one in captions])
    return captions, about


def _listed(file: Path) -> ListedCaptions:
    try:
        # utf-8-sig also drops the byte order mark that some editors write.
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise AtollError(f"{file}: not found; write the captions there, one per line") from None
    except (OSError, UnicodeDecodeError) as error:
        raise AtollError(f"{file}: cannot be read ({error}); expected a text file, one caption per line") from None
    if not lines:
        raise AtollError(f"{file}: is empty; expected one caption per line")
    # A single empty line is a mistake, a list of them means no captions.
    empty = [number for number, line in enumerate(lines, start=1) if not line.strip()]
    if empty and len(empty) < len(lines):  # all lines are empty for experts that were trained without captions
        raise AtollError(f"{file}: line {empty[0]} is empty; remove it")
    return ListedCaptions(lines, sha256_file(file))


def _cluster_captions(directory: Path, assignment: str, skip: Collection[str]) -> ClusterCaptions:
    # An island may hold experts without any data: explain how to name captions.
    if not (directory / INDEX).is_file():
        raise AtollError(
            f"no captions: {directory} does not exist; name them with --captions, a text file of one caption per line "
            "or a directory with one per cluster (cluster-000.txt)"
        )
    # Captions of other clusters would not fit the experts.
    shards = Shards(directory)
    if (other := shards.card(ClusterShardsCard).assignment) != assignment:
        raise AtollError(
            f"{directory}: its assignment is {other}, the experts' is {assignment}; name the captions with --captions"
        )
    # Held-out captions are not drawn, so a cluster needs training rows.
    captions = ClusterCaptions(shards.without(skip))
    if not len(captions):
        least = "no training rows" if not len(shards.rows("train")) else "no training rows that train.skip leaves"
        raise AtollError(f"{directory}: holds {least}; name the captions with --captions")
    return captions
