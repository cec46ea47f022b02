"""The pages of a parquet file by their headers, so that their size is known before one is unpacked.

A page's header says how many bytes it unpacks to, and Arrow allocates these first. The footer's sums may be wrong, so
the headers themselves are read (parquet-format, PageHeader in Thrift's compact protocol), which costs a few bytes per
page.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

DICTIONARY_PAGE = 2  # parquet-format, enum PageType
# Field types of the Thrift compact protocol.
_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = 1, 2, 3, 7, 8, 9, 10, 11, 12


_DATA_PAGES = (5, 8)  # fields of PageHeader: DataPageHeader and DataPageHeaderV2, whose first field counts values


class Page(NamedTuple):
    """A page by its header: its kind, the bytes it unpacks to, those it has, and its values (0 if not of data)."""

    kind: int
    unpacked: int
    packed: int
    values: int


def pages(file: Any, start: int, size: int) -> Iterator[Page]:
    """Yield the pages of a column chunk.

    Args:
        file: the open file.
        start: of its first page, in bytes.
        size: of the chunk, in bytes.

    Raises:
        ValueError: the bytes are no page headers.
    """
    at, end = start, start + size
    while at < end:
        for length in (1 << 9, 1 << 12, 1 << 18):  # statistics may make a header long
            file.seek(at)
            head = file.read(min(length, end - at))
            try:
                fields, used = _header(head, 0)
                break
            except IndexError:
                if len(head) < length:
                    raise ValueError(f"no page header at byte {at:,}") from None
        else:
            raise ValueError(f"no page header at byte {at:,}")
        # Fields 1 to 3 of PageHeader: type, uncompressed and compressed size.
        kind, unpacked, packed = (fields.get((number,), -1) for number in (1, 2, 3))
        values = max(fields.get((number, 1), 0) for number in _DATA_PAGES)
        if min(kind, unpacked, packed, values) < 0:
            raise ValueError(f"a page header without sizes at byte {at:,}")
        yield Page(kind, unpacked, packed, values)
        at += used + packed


def _header(data: bytes, at: int, depth: int = 0) -> tuple[dict[tuple[int, ...], int], int]:
    """Return the integer fields of a struct in Thrift's compact protocol, and its end. IndexError if cut short.

    A field of a struct within has the numbers of both.
    """
    fields: dict[tuple[int, ...], int] = {}
    number = 0
    # Crafted nesting must not exhaust the stack.
    if depth > 8:
        raise ValueError("a page header that is nested too deeply")
    while (head := data[at]) != 0:
        at, kind = at + 1, head & 15
        # The high half is the distance to the previous field number; 0 means that the number follows.
        if head >> 4:
            number += head >> 4
        else:
            number, at = _zigzag(data, at)
        if kind in (4, 5, 6):  # whole numbers of 16, 32 and 64 bits
            fields[(number,)], at = _zigzag(data, at)
        elif kind == _STRUCT:
            inner, at = _header(data, at, depth + 1)
            fields |= {(number, *path): value for path, value in inner.items()}
        elif kind not in (_TRUE, _FALSE):  # a truth value is its own type
            at = _skip(data, at, kind, depth)
    return fields, at + 1


def _skip(data: bytes, at: int, kind: int, depth: int) -> int:
    """Return the position after a value of a type."""
    if kind in (_TRUE, _FALSE, _BYTE):  # in a list, truth values take a byte
        at += 1
    elif kind in (4, 5, 6):
        at = _varint(data, at)[1]
    elif kind == _DOUBLE:
        at += 8
    elif kind == _BINARY:
        length, at = _varint(data, at)
        at += length
    elif kind in (_LIST, _SET):
        size, element, at = data[at] >> 4, data[at] & 15, at + 1
        # Sizes below 15 are in the head byte.
        if size == 15:
            size, at = _varint(data, at)
        for _ in range(size):
            at = _skip(data, at, element, depth + 1)
    elif kind == _STRUCT:
        at = _header(data, at, depth + 1)[1]
    else:
        raise ValueError("a page header of an unknown form")
    # A longer piece of the file may hold the rest.
    if at > len(data):
        raise IndexError
    return at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value, at, shift = value | (byte & 127) << shift, at + 1, shift + 7
        if byte < 128:
            return value, at
        # A crafted number could otherwise be as long as the file.
        if shift > 63:
            raise ValueError("a page header with a number of more than 64 bits")


def _zigzag(data: bytes, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return (value >> 1) ^ -(value & 1), at
