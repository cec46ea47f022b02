"""Seeded batches: the batch of a step is a function of (seed, step) alone, so that a resumed training repeats it."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from atoll.calibration import resized
from atoll.condition import Condition, Tokens
from atoll.encoders.text import TextEncoder
from atoll.randomness import ShuffledPasses, Stream, cpu_generator, hashed_seed, random_rows, seeded
from atoll.storage.cards import ClusterShardsCard
from atoll.storage.shards import LATENTS, TARGET, Shards, Split, Weighted
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
    def of(shards: Sequence[Shards], split: Split | None) -> "Rows":
        """Return all rows of a split, None for both."""
        # A directory's rows are numbered after those of the directories before it.
        starts = [0, *torch.tensor([len(part) for part in shards]).cumsum(0).tolist()]
        return Rows(shards, torch.cat([part.rows(split) + start for part, start in zip(shards, starts, strict=False)]))

    def __len__(self) -> int:
        return len(self.numbers)

    def select(self, rows: Tensor) -> "Rows":
        """Return some rows [b] int64 of these."""
        return Rows(self.shards, self.numbers[rows])

    @cached_property
    def _shapes(self) -> tuple[list[tuple[int, ...]], Tensor | None]:
        """The shapes of the latents of these rows, and each row's as a position among them [n] int16; None: all equal.

        The main shape comes first if a row has it, the others are sorted.
        """
        main = self.shards[0].shape(LATENTS[0])
        every = sorted({shape for part in self.shards for shape in part.shapes(LATENTS[0])})
        every.sort(key=lambda shape: shape != main)
        if len(every) == 1:
            return every, None
        # Each directory counts its own shapes.
        numbers = []
        for part in self.shards:
            own = torch.tensor([every.index(shape) for shape in part.shapes(LATENTS[0])], dtype=torch.int16)
            numbers.append(own[part.shape_numbers(LATENTS[0]).long()])
        kinds = torch.cat(numbers)[self.numbers]
        # Shapes that none of these rows has are left out.
        used = kinds.unique(sorted=True).tolist()
        kinds = torch.searchsorted(torch.tensor(used, dtype=torch.int16), kinds).to(torch.int16)
        return [every[kind] for kind in used], kinds if len(used) > 1 else None

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes (C, H, W) of these rows' latents: the main one first if a row has it, then the others sorted."""
        return self._shapes[0]

    @property
    def groups(self) -> list[Tensor]:
        """The rows of each of `shapes`, [m] int64 each."""
        return self.alike(torch.arange(len(self)))

    def shape_of(self, rows: Tensor) -> tuple[int, ...]:
        """Return the shape (C, H, W) of the latents of rows [b] int64 of one shape."""
        shapes, kinds = self._shapes
        return shapes[0 if kinds is None else int(kinds[rows[0]])]

    def kinds(self, rows: Tensor) -> Tensor:
        """Return the shapes of rows [b] int64 as positions in `shapes`, [b]."""
        _, kinds = self._shapes
        return torch.zeros_like(rows) if kinds is None else kinds[rows]

    def alike(self, rows: Tensor) -> list[Tensor]:
        """Divide rows [b] int64 by the shape of their latents, in the order of `shapes`; each group in its order."""
        if self._shapes[1] is None:
            return [rows]
        kinds = self.kinds(rows)
        return [rows[kinds == kind] for kind in kinds.unique(sorted=True)]

    @property
    def has_flips(self) -> bool:
        """Whether the latents of the mirrored images are stored too."""
        return all(LATENTS[1] in part.columns for part in self.shards)

    def latents(self, rows: Tensor, mirrored: Tensor | None = None) -> Tensor:
        """Read latents.

        Args:
            rows: [b] int64, of one shape.
            mirrored: [b] bool, True for the latent of the mirrored image; None for no row.

        Returns:
            [b,C,H,W] float16, as stored.
        """
        # The stored latents of all rows, then the mirrored ones in place.
        latents = self._read(LATENTS[0], self.numbers[rows])
        if mirrored is not None and mirrored.any():
            # Only the mirrored rows are read again.
            latents[mirrored] = self._read(LATENTS[1], self.numbers[rows[mirrored]])
        return latents

    def targets(self, rows: Tensor, mirrored: Tensor | None = None) -> Tensor:
        """Read targets of representation.

        Args:
            rows: [b] int64.
            mirrored: [b] bool, True for those of the mirrored image; None for no row.

        Returns:
            [b,dims,g,g] float16.
        """
        targets = self._read(TARGET, self.numbers[rows])
        # Stored once: the features of a mirrored image are nearly the mirrored features.
        if mirrored is not None:
            targets[mirrored] = targets[mirrored].flip(-1)
        return targets

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
        """Return the mean latent [C,H,W] float32 of all rows; those of other shapes are resized to the main one."""
        main = self.shards[0].shape(LATENTS[0])
        mean = torch.zeros(main, dtype=torch.float64)
        for group in self.groups:
            # In float64 and in chunks: millions of float16 latents are summed.
            total = torch.zeros(self.shape_of(group), dtype=torch.float64)
            for rows in group.split(_CHUNK):
                total += self.latents(rows).double().sum(0)
            mean += resized(total, main[1:])
        return (mean / len(self)).float()

    def _read(self, column: str, numbers: Tensor) -> Tensor:
        part = self._part(numbers)  # [b]
        used = part.unique().tolist()
        # The usual case, an expert of one cluster, needs no copy.
        if len(used) == 1:
            output: Tensor = self.shards[used[0]].read(column, numbers - self._start(used[0]))
            return output
        # Rows of several directories: fill in each directory's rows.
        result = torch.empty(0)
        for i in used:
            positions = (part == i).nonzero().flatten()
            read = self.shards[i].read(column, numbers[positions] - self._start(i))
            result = result if len(result) else torch.empty(len(numbers), *read.shape[1:], dtype=read.dtype)
            result[positions] = read
        return result

    def _part(self, numbers: Tensor) -> Tensor:
        """The directory of each row number, [b] int64."""
        return torch.searchsorted(self._ends, numbers, right=True)

    def _start(self, part: int) -> int:
        """The number of a directory's first row."""
        return int(self._ends[part]) - len(self.shards[part])


