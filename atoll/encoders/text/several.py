"""Several encoders over one prompt: the experts of an ensemble need not read it alike."""

from collections.abc import Sequence
from typing import Any

import torch

from atoll.condition import Conditions, Tokens
from atoll.encoders.text.encoder import TextEncoder


class PromptEncoder:
    """Encoders side by side, used like one: each caption is tokenized and encoded once by each of them."""

    def __init__(self, encoders: Sequence[TextEncoder]):
        self.encoders = tuple(encoders)

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """Captions to the tokens of all encoders, one after the other [B, L1 + L2 + ...]."""
        parts = [encoder.tokenize(captions) for encoder in self.encoders]
        return Tokens(torch.cat([part.ids for part in parts], 1), torch.cat([part.mask for part in parts], 1))

    def encode(self, tokens: Tokens) -> Conditions:
        """Tokens [B, L1 + L2 + ...] to the encoders' conditions."""
        lengths = [encoder.length for encoder in self.encoders]
        parts = zip(tokens.ids.split(lengths, dim=1), tokens.mask.split(lengths, dim=1), self.encoders, strict=True)
        return Conditions(tuple(encoder.encode(Tokens(ids, mask)) for ids, mask, encoder in parts))

    def truncated_text(self, caption: str) -> str:
        """What the encoder that reads least of a caption does not read; "" where all read it whole."""
        return max((encoder.truncated_text(caption) for encoder in self.encoders), key=len)

    def config(self) -> dict[str, Any]:
        """Plain values, to be compared; each expert's card has its own encoder's."""
        return {"name": "several", "encoders": [encoder.config() for encoder in self.encoders]}

    def __call__(self, captions: Sequence[str]) -> Conditions:
        return self.encode(self.tokenize(captions))

    def null(self, batch: int) -> Conditions:
        """The null conditions, `batch` times."""
        return self([""] * batch)
