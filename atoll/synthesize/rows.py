"""What a drawn row is: key, split and noise, each a function of the row's number and the seed alone."""

import heapq
import math
from collections.abc import Sequence

from torch import Tensor

from atoll.errors import AtollError
from atoll.randomness import hashed_seed, seeded_noise
from atoll.storage.shards import Split, key_fraction, split_by_hash

_HELD_OUT = 8  # rows of a cluster at least, where it has twice as many


class Keys:
    """The keys of a cluster's rows, and which of them are held out.

    Args:
        seed, cluster: of the draws.
        rows: how many.
        validation: the share that is held out, by a hash of the key; of a few rows it is raised until some are.

    Raises:
        AtollError: fewer than two rows, or none left to train on.
    """

    def __init__(self, seed: int, cluster: int, rows: int, validation: float):
        if rows < 2:
            raise AtollError(f"images is {rows}; expected at least 2 of each cluster: one to train on, one to hold out")
        self._prefix = f"drawn-{seed}-{cluster:03d}"
        least = min(_HELD_OUT, rows // 2)
        fractions = heapq.nsmallest(least, (key_fraction(self._key(row)) for row in range(rows)))
        self._share = max(validation, math.nextafter(fractions[-1], 1))
        if all(self.split(self._key(row)) == "val" for row in range(rows)):
            raise AtollError(f"data.validation {validation} holds out all {rows} images of cluster {cluster}; lower it")

    def __call__(self, rows: range) -> list[str]:
        return [self._key(row) for row in rows]

    def split(self, key: str) -> Split:
        return split_by_hash(key, self._share)

    def _key(self, row: int) -> str:
        return f"{self._prefix}-{row:08d}"


def noise(seed: int, cluster: int, rows: range, shape: Sequence[int]) -> Tensor:
    """x at t = 1 of the given rows, [n, *shape] float32: each row from its own seed, drawn on the CPU.

    A CPU's generator takes 32 bits of a seed, so the seeds are counted from a hash: hashes themselves would collide.
    """
    first = hashed_seed("noise", seed, cluster)
    return seeded_noise([(first + row) % 2**32 for row in rows], shape)