def sizes_of(rows: Rows, main: Sequence[int]) -> dict[str, Any]:
    """Return what identifies a training on latents of other shapes than the main one; nothing if there are none."""
    return {} if rows.shapes == [tuple(main)] else {"shapes": [list(shape) for shape in rows.shapes]}


class SeededSampler:
    """The rows of each step: epoch after epoch, each a permutation seeded by (seed, epoch).

    With groups, the rows of a step are of one group, and each group has its own epochs: as all its batches are full,
    they may begin in one of its passes and end in the next. In the first e epochs of all rows, a group of n rows has
    had floor((e n + phase) / batch) batches, so that every row comes equally often, to within a batch. The order of
    an epoch's batches is a permutation seeded by (seed, epoch), and so is everything: a resumed training repeats it.

    Args:
        rows: their number.
        batch: rows of a step.
        seed: of the order.
        groups: the rows [m] int64 of each group; none: all rows are one group.
    """

    def __init__(self, rows: int, batch: int, seed: int, groups: Sequence[Tensor] = ()):
        self.batch, self._seed = batch, seed
        self._groups = list(groups) if len(groups) > 1 else []
        self._sizes = [len(group) for group in self._groups] or [rows]
        # An epoch's order depends on its number alone, so a resumed training repeats it.
        self._passes = [ShuffledPasses(n, lambda epoch: seeded(seed, epoch, Stream.ORDER)) for n in self._sizes]
        # Groups of equal size would otherwise all wait for the same epoch.
        generator = cpu_generator(hashed_seed("phases of groups", seed))
        self._phases = torch.randint(batch, (len(self._sizes),), generator=generator).tolist()
        self._current: tuple[int, Tensor, Tensor] | None = None  # epoch, group and number of each of its batches

    def at(self, step: int) -> Tensor:
        """Return the row numbers [batch] of a step."""
        if not self._groups:
            return self._passes[0].items(step * self.batch, (step + 1) * self.batch)
        group, number = self._place(step)
        rows = self._passes[group].items(number * self.batch, (number + 1) * self.batch)
        return self._groups[group][rows]

    def _before(self, epoch: int) -> list[int]:
        """The number of batches of each group before an epoch."""
        return [(epoch * n + phase) // self.batch for n, phase in zip(self._sizes, self._phases, strict=True)]

    def _place(self, step: int) -> tuple[int, int]:
        """The group of a step, and the number of its batch among those of the group."""
        # The last epoch that does not begin after the step; each group may lack a batch.
        end = (step + len(self._sizes)) * self.batch // sum(self._sizes) + 2
        epoch = bisect_right(range(end), step, key=lambda number: sum(self._before(number))) - 1
        if self._current is None or self._current[0] != epoch:
            self._current = (epoch, *self._epoch(epoch))
        _, groups, numbers = self._current
        place = step - sum(self._before(epoch))
        return int(groups[place]), int(numbers[place])

    def _epoch(self, epoch: int) -> tuple[Tensor, Tensor]:
        """The group of each batch of an epoch, and its number among those of the group; [m] int64 each."""
        first, end = (torch.tensor(self._before(number)) for number in (epoch, epoch + 1))
        groups = torch.arange(len(first)).repeat_interleave(end - first)
        groups = groups[torch.randperm(len(groups), generator=seeded(self._seed, epoch, Stream.GROUPS))]
        numbers = torch.empty_like(groups)
        for group, number in enumerate(first.tolist()):
            own = groups == group
            numbers[own] = number + torch.arange(int(own.sum()))
        return groups, numbers


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

    def sampler(self, batch: int, seed: int) -> SeededSampler:
        """Return the order in which to train on these rows: batches of one shape."""
        return SeededSampler(len(self), batch, seed, self.rows.groups)

    def repeated(self, batch: int) -> list[str]:
        """Return a line for each shape that has fewer rows than a batch, which therefore repeats them."""
        groups = self.rows.groups
        return [
            f"{len(group):,} rows of the shape {list(self.rows.shape_of(group))}, in batches of {batch} of that shape: "
            "they repeat within a batch; lower data.buckets.max_aspect to join small buckets"
            for group in groups
            if len(groups) > 1 and len(group) < batch
        ]

    def batch(
        self, rows: Tensor, mirrored: Tensor | None = None, draws: Tensor | None = None, targets: bool = False
    ) -> Batch:
        """Read rows and tokenize their captions.

        Args:
            rows: [b] int64, of one shape.
            mirrored: [b] bool, True for the latent of the mirrored image; ignored if none is stored.
            draws: [b] int64 from `caption_draws`, for one of each image's captions; None for the first one as it is.
            targets: read the targets of representation, too.

        Returns:
            x0 [b,C,H,W] float16, ids [b,L] and mask [b,L] of the captions; perhaps target [b,dims,g,g] float16.
        """
        # Tokens, not encodings: encoding runs on the device with the loss.
        tokens = self.encoder.tokenize(self._captions(rows, draws))
        if not self.rows.has_flips:
            mirrored = None
        batch = {"x0": self.rows.latents(rows, mirrored), "ids": tokens.ids, "mask": tokens.mask}
        return batch | ({"target": self.rows.targets(rows, mirrored)} if targets else {})

    def _captions(self, rows: Tensor, draws: Tensor | None) -> list[str]:
        captions = self.rows.captions(rows)
        # Usually there is nothing to draw.
        if draws is None or not (self.tags or self.rows.has_several_captions):
            return captions
        return drawn_captions(captions, self.rows.other_captions(rows), draws, self.tags)

    def condition(self, batch: Batch) -> Condition:
        """Encode a batch's captions, on its device."""
        return self.encoder.encode(Tokens(batch["ids"], batch["mask"]))

    def some(self, count: int, seed: int) -> list[tuple[Tensor, Condition]]:
        """Return at most `count` random rows, which the seed determines, in groups of one shape.

        Returns:
            x0 [b,C,H,W] float32 and the condition of b rows, for each shape that some of them have.
        """
        # Sorted, so that the shards are read in order.
        chosen = random_rows(len(self), count, seeded(seed, 0, Stream.SUBSET)).sort().values
        groups = []
        for rows in self.rows.alike(chosen):
            batch = self.batch(rows)
            groups.append((batch["x0"].float(), self.condition(batch)))
        return groups
