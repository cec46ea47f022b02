"""Repeated values among many rows, with bounded memory."""

from collections.abc import Callable, Hashable, Iterable, Sequence

import numpy as np

_PASS = 1 << 25  # hashes in memory at a time: 256 MiB


def repeats(parts: Callable[[], Iterable[Sequence[Hashable]]], rows: int) -> dict[int, int]:
    """Map each row that repeats an earlier value to the first row with that value. The result is exact.

    Memory: `_PASS` hashes of 8 bytes, plus the values that repeat.

    Args:
        parts: returns all values in order, part by part; called several times.
        rows: the total number of values.

    Returns:
        {row: first row with the same value}, rows ascending.
    """
    # Each pass handles the hashes of one residue, so that at most about `_PASS` of them are in memory.
    passes = max(1, -(-rows // _PASS))
    suspects: set[int] = set()  # hashes that occur twice: of equal values, or (rarely) by chance
    for number in range(passes):
        chunks = []
        for part in parts():
            hashes = np.fromiter(map(hash, part), np.int64, len(part))
            chunks.append(hashes[hashes % passes == number])
        # Equal hashes are neighbours after sorting.
        hashes = np.sort(np.concatenate(chunks)) if chunks else np.empty(0, np.int64)
        suspects.update(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    if not suspects:
        return {}
    # Compare the suspects by value, since different values can share a hash.
    first: dict[Hashable, int] = {}
    repeated, start = {}, 0
    for part in parts():
        for row, value in enumerate(part, start):
            if hash(value) in suspects and first.setdefault(value, row) != row:
                repeated[row] = first[value]
        start += len(part)
    return repeated
