"""Detect whether data changed since they were encoded: by sizes and times, then by contents where these differ.

The fingerprint in a card is a hash of names and sizes: fast even for terabytes. An edit that keeps a file's size is
detected by a record beside the shards: size, time of change and content hash of every file as it was encoded. A file
whose time differs is hashed again; one whose content is still the same (copied, touched) has not changed.

On request (`data.fingerprint: content`) the card's hash covers the contents, and all files are read for it.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from atoll.data.names import listed
from atoll.data.opening import is_local, join, open_file
from atoll.errors import AtollError
from atoll.storage.memory import refuse_out_of_memory

SOURCE_FILES = "source.parquet"  # the record beside the shards
_THREADS = 4
_PIECE = 1 << 20  # bytes


class FileRecord(NamedTuple):
    """A file as it was read. stamp: its time or its tag, "" if unknown. sha256: of its content, "" if not computed."""

    name: str
    size: int
    stamp: str
    sha256: str


@dataclass(frozen=True)
class Listing:
    """The files of a source. root: as in `Files`. sizes: bytes by name. stamps: times of change, or tags, by name."""

    root: str | None
    sizes: Mapping[str, int]
    stamps: Mapping[str, str]


@dataclass
class Changes:
    """How files differ from their record. Each list holds names."""

    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    edited: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.edited)

    def __str__(self) -> str:
        parts = (("edited", self.edited), ("new", self.added), ("gone", self.removed))
        return "; ".join(f"{what}: {listed(names)}" for what, names in parts if names)


def fingerprint(sizes: Iterable[tuple[str, int]]) -> str:
    """Return the sha256 over relative names and sizes."""
    digest = hashlib.sha256()
    for name, size in sizes:
        # The zero byte cannot be in a name, so different lists never give the same bytes.
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0%d\n" % size)
    return digest.hexdigest()


def content_fingerprint(root: str | None, names: Sequence[str]) -> str:
    """Return the sha256 over relative names and contents; reads every file.

    Raises:
        AtollError: a file cannot be read.
    """
    digest = hashlib.sha256()
    with ThreadPoolExecutor(_THREADS) as pool:
        # `map` keeps the order of names, so the digest does not depend on timing.
        for name, sha in zip(names, pool.map(lambda name: _hash(join(root, name)), names), strict=True):
            if not sha:
                raise AtollError(f"{listed([name])}: cannot be read for its content hash; mend or remove it")
            digest.update(name.encode("utf-8", "surrogateescape") + b"\0" + sha.encode() + b"\n")
    return digest.hexdigest()


def stamp_of(stat: os.stat_result) -> str:
    """Return the times at which a local file's content and its entry changed, in nanoseconds.

    A tool may set the first time back, and no tool can set the second.
    """
    return f"{stat.st_mtime_ns} {stat.st_ctime_ns}"


def tag_of(info: Mapping[str, Any]) -> str:
    """Return the tag or time by which a remote file system distinguishes versions of a file; "" if it has none."""
    keys = ("ETag", "etag", "md5Hash", "content_md5", "checksum", "blob_id", "LastModified", "last_modified", "mtime")
    return next((str(info[key]) for key in (*keys, "updated", "created") if info.get(key)), "")


def record_files(root: str | None, names: Sequence[str]) -> list[FileRecord]:
    """Record local files by reading their contents; remote files are identified by tags and have no records."""
    if root is None or not is_local(root):
        return []
    with ThreadPoolExecutor(_THREADS) as pool:
        return [record for record in pool.map(lambda name: _record(root, name), names) if record is not None]


def _record(root: str, name: str) -> FileRecord | None:
    """Return the record of a file; None if it vanished, which counts as an edit."""
    path = join(root, name)
    try:
        before = os.stat(path)
        sha = _hash(path)
        after = os.stat(path)
    except OSError:
        return None
    # If the file was edited meanwhile, it is unknown which content was encoded.
    steady = (before.st_size, stamp_of(before)) == (after.st_size, stamp_of(after))
    return FileRecord(name, before.st_size, stamp_of(before), sha if steady else "")


def _hash(path: str) -> str:
    """Return the sha256 of a file; "" if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open_file(path) as file:
            while piece := file.read(_PIECE):
                digest.update(piece)
    except MemoryError:
        raise
    except Exception:  # each file system has exceptions of its own
        return ""
    return digest.hexdigest()


def sealed_records(listing: Listing, records: Iterable[FileRecord]) -> list[FileRecord]:
    """Return the final records: every listed file with its stamp from the listing and its hash from the encoding.

    A file that changed between listing and hashing has no hash: the next comparison counts it as edited.
    """
    # Combine the stamp at the start with the hash during encoding, if the file was the same at both times.
    by_name = {record.name: record for record in records}
    sealed = []
    for name, size in listing.sizes.items():
        record, stamp = by_name.get(name), listing.stamps.get(name, "")
        same = record is not None and (record.size, record.stamp) == (size, stamp)
        sealed.append(FileRecord(name, size, stamp, record.sha256 if same and record is not None else ""))
    return sealed


def changes(listing: Listing, records: Iterable[FileRecord], complete: bool = True, contents: bool = False) -> Changes:
    """Compare the files of a source with their records. Only files whose stamp differs are read.

    Args:
        listing: the current files.
        records: the files when they were encoded.
        complete: whether the records cover all files; else only the recorded ones are compared.
        contents: read all files that have a recorded hash, whatever their stamps.
    """
    differences, seen, suspects = Changes(), set(), []
    # First by size and stamp, which cost nothing; only suspects are read.
    for record in records:
        seen.add(record.name)
        size = listing.sizes.get(record.name)
        if size is None:
            differences.removed.append(record.name)
        elif size != record.size:
            differences.edited.append(record.name)
        elif listing.stamps.get(record.name, "") != record.stamp or (contents and record.sha256):
            suspects.append(record)
    # Partial records cannot show additions.
    if complete:
        differences.added += [name for name in listing.sizes if name not in seen]
    with ThreadPoolExecutor(_THREADS) as pool:
        # A suspect without a recorded hash counts as edited: nothing proves otherwise.
        hashes = pool.map(lambda record: _hash(join(listing.root, record.name)) if record.sha256 else "", suspects)
        differences.edited += [r.name for r, sha in zip(suspects, hashes, strict=True) if not sha or sha != r.sha256]
    return differences


def write_records(path: Path, records: Sequence[FileRecord]) -> None:
    """Write records as a parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from atoll.storage.artifact import write_bytes

    # Names are bytes, because file names need not be utf-8.
    columns = {
        "name": pa.array([record.name.encode("utf-8", "surrogateescape") for record in records], pa.binary()),
        "size": pa.array([record.size for record in records], pa.int64()),
        "stamp": pa.array([record.stamp for record in records], pa.string()),
        "sha256": pa.array([bytes.fromhex(record.sha256) for record in records], pa.binary()),
    }
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    write_bytes(path, sink.getvalue().to_pybytes())


def read_records(path: Path) -> list[FileRecord] | None:
    """Read records; None if missing or unreadable: then only names and sizes can be compared."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        columns = pq.ParquetFile(path).read().to_pydict()
        rows = zip(*(columns[name] for name in FileRecord._fields), strict=True)
        return [
            FileRecord(name.decode("utf-8", "surrogateescape"), size, stamp, sha.hex())
            for name, size, stamp, sha in rows
        ]
    except (OSError, pa.ArrowException, KeyError, TypeError, AttributeError) as error:
        refuse_out_of_memory(error, path)
        return None
