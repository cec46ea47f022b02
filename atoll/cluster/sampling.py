"""Uniform samples by a hash of the key: the same rows wherever they are; samples of two data sets merge into one."""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

_FULL = 1 << 64


def hash_keys(keys: Sequence[str]) -> np.ndarray:
    """Return uniform hashes of n keys, [n] uint64."""
    # One buffer for all keys: numpy reads it without a copy.
    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return np.frombuffer(digests, "<u8")


def draw(hashes: np.ndarray, seed: int, purpose: str) -> np.ndarray:
    """Turn hashes of keys into draws that are uniform, and independent between any two (seed, purpose).

    The last steps of SplitMix64 (Steele et al. 2014), a bijection, applied to the hash plus a hash of the purpose.

    Args:
        hashes: [n] uint64 from `hash_keys`.
        seed: of the clustering.
        purpose: the name of the sample.

    Returns:
        [n] uint64.
    """
    # Sums and products wrap around modulo 2^64, as SplitMix64 requires.
    z = hashes + np.frombuffer(hashlib.blake2b(f"{seed} {purpose}".encode(), digest_size=8).digest(), "<u8")
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = z ^ (z >> np.uint64(31))
    return mixed


def below(draws: np.ndarray, fraction: float) -> np.ndarray:
    """Return which rows belong to a uniform sample of this fraction of all rows: draws [n] uint64 -> [n] bool."""
    return draws <= np.uint64(min(int(fraction * _FULL), _FULL - 1))


def smallest(parts: Iterable[np.ndarray], count: int) -> np.ndarray:
    """Return the `count` smallest of all numbers in the parts, ascending; memory: twice as many numbers."""
    best, waiting = np.empty(0, np.uint64), [np.empty(0, np.uint64)]
    for part in parts:
        waiting.append(part if len(best) < count else part[part < best[-1]])
        # Merge whenever as many wait as are sought.
        if len(best) < count or sum(map(len, waiting)) >= count:
            best, waiting = np.sort(np.concatenate([best, *waiting]))[:count], []
    return np.sort(np.concatenate([best, *waiting]))[:count]
