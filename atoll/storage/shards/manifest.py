"""The manifest of a directory of shards: the texts of each row, checked before they fill the memory.

A small manifest may claim much: a page that unpacks to a gigabyte, or a million rows with one long caption, which
parquet stores once. So the pages are measured by their headers, and the texts by the dictionary of a column.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atoll.storage.bounds import MAX_CAPTION_BYTES
from atoll.storage.parquet_pages import pages
from atoll.storage.shards.captions import OTHERS
from atoll.storage.shards.format import SPLITS, TEXT

_FREE = 1 << 20  # bytes of a column's pages beside its texts


class ManifestFile:
    """An open manifest.

    Attributes:
        names: its columns: key, caption, split, and other_captions if an image has several.

    Args:
        path: the file.
        rows: the rows of each shard; each is one row group.

    Raises:
        ValueError: another layout, or pages that are larger than the rows' longest texts.
        OSError, pyarrow.ArrowException: the file cannot be read.
    """

    def __init__(self, path: Path, rows: Sequence[int]):
        import pyarrow.parquet as pq

        self._path, self._rows = path, rows
        self._file = pq.ParquetFile(path)
        self._checked: set[tuple[int, str]] = set()  # row groups and columns
        # One row group per shard: `group` depends on it.
        facts = self._file.metadata
        actual = [facts.row_group(number).num_rows for number in range(facts.num_row_groups)]
        if actual != list(rows):
            raise ValueError(f"it has {sum(actual)} rows, the index has {sum(rows)}, or they are cut otherwise")
        # Other types would fail later, far from the file.
        types = {field.name: str(field.type) for field in self._file.schema_arrow}
        self.names: tuple[str, ...] = (*TEXT, OTHERS) if OTHERS in types else TEXT
        if any(types.get(name) not in ("string", "large_string") for name in self.names):
            raise ValueError(f"its columns are {types!s:.200}, expected the texts {', '.join(self.names)}")

    def column(self, name: str) -> Any:
        """Read a whole column as a pyarrow ChunkedArray. Raises as the class does."""
        for number in range(len(self._rows)):
            self._check(number, name)
        return self._file.read(columns=[name], use_threads=False)[name]

    def group(self, number: int, names: Sequence[str]) -> dict[str, list[str]]:
        """Read some columns for one shard, as Python strings. Raises as the class does."""
        for name in names:
            self._check(number, name)
        value: dict[str, list[str]] = self._file.read_row_group(
            number, columns=list(names), use_threads=False
        ).to_pydict()
        return value

    def _check(self, number: int, name: str) -> None:
        """Raise ValueError unless a column of a row group holds texts of bounded length, and splits that exist."""
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        # Once per row group: the file is compared with its hash.
        if (number, name) in self._checked:
            return
        self._check_pages(number, name)
        # As a dictionary, a text that repeats is in memory once.
        with pq.ParquetFile(self._path, read_dictionary=[name]) as file:
            column = file.read_row_group(number, columns=[name], use_threads=False)[name]
        if column.null_count:
            raise ValueError(f"{name}: {column.null_count:,} rows have none")
        for chunk in column.chunks:
            texts = getattr(chunk, "dictionary", chunk)
            longest = pc.max(pc.binary_length(texts)).as_py() or 0
            if longest > MAX_CAPTION_BYTES:
                raise ValueError(f"{name}: a text of {longest:,} bytes, expected at most {MAX_CAPTION_BYTES:,}")
            if name == "split" and (unknown := set(texts.to_pylist()) - set(SPLITS)):
                raise ValueError(f"split: {sorted(unknown)[0]!r:.60}, expected {' or '.join(SPLITS)}")
        self._checked.add((number, name))

    def _check_pages(self, number: int, name: str) -> None:
        """Raise ValueError if the pages of a column unpack to more than the longest texts of its rows."""
        group = self._file.metadata.row_group(number)
        most = _FREE + self._rows[number] * (MAX_CAPTION_BYTES + 8)  # 4 bytes for a length, and for an index
        with self._path.open("rb") as file:
            for chunk in map(group.column, range(group.num_columns)):
                if chunk.path_in_schema != name:
                    continue
                # The dictionary page, if there is one, comes before the data pages.
                starts = [chunk.data_page_offset]
                if chunk.has_dictionary_page and chunk.dictionary_page_offset:
                    starts.append(chunk.dictionary_page_offset)
                unpacked = sum(page.unpacked for page in pages(file, min(starts), chunk.total_compressed_size))
                if unpacked > most:
                    raise ValueError(f"{name}: {unpacked:,} bytes of {self._rows[number]:,} rows")
