"""Source for a folder of images, with captions in text files beside them or in tables."""

import json
from collections.abc import Iterator
from itertools import chain
from typing import Any

from atoll.data.caption_lists import captions_of, combined, first_and_others, joined_note
from atoll.data.captions import FROM_FILE, FROM_FOLDER, caption_from_name, check_encoding, field_of, like_captions
from atoll.data.fingerprint import Listing, content_fingerprint, fingerprint
from atoll.data.folder_scan import Entry, FolderScan
from atoll.data.limits import MAX_IMAGE_BYTES, MAX_SIDECAR_BYTES
from atoll.data.locate import config_of, locate
from atoll.data.names import clean, listed, message_of
from atoll.data.opening import TooLarge, ahead, is_local, join, read_file
from atoll.data.types import UNREAD_CAPTIONS, Block, Raw, Skipped, Source, Unfit
from atoll.manifest import DataSettings
from atoll.storage.shards import Weighted, split_by_hash

_THREADS = 16  # threads that fetch remote files


class Folder(Source):
    """Read the images in a folder and below, sorted by relative path; the relative path is the key.

    Captions come from tables (metadata.jsonl, .csv, .tsv, .json or .parquet, in the folder or below, whose rows name
    images relative to themselves) and from text files beside the images. `data.caption` names a column, the extension
    of the text files, or "@file" or "@folder" for names. docs/data.md lists what is read, in order.

    Masks and other companions of images are left out, folders called test or validation are held out, and files whose
    name begins with a dot are ignored.

    Table rows that cannot be read are skipped and come first. Images that a row names but that do not exist are skipped
    in their place among the others.

    Raises:
        AtollError: there are no images, a table lacks a column, or the folder has captions that are not read.
    """

    name = "folder"

    def __init__(self, data: DataSettings):
        check_encoding(data.encoding)
        self._data = data
        files = locate(data.path or (), "images", links=data.links)
        self.root = files.root
        self._scan = FolderScan(files, data)

    def __getstate__(self) -> dict[str, Any]:
        """Drop the list of files: a block carries all that a worker needs."""
        return {"_data": self._data, "root": self.root}

    def blocks(self) -> list[Block]:
        size, entries, blocks = self._data.block, self._scan.entries, []
        for start in range(0, len(entries), size):
            part = entries[start : start + size]
            # A row may name a file that does not exist. Such a file has no size to record, and its entry is skipped
            # later.
            files = [
                name
                for entry in part
                for name in (entry.file, *chain(*entry.sidecars))
                if name in self._scan.files.sizes
            ]
            # The tables are read once for the whole folder, so the first block records them.
            tables = [] if start else [name for name in self._scan.tables if name in self._scan.files.sizes]
            blocks.append(
                Block(f"{start:09d}-{start + len(part):09d}", len(part), part, (*tables, *dict.fromkeys(files)))
            )
        return blocks

    def read(self, block: Block) -> Iterator[Raw | Skipped]:
        # Local reads are fast enough in sequence; remote ones wait for the network and overlap.
        near = self.root is not None and is_local(self.root)
        yield from map(self._read, block.content) if near else ahead(self._read, block.content, _THREADS)

    def config(self) -> dict[str, Any]:
        return config_of(self.name, self._data)

    def fingerprint(self) -> str:
        """Return the sha256 over the relative name and the size of every image, sidecar and table."""
        listing = self.listing()
        # The default is cheap (names and sizes); hashing all contents has to be requested.
        if self._data.fingerprint == "content":
            return content_fingerprint(listing.root, list(listing.sizes))
        return fingerprint(listing.sizes.items())

    def listing(self) -> Listing:
        return self._scan.files.listing(self._scan.read_names())

    def notes(self) -> list[str]:
        return self._scan.notes

    def _read(self, entry: Entry) -> Raw | Skipped:
        # The scan has already found this entry unreadable, for example a bad row or a missing file.
        if entry.reason:
            return Skipped(entry.key, entry.reason)
        try:
            parts: list[tuple[list[Weighted], float]] = []
            notes: tuple[str, ...] = ()
            for number, (name, weight) in enumerate(self._data.captions):
                captions, more = self._captions(entry, number, name)
                parts.append((captions, weight))
                notes += more
            caption, others = first_and_others(combined(parts))
            # A split named by a table or folder wins over the hash of the key.
            split = entry.split or split_by_hash(entry.key, self._data.validation)
            return Raw(entry.key, self._bytes(entry.file, MAX_IMAGE_BYTES), caption, split, notes, others, entry.focus)
        except Unfit as error:
            return Skipped(entry.key, str(error))

    def _captions(self, entry: Entry, number: int, wanted: str | None) -> tuple[list[Weighted], tuple[str, ...]]:
        """Return the captions of an image for a name of `data.captions`, and notes.

        The first text file that is not empty wins.
        """
        # A caption from names needs no file.
        if wanted in (FROM_FILE, FROM_FOLDER):
            return captions_of(caption_from_name(entry.file, wanted), self._data), ()
        # A table row wins over the text files beside the image.
        if (captions := entry.captions[number]) is not None:
            return captions, ()
        notes: list[str] = []
        # The scan sorted the sidecars by preference.
        for name in entry.sidecars[number]:
            value: object = self._bytes(name, MAX_SIDECAR_BYTES)
            if name.lower().endswith(".json"):
                value, note = self._field(name, value, wanted)
                notes += [note] if note else []
            # The note replaces those of earlier files: only the file that is used matters.
            if captions := captions_of(value, self._data):
                return captions, joined_note(value, name, self._data) or tuple(notes)
        return [], tuple(notes)

    def _field(self, name: str, data: object, wanted: str | None) -> tuple[Any, str]:
        """Return the caption in a JSON file beside an image, and a note if there is none."""
        assert isinstance(data, bytes)
        try:
            content = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise Unfit(f"json: {clean(name)} cannot be parsed ({message_of(error)})") from None
        # A bare string is the caption itself, a bare list several.
        if not isinstance(content, dict):
            return content if isinstance(content, str | list) else None, ""
        # A value with a leading dot is a file extension, not the name of a field.
        column = wanted if not (wanted or ".").startswith(".") else None
        # A field that one file lacks may have a usual name there; of several captions, it is one less.
        value = field_of(content, column if column in content or len(self._data.captions) > 1 else None)
        if value is None and len(self._data.captions) > 1:
            return None, f"images without one of their captions (no {clean(str(wanted))} in {clean(name)})"
        # Report fields that look like captions, so that a wrong setting does not train without captions unnoticed.
        if value is None and (others := like_captions(content)):
            return None, f"{UNREAD_CAPTIONS}: .json files have {listed(others)}; data.caption names one"
        return value, ""

    def _bytes(self, name: str, most: int) -> bytes:
        try:
            return read_file(join(self.root, name), most)
        except TooLarge as error:
            raise Unfit(f"too large: {clean(name)} has {error}") from None
        except OSError as error:
            raise Unfit(f"cannot be read: {clean(name)} ({message_of(error)})") from None
