"""Training rows that are kept from training, so that experts can be measured on them."""

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from atoll.storage.shards.reader import Shards
from atoll.storage.shards.split import key_fraction


def is_held_out(shards: Sequence[Shards], share: float) -> Tensor:
    """Which rows of some directories, one after the other, are held back: [n] bool.

    A training row is, if a hash of its key, as a fraction of 1, lies below `share`; of all training rows at least one
    is. So replicas of a cluster hold back the same rows wherever they were trained, and whoever measures an expert
    later finds them again, also when data was added since.
    """
    # Shard by shard: all keys of a large cluster as Python strings would take gigabytes.
    fractions = array("d", (_fraction(key) for d in shards for part in d.parts() for key in part.keys))
    training = torch.cat([_mask(len(directory), directory.rows("train")) for directory in shards])
    fraction = torch.tensor(fractions, dtype=torch.float64).masked_fill(~training, 2.0)
    found = fraction < share
    if training.any() and not found.any():
        found[fraction.argmin()] = True
    return found


def _mask(count: int, rows: Tensor) -> Tensor:
    return torch.zeros(count, dtype=torch.bool).index_fill(0, rows, True)


def _fraction(key: str) -> float:
    """Uniform in [0, 1) over keys, and independent of what decides the val split."""
    return key_fraction("held back\0" + key)
