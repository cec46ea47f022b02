"""One interface to every object store: a directory, S3, GCS, Azure, a Hugging Face repository, memory for tests.

Each store can create an object only if it is absent; this is atomic everywhere. Not every store can replace one only if
it is unchanged, so nothing here needs that.
"""

import hashlib
import os
import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from atoll.errors import AtollError

MAX_LISTED = 1_000_000  # objects below one prefix; a stranger could create any number of them
ATTEMPTS = 5  # to create an object whose outcome is unknown
EXTRA = "collective"  # pip install 'atoll[collective]'


class StoreError(AtollError):
    """The store did not answer, or answered with an error. Another attempt may succeed."""


class StoreRefusedError(StoreError):
    """The store refused: no rights, no space, a wrong clock. Another attempt would fail alike."""


class ObjectExistsError(Exception):
    """An object of this name exists. It may be the caller's own: clients repeat requests whose answer was lost."""


class StoredObject(NamedTuple):
    """An object's place, its size in bytes, and the time of its last change in Unix seconds by the store's clock."""

    path: str
    size: int
    modified: float


class ObjectClient(Protocol):
    """What a store must be able to do. `Store` builds everything else on it.

    Methods raise StoreError if the store fails.
    """

    url: str

    def get(self, path: str, most: int) -> bytes | None:
        """Read an object of at most `most` bytes; None if absent. Raises AtollError if it is larger."""

    def put_new(self, path: str, data: bytes) -> None:
        """Create an object atomically. Raises ObjectExistsError if one exists."""

    def put(self, path: str, data: bytes) -> None:
        """Write an object, and replace an existing one."""

    def put_file(self, path: str, file: Path) -> None:
        """Write an object from a file of any size."""

    def chunks(self, path: str) -> Iterator[bytes]:
        """Yield the content of an object in parts."""

    def entry(self, path: str) -> StoredObject | None:
        """Describe one object; None if absent."""

    def entries(self, prefix: str) -> Iterator[StoredObject]:
        """Yield all objects below a prefix, which is a whole path segment: work/3 is not a prefix of work/30/..."""


class Store:
    """An object store with safe creation, checked downloads and its own clock.

    Args:
        client: the store itself.
        pause: seconds before the second attempt to create an object; it doubles with each further one.
    """

    def __init__(self, client: ObjectClient, pause: float = 0.2):
        self.client, self._pause = client, pause

    @property
    def url(self) -> str:
        """The store's address, for messages."""
        return self.client.url

    def place(self, path: str) -> str:
        """Return the full address of an object, for messages."""
        return f"{self.url.rstrip('/')}/{path}"

    def read(self, path: str, most: int) -> bytes | None:
        """Read a small object.

        Args:
            path: its place.
            most: the largest size accepted, in bytes.

        Returns:
            Its content; None if there is no such object.

        Raises:
            AtollError: it is larger. StoreError: the store failed.
        """
        return self.client.get(path, most)

    def exists(self, path: str) -> bool:
        """Return whether there is such an object."""
        return self.client.entry(path) is not None

    def create(self, path: str, data: bytes) -> bool:
        """Create an object if there is none. This is atomic: of several callers with different bytes, one succeeds.

        A lost answer is not a failure: the object is read back and compared. So two callers need different bytes,
        such as a nonce, to tell their attempts apart.

        Args:
            path: its place.
            data: its content.

        Returns:
            True if the object now holds `data`, False if it holds something else.

        Raises:
            StoreError: the store failed. The object may still appear if the request is under way.
        """
        failure = StoreError(f"{self.place(path)}: cannot be created; the store gives no clear answer, try again")
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(self._pause * 2 ** (attempt - 1))
            # After any answer but success, the object itself shows who created it.
            try:
                self.client.put_new(path, data)
                return True
            except ObjectExistsError:
                pass
            except StoreRefusedError:
                raise
            except StoreError as error:
                failure = error
            try:
                entry = self.client.entry(path)
                if entry is not None:
                    return entry.size == len(data) and self.client.get(path, len(data)) == data
            except StoreError as error:
                failure = error
        raise failure

    def write(self, path: str, data: bytes) -> None:
        """Write an object that only the caller writes, and whose content nobody trusts."""
        self.client.put(path, data)

    def list(self, prefix: str) -> list[StoredObject]:
        """List all objects below a prefix, sorted by path. Raises AtollError above `MAX_LISTED`."""
        entries: list[StoredObject] = []
        for entry in self.client.entries(prefix):
            if len(entries) == MAX_LISTED:
                raise AtollError(f"{self.place(prefix)}: holds more than {MAX_LISTED:,} objects; remove foreign ones")
            entries.append(entry)
        return sorted(entries)

    def now(self, name: str) -> float:
        """Return the store's time in Unix seconds. No member's clock is compared with another's.

        Args:
            name: names the small object that is written for it; each member uses its own.
        """
        # Only a change has a time, so something must be written. Equal bytes would be no change in a repository.
        path = f"clock/{name}"
        self.client.put(path, secrets.token_hex(8).encode())
        entry = self.client.entry(path)
        if entry is None:
            raise StoreError(f"{self.place(path)}: vanished after it was written; try again")
        return entry.modified

    def upload(self, path: str, file: Path, size: int) -> None:
        """Upload a file, unless an object of its size is there. The reader checks its hash.

        Raises:
            StoreError: the store failed, or is full.
        """
        entry = self.client.entry(path)
        if entry is None or entry.size != size:
            self.client.put_file(path, file)

    def download(self, path: str, file: Path, sha256: str, size: int) -> None:
        """Download an object, check size and hash while it streams, and let it appear as a whole.

        Args:
            path: its place in the store.
            file: where to write it; an existing file is replaced.
            sha256: its expected hash.
            size: its expected size in bytes.

        Raises:
            AtollError: missing, another size or hash, no space. Nothing is left at `file` that was not there before.
        """
        where = self.place(path)
        # The size is checked before anything is read: a stranger chose it.
        entry = self.client.entry(path)
        if entry is None:
            raise AtollError(f"{where}: not found, though it is listed; whoever published it must upload it again")
        if entry.size != size:
            raise AtollError(f"{where}: has {entry.size:,} bytes, expected {size:,}; it was changed or is not whole")
        if (free := shutil.disk_usage(file.parent).free) < size:
            raise AtollError(f"{file.parent}: {free:,} bytes are free, {where} needs {size:,}; free some space")
        # Stream into a temporary file beside the target, hashing on the way.
        temporary = file.with_name(f".{file.name}.{os.getpid()}-{threading.get_ident()}.tmp")
        digest, count = hashlib.sha256(), 0
        try:
            with temporary.open("wb") as out:
                for chunk in self.client.chunks(path):
                    count += len(chunk)
                    if count > size:
                        raise AtollError(f"{where}: sends more than its {size:,} bytes; do not trust this store")
                    digest.update(chunk)
                    out.write(chunk)
                out.flush()
                os.fsync(out.fileno())
            # Only a file that is exactly the expected one gets its name.
            if count != size or digest.hexdigest() != sha256:
                raise AtollError(
                    f"{where}: sha256 is {digest.hexdigest()[:12]}..., expected {sha256[:12]}...; "
                    "it was changed or damaged, and was not kept"
                )
            os.replace(temporary, file)
        except OSError as error:
            raise AtollError(f"{file}: cannot be written ({error.strerror or error})") from None
        finally:
            temporary.unlink(missing_ok=True)
