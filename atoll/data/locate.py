"""What the sources of files share: finding files, opening them, captions, splits, fingerprints.

Paths are local or URLs; whatever fsspec opens is fine (s3://, gs://, hf://, https://, memory://, ...).
"""

import glob
import hashlib
import os
import posixpath
import re
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar

from atoll.encoders.weights import unset_variable
from atoll.errors import AtollError
from atoll.manifest import DataSettings
from atoll.storage.shards import Split

# Extensions of images. What Pillow cannot decode (heic without a plugin) is then skipped with the reason, not unseen.
IMAGES = (
    *("jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "gif", "bmp", "dib", "tif", "tiff", "avif", "heic", "heif"),
    *("jxl", "jp2", "j2k", "jpx", "ppm", "pgm", "pbm", "pnm", "pcx", "tga", "sgi", "qoi", "ico", "psd"),
)

_REASON = 300  # characters at which foreign text in a message is cut
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")

Item = TypeVar("Item")
Result = TypeVar("Result")


class Unfit(Exception):
    """A sample that cannot be used; its text is the reason, in one line."""


@dataclass(frozen=True)
class Files:
    """Files below a common root. root: an absolute path or a URL, None if they have nothing in common.

    sizes: posix path relative to the root -> bytes, in the order of the paths.
    """

    root: str | None
    sizes: dict[str, int]

    def url(self, name: str) -> str:
        """What `open_file` opens."""
        return join(self.root, name)


def join(root: str | None, name: str) -> str:
    """The path or URL of a file below a root."""
    return name if root is None else f"{root}/{name}"


def locate(path: str | tuple[str, ...], what: str, suffixes: tuple[str, ...] | None = None) -> Files:
    """The files that a path, a glob, a URL or a list of them stand for; of directories, all that lie in or below them.

    `~`, `$VAR` and `{00000..00999}` are expanded. Names that start with a dot are left out.

    Args:
        what: what is looked for, for messages.
        suffixes: of the files, in lower case; case does not matter. A file named outright may have any suffix. None:
            all files, and only directories may be named.

    Raises:
        AtollError: something named is not there or holds no such file, or its file system needs a package.
    """
    listed = []
    for entry in [path] if isinstance(path, str) else path:
        for url in _ranges(os.path.expandvars(entry)):
            try:
                root, sizes, outright = _list(url)
            except OSError as error:
                _refuse_unset(entry, url)
                raise AtollError(f"{_both(entry, url)}: cannot be listed ({told(error)}); expected {what}") from error
            if suffixes is None and outright:
                raise AtollError(f"{entry}: is a file; expected a directory that holds {what}")
            wanted = sizes if suffixes is None or outright else _with_suffix(sizes, suffixes)
            if not wanted:
                _refuse_unset(entry, url)
                raise nothing(_both(entry, url), what, suffixes or (), sizes)
            listed.append((root, wanted))
    if not listed:
        raise AtollError(f"data.path is empty; expected where {what} are")
    return _below_common_root(listed)


def _refuse_unset(entry: str, url: str) -> None:
    if unset := unset_variable(url):
        raise AtollError(f"{entry}: {unset} is not set in the environment; set it, or name the path itself")


def _both(entry: str, url: str) -> str:
    """A path as it was given, and as it was looked for where that is another."""
    return entry if "$" not in entry else f"{entry} ({url})"


def nothing(where: object, what: str, suffixes: Iterable[str], names: Iterable[str]) -> AtollError:
    """The error that nothing was found, with what is there instead."""
    kinds = Counter(posixpath.splitext(name)[1] or "no extension" for name in names)
    there = ", ".join(f"{count:,} of {shown(kind)}" for kind, count in kinds.most_common(3))
    return AtollError(
        f"{where}: no {what} found; looked for {', '.join(suffixes) or 'files'} in it and below, "
        f"there {f'are files: {there}' if there else 'is nothing'}"
    )


def is_local(url: str) -> bool:
    return "://" not in url and "::" not in url


def open_file(url: str) -> Any:
    """A file opened for reading bytes, a context manager.

    Raises:
        OSError: it cannot be opened, whatever its file system raises for that.
        AtollError: its file system needs a package.
    """
    if is_local(url):
        return open(url, "rb")
    fs, path = _filesystem(url)
    try:
        return fs.open(path, "rb")
    except OSError:
        raise
    except Exception as error:  # each file system has exceptions of its own
        raise OSError(told(error)) from error


def read_file(url: str) -> bytes:
    """The bytes of a file. Raises as `open_file`."""
    with open_file(url) as file:
        return read_whole(file)


def read_whole(file: BinaryIO) -> bytes:
    """What is left of a file. Raises OSError, whatever the file system raises."""
    try:
        return file.read()
    except OSError:
        raise
    except Exception as error:
        raise OSError(told(error)) from error


def ahead(read: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Iterator[Result]:
    """`map` in threads that are at most 2 * `threads` items ahead: what is far away is fetched while others work."""
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


def caption_of(value: object, encoding: str) -> str:
    """The caption that a cell or a file holds: stripped, in one line; "" for None.

    Bytes are decoded with `encoding`, unless they start with a byte order mark of utf-8 or utf-16.

    Raises Unfit for what is not text, naming the first byte.
    """
    if value is None:
        return ""
    if isinstance(value, bytes):
        codec = encoding_of(value, encoding)
        try:
            value = value.decode(codec)
        except UnicodeDecodeError as error:
            raise _not_text(codec, f"byte 0x{error.object[error.start]:02x} at {error.start}") from None
        except UnicodeError as error:
            raise _not_text(codec, told(error)) from None
    if not isinstance(value, str):
        raise Unfit(f"caption: is {type(value).__name__}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        code = ord(value[error.start])  # U+DC80 to U+DCFF stand for bytes, see PEP 383
        found = f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"half a character, U+{code:04X},"
        raise _not_text(encoding, f"{found} at {error.start}") from None
    return " ".join(line for line in map(str.strip, value.splitlines()) if line)


def _not_text(encoding: str, found: str) -> Unfit:
    return Unfit(f"caption: not {encoding} ({found}); save it as utf-8, or set data.encoding")


def encoding_of(start: bytes, encoding: str) -> str:
    """The encoding of bytes that start so: `encoding`, unless a byte order mark says otherwise."""
    if start.startswith(BOM_UTF8):
        return "utf-8-sig"
    return "utf-16" if start.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) else encoding


def check_encoding(encoding: str) -> None:
    """Raises AtollError if Python knows no text encoding of this name."""
    try:
        b"a".decode(encoding)
    except LookupError:
        raise AtollError(f"data.encoding is {encoding!r}, which is no text encoding; try utf-8 or latin-1") from None
    except UnicodeError:
        pass  # utf-16 has no character of one byte


def key_of(value: object) -> str:
    """The key in a cell: text as it is, a whole number in digits. Raises Unfit for anything else."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or value == "" or printable(value) != value:
        raise Unfit(f"key: is {shown(repr(value))}, expected text or a whole number")
    return value


def split_of(value: object) -> Split:
    """The split that a cell names: "train" trains, anything else is held out."""
    return "train" if value in ("train", b"train") else "val"


def fingerprint(sizes: Iterable[tuple[str, int]]) -> str:
    """The sha256 over relative names and sizes: quick also for terabytes; an edit that keeps the size is not seen."""
    digest = hashlib.sha256()
    for name, size in sizes:
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0%d\n" % size)
    return digest.hexdigest()


def config_of(name: str, data: DataSettings) -> dict[str, Any]:
    """What decides which samples a source of files gives."""
    settings = {"path", "image", "caption", "key", "split", "validation", "encoding"}
    return {"name": name, **data.model_dump(mode="json", include=settings)}


def printable(text: str) -> str:
    """A name that may hold bytes that are no text (PEP 383), with these written out as \\udc.., so that it can be."""
    return text.encode("utf-8", "backslashreplace").decode()


def told(error: BaseException) -> str:
    """The message of an exception in one line, not too long; its type where it has none."""
    text = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
    return shown(" ".join(text.split())) or type(error).__name__


def shown(text: str) -> str:
    """Foreign text for a message: in one line, not too long, with what cannot be printed written out."""
    short = text if len(text) <= _REASON else text[:_REASON] + "..."
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in short)


def _ranges(text: str) -> Iterator[str]:
    """{00000..00999}, as WebDataset writes many tars, spelled out."""
    match = _RANGE.search(text)
    if match is None:
        yield text
        return
    first, last = match.groups()
    for number in range(int(first), int(last) + 1):
        yield from _ranges(text[: match.start()] + f"{number:0{len(first)}d}" + text[match.end() :])


def _filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL and the path in it."""
    from fsspec.core import url_to_fs
    from fsspec.registry import known_implementations

    protocol = url.split("://")[0].split("::")[0]
    try:
        value: tuple[Any, str] = url_to_fs(url)
        return value
    except ImportError as error:
        package = known_implementations.get(protocol, {}).get("class", protocol).split(".")[0]
        how = "" if package == "fsspec" else f"; pip install {package}"
        raise AtollError(f"{url}: {protocol}:// needs a package that is not installed ({told(error)}){how}") from error
    except Exception as error:  # each file system has exceptions of its own
        raise AtollError(f"{url}: cannot be opened ({told(error)}); expected a path or a URL of fsspec") from error


def _list(url: str) -> tuple[str, dict[str, int], bool]:
    """The root, the files below it with their sizes, and whether the URL is one file.

    Raises OSError where nothing can be listed, FileNotFoundError where nothing is there.
    """
    url = url.removeprefix("file://") if "::" not in url else url
    if is_local(url):
        url = os.path.abspath(os.path.expanduser(url))
    fs, path = _filesystem(url)
    try:
        try:
            info = fs.info(path)
        except FileNotFoundError:
            if not glob.has_magic(url):
                raise FileNotFoundError("it is not there") from None
        else:
            if info["type"] != "directory":
                root, name = url.rsplit("/", 1)
                return root, {name: info.get("size") or 0}, True
            return url.rstrip("/"), dict(_below(fs, path)), False
        root = url[: _magic(url)].rpartition("/")[0]
        base, sizes = path[: _magic(path)].rpartition("/")[0], {}
        for found, info in fs.glob(path, detail=True).items():
            inside = found.removeprefix(base).lstrip("/")
            if info["type"] != "directory":
                sizes[inside] = info.get("size") or 0
            elif not inside.startswith("."):
                sizes |= {f"{inside}/{name}": size for name, size in _below(fs, found)}
        return root, _visible(sizes), False
    except OSError:
        raise
    except Exception as error:  # each file system has exceptions of its own
        raise OSError(told(error)) from error


def _magic(url: str) -> int:
    """Where the first wildcard of a glob stands."""
    return min(url.index(letter) for letter in "*?[" if letter in url)


def _below(fs: Any, path: str) -> Iterator[tuple[str, int]]:
    """The files in a directory and below, relative to it, with their sizes."""
    from fsspec.implementations.local import LocalFileSystem

    if not isinstance(fs, LocalFileSystem):
        yield from _visible(
            {posixpath.relpath(name, path): info.get("size") or 0 for name, info in fs.find(path, detail=True).items()}
        ).items()
        return
    # fsspec would make a dictionary of a dozen entries per file: this is ten times faster for a million files.
    seen = set()
    for folder, directories, names in os.walk(path, followlinks=True, onerror=_raise):
        stat = os.stat(folder)
        if (stat.st_dev, stat.st_ino) in seen:  # a link that leads back
            directories.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        inside = os.path.relpath(folder, path)
        for name in names:
            if not name.startswith("."):
                yield name if inside == "." else f"{inside}/{name}", _size(os.path.join(folder, name))


def _raise(error: OSError) -> None:
    raise error


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:  # a link to nowhere: whoever reads it says so
        return 0


def _visible(sizes: dict[str, int]) -> dict[str, int]:
    return {name: size for name, size in sizes.items() if not any(part.startswith(".") for part in name.split("/"))}


def _with_suffix(sizes: dict[str, int], suffixes: tuple[str, ...]) -> dict[str, int]:
    return {name: size for name, size in sizes.items() if name.lower().endswith(suffixes)}


def _below_common_root(listed: list[tuple[str, dict[str, int]]]) -> Files:
    """Several roots as one; a file that was named twice counts once."""
    parts = [root.split("/") for root, _ in listed]
    shared = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    common = "/".join(shared) if shared else None
    sizes: dict[str, int] = {}
    for (_, found), own in zip(listed, parts, strict=True):
        rest = "/".join(own[len(shared) :])
        sizes |= {f"{rest}/{name}" if rest else name: size for name, size in found.items()}
    return Files(common, dict(sorted(sizes.items())))
