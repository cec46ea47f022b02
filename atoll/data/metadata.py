"""Read tables of captions in a folder and match their rows with images.

The tables are metadata.jsonl, .csv, .tsv, .json and .parquet in every directory, or those that `data.metadata` names.
"""

import posixpath
from collections import defaultdict
from collections.abc import Collection, Iterator
from typing import NamedTuple

from atoll.data.caption_lists import captions_in
from atoll.data.captions import FROM_FILE, FROM_FOLDER, caption_columns, key_of, split_of
from atoll.data.crop import Box
from atoll.data.focus import box_of
from atoll.data.locate import Files
from atoll.data.names import canonical, clean, printable
from atoll.data.opening import is_local
from atoll.data.splits import HELD_OUT, TRAIN, is_keyword
from atoll.data.tables import FORMATS, Record, file_column, rows_of
from atoll.data.types import Unfit
from atoll.errors import AtollError
from atoll.manifest import DataSettings
from atoll.storage.shards import Split, Weighted

USUAL = tuple(f"metadata{kind}" for kind in (".jsonl", ".csv", ".tsv", ".json", ".parquet", ".ndjson"))


class ImageRow(NamedTuple):
    """Facts about an image from a row of a table.

    Attributes:
        where: its file and line.
        captions: with weights, for each name of `data.captions`; None if the row has none of that name.
        key: None if no column is set for it.
        split: None if it has none.
        reason: why the image cannot be used; "" if it can.
        focus: what must stay inside the crop.
    """

    where: str
    captions: tuple[list[Weighted] | None, ...]
    key: str | None
    split: Split | None
    reason: str
    focus: Box | None = None


