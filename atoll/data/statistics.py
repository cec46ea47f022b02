"""Mean and deviation of latents per channel, from sums that are added up block by block."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from atoll.storage.cards import LatentStatistics
from atoll.storage.shards import LATENTS

_ROWS = 64  # converted to float64 at a time


@dataclass(frozen=True)
class ChannelSums:
    """Sums over all values of a channel; the empty sums have no channels.

    Attributes:
        values: how many there are in each channel.
        total: their sum, for each channel.
        squares: the sum of their squares.
    """

    values: int = 0
    total: tuple[float, ...] = ()
    squares: tuple[float, ...] = ()

    @staticmethod
    def of(columns: Mapping[str, Tensor], splits: Sequence[str]) -> "ChannelSums":
        """Sum the latents of the training rows, mirrored ones included.

        The result depends on the rows and their order alone: numpy sums in one thread.

        Args:
            columns: tensors [rows, ...] by name, among them latents [rows, C, H, W].
            splits: "train" or "val" per row.
        """
        chosen = np.array([split == "train" for split in splits], bool)
        sums = ChannelSums()
        for name in LATENTS:
            if name in columns and chosen.any():
                latents = columns[name].numpy()[chosen]
                for start in range(0, len(latents), _ROWS):
                    sums += _sums(latents[start : start + _ROWS])
        return sums

    def __add__(self, other: "ChannelSums") -> "ChannelSums":
        if not self.values or not other.values:
            return self if self.values else other
        return ChannelSums(
            self.values + other.values,
            tuple(a + b for a, b in zip(self.total, other.total, strict=True)),
            tuple(a + b for a, b in zip(self.squares, other.squares, strict=True)),
        )

    @property
    def finite(self) -> bool:
        """Whether no latent is NaN or infinite."""
        return all(map(math.isfinite, (*self.total, *self.squares)))

    def statistics(self) -> LatentStatistics | None:
        """Return mean and standard deviation per channel; None for no rows."""
        if not self.values:
            return None
        mean = [total / self.values for total in self.total]
        # Rounding may leave a constant channel's variance slightly below 0.
        variance = [max(0.0, q / self.values - m * m) for q, m in zip(self.squares, mean, strict=True)]
        return LatentStatistics(mean=mean, std=[math.sqrt(v) for v in variance], values=self.values)

    def to_json(self) -> str:
        """Return the sums as JSON, exactly."""
        return json.dumps([self.values, self.total, self.squares])

    @staticmethod
    def from_json(text: str) -> "ChannelSums":
        """Read what `to_json` returned."""
        values, total, squares = json.loads(text)
        return ChannelSums(values, tuple(total), tuple(squares))


def _sums(latents: np.ndarray) -> ChannelSums:
    """The sums of latents [n, C, H, W]."""
    x = latents.astype(np.float64).swapaxes(0, 1).reshape(latents.shape[1], -1)  # [C, n H W]
    total, squares = x.sum(1), np.square(x).sum(1)
    return ChannelSums(x.shape[1], tuple(total.tolist()), tuple(squares.tolist()))
