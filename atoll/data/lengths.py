"""How many captions are longer than the text encoder reads, and how much of them it does not read."""

from collections.abc import Sequence
from typing import Any

from atoll.encoders.text.encoder import TextEncoder

_ALL = 200_000  # captions up to which each is looked at; of more, an even sample of as many


class CutCaptions:
    """Counts captions that are cut.

    Attributes:
        captions: captions that are cut.
        characters, cut: characters of these, and characters that are not read.
    """

    def __init__(self, encoder: TextEncoder, rows: int):
        """Look at one caption in so many that about `_ALL` of `rows` are looked at."""
        self._encoder, self._step, self._row = encoder, max(1, rows // _ALL), 0
        self.captions = self.characters = self.cut = 0

    def add(self, captions: Sequence[str]) -> None:
        """Look at some captions, in the order of their rows."""
        for caption in captions[-self._row % self._step :: self._step]:
            # A token has at least a byte, so that short captions need no tokenizer.
            if len(caption.encode()) < self._encoder.length - 1:
                continue
            if rest := self._encoder.truncated_text(caption):
                self.captions += 1
                self.characters += len(caption)
                self.cut += min(len(rest), len(caption))
        self._row += len(captions)

    def counts(self) -> dict[str, Any] | None:
        """Plain values for the card: captions that are cut, and the fraction of their text; None if there are none."""
        if not self.captions:
            return None
        return {"captions": self.captions * self._step, "fraction": round(self.cut / self.characters, 4)}


def cut_line(cut: dict[str, Any], length: int) -> str:
    """What to say of cut captions: how many there are, and how much is cut."""
    return (
        f"{cut['captions']:,} captions are longer than the text encoder reads ({length} tokens): on average "
        f"{cut['fraction']:.0%} of their text is cut; a longer condition.length or another condition reads more"
    )
