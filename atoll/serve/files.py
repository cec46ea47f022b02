"""Finished images in memory under unguessable names, for a bounded time and size. No disk is touched."""

import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class _StoredFile:
    content: bytes
    expires: float


def largest_owner(shares: Iterable[tuple[str, int]]) -> str:
    """Return the owner of the most. shares: (owner, how much), at least one."""
    sums = Counter[str]()
    for owner, share in shares:
        sums[owner] += share
    return sums.most_common(1)[0][0]


class FileStore:
    """Files by name; the oldest go first.

    Args:
        seconds: how long a file stays.
        most_bytes: size of all files; a larger file is not stored.
        clock: seconds.
    """

    def __init__(self, seconds: float, most_bytes: int, clock: Callable[[], float] = time.monotonic):
        self._seconds, self._most, self._clock = seconds, most_bytes, clock
        self._files: OrderedDict[str, _StoredFile] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._files)

    def add(self, content: bytes, suffix: str = ".png") -> str:
        """Store a file, and return its name: 128 random bits, which are all that protects it."""
        name = secrets.token_urlsafe(16) + suffix
        self._files[name] = _StoredFile(content, self._clock() + self._seconds)
        self.bytes += len(content)
        self.evict()
        return name

    def get(self, name: str) -> bytes | None:
        """Return a file; None if it is unknown, too old or displaced."""
        self.evict()
        file = self._files.get(name)
        return None if file is None else file.content

    def evict(self) -> None:
        """Remove files that are too old, or too many."""
        # All stay equally long, so the first is the oldest.
        now = self._clock()
        while self._files:
            name, file = next(iter(self._files.items()))
            if file.expires > now and self.bytes <= self._most:
                return
            del self._files[name]
            self.bytes -= len(file.content)
