"""A folder of images, with captions in .txt files beside them or in metadata.jsonl or metadata.csv."""

import csv
import io
import json
import posixpath
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from atoll.data.locate import (
    IMAGES,
    Files,
    Unfit,
    ahead,
    caption_of,
    check_encoding,
    config_of,
    encoding_of,
    fingerprint,
    is_local,
    join,
    key_of,
    locate,
    nothing,
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
from atoll.storage.shards import split_by_hash

METADATA = ("metadata.jsonl", "metadata.csv")
_CAPTIONS = ("text", "caption")  # where data.caption names none
_THREADS = 16  # that fetch files which are far away


class Entry(NamedTuple):
    """An image and what is known of it before it is read.

    file: relative to the root, as is sidecar. caption: as the metadata has it; None where the sidecar tells, if any.
    reason: why it cannot be used, "" if it can.
    """

    key: str
    file: str = ""
    sidecar: str | None = None
    caption: str | None = None
    split: str | None = None
    reason: str = ""


class Folder(Source):
    """The images in a folder and below, in the order of their relative paths, which are their keys.

    Captions, by the Hugging Face imagefolder convention: a metadata.jsonl or metadata.csv, in the folder or below,
    names images relative to itself (`file_name`), with the caption in `data.caption`, else in text or caption;
    `data.key` and `data.split` name more columns. An image that no metadata names has its caption in the file
    of the same name that ends in .txt. Names of directories say nothing, and what begins with a dot is not looked at.

    Skipped are, first, lines of metadata that cannot be read; then, among the others, images that metadata names
    and that are not there.

    Raises AtollError if there are no images, or the metadata lacks a column.
    """

    name = "folder"

    def __init__(self, data: DataSettings):
        check_encoding(data.encoding)
        self._data = data
        files = locate(data.path or (), "images", None)
        self._root = files.root
        self._entries, self._fingerprint = _scan(files, data)

    def __getstate__(self) -> dict[str, Any]:
        """Without the list of files: a block tells a worker all that it needs."""
        return {"_data": self._data, "_root": self._root}

    def blocks(self) -> list[Block]:
        size, entries = self._data.block, self._entries
        parts = [(start, entries[start : start + size]) for start in range(0, len(entries), size)]
        return [Block(f"{start:09d}-{start + len(part):09d}", len(part), part) for start, part in parts]

    def read(self, block: Block) -> Iterator[Raw | Skipped]:
        near = self._root is not None and is_local(self._root)
        yield from map(self._read, block.content) if near else ahead(self._read, block.content, _THREADS)

    def config(self) -> dict[str, Any]:
        return config_of(self.name, self._data)

    def fingerprint(self) -> str:
        """The sha256 over the relative name and the size of every image, sidecar and metadata file."""
        return self._fingerprint

    def _read(self, entry: Entry) -> Raw | Skipped:
        if entry.reason:
            return Skipped(entry.key, entry.reason)
        try:
            caption = caption_of(entry.caption, self._data.encoding)
            if entry.caption is None and entry.sidecar is not None:
                caption = caption_of(self._bytes(entry.sidecar), self._data.encoding)
            named = self._data.split is not None
            split = split_of(entry.split) if named else split_by_hash(entry.key, self._data.validation)
            return Raw(entry.key, self._bytes(entry.file), caption, split)
        except Unfit as error:
            return Skipped(entry.key, str(error))

    def _bytes(self, name: str) -> bytes:
        try:
            return read_file(join(self._root, name))
        except OSError as error:
            raise Unfit(f"{shown(name)}: cannot be read ({told(error)})") from None


def _scan(files: Files, data: DataSettings) -> tuple[list[Entry], str]:
    """All entries in order, and the hash of what they are read from."""
    metadata = [name for name in files.sizes if posixpath.basename(name) in METADATA]
    images = {name for name in files.sizes if _extension(name) in IMAGES}
    rows = _Metadata(files, data)
    for name in metadata:
        rows.read(name)
    rows.check_columns(bool(metadata))
    images |= rows.found.keys()  # metadata may name what has no usual extension
    if not images:
        raise nothing(data.path, "images", [f".{kind}" for kind in IMAGES[:5]], files.sizes)
    entries = [rows.entry(name) for name in sorted(images)]
    read = [name for entry in entries for name in (entry.file, entry.sidecar) if name in files.sizes]
    sizes = ((name, files.sizes[name]) for name in sorted({*metadata, *read}))
    return rows.problems + entries, fingerprint(sizes)


def _extension(name: str) -> str:
    return posixpath.splitext(name)[1][1:].lower()


class _Row(NamedTuple):
    """A line of metadata. where: its file and number. key: None if it has none that is fit."""

    where: str
    caption: str | None
    key: str | None
    split: str | None
    reason: str


class _Metadata:
    """What the metadata files say, by the name of the image; problems: lines that say nothing that can be used."""

    def __init__(self, files: Files, data: DataSettings):
        self._files, self._data = files, data
        self._columns: dict[str, None] = {}  # in the order of their appearance
        self.found: dict[str, _Row] = {}
        self.problems: list[Entry] = []

    def read(self, name: str) -> None:
        """Takes in one metadata file. Raises AtollError if it cannot be read, or its directory has two."""
        folder = posixpath.dirname(name)
        if name.endswith(".csv") and posixpath.join(folder, METADATA[0]) in self._files.sizes:
            raise AtollError(f"{self._files.url(folder)}: holds both {' and '.join(METADATA)}; remove one of them")
        lines = _csv if name.endswith(".csv") else _jsonl
        try:
            with open_file(self._files.url(name)) as raw:
                file = io.BufferedReader(raw) if not hasattr(raw, "peek") else raw
                encoding = encoding_of(file.peek(3)[:3], self._data.encoding)
                # surrogateescape: a byte that is no text spoils its own line and no other
                text = io.TextIOWrapper(file, encoding, errors="surrogateescape", newline="")
                for number, record in lines(text, self._files.url(name)):
                    where = f"{shown(name)}:{number}"
                    try:
                        self._take(folder, where, record())
                    except Unfit as error:
                        self.problems.append(Entry(where, reason=f"metadata: {error}"))
        except UnicodeError as error:
            raise AtollError(f"{self._files.url(name)}: not {encoding} ({told(error)}); set data.encoding") from error
        except OSError as error:
            raise AtollError(f"{self._files.url(name)}: cannot be read ({told(error)})") from error

    def _take(self, folder: str, where: str, record: dict[str, Any]) -> None:
        self._columns |= dict.fromkeys(record)
        named = record.get("file_name")
        if not isinstance(named, str) or not named:
            raise Unfit(f"no file_name in this line; it has {shown(', '.join(record)) or 'nothing'}")
        name = posixpath.normpath(posixpath.join(folder, named))
        if name in self.found:
            raise Unfit(f"names {shown(name)} again (first in {self.found[name].where}); the first line is used")
        self.found[name] = self._row(where, record)

    def _row(self, where: str, record: dict[str, Any]) -> _Row:
        data, key = self._data, None
        column = data.caption or next((name for name in _CAPTIONS if name in record), None)
        try:
            for name in filter(None, (data.key, data.split)):
                if name not in record:
                    raise Unfit(f"no column {name!r} in {where}")
            key = key_of(record[data.key]) if data.key is not None else None
            caption = caption_of(record.get(column) if column else None, data.encoding)
        except Unfit as error:
            return _Row(where, "", key, None, str(error))
        split = str(record[data.split]) if data.split is not None else None
        return _Row(where, caption if column in record else None, key, split, "")

    def check_columns(self, any_metadata: bool) -> None:
        """Raises AtollError if a column that the settings name is in no line."""
        for setting in ("caption", "key", "split"):
            column = getattr(self._data, setting)
            if column is None or column in self._columns or (any_metadata and not self._columns):
                continue
            there = f"its columns are {shown(', '.join(self._columns))}" if any_metadata else "there is no metadata"
            raise AtollError(f"{self._data.path}: no column {column!r}, which data.{setting} names; {there}")

    def entry(self, name: str) -> Entry:
        """What is known of an image."""
        row = self.found.get(name)
        key = row.key if row is not None and row.key is not None else name
        if name not in self._files.sizes:
            where = row.where if row is not None else ""
            return Entry(printable(key), reason=f"image: {where} names {shown(name)}, which is not there")
        if row is not None and row.reason:
            return Entry(printable(key), name, reason=row.reason)
        if row is None and (self._data.key is not None or self._data.split is not None):
            return Entry(
                printable(key), name, reason="metadata: no line names this image, so its key or split is unknown"
            )
        if printable(key) != key:
            return Entry(printable(key), name, reason="key: its name is not utf-8; rename it")
        text = posixpath.splitext(name)[0] + ".txt"
        caption = row.caption if row is not None else None
        sidecar = text if caption is None and text in self._files.sizes else None
        return Entry(key, name, sidecar, caption, row.split if row is not None else None)


# A line of metadata that is parsed when it is called, and then may raise Unfit.
_Line = Callable[[], dict[str, Any]]


def _jsonl(text: io.TextIOWrapper, where: str) -> Iterator[tuple[int, _Line]]:
    """The lines of a metadata.jsonl with their numbers, which start at 1."""

    def parse(line: str) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise Unfit(f"this line is no JSON ({told(error)})") from None
        if not isinstance(record, dict):
            raise Unfit(f"this line is a {type(record).__name__}, expected an object")
        return record

    for number, line in enumerate(text, 1):
        if line.strip():
            yield number, lambda line=line: parse(line)  # type: ignore[misc]


def _csv(text: io.TextIOWrapper, where: str) -> Iterator[tuple[int, _Line]]:
    """The rows of a metadata.csv, each with its last line's number. Raises AtollError if it has no file_name."""
    reader = csv.reader(text, strict=True)

    def parse(cells: list[str] | csv.Error) -> dict[str, Any]:
        if isinstance(cells, csv.Error):
            raise Unfit(f"this line is no CSV ({told(cells)})")
        if len(cells) != len(header):
            raise Unfit(f"this line has {len(cells)} cells, the header has {len(header)}")
        return dict(zip(header, cells, strict=True))

    header: list[str] = []
    while True:
        try:
            cells: list[str] | csv.Error = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            cells = error
        if not header:
            header = cells if isinstance(cells, list) else []
            if "file_name" not in header:
                raise AtollError(f"{where}: no column 'file_name'; its columns are {shown(', '.join(header))}")
        elif cells != []:
            yield reader.line_num, lambda cells=cells: parse(cells)  # type: ignore[misc]
