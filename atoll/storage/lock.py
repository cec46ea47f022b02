"""One process at a time, on a directory: a lock that goes with the process, however that ends."""

import fcntl
import time
from pathlib import Path
from typing import IO

from atoll.errors import AtollError


def hold(directory: Path, doing: str) -> IO[str]:
    """Keeps other processes out of a directory until the file that is returned is closed.

    Raises:
        AtollError: another process is `doing` ("encoding") there.
    """
    file = (directory / ".lock").open("w")
    if not try_lock(file.fileno()):
        file.close()
        raise AtollError(f"{directory}: another process is {doing} here; wait for it, or stop it")
    return file


def try_lock(descriptor: int, patience: float = 0.0) -> bool:
    """Whether this open file's lock is now held by it, until it is closed in every process that has inherited it.

    A file system without locks gives it to everybody.

    Args:
        descriptor: of an open file.
        patience: seconds to wait where another may hold it still.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.5)
        except OSError:
            return True
        else:
            return True
