"""Match text files with the images beside them, in order of preference."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from atoll.data.names import canonical


class Sidecars:
    """The text files of a folder, by image name.

    "a.txt" and "a.jpg.txt" belong to "a.jpg". Names are compared exactly first; then, for text files that belong to no
    image, as they print (Unicode NFC) and without regard to upper and lower case, where this leaves one choice.
    """

    def __init__(self, names: Iterable[str], images: Iterable[str], kinds: Sequence[str]):
        """Match the text files among `names`. kinds: their extensions without a leading dot, preferred ones first."""
        self.kinds = tuple(kind.lower() for kind in kinds)
        bases = {base for name in images for base in _bases(name)}
        self._exact: dict[str, list[tuple[int, str]]] = defaultdict(list)  # base -> (rank of its kind, name)
        self._loose: dict[str, dict[str, list[tuple[int, str]]]] = defaultdict(dict)
        self.names: list[str] = []
        for name in names:
            rank = self._rank(name)
            if rank is None:
                continue
            self.names.append(name)
            base = name[: -len(self.kinds[rank]) - 1]
            self._exact[base].append((rank, name))
            if base not in bases:
                self._loose[canonical(base).casefold()].setdefault(base, self._exact[base])

    def of(self, image: str) -> tuple[str, ...]:
        """Return the text files of an image, preferred first."""
        bases = _bases(image)
        # Rank by kind first, then "a.txt" before "a.jpg.txt".
        ranked = [(rank, order, name) for order, base in enumerate(bases) for rank, name in self._exact.get(base, ())]
        if not ranked:
            for order, base in enumerate(bases):
                candidates = self._loose.get(canonical(base).casefold(), {})
                # Two candidates that differ only in case are ambiguous: take neither.
                if len(candidates) == 1:
                    ranked += [(rank, order, name) for rank, name in next(iter(candidates.values()))]
        return tuple(name for _, _, name in sorted(ranked))

    def _rank(self, name: str) -> int | None:
        lower = name.lower()
        return next((rank for rank, kind in enumerate(self.kinds) if lower.endswith(f".{kind}")), None)

    def kind_of(self, name: str) -> str:
        """Return the extension of a text file, with its dot."""
        rank = self._rank(name)
        return "" if rank is None else f".{self.kinds[rank]}"


def unread_notes(
    sidecars: Sequence[tuple[str, ...]], by_table: Sequence[tuple[str, ...]], kinds: Sidecars
) -> list[str]:
    """Return notes on text files beside images that are not read.

    Args:
        sidecars: for each image that reads one, all of its candidates.
        by_table: the candidates of each image whose caption is in a table.
        kinds: the text files.
    """
    notes = []
    # Text files behind the preferred one.
    later = Counter(kinds.kind_of(name) for names in sidecars for name in names[1:])
    for kind, count in later.items():
        first = Counter(kinds.kind_of(names[0]) for names in sidecars if len(names) > 1).most_common(1)[0][0]
        notes.append(
            f"{count:,} {kind} files beside images are read only where {first} is empty, as {first} comes first; "
            f"data.caption: {kind} reads them instead"
        )
    for kind, count in Counter(kinds.kind_of(name) for names in by_table for name in names).items():
        notes.append(
            f"{count:,} {kind} files beside images are not read, as metadata has their captions; "
            f"data.caption: {kind} reads them instead"
        )
    return notes


def _bases(image: str) -> tuple[str, str]:
    """Return the names of a text file without its extension: the image's name without and with its own extension."""
    folder, slash, file = image.rpartition("/")
    stem = file.rpartition(".")[0] or file
    return f"{folder}{slash}{stem}", image
