"""What guides a network: token states, a mask, perhaps a pooled vector; and the frozen encoders of captions.

An encoder works in two steps, so that a training loop tokenises its captions once and encodes every batch:
`tokens = encoder.tokenize(captions)`, then `encoder.encode(tokens.index(rows))`.
"""

import hashlib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from atoll.errors import AtollError


@dataclass(frozen=True, eq=False)
class Tokens:
    """Captions as integers; what an integer means is known to the encoder that made it, in this process.

    ids: [B,L] int64. mask: [B,L] bool, True where a token stands.
    """

    ids: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def index(self, rows: Tensor) -> "Tokens":
        """The given rows ([b] int64), in their order."""
        return Tokens(self.ids[rows], self.mask[rows])

    def to(self, device: torch.device | str) -> "Tokens":
        return Tokens(self.ids.to(device), self.mask.to(device))


@dataclass(frozen=True, eq=False)
class Condition:
    """Encoded captions. Every row has at least one token: attention over an empty row would be 0/0.

    states: [B,L,D] float. mask: [B,L] bool, True where a token stands. pooled: [B,P] float, or None.
    Raises ValueError if the shapes do not belong together.
    """

    states: Tensor
    mask: Tensor
    pooled: Tensor | None = None

    def __post_init__(self) -> None:
        if self.states.ndim != 3 or self.mask.shape != self.states.shape[:2] or self.mask.dtype != torch.bool:
            raise ValueError(
                f"a condition needs states [B,L,D] and a bool mask [B,L]; got {tuple(self.states.shape)} and "
                f"{self.mask.dtype} {tuple(self.mask.shape)}"
            )
        if self.pooled is not None and (self.pooled.ndim != 2 or len(self.pooled) != len(self.states)):
            raise ValueError(f"pooled must be [{len(self.states)},P]; got {tuple(self.pooled.shape)}")

    def __len__(self) -> int:
        return len(self.states)

    def index(self, rows: Tensor) -> "Condition":
        """The given rows ([b] int64, or a [B] bool mask), in their order."""
        pooled = None if self.pooled is None else self.pooled[rows]
        return Condition(self.states[rows], self.mask[rows], pooled)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Condition":
        """Moved to a device and, except for the mask, cast to a dtype."""
        pooled = None if self.pooled is None else self.pooled.to(device, dtype)
        return Condition(self.states.to(device, dtype), self.mask.to(device), pooled)

    @staticmethod
    def cat(conditions: "Sequence[Condition]") -> "Condition":
        """Joined along the batch; all must share L, D and having a pooled vector or not (else ValueError)."""
        pooled = [c.pooled for c in conditions if c.pooled is not None]
        if len(pooled) not in (0, len(conditions)):
            raise ValueError("some conditions have a pooled vector and some have none")
        return Condition(
            torch.cat([c.states for c in conditions]),
            torch.cat([c.mask for c in conditions]),
            torch.cat(pooled) if pooled else None,
        )


class Encoder(ABC):
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

    def __call__(self, captions: Sequence[str]) -> Condition:
        return self.encode(self.tokenize(captions))

    def null(self, batch: int) -> Condition:
        """The null condition, that is the encoding of the empty prompt, `batch` times."""
        return self([""] * batch)


class HashConfig(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["hash"] = "hash"
    dim: int = Field(64, ge=2, multiple_of=2)  # sine and cosine each take half
    length: int = Field(16, ge=2)
    seed: int = 0


class HashEncoder(Encoder):
    """Words to fixed vectors taken from a hash, plus their position: no download, no fitting, any vocabulary.

    A word is a run of letters or digits, in lower case; punctuation only separates. Its vector is the output
    of SHAKE-256 over seed and word, read as uniform numbers of unit variance: the same on every machine.
    The first token is a start token. states = word vector + sinusoidal position, zero where nothing stands;
    pooled = sum of the word vectors at unit mean square, blind to their order.
    """

    name = "hash"

    def __init__(self, dim: int = 64, length: int = 16, seed: int = 0):
        self._config = HashConfig(dim=dim, length=length, seed=seed)
        self.dim = self.pooled_dim = dim
        self.length = length
        self._position = _sinusoids(length, dim)
        self._ids: dict[str, int] = {}  # word -> row of the table; a word is hashed when it is first met
        self._table = torch.zeros(1, dim)  # row 0 is "nothing stands here"
        self._admit([_START])

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        words = [[_START, *_WORD.findall(caption.lower())][: self.length] for caption in captions]
        self._admit(sorted({word for row in words for word in row} - self._ids.keys()))
        ids = [[self._ids[word] for word in row] + [0] * (self.length - len(row)) for row in words]
        tensor = torch.tensor(ids, dtype=torch.int64).reshape(len(words), self.length)
        return Tokens(tensor, tensor > 0)

    def encode(self, tokens: Tokens) -> Condition:
        device = tokens.ids.device
        if self._table.device != device:
            self._table, self._position = self._table.to(device), self._position.to(device)
        words = self._table[tokens.ids]  # [B,L,D]
        states = torch.addcmul(words, self._position, tokens.mask.unsqueeze(-1).to(words.dtype))  # [B,L,D]
        total = words.sum(1)  # [B,D]
        pooled = total * total.square().mean(1, keepdim=True).rsqrt()  # [B,D], no 0/0: the start token stands
        return Condition(states, tokens.mask, pooled)

    def config(self) -> dict[str, Any]:
        return self._config.model_dump()

    def _admit(self, words: Sequence[str]) -> None:
        """Gives each new word a row of the table."""
        if not words:
            return
        self._ids.update({word: len(self._table) + i for i, word in enumerate(words)})
        rows = torch.stack([self._vector(word) for word in words]).to(self._table.device)
        self._table = torch.cat([self._table, rows])

    def _vector(self, word: str) -> Tensor:
        """The word's vector [D]: 32 bits of the hash per number, uniform in +-sqrt(3): unit variance."""
        digest = hashlib.shake_256(f"{self._config.seed}:{word}".encode()).digest(4 * self.dim)
        bits = [int.from_bytes(digest[i : i + 4], "little") for i in range(0, len(digest), 4)]
        return (torch.tensor(bits, dtype=torch.float64) / 2**31 - 1).mul(math.sqrt(3)).float()


_START = "<start>"  # cannot collide: no word holds a bracket
_WORD = re.compile(r"[^\W_]+")


def _sinusoids(length: int, dim: int) -> Tensor:
    """Positions 0..length-1 as sines and cosines [L,D] (Vaswani et al. 2017, section 3.5)."""
    frequency = 10_000.0 ** (-torch.arange(dim // 2) / (dim // 2))  # [D/2]
    angle = torch.arange(length).unsqueeze(1) * frequency  # [L,D/2]
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def build_encoder(config: Mapping[str, Any]) -> Encoder:
    """The encoder that a card's config describes. Raises AtollError for an unknown name, key or value."""
    if config.get("name") != HashEncoder.name:
        raise AtollError(f"unknown condition encoder {config.get('name')!r}; known: {HashEncoder.name!r}")
    try:
        checked = HashConfig.model_validate(dict(config))
    except ValidationError as error:
        where, message = error.errors()[0]["loc"], error.errors()[0]["msg"]
        raise AtollError(f"condition encoder 'hash': {'.'.join(map(str, where))}: {message}") from error
    return HashEncoder(checked.dim, checked.length, checked.seed)
