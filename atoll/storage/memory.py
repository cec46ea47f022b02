"""Errors that report that memory ran out, and their message."""

import errno
import os
from pathlib import Path

from atoll.errors import AtollError

# Parts of the messages of torch, CUDA, Arrow, the C++ library and the system; their types are mostly general ones.
_MESSAGES = (
    *("out of memory", "not enough memory", "cannot allocate memory", "can't allocate memory"),
    *("malloc of size", "realloc of size", "bad_alloc"),
)


def is_out_of_memory(error: object) -> bool:
    """Return whether an error reports that memory ran out, by itself or in an error that it was raised from."""
    chain: list[object] = []
    # Libraries wrap errors of their readers. A chain can be circular.
    while error is not None and error not in chain:
        words = str(error).lower()
        if (
            isinstance(error, MemoryError)
            or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
            or type(error).__name__ == "OutOfMemoryError"  # torch's, which is not imported here
            or any(message in words for message in _MESSAGES)
        ):
            return True
        chain.append(error)
        error = getattr(error, "__cause__", None) or getattr(error, "__context__", None)
    return False


def refuse_out_of_memory(error: BaseException, what: Path | str, size: int | None = None) -> None:
    """Raise an AtollError if an error reports that memory ran out, and return otherwise.

    Call this first where an error is about to be reported as damage: a file that does not fit into memory is intact.

    Args:
        error: what a reader raised.
        what: the file, its URL, or a name of what was loaded.
        size: in bytes; None: the size of the file, if it is one.

    Raises:
        AtollError: memory ran out. The message names what was loaded, and the size of a file.
    """
    if not is_out_of_memory(error):
        return
    # The size is for the message only, so a file that is gone is no error.
    if size is None and os.path.isfile(what):
        size = os.path.getsize(what)
    described = f" ({size:,} bytes)" if size is not None else ""
    raise AtollError(
        f"{what}{described}: out of memory while loading it; free some memory, or use a machine with more"
    ) from error


def one_line(error: BaseException) -> str | None:
    """Return the message of an error that a user can act on, an AtollError or lack of memory; None for a crash."""
    if isinstance(error, AtollError):
        return str(error)
    if not is_out_of_memory(error):
        return None
    # torch's message says how much it tried to allocate, and on which device.
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return f"out of memory ({reason}); free some memory, lower the batch or the memory budget, or use a larger machine"
