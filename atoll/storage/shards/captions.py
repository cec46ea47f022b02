"""Several captions of one image, as a manifest stores them.

The first caption is in the column `caption`, as an only one is. The others are one text in the optional column
`other_captions`: a JSON list of [caption, weight], or "" if there are none. The first caption has weight 1.

A text, because it takes no more memory than its bytes: a parquet list of a few bytes may unpack to billions of nulls.
"""

import json
from collections.abc import Sequence

OTHERS = "other_captions"  # the column
MAX_WEIGHT = 1e12  # of a caption over that of the first one

Weighted = tuple[str, float]  # a caption and its weight, which is above 0


def pack(others: Sequence[Weighted]) -> str:
    """Return captions after the first one as one text; "" for none."""
    # The shortest JSON: the same captions give the same bytes.
    return json.dumps(others, ensure_ascii=False, separators=(",", ":")) if others else ""


def unpack(text: str) -> list[Weighted]:
    """Return the captions of a text by `pack`. Raises ValueError for any other text; a stranger may have written it."""
    if not text:
        return []
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("captions that are nested too deeply") from None
    if not isinstance(content, list):
        raise ValueError(f"captions as {type(content).__name__}, expected a list")
    for item in content:
        if not (isinstance(item, list) and len(item) == 2 and isinstance(item[0], str) and _is_weight(item[1])):
            raise ValueError(f"{item!r:.60}, expected a caption and its weight")
        item[0].encode()  # JSON may spell half a character, which is no text
    return [(caption, float(weight)) for caption, weight in content]


def choose(first: str, others: Sequence[Weighted], u: float) -> str:
    """Return one of an image's captions, each with a probability in proportion to its weight.

    Args:
        first: its first caption, of weight 1.
        others: the others.
        u: uniform in [0, 1).
    """
    # The inverse of the cumulative distribution, in the order of the captions.
    level = u * (1 + sum(weight for _, weight in others))
    total = 1.0
    if level < total:
        return first
    for caption, weight in others:
        total += weight
        if level < total:
            return caption
    # Rounding may leave the level at the total.
    return others[-1][0] if others else first


def _is_weight(value: object) -> bool:
    # The comparison refuses NaN and infinity, too.
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= MAX_WEIGHT
