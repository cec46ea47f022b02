"""Read rows of a parquet file in bounded memory: the unpacked size of pages is checked before unpacking.

A page's header says how many bytes it unpacks to, and Arrow allocates these first: 183 kB of a file can ask for 1 GiB.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from atoll.data.limits import (
    MAX_BATCH_BYTES,
    MAX_CAPTION_BYTES,
    MAX_TEXT_PAGE_BYTES,
    may_expand_to,
)
from atoll.data.names import clean, message_of
from atoll.data.opening import is_local, open_file
from atoll.data.parquet_lists import (
    is_caption_list,
    is_list,
    is_number_list,
    list_values,
    number_lists,
    text_paths,
)
from atoll.data.types import Damaged, Oversized
from atoll.errors import AtollError
from atoll.storage.memory import refuse_out_of_memory
from atoll.storage.parquet_pages import DICTIONARY_PAGE, pages

_ROWS = 32  # rows that are decoded together
_BUFFER = 1 << 20  # bytes of a column that are read at a time
_LEVEL = 8  # bytes of an item of a list in memory, beside its text


def batches(url: str, groups: Sequence[int] | None, columns: Sequence[str], text: Sequence[str]) -> Iterator[Any]:
    """Yield the rows of some row groups as small pyarrow record batches.

    Args:
        url: of the file.
        groups: numbers of row groups; None for all.
        columns: the columns to read.
        text: those of them that hold text, or lists of texts or numbers.

    Raises:
        Damaged: the file cannot be read further, or unpacks to more than its size justifies.
    """
    import pyarrow.parquet as pq

    try:
        with open_file(url) as file:
            # Without the first two options Arrow reads all of a column's bytes in the row group at once.
            options = {"pre_buffer": False, "buffer_size": _BUFFER, "page_checksum_verification": True}
            facts = pq.read_metadata(file)
            schema = facts.schema.to_arrow_schema()
            lists = [name for name in text if is_list(schema.field(name).type)]
            paths = text_paths(facts.schema, lists)
            with pq.ParquetFile(file, metadata=facts, read_dictionary=paths, **options) as opened:
                chosen = range(opened.metadata.num_row_groups) if groups is None else groups
                local = is_local(url)
                largest = _check_pages(file, opened.metadata, chosen, set(columns), set(text), set(lists), local)
                # Rows may all point to one entry of a dictionary, and each gets a copy of it.
                rows = max(1, min(_ROWS, MAX_BATCH_BYTES // max(1, largest)))
                for batch in opened.iter_batches(rows, row_groups=chosen, columns=list(columns), use_threads=False):
                    batch.validate(full=False)
                    yield batch
    except (AtollError, Damaged):
        raise
    except Exception as error:  # Arrow raises several kinds over damaged bytes
        refuse_out_of_memory(error, url)
        raise Damaged(message_of(error)) from error


def plain_rows(url: str, wanted: Callable[[str], bool]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table: text, whole numbers, and lists of captions or numbers in the wanted columns.

    All other columns have None.

    Any other nested value is replaced by an empty one of its kind, which is no caption.

    Raises:
        Damaged: as `batches`.
    """
    import pyarrow.parquet as pq
    import pyarrow.types as kinds

    try:
        with open_file(url) as file, pq.ParquetFile(file) as opened:
            schema = opened.schema_arrow
    except AtollError:
        raise
    except Exception as error:  # as above
        refuse_out_of_memory(error, url)
        raise Damaged(message_of(error)) from error
    # Arrow selects columns by name, so a repeated name cannot be read.
    names = [name for name in schema.names if wanted(name) and schema.names.count(name) == 1]
    readable = (is_text, is_caption_list, is_number_list)
    text = [name for name in names if any(is_one(schema.field(name).type) for is_one in readable)]
    numbers = [name for name in names if kinds.is_integer(schema.field(name).type)]
    others = [name for name in names if kinds.is_nested(schema.field(name).type) and name not in text]
    wrong: dict[str, Any] = {name: [[]] if is_list(schema.field(name).type) else {} for name in others}
    for batch in batches(url, None, [*text, *numbers], text):
        columns = {name: values(batch.column(name)) for name in text}
        columns |= {name: batch.column(name).to_pylist() for name in numbers}
        for row in range(len(batch)):
            yield {**dict.fromkeys(schema.names), **wrong, **{name: column[row] for name, column in columns.items()}}


