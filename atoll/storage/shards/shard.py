"""One shard of a directory, as whoever goes through all of them reads it."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Shard:
    """One shard of a directory.

    Attributes:
        number: its position among the shards, from 0.
        start: the row number of its first row in the directory.
        keys, captions, splits: one string per row.
        columns: tensors [rows, ...] by name, memory-mapped and read-only; mapped latents are computed at first use.
        others: the captions after the first one of each row, as `atoll.storage.shards.captions` packs them.
    """

    number: int
    start: int
    keys: list[str]
    captions: list[str]
    splits: list[str]
    columns: Mapping[str, Tensor]
    others: list[str]

    def __len__(self) -> int:
        return len(self.keys)
