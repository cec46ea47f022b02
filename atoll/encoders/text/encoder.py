"""The interface of a frozen text encoder: captions to a condition.

An encoder works in two steps, so that a training loop tokenizes its captions once and encodes every batch:
`tokens = encoder.tokenize(captions)`, then `encoder.encode(tokens.index(rows))`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from atoll.condition import Condition, Tokens


class TextEncoder(ABC):
    """A frozen text encoder. Subclasses are final; `build_encoder` creates one from its config.

    Attributes:
        name: the name in configs.
        dim: D, the width of the states.
        pooled_dim: P; None without a pooled vector.
        length: L, states per caption: longer captions are cut, shorter ones padded.
        zero_padding: whether the states are zero at padding, and only there.
    """

    name: str
    zero_padding: bool = False
    dim: int
    pooled_dim: int | None
    length: int

    @property
    def token_length(self) -> int:
        """Token numbers per caption: L, unless the encoder also reads text around it, or reads it several times."""
        return self.length

    @property
    def uncut_bytes(self) -> int:
        """Captions of fewer bytes than this are never cut: a token has at least one byte."""
        return self.length - 1

    @abstractmethod
    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """Tokenize B captions to [B, token_length]."""

    @abstractmethod
    def encode(self, tokens: Tokens) -> Condition:
        """Encode tokens [B, token_length] as states [B, L, D], mask [B, L] and pooled [B, P], on their device."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Return the plain values that are stored in cards; `build_encoder` creates an equal encoder from them."""

    def truncated_text(self, caption: str) -> str:
        """Return the end of a caption that is beyond `length` tokens and cut off; "" if nothing is."""
        # An encoder without a limit cuts nothing off.
        return ""

    def __call__(self, captions: Sequence[str]) -> Condition:
        """Tokenize and encode B captions."""
        return self.encode(self.tokenize(captions))

    def null(self, batch: int) -> Condition:
        """Return the null condition, which is the encoding of the empty prompt, as `batch` rows."""
        # The empty prompt is encoded like any other caption.
        return self([""] * batch)
