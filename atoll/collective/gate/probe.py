"""Secret rows, and the noise that they get: every row of every noise level has a time of its own.

A time per row, not per level: whoever knows the levels could otherwise spoil an expert between them. Some rows get
exactly the times of a sampler's steps, at which alone an expert could be spoiled otherwise. The seed is drawn when the
gate runs and stands in the report afterwards.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atoll.calibration import NODES
from atoll.errors import AtollError
from atoll.randomness import cpu_generator, hashed_seed, random_rows
from atoll.schedule import PATH
from atoll.storage.cards import ClusterShardsCard, Lineage
from atoll.storage.layout import cluster_path
from atoll.storage.shards import LATENTS, Shards

# The noise levels: intervals of path time around the nodes of a calibration. The last node stands for t = 1.
EDGES = (0.01, *((a + b) / 2 for a, b in pairwise(NODES)), NODES[-1])
LEVELS = len(EDGES) - 1
_LEAST = 8  # rows; no test has a meaning with fewer
STEPS = (8, 10, 15, 20, 25, 28, 30, 40, 50, 100)  # that samplers take
_SAMPLED = 8  # one row in so many has the time of a step
_OTHER = "is of another clustering than the collective's; make the probe again"


@dataclass(frozen=True, eq=False)
class ProbeRows:
    """Latents [n, C, H, W] float32 with their captions."""

    latents: Tensor
    captions: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.captions)

    def select(self, rows: Tensor) -> "ProbeRows":
        """Return rows [b] int64 of these."""
        return ProbeRows(self.latents[rows], tuple(self.captions[row] for row in rows.tolist()))

    @staticmethod
    def cat(parts: "Sequence[ProbeRows]") -> "ProbeRows":
        """Return the rows of all parts."""
        captions = tuple(caption for part in parts for caption in part.captions)
        return ProbeRows(torch.cat([part.latents for part in parts]), captions)


@dataclass(frozen=True, eq=False)
class Noisy:
    """Rows with noise. x, eps: [n, C, H, W]. t: [n]."""

    x: Tensor
    eps: Tensor
    t: Tensor


def diffuse(latents: Tensor, low: float, high: float, seed: int, level: int) -> Noisy:
    """Noise latents [n, ...] at times that are spread evenly over (low, high), one for each row.

    Every eighth row gets the nearest time of a sampler's step instead, if there is one in between.

    Args:
        latents: x0.
        low, high: path times.
        seed: of the gate's run.
        level: distinguishes its draws.
    """
    generator, count = cpu_generator(hashed_seed("gate", seed, level)), len(latents)
    # One time in each of n equal parts of the interval, in random order.
    places = torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)
    t = low + (high - low) * places / count
    eps = torch.randn(latents.shape, generator=generator)
    for row in range(0, count, _SAMPLED):
        steps = STEPS[int(torch.randint(len(STEPS), (), generator=generator))]
        # To the bit what `atoll.solver` computes.
        times = torch.linspace(1, 0, steps + 1)
        inside = times[(times > low) & (times < high)]
        if len(inside):
            t[row] = inside[(inside - t[row]).abs().argmin()]
    return Noisy(PATH.diffuse(latents, eps, t), eps, t)


class Probe:
    """Directories of secret shards, one per cluster, laid out as clusters/ is.

    Rows of the val split are used if there are any, because training reads the others; otherwise all rows. Rows that
    were assigned before the clusters grew are still rows of what their cluster is now: those of a cluster that was
    split stand for all its parts together, and for none of them alone.

    Args:
        directory: holds cluster-000/ and so on; clusters without rows may be missing.
        lineage: the collective's assignment, with the older ones that it grew from.

    Raises:
        AtollError: shards of another clustering, or none at all.
    """

    def __init__(self, directory: Path, lineage: Lineage):
        self.directory, self.lineage = directory, lineage
        self._shards: dict[int, Shards] = {}
        self._now: dict[int, frozenset[int]] = {}  # what a directory's cluster is now
        self._older = False
        for number in range(lineage.k):
            path = cluster_path(directory, number)
            if not path.is_dir():
                continue
            shards = Shards(path)
            card = shards.card(ClusterShardsCard)
            expected = number, lineage.clusters_of(card.assignment) if lineage.knows(card.assignment) else None
            if (card.cluster, card.clusters) != expected or number >= card.clusters:
                raise AtollError(f"{path}: {_OTHER}")
            self._shards[number] = shards
            self._now[number] = frozenset(lineage.now(card.assignment, (number,)))
            self._older |= card.clusters < lineage.k
        if not self._shards:
            raise AtollError(
                f"{directory}: no cluster-000 to cluster-{lineage.k - 1:03d} in it; expected secret shards"
            )

    @property
    def codec(self) -> dict[str, Any]:
        """The codec of its latents, with the constants that they are normalised by."""
        return next(iter(self._shards.values())).card(ClusterShardsCard).codec

    def has(self, clusters: Sequence[int]) -> bool:
        """Return whether it has rows of these clusters alone."""
        return bool(self._available(clusters))

    def rows(self, clusters: Sequence[int], count: int, seed: int) -> ProbeRows:
        """Read at most `count` random rows, from all the named clusters alike.

        Raises:
            AtollError: fewer than 8 rows; no test has a meaning then.
        """
        parts, available = [], self._available(clusters)
        for place, number in enumerate(available):
            shards, numbers = self._shards[number], self._numbers[number]
            # Equal parts; the first ones take what does not divide.
            part = count // len(available) + (place < count % len(available))
            chosen = numbers[random_rows(len(numbers), part, cpu_generator(hashed_seed("probe", seed, number)))]
            parts.append(ProbeRows(shards.read("latent", chosen).float(), tuple(shards.captions_of(chosen))))
        total = sum(map(len, parts))
        if total < _LEAST:
            raise AtollError(self._problem(clusters, total))
        return ProbeRows.cat(parts)

    def outgrown(self, clusters: Sequence[int]) -> str:
        """Say that it is older than the growth that brought some clusters, and lacks their rows; "" if it does not."""
        count = sum(len(self._numbers[number]) for number in self._available(clusters))
        return self._problem(clusters, count) if self._older and count < _LEAST else ""

    def _problem(self, clusters: Sequence[int], count: int) -> str:
        problem = f"{self.directory}: {count} rows of clusters {list(clusters)}, expected at least {_LEAST}"
        # Its images may be of these clusters, but it does not say which of them are.
        how = "`atoll collective follow` and `atoll collective probe` assign its images anew"
        return f"{problem}; it is older than the growth of the collective: {how}" if self._older else problem

    def _available(self, clusters: Sequence[int]) -> list[int]:
        """The directories whose rows belong to these clusters, whichever of them."""
        return [number for number in clusters if number in self._shards and self._now[number] <= set(clusters)]

    @cached_property
    def _numbers(self) -> dict[int, Tensor]:
        # Of several sizes, the main one: the linear denoisers know that alone.
        held = {number: shards.rows("val", LATENTS[0]) for number, shards in self._shards.items()}
        every = {number: shards.has_main_shape(LATENTS[0]) for number, shards in self._shards.items()}
        return {number: rows if len(rows) else every[number].nonzero().flatten() for number, rows in held.items()}
