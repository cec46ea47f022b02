"""What the experts are asked to draw: a list of captions for each cluster, and which of them a row has."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from atoll.errors import AtollError
from atoll.randomness import ShuffledPasses, cpu_generator, hashed_seed
from atoll.storage.artifact import sha256_file
from atoll.storage.cards import ClusterShardsCard, DrawnCaptions
from atoll.storage.layout import CLUSTER_PREFIX, cluster_name, cluster_path
from atoll.storage.shards import INDEX, Shards


class Captions(Protocol):
    """The captions of one cluster. sha256: of the file that they stand in."""

    @property
    def sha256(self) -> str: ...

    def __len__(self) -> int: ...

    def at(self, places: Tensor) -> list[str]:
        """The captions at the given places [n] int64, in their order."""


@dataclass(frozen=True)
class Listed:
    """Captions of a text file."""

    lines: Sequence[str]
    sha256: str

    def __len__(self) -> int:
        return len(self.lines)

    def at(self, places: Tensor) -> list[str]:
        return [self.lines[place] for place in places.tolist()]


class ClusterCaptions:
    """The captions of a cluster's training rows; of these shards nothing else is read."""

    def __init__(self, shards: Shards):
        self._shards, self._rows, self.sha256 = shards, shards.rows("train"), shards.sha256

    def __len__(self) -> int:
        return len(self._rows)

    def at(self, places: Tensor) -> list[str]:
        return self._shards.captions_of(self._rows[places])


class CaptionOrder:
    """Which caption a row has: pass after pass through the list, in another order each time: all come equally often."""

    def __init__(self, captions: Captions, seed: int, cluster: int):
        self._captions = captions
        self._passes = ShuffledPasses(
            len(captions), lambda number: cpu_generator(hashed_seed("captions", seed, cluster, number))
        )

    def __call__(self, rows: range) -> list[str]:
        """The captions of the rows, in their order."""
        return self._captions.at(self._passes.items(rows.start, rows.stop))


def load_captions(given: Path | None, clusters: Path, k: int, assignment: str) -> tuple[list[Captions], DrawnCaptions]:
    """Each cluster's captions, and what a card tells of where they come from.

    Args:
        given: a text file, one caption per line, for all clusters; or a directory with one per cluster
            (cluster-000.txt, ...); None: the captions of the training rows in `clusters`: shared are the captions then,
            and not the images.
        clusters: the run's clusters/, which need not be there.
        k: the number of clusters.
        assignment: its hash; shards of another one are refused.

    Raises:
        AtollError: a file that is missing, cannot be read, or has no caption; an empty line among others; a file of a
            cluster that does not exist; no captions given and none at hand.
    """
    if given is None:
        found: list[Captions] = [_kept(cluster_path(clusters, number), assignment) for number in range(k)]
        told = "of the clusters' shards: captions shared, images not"
    elif given.is_dir():
        names = [f"{cluster_name(number)}.txt" for number in range(k)]
        if unknown := sorted({file.name for file in given.glob(f"{CLUSTER_PREFIX}*.txt")} - set(names)):
            raise AtollError(f"{given / unknown[0]}: of no cluster; expected {names[0]} to {names[-1]}")
        found, told = [_listed(given / name) for name in names], "a list for each cluster"
    else:
        found, told = [_listed(given)] * k, "one list for all clusters"
    about = DrawnCaptions(origin=told, counts=[len(one) for one in found], sha256=[one.sha256 for one in found])
    return found, about


def _listed(file: Path) -> Listed:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise AtollError(f"{file}: not found; write the captions there, one per line") from None
    except (OSError, UnicodeDecodeError) as error:
        raise AtollError(f"{file}: cannot be read ({error}); expected a text file, one caption per line") from None
    if not lines:
        raise AtollError(f"{file}: is empty; expected one caption per line")
    empty = [number for number, line in enumerate(lines, start=1) if not line.strip()]
    if empty and len(empty) < len(lines):  # of experts that were trained without captions, all lines are empty
        raise AtollError(f"{file}: line {empty[0]} is empty; remove it")
    return Listed(lines, sha256_file(file))


def _kept(directory: Path, assignment: str) -> ClusterCaptions:
    if not (directory / INDEX).is_file():
        raise AtollError(
            f"no captions: {directory} is not at hand; name them with --captions, a text file of one caption per line "
            "or a directory with one per cluster (cluster-000.txt)"
        )
    shards = Shards(directory)
    if (found := shards.card(ClusterShardsCard).assignment) != assignment:
        raise AtollError(
            f"{directory}: its assignment is {found}, the experts' is {assignment}; name the captions with --captions"
        )
    kept = ClusterCaptions(shards)
    if not len(kept):
        raise AtollError(f"{directory}: holds no training rows; name the captions with --captions")
    return kept
