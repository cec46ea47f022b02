"""Several encoders over one prompt: the experts of an ensemble need not read it alike."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from atoll.condition.base import Condition, Encoder, Tokens


@dataclass(frozen=True, eq=False)
class Conditions:
    """The conditions of B prompts by several encoders, in their order."""

    parts: tuple[Condition, ...]

    def __len__(self) -> int:
        return len(self.parts[0])

    def index(self, rows: Tensor) -> "Conditions":
        """The given rows ([b] int64, or a [B] bool mask) of each, in their order."""
        return Conditions(tuple(part.index(rows) for part in self.parts))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Conditions":
        return Conditions(tuple(part.to(device, dtype) for part in self.parts))


class SeveralEncoders:
    """Encoders side by side, used like one: each caption is tokenized and encoded once by each of them."""

    def __init__(self, encoders: Sequence[Encoder]):
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

    def unread(self, caption: str) -> str:
        """What the encoder that reads least of a caption does not read; "" where all read it whole."""
        return max((encoder.unread(caption) for encoder in self.encoders), key=len)

    def config(self) -> dict[str, Any]:
        """Plain values, to be compared; each expert's card has its own encoder's."""
        return {"name": "several", "encoders": [encoder.config() for encoder in self.encoders]}

    def __call__(self, captions: Sequence[str]) -> Conditions:
        return self.encode(self.tokenize(captions))

    def null(self, batch: int) -> Conditions:
        """The null conditions, `batch` times."""
        return self([""] * batch)
