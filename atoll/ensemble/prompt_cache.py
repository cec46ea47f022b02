"""The prompts of one sampling, in the form in which each expert's network takes them.

A network with `read_prompt` (DiT, MMDiT, Paris) computes what depends on the prompt alone, the text's keys and values
in every block, once per prompt, and not again at every step.
"""

import math
from collections.abc import Collection, Sequence
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


class PromptSource(Protocol):
    """The prompts of B images, as an ensemble reads them."""

    def __len__(self) -> int: ...

    @property
    def guides(self) -> bool:
        """Whether there is a null condition."""

    def pooled(self, encoder: int) -> Tensor | None:
        """Return the images' pooled vectors by one text encoder [B, width]; None if it has none."""

    def for_expert(self, network: object, encoder: int, rows: Tensor, guided: Tensor | None = None) -> NetworkCondition:
        """Return the condition of some images, then the null condition of those of them that are guided."""


class PromptCache:
    """The prompts of B images by every text encoder, the null condition, and the `TextKV` computed from them.

    Valid for the current weights only. It is filled as a side effect of evaluating experts, so it belongs to one
    sampling and one thread; an `Ensemble` never holds one.

    Args:
        conditions: of P rows, one per text encoder.
        null: of one row, or of P rows, each prompt's own; one per text encoder. Needed for guidance.
        limit: cache size in bytes; prompts beyond it are computed at every step. 0 caches nothing.
        block_cache: the threshold of first-block caching (`atoll.nn.block_cache`); 0 evaluates all blocks.
        prompt_of: each image's row of the conditions [B]; default: one image per prompt, B = P.
        null_of: each image's row of the null condition [B], for any number of rows; default: the only row, or that of
            the image's prompt.

    Raises:
        AtollError: `block_cache` is negative or not finite; a null condition of neither one nor P rows; images without
            a row.
    """

    def __init__(
        self,
        conditions: tuple[Condition, ...],
        null: tuple[Condition, ...] | None = None,
        limit: int = CACHE_BYTES,
        block_cache: float = 0.0,
        *,
        prompt_of: Sequence[int] | None = None,
        null_of: Sequence[int] | None = None,
    ):
        if not 0 <= block_cache < math.inf:
            raise AtollError(f"block_cache is {block_cache}; expected a threshold from 0 (none) to about 0.3")
        self.conditions, self.null, self.limit, self.block_cache = conditions, null, limit, block_cache
        # Images by prompt, and by negative prompt: rows that several images share are computed once.
        count, nulls = len(conditions[0]), 0 if null is None else len(null[0])
        self._prompt_of = list(range(count) if prompt_of is None else prompt_of)
        self._one_each = self._prompt_of == list(range(count))
        if null_of is None and nulls not in (0, 1, count):
            raise AtollError(f"a null condition of {nulls} rows for {count} prompts; expected one row, or one for each")
        own_nulls = self._prompt_of if nulls == count else [0] * len(self._prompt_of)
        self._null_of = own_nulls if null_of is None else list(null_of)
        # A negative row would silently count from the end.
        for rows, total in ((self._prompt_of, count), (self._null_of, max(1, nulls))):
            if len(rows) != len(self._prompt_of) or not all(0 <= row < total for row in rows):
                raise AtollError(f"{len(rows)} images' rows of {total}; expected one from 0 to {total - 1} per image")
        self._by_network: dict[CachesPrompt, NetworkPrompts] = {}
        self._full = False  # the limit was reached

    def __len__(self) -> int:
        """B, the number of images."""
        return len(self._prompt_of)

    @property
    def guides(self) -> bool:
        """Whether there is a null condition."""
        return self.null is not None

    def pooled(self, encoder: int) -> Tensor | None:
        """Return the images' pooled vectors by one text encoder [B, width]; None if it has none."""
        pooled = self.conditions[encoder].pooled
        # Usually each image has a prompt of its own.
        if pooled is None or self._one_each:
            return pooled
        return pooled[torch.tensor(self._prompt_of, device=pooled.device)]

    @property
    def skip_rate(self) -> float:
        """Fraction of the evaluations in which only the first block was evaluated."""
        # Networks that never used a block cache do not count.
        caches = [cached.blocks for cached in self._by_network.values() if cached.blocks is not None]
        return sum(cache.skipped for cache in caches) / max(1, sum(cache.calls for cache in caches))

    @property
    def nbytes(self) -> int:
        """Cache size in bytes."""
        return sum(cached.nbytes for cached in self._by_network.values())

    def for_expert(self, network: object, encoder: int, rows: Tensor, guided: Tensor | None = None) -> NetworkCondition:
        """Return the condition that `network` is given for some rows.

        Args:
            network: the expert's network.
            encoder: the index of the text encoder that it reads.
            rows: images by number [b] int64.
            guided: those of them whose null condition follows [g] int64; None: none.

        Returns:
            A condition of b + g rows.

        Raises:
            AtollError: guidance without a null condition; a block cache for a network without `read_prompt`.
        """
        # A block cache needs the network's own blocks, which only these networks expose.
        if self.block_cache and not isinstance(network, CachesPrompt):
            raise AtollError(
                f"{type(network).__name__} has no block cache: only DiT, MMDiT and Paris have, without a budget; leave "
                "block_cache at 0"
            )
        # Prompts by number; the rows of the null condition are numbered behind them.
        images, first_null = rows.tolist(), len(self.conditions[0])
        with_null = [] if guided is None else guided.tolist()
        numbers = [self._prompt_of[image] for image in images]
        numbers += [first_null + self._null_of[image] for image in with_null]
        if not self.limit or not isinstance(network, CachesPrompt):
            return self._uncached(encoder, numbers)

        # Compute what this network has not seen yet, unless it does not fit.
        block_cache = BlockCache(self.block_cache) if self.block_cache else None
        cached = self._by_network.setdefault(network, NetworkPrompts(block_cache))
        missing = [number for number in dict.fromkeys(numbers) if number not in cached.positions]
        if missing and self._full:
            return self._uncached(encoder, numbers)
        if missing:
            computed = network.read_prompt(self._uncached(encoder, missing))
            if self.nbytes + computed.nbytes > self.limit:
                self._full = True
                return self._uncached(encoder, numbers)
            cached.add(missing, computed)

        # An image and its guidance branch name a sample for the block cache.
        branches = [(image, 0) for image in images] + [(image, 1) for image in with_null]
        return cached.index(numbers, rows.device, tuple(branches))

    def _uncached(self, encoder: int, numbers: list[int]) -> Condition:
        """Return the conditions of prompts by number; numbers from P on are the null condition's, and come last."""
        # The prompts' own rows.
        condition = self.conditions[encoder]
        # The condition's device: rows may come from elsewhere.
        device = condition.states.device
        own = [number for number in numbers if number < len(condition)]
        rows = condition.index(torch.tensor(own, device=device, dtype=torch.long))
        if len(own) == len(numbers):
            return rows
        # The null condition's rows, repeated as needed.
        if self.null is None:
            raise AtollError("guidance without a null condition; create the cache with an ensemble that has one")
        nulls = [number - len(condition) for number in numbers[len(own) :]]
        null = self.null[encoder].index(torch.tensor(nulls, device=device, dtype=torch.long))
        return Condition.cat([rows, null]) if own else null


