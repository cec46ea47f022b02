"""WebDataset tars, as img2dataset writes them: 00000.tar with 000000000.jpg, 000000000.txt, 000000000.json, ...

The tars are read with the standard library. webdataset's own reader ends silently where a header is damaged or the
file is cut, gives the sample that the cut went through, and stops at a key that comes twice.
"""

import json
import posixpath
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from atoll.data.locate import (
    IMAGES,
    Unfit,
    ahead,
    caption_of,
    check_encoding,
    config_of,
    fingerprint,
    join,
    key_of,
    locate,
    open_file,
    printable,
    read_file,
    shown,
    split_of,
    told,
)
from atoll.data.types import Block, Raw, Skipped, Source
from atoll.errors import AtollError
from atoll.manifest import DataSettings
from atoll.storage.shards import Split, split_by_hash

SUFFIXES = (".tar", ".tar.gz", ".tgz")
_SAMPLE = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")  # WebDataset's rule: the key ends at the first dot of the file name


@dataclass
class _Sample:
    """Members that lie together and have one key. members: extension -> bytes, None where they are not needed."""

    key: str
    members: dict[str, bytes | None] = field(default_factory=dict)


_Content = Callable[[], bytes]


class _Damaged(Exception):
    """Here a tar cannot be read further; its text says why."""


class _Member(tarfile.TarInfo):
    """A member whose damaged header is an error; `tarfile` takes one for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "_Member":
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the end mark
            raise
        except tarfile.EmptyHeaderError:  # type: ignore[attr-defined]
            raise _Damaged("it ends without a tar's end mark" if tar.offset else "it is empty") from None
        except tarfile.HeaderError as error:
            raise _Damaged(f"no tar header at byte {tar.offset:,} ({told(error)})") from None


class Tars(Source):
    """Tars; one tar is one block and is streamed.

    A sample is what lies together and has one name up to the first dot. Its image is the member with the extension
    `data.image`, else the first of the usual ones; its caption the member with the extension `data.caption` (txt), else
    the json's "caption". `data.key` and `data.split` name fields of the json.

    Keys: "<the tar's path relative to the common root, without .tar>/<the sample's name>", unless `data.key` is set.

    Skipped are samples without an image, the second of two with one key, and what follows a damage: the samples
    before it are given, the one that it interrupts is not, as its end cannot be known.

    Raises AtollError if no tar is found.
    """

    name = "webdataset"

    def __init__(self, data: DataSettings):
        check_encoding(data.encoding)
        self._data = data
        self._files = locate(data.path or (), "tars", SUFFIXES)
        self._images = IMAGES if data.image is None else (data.image.lower().removeprefix("."),)
        self._caption = (data.caption or "txt").lower().removeprefix(".")
        self._blocks: list[Block] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the list of files: a block tells a worker all that it needs."""
        return {**self.__dict__, "_files": None, "_blocks": None}

    def blocks(self) -> list[Block]:
        if self._blocks is None:
            names = list(self._files.sizes)
            self._blocks = [
                Block(name.removesuffix(".tar"), count, (self._files.url(name), name.removesuffix(".tar")))
                for name, count in zip(names, _counts(self._files.root, names), strict=True)
            ]
        return self._blocks

    def read(self, block: Block) -> Iterator[Raw | Skipped]:
        url, name = block.content
        samples, seen = 0, set[str]()
        try:
            for sample in _samples(_members(url, {*self._images, self._caption, "json"})):
                samples += 1
                yield self._decode(name, sample, again=sample.key in seen)
                seen.add(sample.key)
        except _Damaged as error:
            yield Skipped(printable(name), f"tar: {error}; {samples:,} samples were read before that")
        else:
            if not samples:
                yield Skipped(printable(name), "tar: it holds no samples")

    def config(self) -> dict[str, Any]:
        return config_of(self.name, self._data)

    def fingerprint(self) -> str:
        """The sha256 over the relative name and the size of every tar."""
        return fingerprint(self._files.sizes.items())

    def _decode(self, name: str, sample: _Sample, again: bool) -> Raw | Skipped:
        key = f"{name}/{sample.key}"
        try:
            if again:
                raise Unfit(f"key: twice in its tar (again with {_list(sample)}); a sample's members must lie together")
            if printable(key) != key:
                raise Unfit("key: its name is not utf-8; rename it")
            image = next((sample.members[kind] for kind in self._images if sample.members.get(kind) is not None), None)
            if image is None:
                expected = ", ".join(self._images[:5]) + (", ..." if len(self._images) > 5 else "")
                raise Unfit(f"image: none among its members ({_list(sample)}); expected {expected}")
            facts = _Json(sample.members.get("json"))
            caption = self._text(sample, facts)
            key = key_of(facts[self._data.key]) if self._data.key is not None else key
            return Raw(key, image, caption, self._split(key, facts))
        except Unfit as error:
            return Skipped(printable(key), str(error))

    def _text(self, sample: _Sample, facts: "_Json") -> str:
        text = sample.members.get(self._caption)
        if text is not None and self._caption != "json":
            return caption_of(text, self._data.encoding)
        return caption_of(facts.get("caption"), self._data.encoding)

    def _split(self, key: str, facts: "_Json") -> Split:
        if self._data.split is not None:
            return split_of(facts[self._data.split])
        return split_by_hash(key, self._data.validation)


