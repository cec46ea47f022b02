"""Scan a folder of images before any image is read: entries, companions left out, and files that are not read."""

import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import NamedTuple

from atoll.data.captions import FROM_FILE, FROM_FOLDER, SIDECARS, is_usual, like_captions
from atoll.data.companions import companions, describe
from atoll.data.crop import Box
from atoll.data.limits import MAX_SIDECAR_BYTES
from atoll.data.locate import IMAGES, Files, nothing
from atoll.data.metadata import Metadata
from atoll.data.names import clean, listed, printable
from atoll.data.opening import TooLarge, read_file
from atoll.data.sidecars import Sidecars, unread_notes
from atoll.data.splits import NamedSplits, named_splits
from atoll.data.tables import FORMATS, columns_of
from atoll.errors import AtollError
from atoll.manifest import DataSettings
from atoll.storage.shards import Split, Weighted

_ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".7z", ".rar", ".tfrecord", ".arrow")
# Files of other tools that hold no captions; no note mentions them.
_KNOWN: tuple[str, ...] = (
    "readme",
    "license",
    "licence",
    "notice",
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
)
_KNOWN += ("state.json", "config.json")


class Entry(NamedTuple):
    """An image and the facts known before it is read.

    Attributes:
        key: unique in the folder.
        file: relative to the root.
        sidecars: for each name of `data.captions`, the text files that may have its caption, preferred first.
        captions: for each of them, what a table has, with weights; None to read the sidecars.
        split: None if a hash of the key decides.
        reason: why it cannot be used; "" if it can.
        focus: what must stay inside the crop.
    """

    key: str
    file: str = ""
    sidecars: tuple[tuple[str, ...], ...] = ()
    captions: tuple[list[Weighted] | None, ...] = ()
    split: Split | None = None
    reason: str = ""
    focus: Box | None = None

    @property
    def has_caption(self) -> bool:
        """Whether a table or a text file may have its caption."""
        return any(captions is not None for captions in self.captions) or any(self.sidecars)


