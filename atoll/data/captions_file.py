"""A file of captions by key, such as `atoll recaption` writes, and a source whose captions come from one.

Each line is {"key": "...", "captions": [...]}: a text, or a list as everywhere (`atoll.data.caption_lists`); null if
there is no caption.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from atoll.data.caption_lists import captions_of, combined, first_and_others
from atoll.data.fingerprint import FileRecord, Listing
from atoll.data.limits import MAX_LINE
from atoll.data.names import clean, message_of
from atoll.data.tally import Tally
from atoll.data.types import Block, Raw, Skipped, Source, Unfit
from atoll.errors import AtollError
from atoll.manifest import DataSettings
from atoll.storage.shards import Weighted, unpack

NOT_NAMED = "images without a line in the captions file, which keep their own caption"  # start of a note


class CaptionsFile:
    """Captions by key. Only the hashes of the keys and the places of the lines are in memory, 16 bytes for each.

    Args:
        path: the file.
        torn: whether a last line without an end is left out, as a killed process leaves it.

    Attributes:
        sha256: of the file.
        complete: bytes of all lines with an end.

    Raises:
        AtollError: the file cannot be read, or a line is no object with a key and captions, or repeats a key.
    """

    def __init__(self, path: Path, torn: bool = False):
        self.path, digest = path, hashlib.sha256()
        hashes, places = [], []
        self.complete = 0
        try:
            with path.open("rb") as file:
                number = 0
                while line := file.readline(MAX_LINE + 1):
                    number += 1
                    if torn and not line.endswith(b"\n"):
                        break
                    digest.update(line)
                    if line.strip():
                        hashes.append(_hash(self._parse(line, number)["key"]))
                        places.append((self.complete, number))
                    self.complete += len(line)
        except OSError as error:
            raise AtollError(f"{path}: cannot be read ({message_of(error)})") from None
        self.sha256 = digest.hexdigest()
        # Sorted by hash; stable, so that the first of two lines with one key comes first.
        order = np.argsort(np.array(hashes, dtype=np.uint64), kind="stable")
        self._hashes = np.array(hashes, dtype=np.uint64)[order]
        self._places = np.array(places, dtype=np.int64).reshape(-1, 2)[order]
        self._refuse_repeats()

    def __len__(self) -> int:
        return len(self._hashes)

    def __contains__(self, key: str) -> bool:
        return self._find(key) is not None

    def captions(self, key: str, data: DataSettings) -> list[Weighted] | None:
        """Return the captions of a key, none if there is none; None if no line has the key.

        Raises:
            Unfit: as `captions_of`; the reason ends with the line.
        """
        if (found := self._find(key)) is None:
            return None
        number, record = found
        try:
            return captions_of(record["captions"], data)
        except Unfit as error:
            raise Unfit(f"{error} ({clean(self.path.name)}:{number})") from None

    @property
    def example(self) -> str:
        """A key, for messages; "" in an empty file."""
        return str(self._read(self._places[0])[1]["key"]) if len(self) else ""

    def _find(self, key: str) -> tuple[int, dict[str, Any]] | None:
        """Return the number and the content of the line of a key."""
        value = np.uint64(_hash(key))
        at = int(np.searchsorted(self._hashes, value))
        # Different keys may share a hash.
        while at < len(self._hashes) and self._hashes[at] == value:
            number, record = self._read(self._places[at])
            if record["key"] == key:
                return number, record
            at += 1
        return None

    def _read(self, place: np.ndarray) -> tuple[int, dict[str, Any]]:
        start, number = place.tolist()
        self._file.seek(start)
        return number, self._parse(self._file.readline(MAX_LINE + 1), number)

    @cached_property
    def _file(self) -> Any:
        return self.path.open("rb")

    def _refuse_repeats(self) -> None:
        for at in np.flatnonzero(self._hashes[1:] == self._hashes[:-1]).tolist():
            (first, one), (second, other) = self._read(self._places[at]), self._read(self._places[at + 1])
            if one["key"] == other["key"]:
                where = f"{self.path}:{max(first, second)}"
                raise AtollError(
                    f"{where}: the key {one['key']!r:.200} again (first in line {min(first, second)}); keep one"
                )

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        where = f"{self.path}:{number}"
        if len(line) > MAX_LINE:
            raise AtollError(f"{where}: a line of more than {MAX_LINE:,} bytes")
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise AtollError(f"{where}: this line is no JSON ({message_of(error)})") from None
        if not isinstance(record, dict) or not isinstance(record.get("key"), str) or "captions" not in record:
            got = clean(line.decode(errors="replace").strip())
            raise AtollError(f'{where}: expected {{"key": "...", "captions": [...]}}; got {got:.200}')
        return record


class CaptionedSource(Source):
    """The images of a source, with captions from a file.

    An image that no line names keeps its own captions, and a note counts it. `data.own_captions` is the fraction of
    draws that takes an image's own captions though the file has others.

    Raises:
        AtollError: as `CaptionsFile`.
    """

    name = "captions from a file"

    def __init__(self, source: Source, data: DataSettings):
        assert data.captions_from is not None
        self._source, self._data = source, data
        self._path = Path(os.path.expanduser(os.path.expandvars(data.captions_from)))
        self.root, self.sha256 = source.root, self.file.sha256

    def __getstate__(self) -> dict[str, Any]:
        """Leave the index out: each process makes its own."""
        return {name: value for name, value in self.__dict__.items() if name != "file"}

    @cached_property
    def file(self) -> CaptionsFile:
        """The captions by key."""
        return CaptionsFile(self._path)

    def blocks(self) -> Sequence[Block]:
        return self._source.blocks()

    def read(self, block: Block) -> Iterator[Raw | Skipped]:
        for sample in self._source.read(block):
            yield self._captioned(sample) if isinstance(sample, Raw) else sample

    def config(self) -> dict[str, Any]:
        own = {"own_captions": self._data.own_captions} if self._data.own_captions else {}
        return {**self._source.config(), "captions_from": self.sha256, **own}

    def fingerprint(self) -> str:
        return self._source.fingerprint()

    def notes(self) -> Sequence[str]:
        return self._source.notes()

    def listing(self) -> Listing | None:
        return self._source.listing()

    def record(self, block: Block) -> list[FileRecord]:
        return self._source.record(block)

    def check(self, tally: Tally) -> None:
        """Raise AtollError if the file names none of the good images."""
        if tally.good and tally.good == tally.notes[NOT_NAMED]:
            image = tally.examples[NOT_NAMED].removeprefix(NOT_NAMED).strip(" ()")
            raise AtollError(
                f"{self._path}: names none of {tally.good:,} images, such as {image!r}; it names such as "
                f"{self.file.example!r:.200}; set data.key to the column with these keys, or make the file anew"
            )

    def _captioned(self, raw: Raw) -> Raw | Skipped:
        try:
            captions = self.file.captions(raw.key, self._data)
            if captions is None:
                return replace(raw, notes=(*raw.notes, f"{NOT_NAMED} ({clean(raw.key)})"))
            own = [(raw.caption, 1.0), *unpack(raw.others)] if raw.caption else []
            # Without captions of the file, the image's own ones are all there are.
            fraction = self._data.own_captions if captions else 1.0
            parts = [(captions, 1 - fraction), (own, fraction)]
            caption, others = first_and_others(combined([part for part in parts if part[0] and part[1]]))
        except Unfit as error:
            return Skipped(raw.key, str(error))
        return replace(raw, caption=caption, others=others)


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
