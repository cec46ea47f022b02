"""What guides a network: token states, a mask, perhaps a pooled vector; and what every frozen encoder of captions is.

An encoder works in two steps, so that a training loop tokenises its captions once and encodes every batch:
`tokens = encoder.tokenize(captions)`, then `encoder.encode(tokens.index(rows))`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from atoll.condition import Condition, Tokens


class TextEncoder(ABC):
    """A frozen text encoder. Subclasses are final; `build_encoder` makes one again from its config."""

    name: ClassVar[str]
    dim: int  # D, the width of the states
    pooled_dim: int | None  # P, or None where there is no pooled vector
    length: int  # L, tokens per caption: longer captions are cut, shorter ones padded

    @abstractmethod
    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """Captions to tokens [B,L]."""

    @abstractmethod
    def encode(self, tokens: Tokens) -> Condition:
        """Tokens [B,L] to states [B,L,D], mask [B,L] and pooled [B,P], on the device of the tokens."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The plain values that stand in cards; `build_encoder(config)` makes an equal encoder anywhere."""

    def truncated_text(self, caption: str) -> str:
        """What of a caption stands beyond `length` tokens and is cut; "" where nothing does."""
        return ""

    def __call__(self, captions: Sequence[str]) -> Condition:
        return self.encode(self.tokenize(captions))

    def null(self, batch: int) -> Condition:
        """The null condition, that is the encoding of the empty prompt, `batch` times."""
        return self([""] * batch)
