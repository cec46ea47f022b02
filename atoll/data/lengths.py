"""Count captions that the text encoder truncates, and the fraction of their text that it drops."""

from collections.abc import Sequence
from typing import Any

from atoll.encoders.text.encoder import TextEncoder
from atoll.report.words import cut_captions

_ALL = 200_000  # captions to check at most; of more, an even sample


class CutCaptions:
    """Counts captions that are truncated.

    Attributes:
        captions: captions that are cut.
        characters, cut: characters of these, and characters that are not read.
    """

    def __init__(self, encoder: TextEncoder, captions: int):
        """Check an even sample of about `_ALL` of this number of captions."""
        self._encoder, self._step, self._number = encoder, max(1, captions // _ALL), 0
        self.captions = self.characters = self.cut = 0

    def add(self, captions: Sequence[str]) -> None:
        """Check some captions, in the order of their rows; of an image with several, all."""
        for caption in captions[-self._number % self._step :: self._step]:
            # A token of ASCII has at least one letter, so short captions need no tokenizer. Other letters may unfold:
            # T5 reads U+FDFA as 18 letters.
            if caption.isascii() and len(caption) < self._encoder.uncut_bytes:
                continue
            if rest := self._encoder.truncated_text(caption):
                self.captions += 1
                self.characters += len(caption)
                self.cut += min(len(rest), len(caption))
        self._number += len(captions)

    def counts(self) -> dict[str, Any] | None:
        """Return the counts of truncated captions and dropped text for the card; None if there are none."""
        if not self.captions:
            return None
        return {"captions": self.captions * self._step, "fraction": round(self.cut / self.characters, 4)}


def cut_line(cut: dict[str, Any], length: int) -> str:
    """Return the note on truncated captions: how many there are, and how much is dropped."""
    said = cut_captions(cut["captions"], cut["fraction"])
    return f"{said}; it reads {length} tokens: a larger condition.length or another condition reads more"
