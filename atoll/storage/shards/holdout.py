"""Training rows that are held out of training, so that experts can be measured on them."""

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from atoll.storage.shards.reader import Shards
from atoll.storage.shards.split import key_fraction


def is_held_out(shards: Sequence[Shards], share: float) -> Tensor:
    """Select the held-out training rows of several directories.

    A training row is held out if hash(key) < share. At least one training row is held out. Rows that a directory leaves
    out (`Shards.without`) are not. Replicas of a cluster hold
    out the same rows wherever they are trained, and a later measurement selects them again, even after data was added.

    Args:
        shards: the directories; their rows are concatenated in this order.
        share: the fraction to hold out, in [0, 1].

    Returns:
        A mask [n] bool over all rows, True where the row is held out.
    """
    # Shard by shard: all keys of a large cluster as Python strings would take gigabytes.
    fractions = array("d", (_fraction(key) for d in shards for keys in d.keys_by_shard() for key in keys))
    # Rows of the val split get a fraction above every threshold.
    training = torch.cat([_mask(len(directory), directory.rows("train")) for directory in shards])
    fraction = torch.tensor(fractions, dtype=torch.float64).masked_fill(~training, 2.0)
    held_out = fraction < share
    # A small cluster may have no row below the threshold: take the one with the smallest hash.
    if training.any() and not held_out.any():
        held_out[fraction.argmin()] = True
    return held_out


def _mask(count: int, rows: Tensor) -> Tensor:
    """Return [count] bool, True at the given rows."""
    return torch.zeros(count, dtype=torch.bool).index_fill(0, rows, True)


def _fraction(key: str) -> float:
    """Hash a key to [0, 1), uniformly and independently of the hash for the val split."""
    # Another prefix gives another hash, independent of the split's.
    return key_fraction("held back\0" + key)
