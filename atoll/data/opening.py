"""Open local files and every URL that fsspec supports (s3://, gs://, hf://, https://, ...)."""

import os
import stat
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO, TypeVar

from atoll.data.names import clean, message_of
from atoll.errors import AtollError
from atoll.storage.memory import refuse_out_of_memory

Item = TypeVar("Item")
Result = TypeVar("Result")


class TooLarge(OSError):
    """A file with more bytes than the limit."""


def join(root: str | None, name: str) -> str:
    """Return the path or URL of a file below a root."""
    return name if root is None else f"{root}/{name}"


def is_local(url: str) -> bool:
    """Return whether a path is local and not a URL."""
    return "://" not in url and "::" not in url


def open_file(url: str) -> Any:
    """Open a file for reading bytes; a context manager.

    Raises:
        OSError: it cannot be opened, whatever its file system raises for that.
        AtollError: its file system needs a package.
    """
    if is_local(url):
        if not stat.S_ISREG(os.stat(url).st_mode):  # a pipe may never end
            raise OSError("it is no plain file")
        return open(url, "rb")
    fs, path = filesystem(url)
    try:
        return fs.open(path, "rb")
    except OSError:
        raise
    except Exception as error:  # each file system has exceptions of its own
        refuse_out_of_memory(error, clean(url))
        raise OSError(message_of(error)) from error


def read_file(url: str, most: int) -> bytes:
    """Read the bytes of a file.

    Raises:
        TooLarge: it has more than `most` bytes; no more are read.
        OSError, AtollError: as `open_file`.
    """
    with open_file(url) as file:
        try:
            return read_whole(file, most)
        except MemoryError as error:
            refuse_out_of_memory(error, clean(url))
            raise


def read_whole(file: BinaryIO, most: int) -> bytes:
    """Read the rest of a file. Raises TooLarge beyond `most` bytes; other errors become OSError, except MemoryError."""
    try:
        # One byte more than allowed shows that the file is too large.
        data = file.read(most + 1)
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise OSError(message_of(error)) from error
    if len(data) > most:
        raise TooLarge(f"more than {most:,} bytes")
    return data


def ahead(read: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Generator[Result]:
    """Map in threads, at most 2 * `threads` items ahead: remote files are fetched while others are processed."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: list[Future[Result]] = []
        try:
            for item in items:
                waiting.append(pool.submit(read, item))
                if len(waiting) == 2 * threads:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()


def filesystem(url: str) -> tuple[Any, str]:
    """Return the fsspec file system of a URL, and the path in it.

    Raises:
        AtollError: the protocol is unknown, or needs a package that is not installed.
    """
    from fsspec.core import url_to_fs
    from fsspec.registry import known_implementations

    protocol = url.split("://")[0].split("::")[0]
    try:
        value: tuple[Any, str] = url_to_fs(url)
        return value
    except ImportError as error:
        # The class of the implementation names the package to install.
        package = known_implementations.get(protocol, {}).get("class", protocol).split(".")[0]
        how = "" if package == "fsspec" else f"; pip install {package}"
        what = f"{protocol}:// needs a package that is not installed ({message_of(error)}){how}"
        raise AtollError(f"{clean(url)}: {what}") from error
    except Exception as error:  # each file system has exceptions of its own
        refuse_out_of_memory(error, clean(url))
        raise AtollError(
            f"{clean(url)}: cannot be opened ({message_of(error)}); expected a path or a URL of fsspec"
        ) from error
