"""Seeded random numbers: what is drawn depends on seeds and row numbers alone, never on what ran before.

All generators are on the CPU, so that a seed gives the same numbers on every device.
"""

import hashlib
from collections.abc import Callable, Sequence
from enum import IntEnum

import torch
from torch import Tensor


class Stream(IntEnum):
    """The independent uses of one training seed; at most 16, see `seeded`."""

    BATCH = 0  # times, noise and dropped conditions of a training batch
    ORDER = 1  # the order of an epoch's rows, and which images of a batch are mirrored
    CAPTIONS = 2  # which caption of each image of a batch is read, and which of its tags
    GROUPS = 3  # the order of an epoch's batches, where those of several shapes alternate
    ROUTE = 4  # which image tokens of a batch pass all blocks
    CALIBRATION = 5
    ROUTER_VALIDATION = 7
    SUBSET = 11  # the rows that are measured or shown
    VALIDATION = 12
    SAMPLES = 13  # the noise of sample grids


def cpu_generator(seed: int) -> torch.Generator:
    """Return a fresh generator on the CPU."""
    return torch.Generator().manual_seed(seed)


def seeded(seed: int, index: int, stream: Stream = Stream.BATCH) -> torch.Generator:
    """Return the generator of item `index` (a batch, an epoch, a noise level) of a stream of `seed`."""
    # Distinct for distinct (seed, index, stream) as long as index < 1,000,003 and stream < 16.
    mixed = (seed * 1_000_003 + index) * 16 + stream
    # torch takes seeds below 2^64; one bit less keeps them positive.
    return cpu_generator(mixed % 2**63)


def hashed_seed(purpose: str, *numbers: int) -> int:
    """Return a seed in 0..2^32-1 for a purpose and numbers that identify its item."""
    # A hash, so that seeds of different purposes have no arithmetic relation.
    return int.from_bytes(hashlib.sha256(f"{purpose} {numbers}".encode()).digest()[:4], "big")


def seeded_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Return standard normal noise [B, *shape] float32, one seed per row: a row does not depend on its batch.

    Args:
        seeds: B seeds. The CPU generator uses 32 bits of each.
        shape: of one row.
    """
    # Stacked rows: each has its own generator.
    return torch.stack([torch.randn(*shape, generator=cpu_generator(seed)) for seed in seeds])


def random_rows(total: int, count: int, generator: torch.Generator) -> Tensor:
    """Return at most `count` different numbers of 0..total-1 in random order, [min(count, total)] int64."""
    # A permutation draws without repetition.
    return torch.randperm(total, generator=generator)[:count]


class ShuffledPasses:
    """Pass after pass through `size` items, each pass in its own random order: all items come equally often.

    Args:
        size: number of items, at least 1.
        generator_of: the generator of a pass, from its number.
    """

    def __init__(self, size: int, generator_of: Callable[[int], torch.Generator]):
        self.size, self._generator_of = size, generator_of
        self._current: tuple[int, Tensor] | None = None  # (number of the pass, its order [size])

    def items(self, start: int, stop: int) -> Tensor:
        """Return the items at positions start..stop-1 of the endless sequence, [stop - start] int64."""
        parts = []
        while start < stop:
            # Take the rest of the current pass, then go on with the next one.
            number, offset = divmod(start, self.size)
            parts.append(self._order(number)[offset : offset + stop - start])
            start += len(parts[-1])
        return torch.cat(parts)

    def _order(self, number: int) -> Tensor:
        # Only the current order is cached: a pass over a large data set is long.
        if self._current is None or self._current[0] != number:
            self._current = (number, torch.randperm(self.size, generator=self._generator_of(number)))
        return self._current[1]
