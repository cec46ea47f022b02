"""Chosen rows of shards: latents and captions, read from memory-mapped files as they are asked for."""

from collections.abc import Sequence

import torch
from torch import Tensor

from atoll.shards import Shards, Split

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
        """Whether the mirrored pictures' latents are there too."""
        return all("latent_flip" in part.columns for part in self.shards)

    def latents(self, rows: Tensor, mirrored: Tensor | None = None) -> Tensor:
        """Latents [b,C,H,W] of the given rows as they are stored (float16). mirrored: [b] bool, of which the mirror."""
        latents = self._read("latent", self.numbers[rows])
        if mirrored is not None and mirrored.any():
            latents[mirrored] = self._read("latent_flip", self.numbers[rows[mirrored]])
        return latents

    def clusters(self, rows: Tensor) -> Tensor:
        """The clusters [b] int64 that the given rows' directories are of."""
        known = torch.tensor([part.card["cluster"] for part in self.shards])
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
            return self.shards[used[0]].read(column, numbers - self._start(used[0]))
        result = torch.empty(len(numbers), *self.shards[0].shape(column), dtype=torch.float16)
        for i in used:
            here = (part == i).nonzero().flatten()
            result[here] = self.shards[i].read(column, numbers[here] - self._start(i))
        return result

    def _start(self, part: int) -> int:
        return int(self._ends[part]) - len(self.shards[part])
