"""Derive splits from the names of folders and files, by the rules of Hugging Face datasets.

`datasets.load_dataset` reads, in this order: files called `NAME-00000-of-00001...`, folders whose name has a keyword
(train, test, validation, ...), and files whose name has one; the first rule that fits any file decides for all.
Files that it would load as another split than train are held out here.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from atoll.storage.shards import Split

TRAIN = ("train", "training")
HELD_OUT = ("validation", "valid", "dev", "val", "test", "testing", "eval", "evaluation")

_SEPARATOR = r"[-._ 0-9]"  # around a keyword, as in "birds-test_2"
_KEYWORD = re.compile(rf"(?:^|(?<={_SEPARATOR}))({'|'.join((*TRAIN, *HELD_OUT))})(?={_SEPARATOR}|$)", re.IGNORECASE)
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}.*", re.DOTALL)


class NamedSplits(NamedTuple):
    """Splits derived from names.

    Attributes:
        splits: the names of files that some rule covers -> their split.
        notes: notes for the user; empty if no name holds anything out.
    """

    splits: dict[str, Split]
    notes: tuple[str, ...] = ()


def keyword_in(name: str) -> str | None:
    """Return the split keyword in a name, in lower case; the first held-out one if there are several."""
    words = [word.lower() for word in _KEYWORD.findall(name)]
    return next((word for word in words if word in HELD_OUT), words[0] if words else None)


def is_keyword(value: object) -> bool:
    """Return whether a cell names a split."""
    return isinstance(value, str) and value.strip().lower() in (*TRAIN, *HELD_OUT)


def named_splits(names: Sequence[str], what: str, all_files: bool = False) -> NamedSplits:
    """Derive splits from the names of folders and files.

    Args:
        names: paths relative to the data's root, with slashes.
        what: kind of the files, for notes: "images", "tars".
        all_files: use names of files only if each has a keyword. This is for images, whose names are free text: one
            photograph called test.jpg is not a split.

    Returns:
        The splits; empty if no name holds anything out, or if nothing would be left to train on.
    """
    labels: dict[str, tuple[Split, str]] = {}  # the split of a file, and the name that implies it
    # The first rule that labels any file decides for all of them.
    for rule in (_by_shard, _by_folder, _by_file):
        labels = rule(names)
        if rule is _by_file and all_files and len(labels) < len(names):
            labels = {}
        if labels:
            break
    # Files without a label train.
    counts = Counter(label for split, label in labels.values() if split == "val")
    if not counts:
        return NamedSplits({})
    said = ", ".join(f"{count:,} in {label}" for label, count in counts.most_common(5))
    # A data set that has only a test split was chosen to train on it.
    if sum(counts.values()) == len(names):
        return NamedSplits({}, (f"all {what} lie in what is called {said}: they train, as nothing else is there",))
    note = f"held out by name: {said} ({what}); data.splits: hash ignores such names"
    return NamedSplits({name: split for name, (split, _) in labels.items()}, (note,))


def _by_shard(names: Iterable[str]) -> dict[str, tuple[Split, str]]:
    """Label shards such as test-00000-of-00001.parquet: beside shards called train, all others are held out."""
    words = {name: match[1] for name in names if (match := _SHARD.fullmatch(name.rsplit("/", 1)[-1]))}
    trains = {word for word in words.values() if keyword_in(word) in TRAIN}
    if not trains:
        return {}
    return {name: ("train" if word in trains else "val", f"{word}-*") for name, word in words.items()}


def _by_folder(names: Iterable[str]) -> dict[str, tuple[Split, str]]:
    """Label files by folder: whole names win over parts of names, held-out names over names that train."""
    known: dict[str, tuple[Split, str] | None] = {}
    labels = {}
    for name in names:
        folder = name.rpartition("/")[0]
        # Many files share a folder; label each folder once.
        if folder not in known:
            known[folder] = _of_folder(folder)
        if (label := known[folder]) is not None:
            labels[name] = label
    return labels


def _of_folder(folder: str) -> tuple[Split, str] | None:
    parts = folder.split("/")
    # A folder called "test" is clearer than one called "birds-test".
    whole = [part for part in parts if part.lower() in (*TRAIN, *HELD_OUT)]
    for candidates in (whole, parts):
        words = {part: word for part in candidates if (word := keyword_in(part))}
        for part, word in words.items():
            if word in HELD_OUT:
                return "val", f"{part}/"
        for part in words:
            return "train", f"{part}/"
    return None


def _by_file(names: Iterable[str]) -> dict[str, tuple[Split, str]]:
    labels: dict[str, tuple[Split, str]] = {}
    for name in names:
        file = name.rsplit("/", 1)[-1]
        if word := keyword_in(file):
            labels[name] = ("train", f"*{word}*") if word in TRAIN else ("val", f"*{word}*")
    return labels