def values(column: Any, most: int = MAX_CAPTION_BYTES) -> list[Any]:
    """Return the cells of a pyarrow column, text as bytes; `Oversized` for text of more than `most` bytes."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if is_number_list(kind):
        return number_lists(column)
    if is_list(kind):
        return list_values(column)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        # As bytes, a text that is not utf-8 fails alone instead of with its whole batch.
        column = column.cast(pa.large_binary() if pa.types.is_large_string(kind) else pa.binary())
    cells: list[Any]
    if not holds_bytes(column.type):
        cells = column.to_pylist()
        return cells
    # Measure before converting, so that an oversized value is never copied to Python.
    sizes = pc.binary_length(column).to_pylist()
    if all(size is None or size <= most for size in sizes):
        cells = column.to_pylist()
        return cells
    return [Oversized(size) if size is not None and size > most else column[i].as_py() for i, size in enumerate(sizes)]


def holds_bytes(kind: Any) -> bool:
    """Return whether a pyarrow type holds bytes, or is a struct with bytes (Hugging Face's Image feature)."""
    import pyarrow.types as kinds

    if kinds.is_struct(kind):
        return any(field.name == "bytes" and holds_bytes(field.type) for field in kind)
    plain = (kinds.is_binary, kinds.is_large_binary, kinds.is_binary_view, kinds.is_fixed_size_binary)
    return any(is_one(kind) for is_one in plain)


def is_text(kind: Any) -> bool:
    """Return whether a pyarrow type holds text, or bytes that may be text, also in a dictionary."""
    import pyarrow.types as kinds

    if kinds.is_dictionary(kind):
        kind = kind.value_type
    plain = (kinds.is_string, kinds.is_large_string, kinds.is_string_view, kinds.is_binary, kinds.is_large_binary)
    return any(is_one(kind) for is_one in plain)


def _check_pages(
    file: Any, footer: Any, groups: Sequence[int], columns: set[str], text: set[str], lists: set[str], local: bool
) -> int:
    """Check the unpacked size of the pages of some columns; return the bytes of the largest dictionary page.

    Remote files are checked by their footers where a column holds images: a look at each page would read them twice.

    Raises:
        Damaged: a page of text beyond `MAX_TEXT_PAGE_BYTES`, or another one beyond `may_expand_to` its size; a list of
            more values than that.
    """
    largest = 0
    for group in groups:
        for chunk in map(footer.row_group(group).column, range(footer.row_group(group).num_columns)):
            name = chunk.path_in_schema.split(".")[0]
            if name not in columns:
                continue
            # Images: only the sums in the footer, as reading page headers would fetch the column.
            if not local and name not in text:
                if chunk.total_uncompressed_size > may_expand_to(chunk.total_compressed_size):
                    raise Damaged(_bomb(name, chunk.total_uncompressed_size, chunk.total_compressed_size))
                continue
            # The dictionary page, if there is one, comes before the data pages.
            starts = [chunk.data_page_offset]
            if chunk.has_dictionary_page and chunk.dictionary_page_offset:
                starts.append(chunk.dictionary_page_offset)
            levels = 0
            for page in pages(file, min(starts), chunk.total_compressed_size):
                if page.unpacked > (MAX_TEXT_PAGE_BYTES if name in text else may_expand_to(page.packed)):
                    raise Damaged(_bomb(name, page.unpacked, page.packed))
                # A list keeps its dictionary, see `list_values`: what repeats is not unpacked.
                if page.kind == DICTIONARY_PAGE and name not in lists:
                    largest = max(largest, page.unpacked)
                # Run-length coding stores a billion empty items in a few bytes; each takes some when it is read.
                levels += page.values * _LEVEL
            if name in lists and levels > may_expand_to(chunk.total_compressed_size):
                raise Damaged(_bomb(name, levels, chunk.total_compressed_size))
    return largest


def _bomb(name: str, unpacked: int, packed: int) -> str:
    return f"column {clean(name)!r} unpacks {packed:,} bytes to {unpacked:,}, which is more than is read at once"