class FolderScan:
    """The entries of a folder.

    Attributes:
        files: everything below the folder.
        tables: the metadata files that were read.
        entries: rows of tables that cannot be used, then all images in the order of their paths.
        notes: notes for the user.
    """

    def __init__(self, files: Files, data: DataSettings):
        """Scan the names in a folder and read its tables.

        Raises:
            AtollError: there are no images, a table or a setting does not fit, or captions in the folder are not read.
        """
        self.files, self._data = files, data
        self.notes: list[str] = []
        # Images, including names that must not be opened.
        named = {name for name in (*files.sizes, *files.unopened) if _extension(name) in IMAGES}
        self._metadata = Metadata(files, data, named)
        self.tables = self._metadata.tables
        images = named | self._metadata.rows.keys()  # a table may name files that have no usual extension
        if not images and not self._metadata.absent:
            raise nothing(data.path, "images", [f".{kind}" for kind in IMAGES[:5]], files.sizes)
        # Captions beside images.
        text = [name for name in (*files.sizes, *files.unopened) if name not in images and name not in self.tables]
        self._names = [name for name, _ in data.captions]
        sidecars = [Sidecars(text, images, self._kinds(text, name)) for name in self._names]
        self._metadata.check_columns([kind for name in self._names for kind in self._given_kinds(text, name)])
        candidates = {name: tuple(kinds.of(name) for kinds in sidecars) for name in sorted(images)}
        # Masks and other companions; an image with a caption is never one.
        self._left_out: dict[str, str] = {}
        if data.companions == "skip":
            captioned = self._metadata.rows.keys() | {name for name, beside in candidates.items() if any(beside)}
            self._left_out = companions(candidates, captioned)
        if self._left_out:
            self.notes.append(
                f"left out as companions of other images: {describe(self._left_out.values())} "
                f"({listed(sorted(self._left_out), 2)}); data.companions: train keeps them"
            )
        remaining = [name for name in candidates if name not in self._left_out]
        splits = self._splits(remaining)
        # Rows that cannot be placed come first; rows for missing images are sorted among the images.
        absent = [Entry(name, reason=row.reason) for name, row in self._metadata.absent.items()]
        entries = [self._entry(name, candidates[name], splits.get(name)) for name in remaining]
        problems = [Entry(place, reason=reason) for place, reason in self._metadata.problems]
        self.entries = problems + sorted(entries + absent, key=lambda entry: entry.file or entry.key)
        self._tell_unread(entries, candidates, sidecars, text)

    def read_names(self) -> set[str]:
        """Return the names of all files that are read."""
        names = {name for entry in self.entries for name in (entry.file, *chain(*entry.sidecars))} | set(self.tables)
        return {name for name in names if name in self.files.sizes}

    def _kinds(self, text: Iterable[str], caption: str | None) -> tuple[str, ...]:
        """Return the extensions of text files with captions."""
        # Of several captions, a column is one and the files beside the images are another.
        if caption in self._metadata.columns:
            return SIDECARS if len(self._names) == 1 else ()
        return self._given_kinds(text, caption)

    def _given_kinds(self, text: Iterable[str], caption: str | None) -> tuple[str, ...]:
        """Return the extensions that a value of `data.caption` selects: with a leading dot, or as the files have it."""
        if caption in (FROM_FILE, FROM_FOLDER):
            return ()
        # A column of that name wins over an extension.
        if caption is None or caption in self._metadata.columns:
            return SIDECARS
        kind = caption.lower().removeprefix(".")
        if caption.startswith(".") or any(name.lower().endswith(f".{kind}") for name in text):
            return (kind,)
        # The name may be a field of JSON files beside the images.
        has_json = any(name.lower().endswith(".json") for name in text)
        if has_json:
            return ("json", kind)
        # Of several captions, each has its own place.
        return SIDECARS if len(self._names) == 1 else (kind,)

    def _splits(self, images: list[str]) -> dict[str, Split]:
        """Return the splits from the names of files; a hash of the key decides for all others."""
        if self._data.split is not None or self._data.splits != "auto":
            return {}
        # A split column decides alone; names are then ignored.
        if self._metadata.uses_split_column:
            held_out = sum(row.split == "val" for row in self._metadata.rows.values())
            self.notes.append(
                f"held out: {held_out:,} by the column split of the metadata; data.splits: hash ignores it"
            )
            return {}
        recognised: NamedSplits = named_splits(images, "images", all_files=True)
        self.notes += recognised.notes
        return recognised.splits

    def _entry(self, name: str, candidates: tuple[tuple[str, ...], ...], split: Split | None) -> Entry:
        row, data = self._metadata.rows.get(name), self._data
        key = row.key if row is not None and row.key is not None else name
        # The first fault that applies is the reason.
        if reason := self.files.unopened.get(name):
            return Entry(printable(key), name, reason=f"image: {reason}")
        if row is not None and row.reason:
            return Entry(printable(key), name, reason=row.reason)
        # A guessed key or split would differ from those of the table.
        if row is None and (data.key is not None or data.split is not None):
            reason = "metadata: no line names this image, so its key or split is unknown"
            return Entry(printable(key), name, reason=reason)
        if printable(key) != key:
            return Entry(printable(key), name, reason="key: its name is not utf-8; rename it")
        captions = row.captions if row is not None else (None,) * len(candidates)
        sidecars = []
        for beside, own in zip(candidates, captions, strict=True):
            # What a table has is not looked for beside the image.
            if own is None and beside and (reason := self.files.unopened.get(beside[0])):
                return Entry(key, name, reason=f"caption: {clean(beside[0])} is {reason}")
            # Sidecars that must not be opened are dropped unless the preferred one is among them.
            sidecars.append(tuple(text for text in beside if text in self.files.sizes) if own is None else ())
        split = row.split if row is not None and row.split else split
        return Entry(key, name, tuple(sidecars), captions, split, focus=row.focus if row is not None else None)

    def _tell_unread(
        self,
        entries: list[Entry],
        candidates: dict[str, tuple[tuple[str, ...], ...]],
        sidecars: list[Sidecars],
        text: list[str],
    ) -> None:
        """Add notes on files that are not read; refuse a folder if all captions are in such files."""
        if columns := [name for name in self._names if name in (FROM_FILE, FROM_FOLDER)]:
            self.notes.append(f"captions are from names, as data.caption is {' and '.join(columns)}")
            return
        with_caption = [entry for entry in entries if entry.has_caption]
        # Files that come second are named; a list of several captions chooses each of its files.
        if len(self._names) == 1:
            by_table = [candidates[entry.file][0] for entry in entries if entry.captions[:1] not in ((), (None,))]
            self.notes += unread_notes([entry.sidecars[0] for entry in with_caption], by_table, sidecars[0])
        else:
            self._check_each(with_caption)
        if columns := self._metadata.unread_columns():
            first = next(name for name in self._metadata.columns if is_usual(name) and name not in columns)
            self.notes.append(
                f"metadata: {first} comes first; {listed(columns)} not read; data.caption chooses another"
            )
        # Files that belong to no image, or whose extension is not read.
        used = {name for beside in candidates.values() for name in chain(*beside)} | self._metadata.rows.keys()
        others = [name for name in text if name not in used and name in self.files.sizes]
        plain = list(self._unread(others, candidates))
        self.notes += [note for note, _ in plain]
        links = [name for name in self.files.unopened if name not in candidates and name not in used]
        if links:
            self.notes.append(f"not opened: {listed(links)} ({self.files.unopened[links[0]]})")
        if with_caption or not entries or self._data.captions_from is not None:
            return
        self._refuse_unread_captions(len(entries), [note for note, plainly in plain if plainly])
        self.notes.append('no image has a caption; data.caption: "@folder" takes its folder\'s name, "@file" its own')

    def _check_each(self, entries: list[Entry]) -> None:
        """Raise AtollError if one of several captions is found for no image."""
        for number, name in enumerate(self._names):
            if not any(entry.captions[number] is not None or entry.sidecars[number] for entry in entries):
                columns = clean(", ".join(self._metadata.columns)) or "there is no metadata"
                raise AtollError(
                    f"{self._data.path}: no image has a caption by {name!r}, which data.caption names; expected a "
                    f"column ({columns}) or the extension of text files"
                )

    def _refuse_unread_captions(self, images: int, unread: list[str]) -> None:
        metadata = self._metadata
        unusable = [reason for _, reason in metadata.problems] + [row.reason for row in metadata.absent.values()]
        if others := like_captions(metadata.columns):
            unread.append(f"metadata has {listed(others)}: data.caption names one")
        elif any(is_usual(column) for column in metadata.columns) and unusable:
            unread.append(f"no row of the metadata fits an image ({unusable[0]})")
        if unread and not self._data.allow_uncaptioned:
            raise AtollError(
                f"{self._data.path}: captions lie there and none of them is read for {images:,} images: "
                f"{'; '.join(unread)}; or go on without captions: --allow-uncaptioned"
            )

    def _unread(self, others: list[str], candidates: Iterable[str]) -> Iterator[tuple[str, bool]]:
        """Yield notes on files that are not read, each with whether they clearly hold captions."""
        # Sort the files by what they may hold.
        tables, archives, strays, beside = [], [], [], Counter[str]()
        first: dict[str, str] = {}
        # The two names that a text file beside an image may have, without its extension.
        bases = {base for name in candidates for base in (posixpath.splitext(name)[0], name)}
        stems = {posixpath.basename(base) for base in bases}
        for name in others:
            file = posixpath.basename(name).lower()
            base, kind = posixpath.splitext(name)
            if file.startswith(_KNOWN) or file.endswith("_stats.json"):
                continue
            if base in bases and kind.lower() not in FORMATS:
                beside[kind] += 1
                first.setdefault(kind, name)
            elif file.endswith(_ARCHIVES):
                archives.append(name)
            elif file.endswith(FORMATS):
                tables.append(name)
            elif kind[1:].lower() in SIDECARS and posixpath.basename(base) in stems:
                strays.append(name)
            elif kind[1:].lower() in SIDECARS:
                tables.append(name)  # such as captions.txt: a list, or notes
        # Report each kind of file once, with its count.
        for kind, count in beside.items():
            yield (
                f"{count:,} {clean(kind)} files beside images are not read; data.caption: {clean(kind)} reads them",
                self._is_text(first[kind]),
            )
        # Open only a few tables: their columns show whether they hold captions.
        for name in tables[:3]:
            columns = columns_of(self.files.url(name), name, self._data.encoding) if name.endswith(FORMATS) else []
            captions = [column for column in columns if is_usual(column) or like_captions([column])]
            what = f" (columns {listed(columns, 6)})" if columns else ""
            how = f"; data.metadata: {clean(name)} reads it" if name.lower().endswith(FORMATS) else ""
            yield f"{clean(name)}{what} is not read{how}", bool(captions)
        if len(tables) > 3:
            yield f"{len(tables) - 3:,} more tables are not read", False
        # Text files in another folder than their images, for example in captions/.
        if strays:
            where = Counter(posixpath.dirname(name) or "the folder itself" for name in strays).most_common(1)[0][0]
            yield (
                f"{len(strays):,} text files in {clean(where)} are named after images elsewhere: put them beside these",
                True,
            )
        if archives:
            yield (
                f"archives are not unpacked: {listed(archives)}; unpack them, or name them as a source of their own",
                False,
            )

    def _is_text(self, name: str) -> bool:
        """Return whether a file looks like a caption: short text that is not markup."""
        try:
            # A file larger than a sidecar may be is no caption.
            start = read_file(self.files.url(name), MAX_SIDECAR_BYTES)[:4096]
            words = start.decode(self._data.encoding, "strict").strip()
        except (TooLarge, OSError, UnicodeError):
            return False
        return words[:1] not in ("", "<", "{", "[") and "\0" not in words


def _extension(name: str) -> str:
    return posixpath.splitext(name)[1][1:].lower()
