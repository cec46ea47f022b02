"""The train and val split of data that defines none: by a hash of the key, independent of order and location."""

import hashlib

from atoll.storage.shards.format import Split


def key_fraction(key: str) -> float:
    """Hash a key to [0, 1), uniformly over keys."""
    # Not hash(), which differs between processes.
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def split_by_hash(key: str, validation: float) -> Split:
    """Return the split of a key: "val" if hash(key) < `validation`, a fraction in [0, 1]."""
    # The same key has the same split in every data set.
    return "val" if key_fraction(key) < validation else "train"
