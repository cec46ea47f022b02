"""What must stay inside an image's crop: a box in a column of the metadata, such as a detector of faces writes."""

import json
import math

from atoll.data.crop import Box
from atoll.data.names import clean, message_of
from atoll.data.types import Unfit

_EXPECTED = "[x0, y0, x1, y1] as fractions of the width and the height, from the upper left corner"
MOST_NUMBERS = 5  # of a list that are read: one more than a box has
_MAX_TEXT = 1000  # characters of a box that is written as text


def box_of(value: object) -> Box | None:
    """Return the box in a cell; None for null or empty text.

    Args:
        value: a list of four numbers, or its JSON as text, as a CSV file has it.

    Raises:
        Unfit: anything else: other numbers of items, lists of lists, NaN, pixels, a box that is not inside the image or
            whose sides are swapped.
    """
    items = _parsed(value) if isinstance(value, str | bytes) else value
    if items is None:
        return None
    if not isinstance(items, list):
        raise Unfit(f"focus: is a {type(items).__name__}, expected {_EXPECTED}; null is no box")
    # bool is a kind of int, but no coordinate.
    if wrong := [x for x in items if not isinstance(x, int | float) or isinstance(x, bool)]:
        raise Unfit(f"focus: a list with a {type(wrong[0]).__name__}, expected {_EXPECTED}")
    if len(items) != 4:
        count = f"{len(items)} numbers" if len(items) < MOST_NUMBERS else f"{MOST_NUMBERS} numbers or more"
        raise Unfit(f"focus: a list of {count}, expected {_EXPECTED}; null is no box")
    if not all(math.isfinite(x) for x in items if isinstance(x, float)):
        raise Unfit(f"focus: {clean(repr(items))} is not finite, expected {_EXPECTED}")
    # Pixels are the usual mistake: their image may have been resized since.
    if not all(0 <= x <= 1 for x in items):
        raise Unfit(f"focus: {clean(repr(items))} is not inside the image, expected {_EXPECTED}; divide pixels by them")
    x0, y0, x1, y1 = map(float, items)
    if x0 > x1 or y0 > y1:
        raise Unfit(f"focus: {clean(repr(items))} ends before it begins, expected {_EXPECTED}")
    return Box(x0, y0, x1, y1)


def _parsed(text: str | bytes) -> object:
    """Return the value that a text holds as JSON; None for empty text."""
    if not text.strip():
        return None
    if len(text) > _MAX_TEXT:
        raise Unfit(f"focus: a text of {len(text):,} characters, expected {_EXPECTED}")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        shown = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        raise Unfit(f"focus: {clean(shown)!r} is no JSON ({message_of(error)}), expected {_EXPECTED}") from None
