"""The prompts of a batch, as the experts of an ensemble are asked by them.

A network that can `read_prompt` (DiT, Paris) computes what depends on the prompt alone, the text's keys and values in
every block, once for each prompt that it is asked for, and not again at every step.
"""

import math
from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from atoll.condition import Condition
from atoll.errors import AtollError
from atoll.nn.attention import TextKV
from atoll.nn.block_cache import BlockCache

NetworkCondition = Condition | TextKV  # what a network is given

CACHE_BYTES = 2**31  # by all experts together; an XL/2 keeps 10 MB per prompt of 77 tokens in bfloat16


@runtime_checkable
class CachesPrompt(Protocol):
    """A network that takes what it has read in the condition's place."""

    def read_prompt(self, condition: Condition) -> TextKV: ...


class PromptCache:
    """B prompts by every encoder, the null condition, and what was read of them.

    What is kept is of the networks as they are: of other weights, other `PromptCache`.

    Args:
        conditions: of each encoder, B rows.
        null: of each encoder, one row; needed where there is guidance.
        limit: bytes to keep at most; what comes after is not kept, and read at every step. 0 keeps nothing.
        block_cache: the threshold of first-block caching (`atoll.nn.block_cache`); 0: all blocks are asked.
    """

    def __init__(
        self,
        conditions: tuple[Condition, ...],
        null: tuple[Condition, ...] | None = None,
        limit: int = CACHE_BYTES,
        block_cache: float = 0.0,
    ):
        if not 0 <= block_cache < math.inf:
            raise AtollError(f"block_cache is {block_cache}; expected a threshold from 0 (none) to about 0.3")
        self.conditions, self.null, self.limit, self.block_cache = conditions, null, limit, block_cache
        self._kept: dict[CachesPrompt, _Kept] = {}
        self._full = False  # the limit was met

    def __len__(self) -> int:
        return len(self.conditions[0])

    @property
    def skip_rate(self) -> float:
        """The share of the questions in which the first block alone was asked."""
        caches = [kept.cache for kept in self._kept.values() if kept.cache is not None]
        return sum(cache.skipped for cache in caches) / max(1, sum(cache.calls for cache in caches))

    @property
    def nbytes(self) -> int:
        """Of what is kept of the prompts."""
        return sum(kept.prompts.nbytes for kept in self._kept.values() if kept.prompts is not None)

    def for_expert(self, network: object, encoder: int, rows: Tensor, guided: bool = False) -> NetworkCondition:
        """What `network` is asked with for the rows [b]: b rows; where guided 2 b, the last of the null condition.

        Raises:
            AtollError: guided, without a null condition; a block cache for a network that reads no prompts.
        """
        if self.block_cache and not isinstance(network, CachesPrompt):
            raise AtollError(
                f"{type(network).__name__} has no block cache: only DiT and Paris have, without a memory budget; leave "
                "block_cache at 0"
            )
        wanted = rows.tolist()
        wanted += [len(self)] * len(rows) if guided else []  # the null condition's number
        if self.limit and isinstance(network, CachesPrompt):
            kept = self._kept.setdefault(network, _Kept(BlockCache(self.block_cache) if self.block_cache else None))
            missing = [number for number in dict.fromkeys(wanted) if number not in kept.places]
            if missing and self._full:
                return self._plain(encoder, wanted)
            if missing:
                read = network.read_prompt(self._plain(encoder, missing))
                if self.nbytes + read.nbytes > self.limit:
                    self._full = True
                    return self._plain(encoder, wanted)
                kept.add(missing, read)
            branches = [(row, branch) for branch in range(1 + guided) for row in rows.tolist()]
            return kept.index(wanted, rows.device, tuple(branches))
        return self._plain(encoder, wanted)

    def _plain(self, encoder: int, wanted: list[int]) -> Condition:
        condition = self.conditions[encoder]
        device = condition.states.device
        own = [number for number in wanted if number < len(self)]
        found = condition.index(torch.tensor(own, device=device, dtype=torch.long))
        if len(own) == len(wanted):
            return found
        if self.null is None:
            raise AtollError("guidance of prompts without a null condition; make them by an ensemble that has one")
        null = self.null[encoder].index(torch.zeros(len(wanted) - len(own), device=device, dtype=torch.long))
        return Condition.cat([found, null]) if own else null


class _Kept:
    """What one network has read, in the order in which it was asked."""

    def __init__(self, cache: BlockCache | None) -> None:
        self.cache = cache
        self.places: dict[int, int] = {}  # of a prompt's number, where it stands
        self.prompts: TextKV | None = None

    def add(self, numbers: list[int], read: TextKV) -> None:
        self.places |= {number: len(self.places) + place for place, number in enumerate(numbers)}
        self.prompts = read if self.prompts is None else TextKV.cat([self.prompts, read])

    def index(self, numbers: list[int], device: torch.device, keys: tuple[tuple[int, int], ...]) -> TextKV:
        """Of the prompts' numbers; keys: of each its sample, and the branch of guidance."""
        assert self.prompts is not None
        found = self.prompts.index(torch.tensor([self.places[number] for number in numbers], device=device))
        return found if self.cache is None else replace(found, cache=self.cache, keys=keys)