class _Json:
    """The json of a sample, parsed when something in it is asked for. Raises Unfit if it is none, or lacks a field."""

    def __init__(self, data: bytes | None):
        self._data = data
        self._fields: dict[str, Any] | None = None

    def get(self, name: str) -> Any:
        """The field, None where there is none."""
        return self._parsed().get(name)

    def __getitem__(self, name: str) -> Any:
        fields = self._parsed()
        if name not in fields:
            raise Unfit(f"json: no field {name!r}; it has {shown(', '.join(fields)) or 'none'}")
        return fields[name]

    def _parsed(self) -> dict[str, Any]:
        if self._fields is None:
            try:
                fields = json.loads(self._data) if self._data is not None else {}
            except (ValueError, RecursionError) as error:
                raise Unfit(f"json: cannot be parsed ({told(error)})") from None
            if not isinstance(fields, dict):
                raise Unfit(f"json: is a {type(fields).__name__}, expected an object")
            self._fields = fields
        return self._fields


def _members(url: str, wanted: set[str]) -> Iterator[tuple[str, str, _Content | None]]:
    """The members of a tar: key, extension in lower case and, if that is wanted, what reads the content.

    The content must be read before the next member is asked for.

    Raises _Damaged where it cannot be read further, or goes on after its end mark.
    """
    try:
        with open_file(url) as file, tarfile.open(fileobj=file, mode="r|*", tarinfo=_Member) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # else all headers of the tar stay in memory
                base = posixpath.basename(member.name)
                # As webdataset: __name__ holds facts about the tar, and a dot begins the names of hidden files.
                if not member.isfile() or base.startswith(".") or re.match(r"__[^/]*__($|/)", member.name):
                    continue
                match = _SAMPLE.fullmatch(member.name.removeprefix("./"))
                key, extension = match.groups() if match else (member.name.removeprefix("./"), "")
                yield key, extension.lower(), partial(_content, tar, member) if extension.lower() in wanted else None
            while rest := tar.fileobj.read(1 << 16):
                if rest.strip(b"\0"):
                    raise _Damaged("it goes on after its end mark")
    except (_Damaged, AtollError):
        raise
    except Exception as error:  # tarfile and its decompressors raise almost anything over damaged bytes
        raise _Damaged(told(error)) from error


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if member.issparse():
        raise _Damaged(f"{shown(member.name)} is a sparse file, which no image is")
    try:
        file = tar.extractfile(member)
        content = file.read() if file is not None else b""
    except Exception as error:  # as above
        raise _Damaged(told(error)) from error
    if len(content) != member.size:
        raise _Damaged("unexpected end of data")
    return content


def _samples(members: Iterator[tuple[str, str, _Content | None]]) -> Iterator[_Sample]:
    """Groups members. A sample is given once the next header, or the end mark, shows that it is complete.

    A member whose extension its sample has already begins another sample, of the same key.
    """
    current: _Sample | None = None
    for key, extension, content in members:
        if current is None or key != current.key or extension in current.members:
            if current is not None:
                yield current
            current = _Sample(key)
        current.members[extension] = content() if content is not None else None
    if current is not None:
        yield current


def _list(sample: _Sample) -> str:
    return shown(", ".join(extension or "no extension" for extension in sample.members))


def _counts(root: str | None, names: list[str]) -> Iterator[int | None]:
    """How many samples each tar holds, by the 00000_stats.json that img2dataset puts beside 00000.tar."""

    def count(name: str) -> int | None:
        try:
            stats = json.loads(read_file(join(root, name.removesuffix(".tar") + "_stats.json")))
        except (OSError, ValueError, RecursionError):
            return None
        found = stats.get("successes", stats.get("count")) if isinstance(stats, dict) else None
        return found if isinstance(found, int) and not isinstance(found, bool) and found >= 0 else None

    yield from ahead(count, names, threads=16)
