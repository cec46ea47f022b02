"""Several captions of one image: a list in a cell, several columns, or the lines of a text; and their weights."""

import math
from collections.abc import Sequence
from typing import Any

from atoll.data.captions import field_of, lines_of
from atoll.data.names import clean
from atoll.data.types import Unfit
from atoll.manifest import DataSettings
from atoll.storage.bounds import MAX_CAPTION_BYTES
from atoll.storage.shards import MAX_WEIGHT, Weighted, pack

TEXT_FIELDS = ("text", "caption")  # of a caption with a weight; either one
WEIGHT_FIELD = "weight"


def captions_of(value: object, data: DataSettings) -> list[Weighted]:
    """Return the captions of a cell or a file, with weights; none for None or empty text.

    A cell holds text, or a list whose items are texts or {text, weight}; an item without a weight has weight 1. A
    caption of weight 0 is left out.

    Raises:
        Unfit: as `lines_of`; an empty list, an item or a weight of another kind, or weights that are all 0.
    """
    if not isinstance(value, list | tuple):
        lines = lines_of(value, data.encoding)
        return [(line, 1.0) for line in lines] if data.caption_lines == "each" else _joined(lines, 1.0)
    if not value:
        raise Unfit("caption: an empty list, expected at least one caption; null is no caption")
    items = [_item(item, number, data.encoding) for number, item in enumerate(value, 1)]
    # Empty texts do not count, whatever their weight.
    captions = [caption for item in items for caption in item]
    if captions and not any(weight > 0 for _, weight in captions):
        raise Unfit("caption: the weights of its list are all 0, expected at least one above 0")
    return [(text, weight) for text, weight in captions if weight > 0]


def captions_in(record: dict[str, Any], column: str | None, data: DataSettings) -> list[Weighted] | None:
    """Return the captions in a field of a record, or in the first usual field; None if there is none."""
    value = field_of(record, column)
    return None if value is None else captions_of(value, data)


def joined_note(value: object, where: str, data: DataSettings) -> tuple[str, ...]:
    """Return the note on a text of several lines that is read as one caption; none otherwise."""
    if data.caption_lines == "each" or not isinstance(value, str | bytes) or len(lines_of(value, data.encoding)) < 2:
        return ()
    return (f"captions of several lines, joined into one ({clean(where)}); data.caption_lines: each keeps them apart",)


def combined(parts: Sequence[tuple[list[Weighted], float]]) -> list[Weighted]:
    """Return the captions of several columns as one list.

    Args:
        parts: the captions of each column, and the column's weight, which its captions share.
    """
    if len(parts) == 1:
        return parts[0][0]
    captions = []
    for part, weight in parts:
        total = sum(own for _, own in part)
        captions += [(text, weight * own / total) for text, own in part]
    return captions


def first_and_others(captions: Sequence[Weighted]) -> tuple[str, str]:
    """Return the first caption, and the others as `Shard.others` holds them; ("", "") for no caption.

    Raises:
        Unfit: the others are longer than a manifest holds, or the weights differ too much.
    """
    if not captions:
        return "", ""
    (first, unit), *rest = captions
    others = [(text, weight / unit) for text, weight in rest]
    if not all(0 < weight <= MAX_WEIGHT for _, weight in others):
        raise Unfit(f"caption: weights that differ by more than {MAX_WEIGHT:.0e} times; leave the rarest caption out")
    packed = pack(others)
    if (size := len(packed.encode())) > MAX_CAPTION_BYTES:
        raise Unfit(f"caption: {size:,} bytes of captions after the first one, expected at most {MAX_CAPTION_BYTES:,}")
    return first, packed


def _item(item: object, number: int, encoding: str) -> list[Weighted]:
    """Return the caption of an item of a list; none if its text is empty."""
    if isinstance(item, str | bytes):
        return _joined(lines_of(item, encoding), 1.0)
    if not isinstance(item, dict):
        raise Unfit(f"caption: item {number} of its list is {_kind(item)}, expected text or {{text, weight}}")
    # An unknown key may be a misspelled one.
    if unknown := [str(key) for key in item if key not in (*TEXT_FIELDS, WEIGHT_FIELD)]:
        raise Unfit(f"caption: item {number} of its list has {clean(unknown[0])!r}, expected text and weight")
    texts = [item[field] for field in TEXT_FIELDS if field in item]
    if len(texts) != 1 or not isinstance(texts[0], str | bytes):
        what = _kind(texts[0]) if texts else "missing"
        raise Unfit(f"caption: the text of item {number} of its list is {what}, expected text")
    weight = item.get(WEIGHT_FIELD, 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or weight < 0 or not math.isfinite(weight):
        raise Unfit(
            f"caption: the weight of item {number} of its list is {clean(repr(weight))}, expected a finite number of "
            "at least 0"
        )
    return _joined(lines_of(texts[0], encoding), float(weight))


def _joined(lines: list[str], weight: float) -> list[Weighted]:
    return [(" ".join(lines), weight)] if lines else []


def _kind(value: object) -> str:
    return "null" if value is None else f"a {type(value).__name__}"
