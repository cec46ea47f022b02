"""Which rows repeat an earlier one, in memory that is bounded however many there are."""

from collections.abc import Callable, Hashable, Iterable, Sequence

import numpy as np

_PASS = 1 << 25  # hashes in memory at a time: 256 MiB


def repeats(parts: Callable[[], Iterable[Sequence[Hashable]]], rows: int) -> dict[int, int]:
    """Each row whose value stood in an earlier row already, ascending -> the first row that has that value. Exact.

    parts: gives all values in order, part by part; it is called several times. rows: how many they are. Memory is that
    of `_PASS` hashes of 8 bytes and of the values that really repeat.
    """
    passes = max(1, -(-rows // _PASS))
    suspects: set[int] = set()  # hashes that occur twice: of equal values, or (rarely) by chance
    for number in range(passes):
        kept = []
        for part in parts():
            hashes = np.fromiter(map(hash, part), np.int64, len(part))
            kept.append(hashes[hashes % passes == number])
        hashes = np.sort(np.concatenate(kept)) if kept else np.empty(0, np.int64)
        suspects.update(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    if not suspects:
        return {}
    first: dict[Hashable, int] = {}
    repeated, start = {}, 0
    for part in parts():
        for row, value in enumerate(part, start):
            if hash(value) in suspects and first.setdefault(value, row) != row:
                repeated[row] = first[value]
        start += len(part)
    return repeated
