"""Seeded batches: the batch of a step is a function of (seed, step) alone, so that a resumed training repeats it."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from atoll.condition import Condition, Tokens
from atoll.encoders.text import TextEncoder
from atoll.randomness import ShuffledPasses, Stream, random_rows, seeded
from atoll.storage.cards import ClusterShardsCard
from atoll.storage.shards import Shards, Split, Weighted
from atoll.train.drawn_captions import ALL_TAGS, TagDropout, drawn_captions
from atoll.train.prefetch import Batch

TextT = TypeVar("TextT")

_CHUNK = 4096  # rows in memory at a time in a pass over all


class Rows:
    """Rows of several directories of shards, as one list; latents and captions are read on demand.

    Args:
        shards: the directories.
        numbers: rows [n] int64, counted through the directories one after the other.
    """

    def __init__(self, shards: Sequence[Shards], numbers: Tensor):
        self.shards, self.numbers = tuple(shards), numbers
        # The end of each directory's numbers locates the directory of a row.
        self._ends = torch.tensor([len(part) for part in shards]).cumsum(0)

    @staticmethod
    def of(shards: Sequence[Shards], split: Split) -> "Rows":
        """Return all rows of a split."""
        # A directory's rows are numbered after those of the directories before it.
        starts = [0, *torch.tensor([len(part) for part in shards]).cumsum(0).tolist()]
        return Rows(shards, torch.cat([part.rows(split) + start for part, start in zip(shards, starts, strict=False)]))

    def __len__(self) -> int:
        return len(self.numbers)

    def select(self, rows: Tensor) -> "Rows":
        """Return some rows [b] int64 of these."""
        return Rows(self.shards, self.numbers[rows])

    @property
    def has_flips(self) -> bool:
        """Whether the latents of the mirrored images are stored too."""
        return all("latent_flip" in part.columns for part in self.shards)

    def latents(self, rows: Tensor, mirrored: Tensor | None = None) -> Tensor:
        """Read latents.

        Args:
            rows: [b] int64.
            mirrored: [b] bool, True for the latent of the mirrored image; None for no row.

        Returns:
            [b,C,H,W] float16, as stored.
        """
        # The stored latents of all rows, then the mirrored ones in place.
        latents = self._read("latent", self.numbers[rows])
        if mirrored is not None and mirrored.any():
            # Only the mirrored rows are read again.
            latents[mirrored] = self._read("latent_flip", self.numbers[rows[mirrored]])
        return latents

    def clusters(self, rows: Tensor) -> Tensor:
        """Return the clusters [b] int64 of rows [b] int64, which their directories name."""
        # A directory of cluster shards holds one cluster.
        known = torch.tensor([part.card(ClusterShardsCard).cluster for part in self.shards])
        return known[self._part(self.numbers[rows])]

    @property
    def has_several_captions(self) -> bool:
        """Whether some image has more than one caption."""
        return any(part.has_several_captions for part in self.shards)

    def captions(self, rows: Tensor) -> list[str]:
        """Read the first captions of rows [b] int64."""
        return self._texts(rows, Shards.captions_of)

    def other_captions(self, rows: Tensor) -> list[list[Weighted]]:
        """Read the captions after the first one of rows [b] int64, with weights over the first one's."""
        return self._texts(rows, Shards.other_captions_of)

    def _texts(self, rows: Tensor, read: Callable[[Shards, Tensor], list[TextT]]) -> list[TextT]:
        numbers = self.numbers[rows]
        part = self._part(numbers)
        # Each directory is read once for all of its rows.
        texts: dict[int, TextT] = {}
        for i in part.unique().tolist():
            positions = (part == i).nonzero().flatten()
            here = read(self.shards[i], numbers[positions] - self._start(i))
            texts.update(zip(positions.tolist(), here, strict=True))
        return [texts[position] for position in range(len(rows))]

    def mean(self) -> Tensor:
        """Return the mean latent [C,H,W] float32 of all rows."""
        # In float64 and in chunks: millions of float16 latents are summed.
        total = torch.zeros(self.shards[0].shape("latent"), dtype=torch.float64)
        for rows in torch.arange(len(self)).split(_CHUNK):
            total += self.latents(rows).double().sum(0)
        return (total / len(self)).float()

    def _read(self, column: str, numbers: Tensor) -> Tensor:
        part = self._part(numbers)  # [b]
        used = part.unique().tolist()
        # The usual case, an expert of one cluster, needs no copy.
        if len(used) == 1:
            output: Tensor = self.shards[used[0]].read(column, numbers - self._start(used[0]))
            return output
        # Rows of several directories: fill in each directory's rows.
        result = torch.empty(len(numbers), *self.shards[0].shape(column), dtype=torch.float16)
        for i in used:
            positions = (part == i).nonzero().flatten()
            result[positions] = self.shards[i].read(column, numbers[positions] - self._start(i))
        return result

    def _part(self, numbers: Tensor) -> Tensor:
        """The directory of each row number, [b] int64."""
        return torch.searchsorted(self._ends, numbers, right=True)

    def _start(self, part: int) -> int:
        """The number of a directory's first row."""
        return int(self._ends[part]) - len(self.shards[part])


