"""Hashes of files, computed once per file and process."""

import threading
from pathlib import Path

from atoll.storage.artifact import sha256_file

# What identifies the content of a file without reading it: path, size in bytes, mtime in ns, device and inode.
Stamp = tuple[str, int, int, int, int]
_hashes: dict[Stamp, str] = {}
# The thread that prefetches batches and the main thread read the same files: the second one waits for the first.
_lock = threading.Lock()


def sha256_once(path: Path) -> str:
    """Return the hex digest of a file. It is computed at the first call, and again if the file has changed since.

    A change shows in size, mtime or inode. One that keeps all three is not noticed.

    Raises:
        OSError: the file cannot be read.
    """
    with _lock:
        stamp = _stamp(path)
        if stamp not in _hashes:
            # A file that changes while it is read is hashed again at the next call.
            digest = sha256_file(path)
            if _stamp(path) != stamp:
                return digest
            _hashes[stamp] = digest
        return _hashes[stamp]


def _stamp(path: Path) -> Stamp:
    status = path.stat()
    # Absolute, since a process may change its working directory.
    return str(path.absolute()), status.st_size, status.st_mtime_ns, status.st_dev, status.st_ino
