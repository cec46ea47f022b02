"""Locks on directories. The system releases a lock when its process ends, even if it is killed."""

import fcntl
import time
from pathlib import Path
from typing import IO

from atoll.errors import AtollError


def hold(directory: Path, doing: str) -> IO[str]:
    """Lock a directory until the returned file is closed.

    Args:
        directory: the directory; a file `.lock` is created in it.
        doing: the activity that the lock protects, for the message, such as "encoding".

    Returns:
        The open lock file. Closing it releases the lock.

    Raises:
        AtollError: another process holds the lock.
    """
    # The file stays after its release: removing it would let two processes lock two different files.
    file = (directory / ".lock").open("w")
    # Refuse at once: waiting would hide that another process works here.
    if not try_lock(file.fileno()):
        file.close()
        raise AtollError(f"{directory}: another process is {doing} here; wait for it, or stop it")
    return file


def try_lock(descriptor: int, patience: float = 0.0) -> bool:
    """Try to lock an open file, until it is closed in every process that inherited the descriptor.

    Args:
        descriptor: the descriptor of an open file.
        patience: seconds to wait while another process holds the lock; default 0.

    Returns:
        Whether the file is locked now. On a file system without locks always True.
    """
    # A monotonic clock, since the wall clock may be set while waiting.
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.5)
        # Some network file systems have no locks. Work without one rather than refuse to run.
        except OSError:
            return True
        else:
            return True
