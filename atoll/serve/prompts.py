"""The prompts of all running requests, each read once by each network, however many images and steps share it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from atoll.condition import Condition
from atoll.ensemble.prompt_cache import CACHE_BYTES, CachesPrompt, NetworkCondition, NetworkPrompts

NULL = 0  # the number of the ensemble's own null condition
_MAX_PROMPTS = 4096  # beyond as many, those that nobody uses are forgotten


class PromptPool:
    """Prompts by number. For one thread; valid for the current weights only.

    Args:
        null: the ensemble's null condition, one row per text encoder; None for an ensemble without guidance.
        device: where prompts are.
        limit: cache size in bytes; beyond it, prompts that nobody uses any more are forgotten.
    """

    def __init__(
        self, null: tuple[Condition, ...] | None, device: str | torch.device = "cpu", limit: int = CACHE_BYTES
    ):
        self.limit, self._device = limit, torch.device(device)
        self._conditions: dict[int, tuple[Condition, ...]] = {} if null is None else {NULL: null}
        self._numbers: dict[str, int] = {}  # by text
        self._users: dict[int, int] = {NULL: 1}  # how many jobs use it
        self._by_network: dict[CachesPrompt, NetworkPrompts] = {}
        self._next = NULL + 1
        self._encoded_bytes = sum(map(_nbytes, self._conditions.values()))

    def __len__(self) -> int:
        return len(self._conditions)

    @property
    def nbytes(self) -> int:
        """Cache size in bytes."""
        return self._encoded_bytes + sum(cached.nbytes for cached in self._by_network.values())

    def acquire(self, text: str, conditions: tuple[Condition, ...]) -> int:
        """Return the number of a prompt, which stays valid until it is released as often as it was acquired.

        Args:
            text: the prompt.
            conditions: its encoding, one row per text encoder.
        """
        if text not in self._numbers:
            self._numbers[text], self._conditions[self._next] = self._next, conditions
            self._encoded_bytes += _nbytes(conditions)
            self._users[self._next] = 0
            self._next += 1
        number = self._numbers[text]
        self._users[number] += 1
        return number

    def release(self, number: int) -> None:
        """Give a prompt up; it stays in the cache while there is room."""
        self._users[number] -= 1
        if self.nbytes > self.limit or len(self) > _MAX_PROMPTS:
            self._forget_unused()

    def rows(self, prompts: Sequence[int], nulls: Sequence[int]) -> "PooledPrompts":
        """Return the prompts of B images, by number, and each one's negative prompt."""
        return PooledPrompts(self, tuple(prompts), tuple(nulls))

    def conditions(self, numbers: Sequence[int], encoder: int) -> Condition:
        """Return prompts by number, as one text encoder reads them."""
        return Condition.cat([self._conditions[number][encoder] for number in numbers])

    def read(self, network: CachesPrompt, encoder: int, numbers: Sequence[int]) -> NetworkCondition:
        """Return prompts by number, as a network has read them."""
        cached, device = self._by_network.setdefault(network, NetworkPrompts()), self._device
        missing = [number for number in dict.fromkeys(numbers) if number not in cached.positions]
        if missing:
            cached.add(missing, network.read_prompt(self.conditions(missing, encoder)))
        return cached.index(list(numbers), device)

    def _forget_unused(self) -> None:
        """Forget all prompts that nobody uses."""
        kept = {number for number, users in self._users.items() if users > 0}
        for conditions in (self._conditions, self._users):
            for number in conditions.keys() - kept:
                del conditions[number]
        self._encoded_bytes = sum(map(_nbytes, self._conditions.values()))
        self._numbers = {text: number for text, number in self._numbers.items() if number in kept}
        for cached in self._by_network.values():
            cached.keep(kept)


def _nbytes(conditions: tuple[Condition, ...]) -> int:
    """Return the size of an encoded prompt in bytes."""
    fields = (field for one in conditions for field in (one.states, one.mask, one.pooled))
    return sum(field.nbytes for field in fields if field is not None)


class PooledPrompts:
    """The prompts of B images, in the interface of `PromptCache`."""

    def __init__(self, pool: PromptPool, prompts: tuple[int, ...], nulls: tuple[int, ...]):
        self._pool, self._prompts, self._nulls = pool, prompts, nulls

    def __len__(self) -> int:
        return len(self._prompts)

    @property
    def guides(self) -> bool:
        """Whether there is a null condition: requests without one are refused before."""
        return True

    def pooled(self, encoder: int) -> Tensor | None:
        """Return the images' pooled vectors by one text encoder [B, P]; None if it has none."""
        return self._pool.conditions(self._prompts, encoder).pooled

    def for_expert(self, network: object, encoder: int, rows: Tensor, guided: Tensor | None = None) -> NetworkCondition:
        """Return the condition of some images, then of the guided ones' negative prompts; as in `PromptCache`."""
        numbers = [self._prompts[row] for row in rows.tolist()]
        if guided is not None:
            numbers += [self._nulls[row] for row in guided.tolist()]
        if isinstance(network, CachesPrompt):
            return self._pool.read(network, encoder, numbers)
        return self._pool.conditions(numbers, encoder)
