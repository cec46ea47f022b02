"""Seeded batches: what step s sees is a function of (seed, s), so that a restarted run sees what it would have seen."""

from collections.abc import Sequence

import torch
from torch import Tensor

from atoll.condition import Condition, Tokens
from atoll.encoders.text import TextEncoder
from atoll.randomness import ShuffledPasses, Stream, random_rows, seeded
from atoll.storage.cards import ClusterShardsCard
from atoll.storage.shards import Shards, Split
from atoll.train.prefetch import Batch

_CHUNK = 4096  # rows in memory at a time where all are gone through


class Rows:
    """Rows of some directories of shards, as one list. Holds row numbers and, once asked for, captions; no latents."""

    def __init__(self, shards: Sequence[Shards], numbers: Tensor):
        """numbers: [n] int64 into the directories one after the other."""
        self.shards, self.numbers = tuple(shards), numbers
        self._ends = torch.tensor([len(part) for part in shards]).cumsum(0)

    @staticmethod
    def of(shards: Sequence[Shards], split: Split) -> "Rows":
        """All rows of a split."""
        starts = [0, *torch.tensor([len(part) for part in shards]).cumsum(0).tolist()]
        return Rows(shards, torch.cat([part.rows(split) + start for part, start in zip(shards, starts, strict=False)]))

    def __len__(self) -> int:
        return len(self.numbers)

    def select(self, rows: Tensor) -> "Rows":
        """The given rows ([b] int64) alone."""
        return Rows(self.shards, self.numbers[rows])

    @property
    def has_flips(self) -> bool:
        """Whether the mirrored images' latents are there too."""
        return all("latent_flip" in part.columns for part in self.shards)

    def latents(self, rows: Tensor, mirrored: Tensor | None = None) -> Tensor:
        """Latents [b,C,H,W] of the given rows as they are stored (float16). mirrored: [b] bool, of which the mirror."""
        latents = self._read("latent", self.numbers[rows])
        if mirrored is not None and mirrored.any():
            latents[mirrored] = self._read("latent_flip", self.numbers[rows[mirrored]])
        return latents

    def clusters(self, rows: Tensor) -> Tensor:
        """The clusters [b] int64 that the given rows' directories are of."""
        known = torch.tensor([part.card(ClusterShardsCard).cluster for part in self.shards])
        return known[torch.searchsorted(self._ends, self.numbers[rows], right=True)]

    def captions(self, rows: Tensor) -> list[str]:
        """The captions of the given rows."""
        numbers = self.numbers[rows]
        part = torch.searchsorted(self._ends, numbers, right=True)
        captions = [""] * len(rows)
        for i in part.unique().tolist():
            here = (part == i).nonzero().flatten()
            found = self.shards[i].captions_of(numbers[here] - self._start(i))
            for place, caption in zip(here.tolist(), found, strict=True):
                captions[place] = caption
        return captions

    def mean(self) -> Tensor:
        """The mean latent [C,H,W] float32 of all rows."""
        total = torch.zeros(self.shards[0].shape("latent"), dtype=torch.float64)
        for rows in torch.arange(len(self)).split(_CHUNK):
            total += self.latents(rows).double().sum(0)
        return (total / len(self)).float()

    def _read(self, column: str, numbers: Tensor) -> Tensor:
        part = torch.searchsorted(self._ends, numbers, right=True)  # [b]
        used = part.unique().tolist()
        if len(used) == 1:
            output: Tensor = self.shards[used[0]].read(column, numbers - self._start(used[0]))
            return output
        result = torch.empty(len(numbers), *self.shards[0].shape(column), dtype=torch.float16)
        for i in used:
            here = (part == i).nonzero().flatten()
            result[here] = self.shards[i].read(column, numbers[here] - self._start(i))
        return result

    def _start(self, part: int) -> int:
        return int(self._ends[part]) - len(self.shards[part])


class SeededSampler:
    """Which rows step s trains on: epoch after epoch, each a permutation seeded by (seed, epoch)."""

    def __init__(self, rows: int, batch: int, seed: int):
        self.batch = batch
        self._epochs = ShuffledPasses(rows, lambda epoch: seeded(seed, epoch, Stream.ORDER))

    def at(self, step: int) -> Tensor:
        """Row numbers [batch] of this step."""
        return self._epochs.items(step * self.batch, (step + 1) * self.batch)


def mirrored(seed: int, index: int, count: int) -> Tensor:
    """Which images of a batch are mirrored: [count] bool, the same however the batch is shared out."""
    return torch.rand(count, generator=seeded(seed, index, Stream.ORDER)) < 0.5


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
    """Latents with their captions' tokens: what a part trains on, or is measured on."""

    def __init__(self, rows: Rows, encoder: TextEncoder):
        self.rows, self.encoder = rows, encoder

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, rows: Tensor, mirrored: Tensor | None = None) -> Batch:
        """The given rows: x0 [b,C,H,W] float16, ids and mask [b,L]. mirrored: [b] bool, of which images the mirror's
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
        chosen = random_rows(len(self), count, seeded(seed, 0, Stream.SUBSET)).sort().values
        batch = self.batch(chosen)
        return batch["x0"].float(), self.condition(batch)
