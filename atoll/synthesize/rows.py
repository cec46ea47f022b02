"""Key, split and noise of a drawn row, each a function of the row's number and the seed alone."""

import heapq
import math
from collections.abc import Sequence

from torch import Tensor

from atoll.errors import AtollError
from atoll.randomness import hashed_seed, seeded_noise
from atoll.storage.shards import Split, key_fraction, split_by_hash

_HELD_OUT = 8  # rows per cluster, at least, if there are twice as many


class Keys:
    """The keys of a cluster's rows and their splits.

    Args:
        seed: of the draws.
        cluster: its number.
        rows: number of rows.
        validation: fraction that is held out, by a hash of the key; raised if too few rows would be held out.

    Raises:
        AtollError: fewer than two rows, or none left to train on.
    """

    def __init__(self, seed: int, cluster: int, rows: int, validation: float):
        if rows < 2:
            raise AtollError(f"images is {rows}; expected at least 2 per cluster: one to train on, one to hold out")
        # The key contains seed and cluster, so draws of two seeds never share keys.
        self._prefix = f"drawn-{seed}-{cluster:03d}"
        # A small cluster holds out no more than half of its rows.
        at_least = min(_HELD_OUT, rows // 2)
        # The key's hash decides; for few rows the bound is raised to the smallest hashes.
        fractions = heapq.nsmallest(at_least, (key_fraction(self._key(row)) for row in range(rows)))
        # nextafter: the bound is exclusive, and must include the largest of these hashes.
        self._fraction = max(validation, math.nextafter(fractions[-1], 1))
        # A large fraction could leave nothing to train on.
        if all(self.split(self._key(row)) == "val" for row in range(rows)):
            raise AtollError(f"data.validation {validation} holds out all {rows} images of cluster {cluster}; lower it")

    def __call__(self, rows: range) -> list[str]:
        """Return the keys of rows."""
        return [self._key(row) for row in rows]

    def split(self, key: str) -> Split:
        """Return "val" if the key is held out, else "train"."""
        return split_by_hash(key, self._fraction)

    def _key(self, row: int) -> str:
        return f"{self._prefix}-{row:08d}"


def noise(seed: int, cluster: int, rows: range, shape: Sequence[int]) -> Tensor:
    """Return x at t = 1 of rows, [n, *shape] float32, each row from its own seed.

    A CPU generator uses 32 bits of a seed. The seeds count up from one hash, since hashes of all rows would collide.

    Args:
        seed: of the draws.
        cluster: its number.
        rows: their numbers.
        shape: of a latent.
    """
    first = hashed_seed("noise", seed, cluster)
    return seeded_noise([(first + row) % 2**32 for row in rows], shape)
