"""The words that distinguish one group of captions from all captions, for the reports."""

import math
import re
from collections import Counter
from collections.abc import Iterable

WORDS = 6  # per group


def cut_captions(captions: int, fraction: float) -> str:
    """A sentence about captions that are longer than the text encoder reads.

    Args:
        captions: how many are cut.
        fraction: the fraction of their text that is not read.
    """
    many = f"{captions:,} captions are longer than the text encoder reads"
    return f"{many}: on average {fraction:.0%} of their text is cut"


def count_words(captions: Iterable[str]) -> Counter[str]:
    """The number of captions that contain each word."""
    return Counter(word for caption in captions for word in set(re.findall(r"[^\W_]+", caption.lower())))


def distinctive_words(
    counts: Counter[str], captions: int, overall: Counter[str], total: int
) -> tuple[tuple[str, float, float], ...]:
    """The most distinctive words of a group, as (word, fraction p here, fraction q overall), by p log(p/q).

    Args:
        counts, captions: of the group, as `count_words` returns them, and its number of captions.
        overall, total: the same of all captions.
    """
    fractions = [(word, count / captions, overall[word] / total) for word, count in counts.items()]
    # Only words that are more common here; ties in alphabetical order.
    above = [entry for entry in fractions if entry[1] > entry[2]]
    above.sort(key=lambda entry: (-entry[1] * math.log(entry[1] / entry[2]), entry[0]))
    return tuple(above[:WORDS])
