"""The prompts of one sampling, in the form in which each expert's network takes them.

A network with `read_prompt` (DiT, Paris) computes what depends on the prompt alone, the text's keys and values in every
block, once per prompt, and not again at every step.
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

CACHE_BYTES = 2**31  # for all experts together; an XL/2 takes 10 MB per prompt of 77 tokens in bfloat16


@runtime_checkable
class CachesPrompt(Protocol):
    """A network that takes the `TextKV` of a condition in the condition's place."""

    def read_prompt(self, condition: Condition) -> TextKV: ...


class PromptCache:
    """B prompts by every text encoder, the null condition, and the `TextKV` that networks have computed for them.

    Valid for the current weights only. It is filled as a side effect of evaluating experts, so it belongs to one
    sampling and one thread; an `Ensemble` never holds one.

    Args:
        conditions: of B rows, one per text encoder.
        null: of one row, one per text encoder; needed for guidance.
        limit: cache size in bytes; prompts beyond it are computed at every step. 0 caches nothing.
        block_cache: the threshold of first-block caching (`atoll.nn.block_cache`); 0 evaluates all blocks.

    Raises:
        AtollError: `block_cache` is negative or not finite.
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
        self._by_network: dict[CachesPrompt, _NetworkCache] = {}
        self._full = False  # the limit was reached

    def __len__(self) -> int:
        return len(self.conditions[0])

    @property
    def skip_rate(self) -> float:
        """Fraction of the evaluations in which only the first block was evaluated."""
        # Networks that never used a block cache do not count.
        caches = [cached.blocks for cached in self._by_network.values() if cached.blocks is not None]
        return sum(cache.skipped for cache in caches) / max(1, sum(cache.calls for cache in caches))

    @property
    def nbytes(self) -> int:
        """Cache size in bytes."""
        return sum(cached.prompts.nbytes for cached in self._by_network.values() if cached.prompts is not None)

    def for_expert(self, network: object, encoder: int, rows: Tensor, guided: bool = False) -> NetworkCondition:
        """Return the condition that `network` is given for some rows.

        Args:
            network: the expert's network.
            encoder: the index of the text encoder that it reads.
            rows: prompts by number [b] int64.
            guided: whether b rows of the null condition follow.

        Returns:
            A condition of b rows; 2 b if guided.

        Raises:
            AtollError: guidance without a null condition; a block cache for a network without `read_prompt`.
        """
        # A block cache needs the network's own blocks, which only these networks expose.
        if self.block_cache and not isinstance(network, CachesPrompt):
            raise AtollError(
                f"{type(network).__name__} has no block cache: only DiT and Paris have, without a memory budget; leave "
                "block_cache at 0"
            )
        # Prompts by number; the null condition has the number B.
        numbers = rows.tolist()
        numbers += [len(self)] * len(rows) if guided else []
        if not self.limit or not isinstance(network, CachesPrompt):
            return self._uncached(encoder, numbers)

        # Compute what this network has not seen yet, unless it does not fit.
        block_cache = BlockCache(self.block_cache) if self.block_cache else None
        cached = self._by_network.setdefault(network, _NetworkCache(block_cache))
        missing = [number for number in dict.fromkeys(numbers) if number not in cached.positions]
        if missing and self._full:
            return self._uncached(encoder, numbers)
        if missing:
            computed = network.read_prompt(self._uncached(encoder, missing))
            if self.nbytes + computed.nbytes > self.limit:
                self._full = True
                return self._uncached(encoder, numbers)
            cached.add(missing, computed)

        # A row and its guidance branch name a sample for the block cache.
        branches = [(row, branch) for branch in range(1 + guided) for row in rows.tolist()]
        return cached.index(numbers, rows.device, tuple(branches))

    def _uncached(self, encoder: int, numbers: list[int]) -> Condition:
        """Return the conditions of prompts by number; numbers from B on are the null condition's, and come last."""
        # The prompts' own rows.
        condition = self.conditions[encoder]
        # The condition's device: rows may come from elsewhere.
        device = condition.states.device
        own = [number for number in numbers if number < len(self)]
        rows = condition.index(torch.tensor(own, device=device, dtype=torch.long))
        if len(own) == len(numbers):
            return rows
        # The null condition is one row, repeated.
        if self.null is None:
            raise AtollError("guidance without a null condition; create the cache with an ensemble that has one")
        null = self.null[encoder].index(torch.zeros(len(numbers) - len(own), device=device, dtype=torch.long))
        return Condition.cat([rows, null]) if own else null


class _NetworkCache:
    """One network's prompts, in the order in which they were computed."""

    def __init__(self, blocks: BlockCache | None) -> None:
        self.blocks = blocks
        self.positions: dict[int, int] = {}  # by the prompt's number
        self.prompts: TextKV | None = None

    def add(self, numbers: list[int], computed: TextKV) -> None:
        """Append the prompts with these numbers."""
        # A prompt's position is its place in the concatenation.
        self.positions |= {number: len(self.positions) + place for place, number in enumerate(numbers)}
        self.prompts = computed if self.prompts is None else TextKV.cat([self.prompts, computed])

    def index(self, numbers: list[int], device: torch.device, keys: tuple[tuple[int, int], ...]) -> TextKV:
        """Return the prompts with these numbers; keys: each one's sample and guidance branch, for the block cache."""
        assert self.prompts is not None
        # The block cache must know which sample and which branch each row is.
        rows = torch.tensor([self.positions[number] for number in numbers], device=device)
        prompts = self.prompts.index(rows)
        return prompts if self.blocks is None else replace(prompts, cache=self.blocks, keys=keys)
