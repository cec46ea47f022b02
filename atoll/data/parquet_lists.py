"""Lists of captions in the columns of parquet files: lists of texts, or of structs with text and weight.

Text is read as a dictionary, so that a text that repeats is in memory once; a row is measured before it is unpacked.
"""

from typing import Any

import numpy as np

from atoll.data.caption_lists import TEXT_FIELDS, WEIGHT_FIELD
from atoll.data.focus import MOST_NUMBERS
from atoll.data.limits import MAX_CAPTIONS_BYTES
from atoll.data.types import Oversized

_ITEM = 8  # bytes of a list that an item takes, beside its text


def is_list(kind: Any) -> bool:
    """Return whether a pyarrow type is a list."""
    import pyarrow.types as kinds

    return any(is_one(kind) for is_one in (kinds.is_list, kinds.is_large_list, kinds.is_fixed_size_list))


def is_caption_list(kind: Any) -> bool:
    """Return whether a pyarrow type is a list of texts, or of structs with a text and perhaps a weight."""
    if not is_list(kind):
        return False
    item = kind.value_type
    return _is_string(item) or (_is_struct(item) and _is_weighted(item))


def is_number_list(kind: Any) -> bool:
    """Return whether a pyarrow type is a list of numbers."""
    import pyarrow.types as kinds

    return is_list(kind) and (kinds.is_integer(kind.value_type) or kinds.is_floating(kind.value_type))


def wrong_list(kind: Any) -> str:
    """Return what is wrong with a list that `is_caption_list` refuses, in a few words."""
    item = kind.value_type
    if is_list(item):
        return "a list of lists"
    return (
        "a list of structs without text, or with more than text and weight" if _is_struct(item) else "no list of texts"
    )


def text_paths(schema: Any, columns: list[str]) -> list[str]:
    """Return the paths of the texts in some list columns. schema: a pyarrow ParquetSchema."""
    leaves = map(schema.column, range(len(schema)))
    return [
        leaf.path
        for leaf in leaves
        if leaf.path.split(".")[0] in columns and "." in leaf.path and leaf.physical_type == "BYTE_ARRAY"
    ]


def list_values(column: Any) -> list[Any]:
    """Return the cells of a column of `is_caption_list`, read as dictionaries: lists whose texts are bytes.

    `Oversized` in place of a row whose captions have more than `MAX_CAPTIONS_BYTES` together.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    lengths = pc.list_value_length(column).fill_null(0).to_numpy()
    ends = np.cumsum(lengths)  # null rows have no items
    items = column.flatten()
    # The size of each item, from the sizes in the dictionary.
    sizes = np.full(len(items), _ITEM, dtype=np.int64)
    texts = [items]
    if pa.types.is_struct(items.type):
        texts = [items.field(i) for i in range(items.type.num_fields) if items.type[i].name in TEXT_FIELDS]
    for part in texts:
        own = pc.binary_length(part.dictionary.cast(pa.large_binary())).take(part.indices)
        sizes += own.fill_null(0).to_numpy()
    total = np.concatenate([[0], np.cumsum(sizes)])
    cells: list[Any] = []
    for row, (end, length) in enumerate(zip(ends.tolist(), lengths.tolist(), strict=True)):
        size = int(total[end] - total[end - length])
        if not column[row].is_valid:
            cells.append(None)
        elif size > MAX_CAPTIONS_BYTES:
            cells.append(Oversized(size))
        else:
            cells.append(_items(items.slice(end - length, length)))
    return cells


def number_lists(column: Any) -> list[Any]:
    """Return the first `MOST_NUMBERS` items of the cells of a column of `is_number_list`, however long these are."""
    return [list(cell.values[:MOST_NUMBERS].to_pylist()) if cell.is_valid else None for cell in column]


def _items(items: Any) -> list[Any]:
    """Return texts as bytes, and structs as objects without the fields that are null."""
    import pyarrow as pa

    if not pa.types.is_struct(items.type):
        return _texts(items)
    fields = {field.name: items.field(i) for i, field in enumerate(items.type)}
    columns = {name: _texts(part) if name in TEXT_FIELDS else part.to_pylist() for name, part in fields.items()}
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    valid = items.is_valid().to_pylist()
    # A null weight is none; a null text stays, so that it is named.
    return [
        {name: value for name, value in row.items() if name != WEIGHT_FIELD or value is not None} if there else None
        for row, there in zip(rows, valid, strict=True)
    ]


def _texts(part: Any) -> list[bytes | None]:
    """Return the texts of a dictionary array as bytes: one that is not utf-8 then fails alone."""
    import pyarrow as pa

    dictionary = part.dictionary.cast(pa.large_binary())
    return [None if index is None else dictionary[index].as_py() for index in part.indices.to_pylist()]


def _is_string(kind: Any) -> bool:
    import pyarrow.types as kinds

    plain = (kinds.is_string, kinds.is_large_string, kinds.is_binary, kinds.is_large_binary)
    return any(is_one(kind.value_type if kinds.is_dictionary(kind) else kind) for is_one in plain)


def _is_struct(kind: Any) -> bool:
    import pyarrow.types as kinds

    return bool(kinds.is_struct(kind))


def _is_weighted(kind: Any) -> bool:
    """Return whether a struct type has one text, and no other field but a weight."""
    import pyarrow.types as kinds

    fields = {field.name: field.type for field in kind}
    texts = [name for name in fields if name in TEXT_FIELDS]
    weight = fields.get(WEIGHT_FIELD)
    numbers = weight is None or kinds.is_integer(weight) or kinds.is_floating(weight)
    return (
        len(texts) == 1 and fields.keys() <= {*TEXT_FIELDS, WEIGHT_FIELD} and _is_string(fields[texts[0]]) and numbers
    )
