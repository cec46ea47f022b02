"""Seeded batches: what step s sees is a function of (seed, s), so that a restarted run sees what it would have seen."""

import torch
from torch import Tensor

from atoll.condition import Condition, Encoder, Tokens
from atoll.train.feed import Batch
from atoll.train.rows import Rows


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


def mirrored(seed: int, index: int, count: int) -> Tensor:
    """Which pictures of a batch are mirrored: [count] bool, the same however the batch is shared out."""
    return torch.rand(count, generator=seeded(seed, index, stream=1)) < 0.5


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


class Captioned:
    """Latents with their captions' tokens: what a part trains on, or is measured on."""

    def __init__(self, rows: Rows, encoder: Encoder):
        self.rows, self.encoder = rows, encoder

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, rows: Tensor, mirrored: Tensor | None = None) -> Batch:
        """The given rows: x0 [b,C,H,W] float16, ids and mask [b,L]. mirrored: [b] bool, of which pictures the mirror's
        latent is taken where it is stored."""
        tokens = self.encoder.tokenize(self.rows.captions(rows))
        if not self.rows.has_flips:
            mirrored = None
        return {"x0": self.rows.latents(rows, mirrored), "ids": tokens.ids, "mask": tokens.mask}

    def condition(self, batch: Batch) -> Condition:
        """The encoding of a batch's captions, on its device."""
        return self.encoder.encode(Tokens(batch["ids"], batch["mask"]))

    def some(self, count: int, seed: int) -> tuple[Tensor, Condition]:
        """At most `count` rows: x0 [b,C,H,W] float32 and their condition; always the same ones."""
        chosen = torch.randperm(len(self), generator=seeded(seed, 0, stream=11))[:count].sort().values
        batch = self.batch(chosen)
        return batch["x0"].float(), self.condition(batch)
