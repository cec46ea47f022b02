"""Outcome of the samples of an encoding: counts, reasons and notes, and their wording."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from atoll.data.types import UNREAD_CAPTIONS


@dataclass
class Tally:
    """Counts of samples.

    Attributes:
        good: samples that are encoded.
        uncaptioned: good samples without a caption.
        several: good samples with several captions.
        others: captions of these after the first one.
        skipped: failures by the kind of their reason.
        apart: dead links, masks and other samples that are not failures, by reason.
        notes: parts of good samples that were left out or changed, by kind.
        examples: a kind of failure or note -> its first text.
        sizes: of buckets, good samples by size.
    """

    good: int = 0
    uncaptioned: int = 0
    several: int = 0
    others: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    apart: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    sizes: Counter[str] = field(default_factory=Counter)

    @property
    def read(self) -> int:
        """Samples that are good or failed."""
        return self.good + self.skipped.total()

    def add(self, other: "Tally") -> None:
        """Add the counts of another tally."""
        self.good, self.uncaptioned = self.good + other.good, self.uncaptioned + other.uncaptioned
        self.several, self.others = self.several + other.several, self.others + other.others
        self.skipped += other.skipped
        self.apart += other.apart
        self.notes += other.notes
        # Examples of earlier blocks win, so that the first text stays.
        self.examples = {**other.examples, **self.examples}

    def skip(self, reason: str, failed: bool) -> None:
        """Count a sample that is not encoded."""
        if failed:
            self.skipped[kind_of(reason)] += 1
            self.examples.setdefault(kind_of(reason), reason)
        else:
            self.apart[reason] += 1

    def reasons(self) -> str:
        """Return the reasons in a line, most frequent first: "12 too small, 3 truncated"."""
        return ", ".join(f"{count:,} {kind}" for kind, count in self.skipped.most_common())

    def apart_by_kind(self) -> dict[str, Counter[str]]:
        """Return the samples that are not failures by kind, each with the details of its reasons."""
        kinds: dict[str, Counter[str]] = {}
        for reason, count in self.apart.items():
            kind = kind_of(reason)
            kinds.setdefault(kind, Counter())[reason.removeprefix(kind).lstrip(":; ").strip()] += count
        return kinds

    def apart_lines(self) -> list[str]:
        """Return a line for each kind of non-failure: "1,203 dead link (800 of HTTP Error 404: Not Found, ...)"."""
        lines = []
        for kind, details in self.apart_by_kind().items():
            # Three details are enough for a line; the list of skipped samples has all.
            most = ", ".join(f"{count:,} of {detail}" for detail, count in details.most_common(3))
            more = ", ..." if len(details) > 3 else ""
            what = next(iter(details)) if len(details) == 1 else f"{most}{more}"
            lines.append(f"{details.total():,} {kind} ({what})")
        return lines

    def note_lines(self) -> list[str]:
        """Return a line for each kind of note, with its first text."""
        return [f"{count:,} images: {self.examples.get(kind, kind)}" for kind, count in self.notes.most_common()]

    def unread_captions(self) -> str:
        """Return the note on unread captions beside images if no image has a caption; else ""."""
        nothing_read = self.good > 0 and self.uncaptioned == self.good
        return self.examples.get(UNREAD_CAPTIONS, "") if nothing_read and self.notes[UNREAD_CAPTIONS] else ""

    def failure(self, limit: float) -> str:
        """Return the message for too many failures: the reasons, or the common reason if all share one."""
        failed, read = self.skipped.total(), self.read
        # If everything fails for one reason, it is probably a wrong setting: state it alone.
        if self.good == 0 and len(self.skipped) == 1:
            (kind,) = self.skipped
            return f"none of {read:,} images can be used, all for one reason: {self.examples.get(kind, kind)}"
        what = f"{failed:,} of {read:,} images cannot be used ({failed / read:.1%}; {limit:.1%} may fail)"
        first = self.examples.get(self.skipped.most_common(1)[0][0], "")
        return f"{what}: {self.reasons()}; the first of the commonest: {first}"


def kind_of(reason: str) -> str:
    """Return the kind of a reason: the words before the details."""
    return re.split(r"[:(]", reason, maxsplit=1)[0].strip()


def count_notes(notes: Iterable[str]) -> list[dict[str, Any]]:
    """Count the notes of samples: each kind once, with its count and first text, as plain values."""
    kinds: dict[str, dict[str, Any]] = {}
    for note in notes:
        entry = kinds.setdefault(kind_of(note), {"note": note, "count": 0})
        entry["count"] += 1
    return list(kinds.values())


def tally_of(
    captions: list[str],
    others: Sequence[int],
    skipped: Iterable[Mapping[str, Any]],
    notes: Iterable[Mapping[str, Any]],
) -> Tally:
    """Return the tally of a finished block.

    Args:
        captions: first captions of its good samples.
        others: numbers of further captions of these.
        skipped: lines with key, reason and, if it is not a failure, failed = False.
        notes: as `count_notes` returns them.
    """
    tally = Tally(len(captions), captions.count(""), sum(count > 0 for count in others), sum(others))
    for entry in skipped:
        tally.skip(entry["reason"], entry.get("failed", True))
    for entry in notes:
        tally.notes[kind_of(entry["note"])] += entry["count"]
        tally.examples.setdefault(kind_of(entry["note"]), entry["note"])
    return tally
