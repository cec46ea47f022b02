"""The words that tell one group of captions from all: shown by the reports."""

import math
import re
from collections import Counter
from collections.abc import Iterable

WORDS = 6  # per group


def count_words(captions: Iterable[str]) -> Counter[str]:
    """In how many captions each word stands."""
    return Counter(word for caption in captions for word in set(re.findall(r"[^\W_]+", caption.lower())))


def distinctive_words(
    counts: Counter[str], captions: int, overall: Counter[str], total: int
) -> tuple[tuple[str, float, float], ...]:
    """(word, share p here, share q overall) of the words commoner here, by p log(p/q): what tells most."""
    shares = [(word, count / captions, overall[word] / total) for word, count in counts.items()]
    above = [share for share in shares if share[1] > share[2]]
    above.sort(key=lambda share: (-share[1] * math.log(share[1] / share[2]), share[0]))
    return tuple(above[:WORDS])