class Metadata:
    """The rows of all tables of a folder, by image.

    Attributes:
        tables: the files that were read.
        columns: names of columns, in the order of their appearance.
        rows: name of an image -> its row.
        absent: a name that no file has -> its row.
        problems: (place, reason) of unusable rows.
    """

    def __init__(self, files: Files, data: DataSettings, images: Collection[str]):
        """Read the tables and match their rows with files.

        Args:
            files: all files of the folder.
            data: the settings.
            images: the names that look like images; a row may name other files too.

        Raises:
            AtollError: a table cannot be read, a directory has two, or a column that the settings name is in none.
        """
        self._files, self._data, self._images = files, data, images
        self._captions = [name for name, _ in data.captions]
        self._wanted = {
            name for name in (*self._captions, data.key, data.split, data.focus, data.file_name) if name is not None
        }
        self._auto_splits: dict[str, str] = {}  # image -> value of a column called split
        self.columns: dict[str, None] = {}
        self.rows: dict[str, ImageRow] = {}
        self.absent: dict[str, ImageRow] = {}
        self.problems: list[tuple[str, str]] = []
        self.tables = self._find()
        self._stems: dict[str, list[str]] | None = None
        self._canonical: dict[str, list[str]] | None = None
        self._folded: dict[str, str] = {}
        unmatched: list[tuple[str, str, ImageRow, str]] = []  # folder, name, row, split
        for name in self.tables:
            for folder, named, row, split in self._read(name):
                match = self._exact(folder, named)
                if match is None:
                    unmatched.append((folder, named, row, split))
                else:
                    self._add(match, row, split)
        # Exact names come first. Names that only print alike or lack an extension match the remaining files.
        for folder, named, row, split in unmatched:
            match = self._alike(folder, named)
            if match is not None:
                self._add(match, row, split)
            else:
                self._add_absent(folder, named, row)
        self._use_split_column()

    def _find(self) -> list[str]:
        # Tables that the settings name replace the search; they may be outside the folder.
        if self._data.metadata is not None:
            wanted = self._data.metadata
            named = [wanted] if isinstance(wanted, str) else list(wanted)
            alike = {canonical(name): name for name in self._files.sizes}
            names = [name if name in self._files.sizes else alike.get(canonical(name), name) for name in named]
            for name in names:
                inside = name in self._files.sizes
                if not inside and self._unopened(name):
                    raise AtollError(f"{clean(name)}, which data.metadata names, is {self._unopened(name)}")
                if not inside and not (name.startswith("/") or not is_local(name)):
                    raise AtollError(f"{self._data.path}: no file {clean(name)!r}, which data.metadata names")
                if not name.lower().endswith(FORMATS):
                    raise AtollError(
                        f"data.metadata: {clean(name)!r}; expected a file that ends in {', '.join(FORMATS)}"
                    )
            return names
        names = [name for name in self._files.sizes if posixpath.basename(name) in USUAL]
        for name, reason in self._files.unopened.items():
            if posixpath.basename(name) in USUAL:
                raise AtollError(f"{clean(name)}: is {reason}")
        # Two tables in one directory could contradict each other.
        by_folder: dict[str, str] = {}
        for name in names:
            folder = posixpath.dirname(name)
            if folder in by_folder:
                both = " and ".join(sorted(map(posixpath.basename, (by_folder[folder], name)), key=USUAL.index))
                where = clean(self._files.url(folder).rstrip("/"))
                raise AtollError(f"{where}: holds both {both}; remove one of them, or name one as data.metadata")
            by_folder[folder] = name
        return names

    def _unopened(self, name: str) -> str:
        return self._files.unopened.get(name, "")

    def _read(self, name: str) -> Iterator[tuple[str, str, ImageRow, str]]:
        """Yield the directory, the name of the image, the row and the value of a column called split for every row."""
        inside = name in self._files.sizes
        url, folder = self._files.url(name) if inside else name, posixpath.dirname(name) if inside else ""
        any_row = False
        for place, parse in rows_of(url, name, self._data.encoding, self._wanted):
            try:
                record = parse()
                # A dict keeps the order in which columns appear; lines of JSON may differ in theirs.
                self.columns |= dict.fromkeys(record)
                # Fail at once for a table with a header; each line of JSON has its own fields.
                if not any_row and not name.lower().endswith((".jsonl", ".ndjson", ".json")):
                    self._check_file_column(name, record)
                any_row = True
                column = file_column(list(record), self._data.file_name)
                named = record[column]
                # A column of numbers names images only if the settings choose it.
                if isinstance(named, int) and not isinstance(named, bool) and self._data.file_name is not None:
                    named = str(named)
                if isinstance(named, bytes):
                    named = named.decode("utf-8", "surrogateescape")
                if not isinstance(named, str) or not named:
                    raise Unfit(f"no {column} in this line; it has {clean(', '.join(record)) or 'nothing'}")
                split = next((record[key] for key in record if key.lower() == "split"), None)
                split = split.decode("utf-8", "replace") if isinstance(split, bytes) else split
                yield folder, named, self._row(place, record), split if isinstance(split, str) else ""
            except Unfit as error:
                self.problems.append((place, f"metadata: {error}"))

    def _check_file_column(self, name: str, record: Record) -> None:
        """Raise AtollError if a table with a header lacks the column of file names: all of its rows would fail."""
        try:
            file_column(list(record), self._data.file_name)
        except Unfit as error:
            if "several images" in str(error):
                raise AtollError(f"{clean(name)}: {error}") from None
            column = self._data.file_name or "file_name"
            columns = clean(", ".join(record))
            raise AtollError(
                f"{clean(name)}: no column {column!r}; its columns are {columns}; data.file_name names the one with "
                "the images' names"
            ) from None

    def _row(self, where: str, record: Record) -> ImageRow:
        data, key, split = self._data, None, None
        try:
            for name in filter(None, (data.key, data.split)):
                if name not in record:
                    raise Unfit(f"no column {name!r} in {where}")
            if data.key is not None:
                value = record[data.key]
                key = key_of(value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value)
            if data.split is not None:
                split = split_of(record[data.split])
            captions = tuple(self._captions_in(record, name, where) for name in self._captions)
            focus = self._focus_in(record, where)
        except Unfit as error:
            return ImageRow(where, (), key, None, str(error))
        return ImageRow(where, captions, key, split, "", focus)

    def _focus_in(self, record: Record, where: str) -> Box | None:
        if self._data.focus is None:
            return None
        # Not each line of JSON needs the field.
        try:
            return box_of(record.get(self._data.focus))
        except Unfit as error:
            raise Unfit(f"{error} ({where})") from None

    def _captions_in(self, record: Record, name: str | None, where: str) -> list[Weighted] | None:
        # A caption from a file beside the image or from a name is not read from a table.
        if name is not None and (name.startswith(".") or name in (FROM_FILE, FROM_FOLDER)):
            return None
        try:
            return captions_in(record, name, self._data)
        except Unfit as error:
            raise Unfit(f"{error} ({where})") from None

    def _exact(self, folder: str, named: str) -> str | None:
        """Return the file that a row names: relative to the table's directory or the root, or absolute."""
        root = f"{self._files.root}/"
        for name in (posixpath.join(folder, named), named, named.removeprefix(root)):
            tidy = posixpath.normpath(name)
            if tidy in self._files.sizes or tidy in self._files.unopened:
                return tidy
        return None

    def _alike(self, folder: str, named: str) -> str | None:
        """Return the single file whose name prints like the row's, or equals it plus an extension."""
        # Build the indexes only when needed: most tables match exactly.
        if self._canonical is None or self._stems is None:
            self._canonical, self._stems = defaultdict(list), defaultdict(list)
            for name in self._files.sizes:
                self._canonical[canonical(name)].append(name)
            for name in self._images:
                self._stems[posixpath.splitext(canonical(name))[0]].append(name)
                self._folded[canonical(name).casefold()] = name
        tidy = canonical(named)
        for place in dict.fromkeys((posixpath.normpath(posixpath.join(folder, tidy)), posixpath.normpath(tidy))):
            for index in (self._canonical, self._stems):
                # Take a file only if the choice is unique and no exact row has it.
                left = [name for name in index.get(place, ()) if name not in self.rows]
                if len(left) == 1 and len(index[place]) == 1:
                    return left[0]
        return None

    def _add(self, name: str, row: ImageRow, split: str) -> None:
        if name in self.rows:
            reason = f"metadata: names {clean(name)} again (first in {self.rows[name].where}); the first line is used"
            self.problems.append((row.where, reason))
            return
        self.rows[name] = row
        if split:
            self._auto_splits[name] = split

    def _add_absent(self, folder: str, named: str, row: ImageRow) -> None:
        name = printable(posixpath.normpath(posixpath.join(folder, named)))
        reason = f"image: {row.where} names {clean(name)}, which is not there"
        # Suggest a file whose name differs in case only or prints alike.
        if near := self._folded.get(canonical(name).casefold()):
            reason += f" ({clean(near)} is: the letters differ in case, or several names print alike)"
        elif named.startswith("/") or named[1:3] in (":\\", ":/"):
            reason += "; make paths relative to the folder"
        if name in self.absent:
            self.problems.append((row.where, f"metadata: names {clean(name)} again, which is not there"))
        else:
            self.absent[name] = row._replace(reason=reason)

    def _use_split_column(self) -> None:
        """Use a column called split if all of its values name splits, and some train and some are held out."""
        values = {value.strip().lower() for value in self._auto_splits.values()}
        if self._data.split is not None or self._data.splits != "auto" or not values & set(HELD_OUT):
            return
        # A column with other words is free text, and one without "train" would hold out everything.
        if not values & set(TRAIN) or not all(is_keyword(value) for value in values):
            return
        for name, value in self._auto_splits.items():
            self.rows[name] = self.rows[name]._replace(split=split_of(value))

    @property
    def uses_split_column(self) -> bool:
        """Return whether a column called split is used although the settings do not name it."""
        return self._data.split is None and any(row.split is not None for row in self.rows.values())

    def check_columns(self, sidecar_kinds: Collection[str]) -> None:
        """Raise AtollError if a column that the settings name is in no table, and is no extension of text files."""
        columns = [(setting, getattr(self._data, setting)) for setting in ("key", "split", "focus", "file_name")]
        for setting, column in [*(("caption", name) for name in self._captions), *columns]:
            if column is None or column in self.columns or (self.tables and not self.columns):
                continue
            # data.caption may also name an extension or a name instead of a column.
            if setting == "caption" and (column.startswith(("@", ".")) or column.lower() in sidecar_kinds):
                continue
            there = f"its columns are {clean(', '.join(self.columns))}" if self.tables else "there is no metadata"
            raise AtollError(f"{self._data.path}: no column {column!r}, which data.{setting} names; {there}")

    def unread_columns(self) -> list[str]:
        """Return the usual caption columns that are not read because another one is preferred."""
        if self._data.caption is not None:
            return []
        return caption_columns(self.columns)[1:]
