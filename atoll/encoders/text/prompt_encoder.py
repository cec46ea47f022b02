"""The text encoders of an ensemble, over one prompt: its experts need not read a prompt with the same encoder."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from atoll.condition import Condition, Tokens
from atoll.encoders.text.encoder import TextEncoder
from atoll.encoders.weights import same


class PromptEncoder:
    """One or several encoders side by side: each caption is tokenized and encoded once by each of them.

    Args:
        encoders: at least one.
    """

    def __init__(self, encoders: Sequence[TextEncoder]):
        self.encoders = tuple(encoders)

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """Return the tokens of all encoders side by side [B, L1 + L2 + ...]."""
        # Side by side, so that rows can be selected before they are encoded.
        parts = [encoder.tokenize(captions) for encoder in self.encoders]
        return Tokens(torch.cat([part.ids for part in parts], 1), torch.cat([part.mask for part in parts], 1))

    def encode(self, tokens: Tokens) -> tuple[Condition, ...]:
        """Return one condition of B rows per encoder, from tokens [B, L1 + L2 + ...]."""
        # Each encoder gets its own columns back.
        lengths = [encoder.token_length for encoder in self.encoders]
        parts = zip(tokens.ids.split(lengths, dim=1), tokens.mask.split(lengths, dim=1), self.encoders, strict=True)
        return tuple(encoder.encode(Tokens(ids, mask)) for ids, mask, encoder in parts)

    def truncated_text(self, caption: str) -> str:
        """Return the longest end of a caption that some encoder cuts off; "" if none does."""
        # The encoder that reads least loses most.
        return max((encoder.truncated_text(caption) for encoder in self.encoders), key=len)

    def warn_of_truncated(self, captions: Sequence[str], kind: str, stacklevel: int) -> None:
        """Warn about the end of a caption that some encoder cuts off.

        Args:
            captions: those of one call; equal ones are named once.
            kind: what they are called in the warning: "prompt".
            stacklevel: the frame that the warning names, as in `warnings.warn`; 2 is the caller of this function.
        """
        for caption in dict.fromkeys(captions):
            if rest := self.truncated_text(caption):
                text = f"the {kind} {_shortened(caption)!r} is too long: {_shortened(rest)!r} is cut off"
                warnings.warn(text, stacklevel=stacklevel)

    def configs(self) -> list[dict[str, Any]]:
        """Return each encoder's config, as in the cards of the experts."""
        return [encoder.config() for encoder in self.encoders]

    def reads_like(self, other: "PromptEncoder") -> bool:
        """Whether both consist of the same encoders in the same order."""
        # The order matters: experts name an encoder by its index.
        one, two = self.configs(), other.configs()
        return len(one) == len(two) and all(same(a, b) for a, b in zip(one, two, strict=True))

    def __call__(self, captions: Sequence[str]) -> tuple[Condition, ...]:
        """Tokenize and encode B captions: one condition per encoder."""
        return self.encode(self.tokenize(captions))

    def null(self, batch: int) -> tuple[Condition, ...]:
        """Return the null conditions, `batch` rows each."""
        return self([""] * batch)


def _shortened(text: str) -> str:
    """Return a long text without its middle."""
    return text if len(text) <= 120 else f"{text[:60]} ... {text[-50:]}"
