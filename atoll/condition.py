"""What guides a network: token states [B, L, D] with a mask, and an optional pooled vector [B, P].

A network is given one `Condition`. A prompt is a tuple of conditions, one per text encoder, however many there are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Tokens:
    """Captions as token numbers. Only the encoder that tokenized them knows what a number means, in this process.

    Attributes:
        ids: token numbers [B, L] int64.
        mask: True at a token, False at padding [B, L] bool.
    """

    ids: Tensor
    mask: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def index(self, rows: Tensor) -> "Tokens":
        """Return the given rows ([b] int64), in their order."""
        # The order of the rows is the caller's, and repetitions are allowed.
        return Tokens(self.ids[rows], self.mask[rows])

    def to(self, device: torch.device | str) -> "Tokens":
        """Return the tokens on a device."""
        return Tokens(self.ids.to(device), self.mask.to(device))


@dataclass(frozen=True, eq=False)
class Condition:
    """Captions as one text encoder represents them. Every row has at least one token: attention over none is 0/0.

    Attributes:
        states: token states [B, L, D] float.
        mask: True at a token, False at padding [B, L] bool.
        pooled: one vector per caption [B, P] float, or None.

    Raises:
        ValueError: the shapes do not fit together.
    """

    states: Tensor
    mask: Tensor
    pooled: Tensor | None = None

    def __post_init__(self) -> None:
        # A wrong mask or pooled vector would broadcast silently.
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
        """Return the given rows ([b] int64, or a [B] bool mask), in their order."""
        # All three fields have the same rows.
        pooled = None if self.pooled is None else self.pooled[rows]
        return Condition(self.states[rows], self.mask[rows], pooled)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Condition":
        """Return the condition on a device and, except for the mask, in a dtype."""
        # The mask stays bool.
        pooled = None if self.pooled is None else self.pooled.to(device, dtype)
        return Condition(self.states.to(device, dtype), self.mask.to(device), pooled)

    @staticmethod
    def cat(conditions: "Sequence[Condition]") -> "Condition":
        """Return the conditions joined along the batch.

        Raises:
            ValueError: only some of them have a pooled vector.
        """
        # A pooled vector for all rows, or for none.
        pooled = [c.pooled for c in conditions if c.pooled is not None]
        if len(pooled) not in (0, len(conditions)):
            raise ValueError("some conditions have a pooled vector and some have none")
        return Condition(
            torch.cat([c.states for c in conditions]),
            torch.cat([c.mask for c in conditions]),
            torch.cat(pooled) if pooled else None,
        )


def as_conditions(condition: Condition | Sequence[Condition]) -> tuple[Condition, ...]:
    """Return one condition per text encoder, from these or from a single encoder's bare condition.

    The only place where a bare condition is accepted for a tuple: the edge of `Ensemble`.
    """
    # A single encoder is the usual case.
    return (condition,) if isinstance(condition, Condition) else tuple(condition)


def select_rows(conditions: Sequence[Condition], rows: Tensor) -> tuple[Condition, ...]:
    """Return the given rows ([b] int64, or a [B] bool mask) of each condition, in their order."""
    # Every encoder describes the same prompts, so the rows are the same.
    return tuple(condition.index(rows) for condition in conditions)


def move_to(conditions: Sequence[Condition], device: torch.device | str | None) -> tuple[Condition, ...]:
    """Return each condition on a device."""
    # All encoders' conditions are used together, on one device.
    return tuple(condition.to(device) for condition in conditions)
