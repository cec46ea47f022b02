"""A directory, a bucket of S3, GCS or Azure, or memory as a store, by obstore."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from atoll.collective.store import EXTRA, ObjectExistsError, StoredObject, StoreError, StoreRefusedError
from atoll.errors import AtollError
from atoll.runtime.libraries import import_library


class ObstoreClient:
    """A store that obstore reaches.

    Args:
        store: one of obstore's stores.
        url: its address, for messages.
        root: the directory of a local store, else None.
    """

    def __init__(self, store: Any, url: str, root: Path | None = None):
        self._obs = import_library("obstore", EXTRA)
        self._store, self.url, self._root = store, url, None if root is None else root.resolve()

    def get(self, path: str, most: int) -> bytes | None:
        with self._errors(path):
            try:
                result = self._obs.get(self._store, self._checked(path))
            except FileNotFoundError:
                return None
            if (size := result.meta["size"]) > most:
                raise AtollError(f"{self._place(path)}: has {size:,} bytes, expected at most {most:,}")
            data = bytearray()
            for chunk in result.stream():
                data += chunk
                if len(data) > most:
                    raise AtollError(f"{self._place(path)}: sends more than {most:,} bytes; do not trust this store")
            return bytes(data)

    def put_new(self, path: str, data: bytes) -> None:
        with self._errors(path):
            self._obs.put(self._store, self._checked(path), data, mode="create")
        self._sync(path)

    def put(self, path: str, data: bytes) -> None:
        with self._errors(path):
            self._obs.put(self._store, self._checked(path), data)
        self._sync(path)

    def put_file(self, path: str, file: Path) -> None:
        with self._errors(path):
            # In parts if it is large; on every store it appears when the last part is there.
            self._obs.put(self._store, self._checked(path), file)
        self._sync(path)

    def chunks(self, path: str) -> Iterator[bytes]:
        with self._errors(path):
            for chunk in self._obs.get(self._store, self._checked(path)).stream(min_chunk_size=1 << 20):
                yield bytes(chunk)

    def entry(self, path: str) -> StoredObject | None:
        with self._errors(path):
            try:
                return _stored(self._obs.head(self._store, self._checked(path)))
            except FileNotFoundError:
                return None

    def entries(self, prefix: str) -> Iterator[StoredObject]:
        with self._errors(prefix):
            for batch in self._obs.list(self._store, prefix):
                yield from map(_stored, batch)

    def _sync(self, path: str) -> None:
        """Let a write to a directory survive a power failure; buckets do that themselves."""
        if self._root is None:
            return
        with self._errors(path):
            for place in (self._root / path, (self._root / path).parent):
                descriptor = os.open(place, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)

    def _place(self, path: str) -> str:
        return f"{self.url.rstrip('/')}/{path}"

    def _checked(self, path: str) -> str:
        """Refuse what others may place in a shared directory: a link that leads out of it, a pipe that never ends."""
        if self._root is not None:
            file = (self._root / path).resolve()
            if not file.is_relative_to(self._root):
                raise AtollError(f"{self._place(path)}: a link leads out of the directory; remove it")
            if file.exists() and not file.is_file():
                raise AtollError(f"{self._place(path)}: is no regular file; remove it")
        return path

    @contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        """Turn obstore's errors into one line each."""
        errors = import_library("obstore.exceptions", EXTRA)
        try:
            yield
        except AtollError:
            raise
        except (errors.AlreadyExistsError, errors.PreconditionError):
            raise ObjectExistsError(path) from None
        # Some of obstore's errors are built-in ones, which are not under its base class.
        except (errors.BaseError, OSError, ValueError, NotImplementedError) as error:
            raise store_error(self._place(path), str(error)) from None


def _stored(meta: Any) -> StoredObject:
    return StoredObject(meta["path"], meta["size"], meta["last_modified"].timestamp())


# What a store's message contains, and the line that a user can act on.
_REFUSALS = (
    (("RequestTimeTooSkewed", "RequestExpired"), "this machine's clock is off; set it (S3 accepts 15 minutes)"),
    (("os error 28", "QuotaExceeded", "InsufficientStorage", "EntityTooLarge", "os error 122", "507 "), "is full"),
    (
        ("os error 13", "os error 30", "AccessDenied", "403 ", "401 ", "Permission denied", "PermissionDenied",
         "Unauthenticated", "lacked valid authentication", "lack the necessary privileges", "InvalidAccessKeyId",
         "SignatureDoesNotMatch"),
        "the store refuses access; check the credentials and their rights",
    ),
    (("NoSuchBucket", "Bucket not found", "bucket does not exist"), "there is no such bucket"),
)  # fmt: skip
_BAD_NAME = re.compile(r'object with invalid path: (?:Error parsing )?Path "(.*?)"(?::| contained)', re.DOTALL)


def store_error(where: str, text: str) -> StoreError:
    """Describe a store's failure in one line."""
    # Anybody can place such an object in a shared directory, and then nothing beside it can be listed.
    if bad := _BAD_NAME.search(text):
        return StoreRefusedError(f"{where}: holds {bad[1]:.200}, a name that not every store takes; remove it")
    for marks, line in _REFUSALS:
        if any(mark in text for mark in marks):
            return StoreRefusedError(f"{where}: {line}")
    # Below the first line, obstore repeats everything as a structure.
    return StoreError(f"{where}: the store failed ({' '.join(text.split('Debug source')[0].split())[:200]}); try again")
