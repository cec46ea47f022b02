"""A store that fails as real ones do: requests that are lost, answers that are lost, and a process that is killed."""

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

from atoll.collective.store import ObjectClient, ObjectExistsError, StoredObject, StoreError


class FaultyClient:
    """Wraps a store's client.

    Args:
        client: the store.
        seed: of the faults.
        rate: fraction of the requests that fail. For those that write: before the write (an answer 500), after it (a
            lost answer), or after it with 412, as a client that repeats its own success reports.
        kill: fraction of the requests at which this process is killed, before or after it wrote.
    """

    def __init__(self, client: ObjectClient, seed: int, rate: float = 0.0, kill: float = 0.0):
        self.client, self.url = client, client.url
        self.random, self.rate, self.kill = random.Random(seed), rate, kill
        self.faults = 0

    def get(self, path: str, most: int) -> bytes | None:
        self._before()
        return self.client.get(path, most)

    def put_new(self, path: str, data: bytes) -> None:
        self._before()
        self.client.put_new(path, data)
        self._after(path)

    def put(self, path: str, data: bytes) -> None:
        self._before()
        self.client.put(path, data)
        self._after(None)

    def put_file(self, path: str, file: Path) -> None:
        self._before()
        self.client.put_file(path, file)
        self._after(None)

    def chunks(self, path: str) -> Iterator[bytes]:
        self._before()
        yield from self.client.chunks(path)

    def entry(self, path: str) -> StoredObject | None:
        self._before()
        return self.client.entry(path)

    def entries(self, prefix: str) -> Iterator[StoredObject]:
        self._before()
        yield from self.client.entries(prefix)

    def _before(self) -> None:
        self._maybe_kill()
        if self.random.random() < self.rate:
            self.faults += 1
            raise StoreError(f"{self.url}: 500, nothing was done")

    def _after(self, created: str | None) -> None:
        self._maybe_kill()
        if self.random.random() < self.rate:
            self.faults += 1
            # The client repeats a request whose answer was lost, and meets its own object.
            if created is not None and self.random.random() < 0.5:
                raise ObjectExistsError(created)
            raise StoreError(f"{self.url}: the answer was lost")

    def _maybe_kill(self) -> None:
        if self.random.random() < self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
