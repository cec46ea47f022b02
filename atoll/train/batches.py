"""Seeded batches: what step s sees is a function of (seed, s), so that a restarted run sees what it would have seen."""

import torch
from torch import Tensor

from atoll.condition import Condition, Encoder, Tokens


class Order:
    """Which rows step s trains on: epoch after epoch, each a permutation seeded by (seed, epoch)."""

    def __init__(self, rows: int, batch: int, seed: int):
        self.rows, self.batch, self.seed = rows, batch, seed
        self._epoch: tuple[int, Tensor] | None = None

    def at(self, step: int) -> Tensor:
        """Row numbers [batch] of this step."""
        start = step * self.batch
        parts, wanted = [], self.batch
        while wanted > 0:
            epoch, offset = divmod(start, self.rows)
            part = self._permutation(epoch)[offset : offset + wanted]
            parts.append(part)
            start, wanted = start + len(part), wanted - len(part)
        return torch.cat(parts)

    def _permutation(self, epoch: int) -> Tensor:
        if self._epoch is None or self._epoch[0] != epoch:
            order = torch.randperm(self.rows, generator=seeded(self.seed, epoch, 1))
            self._epoch = (epoch, order)
        return self._epoch[1]


def seeded(seed: int, index: int, stream: int = 0) -> torch.Generator:
    """A generator that depends on all three numbers, and on nothing that ran before."""
    mixed = (seed * 1_000_003 + index) * 16 + stream
    return torch.Generator().manual_seed(mixed % 2**63)


def drop_condition(condition: Condition, null: Condition, dropped: Tensor) -> Condition:
    """`condition` with the rows marked in dropped [B] bool replaced by the one row of `null`."""
    pooled = None
    if condition.pooled is not None and null.pooled is not None:
        pooled = torch.where(dropped[:, None], null.pooled, condition.pooled)
    return Condition(
        states=torch.where(dropped[:, None, None], null.states, condition.states),
        mask=torch.where(dropped[:, None], null.mask, condition.mask),
        pooled=pooled,
    )


class CaptionedLatents:
    """Latents [n, C, H, W] with their tokenised captions: what an expert trains on, or is calibrated on."""

    def __init__(self, latents: Tensor, captions: list[str] | Tokens, encoder: Encoder):
        self.latents = latents
        self.tokens = captions if isinstance(captions, Tokens) else encoder.tokenize(captions)
        self.encoder = encoder

    def __len__(self) -> int:
        return len(self.latents)

    def select(self, rows: Tensor) -> "CaptionedLatents":
        """The given rows alone."""
        return CaptionedLatents(self.latents[rows], self.tokens.index(rows), self.encoder)

    def at(self, rows: Tensor) -> tuple[Tensor, Condition]:
        """(x0 [b, C, H, W] float32, condition) of the given rows."""
        return self.latents[rows].float(), self.encoder.encode(self.tokens.index(rows))
