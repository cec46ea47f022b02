"""A text encoder without weights: each word's vector comes from a hash."""

import hashlib
import math
import re
from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from atoll.condition import Condition, Tokens
from atoll.encoders.text.encoder import TextEncoder
from atoll.storage import bounds


class HashConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["hash"] = "hash"
    dim: int = Field(64, ge=2, le=bounds.MAX_DIM, multiple_of=2)  # half sine, half cosine
    length: int = Field(16, ge=2, le=bounds.MAX_TOKENS)
    seed: int = 0

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.dim * self.length > bounds.MAX_STATES:
            raise ValueError(f"dim x length is {self.dim * self.length:,}; expected at most {bounds.MAX_STATES:,}")
        return self


class HashEncoder(TextEncoder):
    """Words as fixed vectors from a hash, plus their position: no download, no fitting, any vocabulary.

    A word is a run of letters or digits, in lower case; punctuation only separates. Its vector is the output of
    SHAKE-256 over seed and word, read as uniform numbers of unit variance: the same on every machine. The first token
    is a start token. states = word vector + sinusoidal position, zero at padding; pooled = sum of the word vectors at
    unit mean square, independent of their order.
    """

    name = "hash"
    zero_padding = True

    def __init__(self, dim: int = 64, length: int = 16, seed: int = 0):
        self._config = HashConfig(dim=dim, length=length, seed=seed)
        self.dim = self.pooled_dim = dim
        self.length = length
        self._position = sinusoids(length, dim)
        self._ids: dict[str, int] = {}  # word -> row of the table; a word is hashed at its first use
        self._table = torch.zeros(1, dim)  # row 0 is padding
        self._placed = (self._table, self._position)
        self._admit([_START])

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        # Words, with the start token first, cut to `length`.
        words = [[_START, *WORD.findall(caption.lower())][: self.length] for caption in captions]
        # Sorted: the table's order does not depend on the order of a set.
        self._admit(sorted({word for row in words for word in row} - self._ids.keys()))
        ids = [[self._ids[word] for word in row] + [0] * (self.length - len(row)) for row in words]
        tensor = torch.tensor(ids, dtype=torch.int64).reshape(len(words), self.length)
        return Tokens(tensor, tensor > 0)

    def encode(self, tokens: Tokens) -> Condition:
        # Word vectors plus positions, zero at padding.
        table, position = self._on(tokens.ids.device)
        words = table[tokens.ids]  # [B,L,D]
        states = torch.addcmul(words, position, tokens.mask.unsqueeze(-1).to(words.dtype))  # [B,L,D]
        # The sum of the words, at unit mean square.
        total = words.sum(1)  # [B,D]
        pooled = total * total.square().mean(1, keepdim=True).rsqrt()  # [B,D], no 0/0: there is a start token
        return Condition(states, tokens.mask, pooled)

    def truncated_text(self, caption: str) -> str:
        # The start token takes one place.
        return " ".join(WORD.findall(caption.lower())[self.length - 1 :])

    def config(self) -> dict[str, Any]:
        return self._config.model_dump()

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the table and the positions on a device.

        One thread may tokenize while another encodes earlier tokens: the first writes only the table, the second only
        these copies.
        """
        placed = self._placed
        if len(placed[0]) != len(self._table) or placed[0].device != device:
            self._placed = placed = (self._table.to(device), self._position.to(device))
        return placed

    def _admit(self, words: Sequence[str]) -> None:
        """Add a row to the table for each new word."""
        # Nothing new: the table stays as it is.
        if not words:
            return
        self._ids.update({word: len(self._table) + i for i, word in enumerate(words)})
        self._table = torch.cat([self._table, torch.stack([self._vector(word) for word in words])])

    def _vector(self, word: str) -> Tensor:
        """Return the word's vector [D]: 32 bits of the hash per number, uniform in +-sqrt(3), so unit variance."""
        # Four bytes per number.
        digest = hashlib.shake_256(f"{self._config.seed}:{word}".encode()).digest(4 * self.dim)
        bits = [int.from_bytes(digest[i : i + 4], "little") for i in range(0, len(digest), 4)]
        return (torch.tensor(bits, dtype=torch.float64) / 2**31 - 1).mul(math.sqrt(3)).float()


_START = "<start>"  # cannot collide: no word contains a bracket
WORD = re.compile(r"[^\W_]+")


def sinusoids(length: int, dim: int) -> Tensor:
    """Return positions 0..length-1 as sines and cosines [L, D] (Vaswani et al. 2017, section 3.5)."""
    # Frequencies fall geometrically, as in the paper.
    frequency = 10_000.0 ** (-torch.arange(dim // 2) / (dim // 2))  # [D/2]
    angle = torch.arange(length).unsqueeze(1) * frequency  # [L,D/2]
    return torch.cat([angle.sin(), angle.cos()], dim=1)