class SeededSampler:
    """The rows of each step: epoch after epoch, each a permutation seeded by (seed, epoch)."""

    def __init__(self, rows: int, batch: int, seed: int):
        self.batch = batch
        # An epoch's order depends on its number alone, so a resumed training repeats it.
        self._epochs = ShuffledPasses(rows, lambda epoch: seeded(seed, epoch, Stream.ORDER))

    def at(self, step: int) -> Tensor:
        """Return the row numbers [batch] of a step."""
        return self._epochs.items(step * self.batch, (step + 1) * self.batch)


def mirrored(seed: int, index: int, count: int) -> Tensor:
    """Draw which images of a batch are mirrored, [count] bool."""
    return torch.rand(count, generator=seeded(seed, index, Stream.ORDER)) < 0.5


def drop_condition(condition: Condition, null: Condition, dropped: Tensor) -> Condition:
    """Return `condition` with the rows marked in dropped [B] bool replaced by the one row of `null`."""
    # Networks without a pooled vector have none in either condition.
    pooled = None
    if condition.pooled is not None and null.pooled is not None:
        pooled = torch.where(dropped[:, None], null.pooled, condition.pooled)
    return Condition(
        states=torch.where(dropped[:, None, None], null.states, condition.states),
        mask=torch.where(dropped[:, None], null.mask, condition.mask),
        pooled=pooled,
    )


class CaptionedLatents:
    """Latents with their captions, to train on or to measure on.

    Args:
        rows: the latents.
        encoder: of the captions.
        tags: what happens to the tags of drawn captions.
    """

    def __init__(self, rows: Rows, encoder: TextEncoder, tags: TagDropout = ALL_TAGS):
        self.rows, self.encoder, self.tags = rows, encoder, tags

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, rows: Tensor, mirrored: Tensor | None = None, draws: Tensor | None = None) -> Batch:
        """Read rows and tokenize their captions.

        Args:
            rows: [b] int64.
            mirrored: [b] bool, True for the latent of the mirrored image; ignored if none is stored.
            draws: [b] int64 from `caption_draws`, for one of each image's captions; None for the first one as it is.

        Returns:
            x0 [b,C,H,W] float16, ids [b,L] and mask [b,L] of the captions.
        """
        # Tokens, not encodings: encoding runs on the device with the loss.
        tokens = self.encoder.tokenize(self._captions(rows, draws))
        if not self.rows.has_flips:
            mirrored = None
        return {"x0": self.rows.latents(rows, mirrored), "ids": tokens.ids, "mask": tokens.mask}

    def _captions(self, rows: Tensor, draws: Tensor | None) -> list[str]:
        captions = self.rows.captions(rows)
        # Usually there is nothing to draw.
        if draws is None or not (self.tags or self.rows.has_several_captions):
            return captions
        return drawn_captions(captions, self.rows.other_captions(rows), draws, self.tags)

    def condition(self, batch: Batch) -> Condition:
        """Encode a batch's captions, on its device."""
        return self.encoder.encode(Tokens(batch["ids"], batch["mask"]))

    def some(self, count: int, seed: int) -> tuple[Tensor, Condition]:
        """Return x0 [b,C,H,W] float32 of at most `count` random rows and their condition; the seed determines them."""
        # Sorted, so that the shards are read in order.
        chosen = random_rows(len(self), count, seeded(seed, 0, Stream.SUBSET)).sort().values
        batch = self.batch(chosen)
        return batch["x0"].float(), self.condition(batch)
