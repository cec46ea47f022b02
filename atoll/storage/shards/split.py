"""Which rows are held out where the data do not say it: by a hash of the key, so the same ones wherever they lie."""

import hashlib

from atoll.storage.shards.format import Split


def key_fraction(key: str) -> float:
    """Uniform in [0, 1) over keys."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def split_by_hash(key: str, validation: float) -> Split:
    """The split of a key: held out are those whose sha256, as a fraction of 1, lies below `validation`."""
    return "val" if key_fraction(key) < validation else "train"