class NetworkPrompts:
    """One network's prompts, in the order in which they were computed."""

    def __init__(self, blocks: BlockCache | None = None) -> None:
        self.blocks = blocks
        self.positions: dict[int, int] = {}  # by the prompt's number
        self.prompts: TextKV | None = None

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return 0 if self.prompts is None else self.prompts.nbytes

    def add(self, numbers: list[int], computed: TextKV) -> None:
        """Append the prompts with these numbers."""
        # A prompt's position is its place in the concatenation.
        self.positions |= {number: len(self.positions) + place for place, number in enumerate(numbers)}
        self.prompts = computed if self.prompts is None else TextKV.cat([self.prompts, computed])

    def keep(self, numbers: Collection[int]) -> None:
        """Forget all prompts but those with these numbers."""
        positions = {number: position for number, position in self.positions.items() if number in numbers}
        rows = list(positions.values())
        if self.prompts is not None and len(rows) < len(self.positions):
            device = self.prompts.keys_values.device
            self.prompts = self.prompts.index(torch.tensor(rows, device=device)) if rows else None
            self.positions = {number: place for place, number in enumerate(positions)}

    def index(self, numbers: list[int], device: torch.device, keys: tuple[tuple[int, int], ...] = ()) -> TextKV:
        """Return the prompts with these numbers; keys: each one's sample and guidance branch, for the block cache."""
        assert self.prompts is not None
        # The block cache must know which sample and which branch each row is.
        rows = torch.tensor([self.positions[number] for number in numbers], device=device)
        prompts = self.prompts.index(rows)
        return prompts if self.blocks is None else replace(prompts, cache=self.blocks, keys=keys)
