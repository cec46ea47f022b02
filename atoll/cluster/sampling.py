"""Uniform samples by a hash of the key: the same rows wherever they lie; samples of two data sets merge into one."""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

_FULL = 1 << 64


def hash_keys(keys: Sequence[str]) -> np.ndarray:
    """[n] uint64, uniform, of n keys."""
    digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8).digest() for key in keys)
    return np.frombuffer(digests, "<u8")


def draw(hashes: np.ndarray, seed: int, purpose: str) -> np.ndarray:
    """[n] uint64 of `hash_keys`' [n]: uniform, and independent from one (seed, purpose) to another.

    The last steps of SplitMix64 (Steele et al. 2014), a bijection, after the hash was shifted by one of the purpose.
    """
    z = hashes + np.frombuffer(hashlib.blake2b(f"{seed} {purpose}".encode(), digest_size=8).digest(), "<u8")
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = z ^ (z >> np.uint64(31))
    return mixed


def below(drawn: np.ndarray, fraction: float) -> np.ndarray:
    """[n] bool: which rows belong to a uniform sample of this fraction of all."""
    return drawn <= np.uint64(min(int(fraction * _FULL), _FULL - 1))


def smallest(parts: Iterable[np.ndarray], most: int) -> np.ndarray:
    """The `most` smallest of all numbers that come in parts, ascending; memory is that of twice as many."""
    kept, waiting = np.empty(0, np.uint64), [np.empty(0, np.uint64)]
    for part in parts:
        waiting.append(part if len(kept) < most else part[part < kept[-1]])
        if len(kept) < most or sum(map(len, waiting)) >= most:
            kept, waiting = np.sort(np.concatenate([kept, *waiting]))[:most], []
    return np.sort(np.concatenate([kept, *waiting]))[:most]
