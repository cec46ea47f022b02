"""Find the files for a path, a glob, a URL or a list of them.

Paths are local or URLs; whatever fsspec opens is fine (s3://, gs://, hf://, https://, memory://, ...).
"""

import glob
import os
import posixpath
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from atoll.data.fingerprint import Listing, stamp_of, tag_of
from atoll.data.names import canonical, clean, listed, message_of
from atoll.data.opening import filesystem, is_local, join
from atoll.encoders.weights import unset_variable
from atoll.errors import AtollError
from atoll.manifest import DataSettings
from atoll.storage.memory import refuse_out_of_memory

# Extensions of images. Formats that Pillow cannot decode (heic without a plugin) are listed too: they are skipped with
# a reason instead of going unnoticed.
IMAGES = (
    *("jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "gif", "bmp", "dib", "tif", "tiff", "avif", "heic", "heif"),
    *("jxl", "jp2", "j2k", "jpx", "ppm", "pgm", "pbm", "pnm", "pcx", "tga", "sgi", "qoi", "ico", "psd"),
)

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MOST_SHARDS = 10_000_000  # limit for one range; LAION-5B has 232,000 shards
_LEAVES = "a link that leaves the folder, which is not followed; data.links: follow reads it"

Links = Literal["inside", "follow"]
Gaps = Literal["refuse", "skip"]

# Settings that decide which samples a source yields. The first ones are in every card, the others only where they
# differ from their defaults: a new setting then leaves old cards valid.
_ALWAYS = ("path", "image", "caption", "key", "split", "validation", "encoding")
_WHERE_SET = (
    *("metadata", "file_name", "companions", "splits", "links", "key_until", "missing_shards", "fingerprint"),
    *("caption_weights", "caption_lines", "focus"),
)


class _Entry(NamedTuple):
    """A file as its directory lists it.

    Attributes:
        size: bytes.
        stamp: time of change or tag; "" if unknown.
        reason: why the file is not opened; "" if it is.
    """

    size: int
    stamp: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Files:
    """Files below a common root.

    Attributes:
        root: an absolute path or a URL; None if the files have nothing in common.
        sizes: posix path relative to the root -> bytes, in the order of the paths.
        stamps: the same names -> time of change, or tag.
        unopened: names of pipes, devices and links out of the folder -> why they are not opened.
        missing: shards of a range that are not there.
    """

    root: str | None
    sizes: dict[str, int]
    stamps: dict[str, str] = field(default_factory=dict)
    unopened: dict[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()

    def url(self, name: str) -> str:
        """Return the path or URL for `open_file`."""
        return join(self.root, name)

    def listing(self, names: Iterable[str]) -> Listing:
        """Return the sizes and stamps of some of the files."""
        names = sorted(names)
        stamps = {name: self.stamps.get(name, "") for name in names}
        return Listing(self.root, {name: self.sizes[name] for name in names}, stamps)


def locate(
    path: str | tuple[str, ...],
    what: str,
    suffixes: tuple[str, ...] | None = None,
    links: Links = "follow",
    gaps: Gaps = "refuse",
) -> Files:
    """Find the files for a path, a glob, a URL or a list of them; directories are searched recursively.

    `~`, `$VAR` and `{00000..00999}` are expanded. Names that start with a dot are left out.

    Args:
        path: a path, glob or URL, or several.
        what: the kind of files in plural, for messages.
        suffixes: suffixes to select, in lower case; they match any case. A file named outright may have any suffix.
            None selects all files, and `path` may then name only directories.
        links: "follow" also reads links that leave a directory; "inside" lists them as unopened.
        gaps: "skip" accepts a range that names missing files; "refuse" raises.

    Returns:
        The files below their common root.

    Raises:
        AtollError: a path does not exist or holds no such file, or its file system needs a package.
    """
    parts: list[tuple[str, dict[str, _Entry]]] = []
    missing: list[str] = []
    for entry in [path] if isinstance(path, str) else path:
        # A range expands first, so that missing shards can be counted per entry.
        urls = list(_ranges(os.path.expandvars(entry)))
        absent = []
        for url in urls:
            try:
                root, entries, outright = _list(url, links)
            except FileNotFoundError as error:
                absent.append(url)
                # Some shards may be missing; an entry of which all are missing is a wrong path.
                if len(absent) < len(urls):
                    continue
                _refuse_unset(entry, url)
                raise _cannot_list(entry, url, what, error) from error
            except OSError as error:
                _refuse_unset(entry, url)
                raise _cannot_list(entry, url, what, error) from error
            # Without suffixes the caller reads whole directories, so a single file is a mistake.
            if suffixes is None and outright:
                raise AtollError(f"{clean(entry)}: is a file; expected a directory that holds {what}")
            # A file named outright is read whatever its suffix; a search selects by suffix.
            wanted = entries if suffixes is None or outright else _with_suffix(entries, suffixes)
            if outright and (reason := next(iter(entries.values())).reason):
                raise AtollError(f"{clean(entry)}: is {reason}; expected {what}")
            if not wanted:
                _refuse_unset(entry, url)
                raise nothing(_both(entry, url), what, suffixes or (), entries)
            parts.append((root, wanted))
        # Missing shards are collected over the whole range, so that one error names them all.
        if absent and gaps == "refuse":
            raise AtollError(
                f"{clean(entry)}: {len(absent):,} of {len(urls):,} are not there ({listed(absent)}); "
                "fetch them, or go on without them: data.missing_shards: skip"
            )
        missing += absent
    if not parts:
        raise AtollError(f"data.path is empty; expected where {what} are")
    return _below_common_root(parts, tuple(missing))


def _cannot_list(entry: str, url: str, what: str, error: OSError) -> AtollError:
    return AtollError(f"{_both(entry, url)}: cannot be listed ({message_of(error)}); expected {what}")


def _alike(url: str) -> str:
    """Return the path of the disk that prints like a local one that is not there; "" if there is none."""
    parent, name = os.path.split(url)
    if parent == url or not (os.path.isdir(parent) or (parent := _alike(parent))):
        return ""
    try:
        return next((os.path.join(parent, n) for n in os.listdir(parent) if canonical(n) == canonical(name)), "")
    except OSError:
        return ""


def _refuse_unset(entry: str, url: str) -> None:
    if unset := unset_variable(url):
        raise AtollError(f"{entry}: {unset} is not set in the environment; set it, or name the path itself")


def _both(entry: str, url: str) -> str:
    """Return a path as in the settings, followed by its expanded form if it has variables."""
    return clean(entry if "$" not in entry else f"{entry} ({url})")


def nothing(where: object, what: str, suffixes: Iterable[str], names: Iterable[str]) -> AtollError:
    """Return the error for a path without matching files; it lists the extensions that are present."""
    # The three most frequent extensions usually show the mistake.
    kinds = Counter(posixpath.splitext(name)[1] or "no extension" for name in names)
    there = ", ".join(f"{count:,} of {clean(kind)}" for kind, count in kinds.most_common(3))
    return AtollError(
        f"{where}: no {what} found; looked for {', '.join(suffixes) or 'files'} in it and below, "
        f"there {f'are files: {there}' if there else 'is nothing'}"
    )


def config_of(name: str, data: DataSettings) -> dict[str, Any]:
    """Return the settings that decide which samples a source of files yields."""
    always = data.model_dump(mode="json", include=set(_ALWAYS))
    return {"name": name, **always, **data.model_dump(mode="json", include=set(_WHERE_SET), exclude_defaults=True)}


def _ranges(text: str) -> Iterator[str]:
    """Expand ranges such as {00000..00999}, WebDataset's notation for many tars."""
    match = _RANGE.search(text)
    if match is None:
        yield text
        return
    # Check the length before expanding: a typo must not fill the memory.
    first, last = match.groups()
    if int(last) - int(first) >= _MOST_SHARDS:
        raise AtollError(f"{clean(text)}: a range of {int(last) - int(first) + 1:,}; expected at most {_MOST_SHARDS:,}")
    for number in range(int(first), int(last) + 1):
        # The recursion expands further ranges in the same text. The width of the first number sets the zero padding.
        yield from _ranges(text[: match.start()] + f"{number:0{len(first)}d}" + text[match.end() :])


def _list(url: str, links: Links) -> tuple[str, dict[str, _Entry], bool]:
    """List the files at a URL.

    Returns:
        The root, the files below it by relative name, and whether the URL names one file.

    Raises:
        FileNotFoundError: nothing exists there.
        OSError: it cannot be listed.
    """
    # A chained URL (zip::file://...) belongs to fsspec as a whole.
    url = url.removeprefix("file://") if "::" not in url else url
    if local := is_local(url):
        url = os.path.abspath(os.path.expanduser(url))
        if not os.path.lexists(url) and not glob.has_magic(url):
            url = _alike(url) or url
    fs, path = filesystem(url)
    try:
        try:
            # A path that exists is taken literally, even if its name has wildcard characters.
            info = fs.info(path)
        except FileNotFoundError:
            if not glob.has_magic(url):
                raise FileNotFoundError("it is not there") from None
        else:
            if info["type"] == "directory":
                return url.rstrip("/"), _directory(fs, path, local, links), False
            root, name = url.rsplit("/", 1)
            return root, {name: _inspect(path, None) if local else _remote(info)}, True
        # It is a glob: its root is the directory before the first wildcard.
        root = url[: _magic(url)].rpartition("/")[0]
        base = path[: _magic(path)].rpartition("/")[0]
        entries: dict[str, _Entry] = {}
        for match, info in fs.glob(path, detail=True).items():
            inside = match.removeprefix(base).lstrip("/")
            if info["type"] == "directory":
                # A glob may match directories; they are searched recursively.
                if not inside.startswith("."):
                    below = _directory(fs, match, local, links)
                    entries |= {f"{inside}/{name}": entry for name, entry in below.items()}
            else:
                entries[inside] = _inspect(match, _inner(base, links)) if local else _remote(info)
        return root, _visible(entries), False
    except OSError:
        raise
    except Exception as error:  # each file system has exceptions of its own
        refuse_out_of_memory(error, clean(url))
        raise OSError(message_of(error)) from error


def _magic(url: str) -> int:
    """Return the index of the first wildcard in a glob."""
    return min(url.index(letter) for letter in "*?[" if letter in url)


def _directory(fs: Any, path: str, local: bool, links: Links) -> dict[str, _Entry]:
    """Return the files in a directory and below, by relative name."""
    # A local walk also detects links, pipes and loops, which fsspec does not report.
    if local:
        return dict(_walk(path, _inner(path, links)))
    names = fs.find(path, detail=True).items()
    return _visible({posixpath.relpath(name, path): _remote(info) for name, info in names})


def _remote(info: dict[str, Any]) -> _Entry:
    return _Entry(info.get("size") or 0, tag_of(info))


def _inner(path: str, links: Links) -> str | None:
    """Return the real path that links must not leave; None if links may lead anywhere."""
    return os.path.realpath(path) if links == "inside" else None


def _walk(top: str, inner: str | None) -> Iterator[tuple[str, _Entry]]:
    """Yield the files in a local directory and below; fsspec would be ten times slower for a million files."""
    seen, waiting = set(), [""]
    while waiting:
        inside = waiting.pop()
        folder = os.path.join(top, inside)
        # Device and inode identify a directory whatever path leads to it.
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:  # a link that leads back
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                name = f"{inside}/{entry.name}" if inside else entry.name
                # Test links first: is_dir follows them and would leave the folder.
                if entry.is_symlink() and inner is not None and not _within(entry.path, inner):
                    yield name, _Entry(0, reason=_LEAVES)
                elif entry.is_dir():
                    waiting.append(name)
                else:
                    yield name, _inspect(entry.path, None)


def _within(path: str, inner: str) -> bool:
    """Return whether a link's target is inside the directory `inner`, a real path."""
    # Compare with a trailing slash, so that /data2 is not inside /data.
    target = os.path.realpath(path)
    return target == inner or target.startswith(inner.rstrip("/") + "/")


def _inspect(path: str, inner: str | None) -> _Entry:
    """Return size and time of a local file, through links; pipes and devices are not opened: reading may never end."""
    if inner is not None and os.path.islink(path) and not _within(path, inner):
        return _Entry(0, reason=_LEAVES)
    try:
        status = os.stat(path)
    except OSError:  # a link to nowhere: reading it gives the reason
        return _Entry(0)
    # Name the kind in the reason.
    if not stat.S_ISREG(status.st_mode):
        kinds = ((stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
        kind = next((name for is_kind, name in kinds if is_kind(status.st_mode)), "a device")
        return _Entry(0, reason=f"{kind}, which is not opened")
    return _Entry(status.st_size, stamp_of(status))


def _visible(entries: dict[str, _Entry]) -> dict[str, _Entry]:
    return {n: entry for n, entry in entries.items() if not any(part.startswith(".") for part in n.split("/"))}


def _with_suffix(entries: dict[str, _Entry], suffixes: tuple[str, ...]) -> dict[str, _Entry]:
    return {name: entry for name, entry in entries.items() if name.lower().endswith(suffixes)}


def _below_common_root(parts: list[tuple[str, dict[str, _Entry]]], missing: tuple[str, ...]) -> Files:
    """Merge several roots into one; a file that was named twice counts once."""
    roots = [root.split("/") for root, _ in parts]
    # The common root is the longest shared prefix of whole path components.
    shared = []
    for level in zip(*roots, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    entries: dict[str, _Entry] = {}
    for (_, own), root in zip(parts, roots, strict=True):
        # Prefix each name with the part of its own root below the common one.
        rest = "/".join(root[len(shared) :])
        entries |= {f"{rest}/{name}" if rest else name: entry for name, entry in own.items()}
    # Sort, so that the order of samples depends neither on the file system nor on the order of paths.
    ordered = sorted(entries.items())
    return Files(
        "/".join(shared) if shared else None,
        {name: entry.size for name, entry in ordered if not entry.reason},
        {name: entry.stamp for name, entry in ordered if not entry.reason},
        {name: entry.reason for name, entry in ordered if entry.reason},
        missing,
    )
