"""Uniform samples by a hash of the key."""

import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from atoll.cluster.sampling import below, draw, hash_keys, smallest

KEYS = [f"image {i}" for i in range(20_000)]


def test_the_hash_depends_on_the_key_alone() -> None:
    assert int(hash_keys(["é"])[0]) == int.from_bytes(hashlib.blake2b("é".encode(), digest_size=8).digest(), "little")
    assert hash_keys(KEYS[::-1]).tolist() == hash_keys(KEYS)[::-1].tolist()
    assert len(hash_keys([])) == 0


def test_draws_are_uniform_and_independent_of_each_other() -> None:
    hashes = hash_keys(KEYS)
    draws = [draw(hashes, seed, purpose) for seed, purpose in ((0, "a"), (1, "a"), (0, "b"))]
    bins = [d >> np.uint64(60) for d in draws]  # 16 equal parts
    for number in bins:
        counts = np.bincount(number.astype(int), minlength=16)
        assert ((counts - 1250) ** 2 / 1250).sum() < 45  # chi^2 of 15 degrees of freedom: p = 1e-4
    for a, b in ((0, 1), (0, 2), (1, 2)):
        same = (bins[a] == bins[b]).sum()
        assert abs(same - 1250) < 5 * 1250**0.5
    assert len(set(draws[0].tolist())) == len(KEYS)


def test_below_keeps_the_fraction_and_samples_are_nested() -> None:
    draws = draw(hash_keys(KEYS), 0, "router")
    assert abs(below(draws, 0.1).sum() - 2000) < 5 * 1800**0.5
    assert below(draws, 1.0).all()
    assert not (below(draws, 0.1) & ~below(draws, 0.2)).any()


@given(st.lists(st.lists(st.integers(0, 50), max_size=9), max_size=9), st.integers(1, 12))
def test_smallest_of_parts_is_smallest_of_all(parts, count) -> None:
    numbers = smallest((np.array(part, np.uint64) for part in parts), count)
    assert numbers.tolist() == sorted(value for part in parts for value in part)[:count]
