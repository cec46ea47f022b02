"""Lists of keys whose rows are left out, without writing the shards again: see `Shards.without`."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from atoll.errors import AtollError


class SkipList:
    """A text file of keys, one per line; blank lines are ignored.

    Args:
        path: the file.

    Attributes:
        keys: all of them.

    Raises:
        AtollError: it cannot be read, is not UTF-8, or holds no key.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise AtollError(f"{path}: cannot be read ({reason}); expected a text file with one key per line") from None
        # Keys may begin or end with spaces, but hold no line break. Reading has made Windows' line breaks plain ones.
        self.keys = frozenset(line for line in text.split("\n") if line.strip())
        if not self.keys:
            raise AtollError(f"{path}: holds no key; write one per line, or leave the list out")


def hash_of_keys(keys: Iterable[str]) -> str:
    """Return the hash of some keys, whatever their order."""
    return hashlib.sha256(json.dumps(sorted(keys)).encode()).hexdigest()


def listed_keys(paths: Iterable[Path]) -> frozenset[str]:
    """Return the keys of several lists, each of which is read once."""
    return frozenset(key for path in set(paths) for key in SkipList(path).keys)
