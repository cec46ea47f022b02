"""The prompts of one call of `AtollPipeline`: texts, or the states of the text encoder in their place.

`prompt_embeds` are what the ensemble's text encoder returns, before any layer of an expert: each expert projects them
itself, as it does with a prompt. So they exist for an ensemble with a single text encoder only; where experts read
different encoders, one tensor cannot hold all conditions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from atoll.condition import Condition, move_to, select_rows
from atoll.encoders.text import PromptEncoder, TextEncoder
from atoll.ensemble import Ensemble
from atoll.ensemble.loading import LoadedEnsemble
from atoll.ensemble.prompt_cache import PromptCache
from atoll.errors import AtollError
from atoll.nn.foreign_calls import READ_POOLED

Nulls = tuple[tuple[Tensor, tuple[Condition, ...] | None], ...]


@dataclass(frozen=True, eq=False)
class PromptSide:
    """The arguments of one side, the prompts or the negative prompts: a text or several, or states.

    Attributes:
        prefix: of the arguments' names: "" or "negative_".
        text: one or several.
        states: [P, L, D] float.
        mask: True at a token [P, L]; 0 and 1 are accepted.
        pooled: [P, pooled] float.
    """

    prefix: str
    text: str | Sequence[str] | None
    states: Tensor | None
    mask: Tensor | None
    pooled: Tensor | None

    @property
    def missing(self) -> bool:
        """Whether there is neither text nor states."""
        return self.text is None and self.states is None

    def texts(self) -> list[str]:
        """Return the texts; raise AtollError for another type."""
        return check_texts(f"{self.prefix}prompt", self.text)

    def condition(self, loaded: LoadedEnsemble, device: torch.device) -> tuple[Condition, ...] | None:
        """Return the states as the condition of the ensemble's only text encoder; None if there are none.

        Raises:
            AtollError: text and states, parts without states, several text encoders, another shape or type, or a
                mask or a pooled vector that is needed and missing.
        """
        # A side is text or states, and a mask belongs to states.
        embeds, masks, vectors = (
            f"{self.prefix}{name}" for name in ("prompt_embeds", "prompt_attention_mask", "pooled_prompt_embeds")
        )
        if self.states is None:
            for name, value in ((masks, self.mask), (vectors, self.pooled)):
                if value is not None:
                    raise AtollError(f"{name} without {embeds}; pass both, or neither")
            return None
        if self.text is not None:
            raise AtollError(f"{self.prefix}prompt and {embeds} were both passed; expected one of them")

        # One tensor is the condition of one encoder.
        encoder = only_encoder(loaded.encoder, embeds, f"{self.prefix}prompt")
        rows = len(self.states) if isinstance(self.states, Tensor) and self.states.ndim == 3 else 1
        states = _checked(embeds, self.states, (max(1, rows), encoder.length, encoder.dim))
        pooled = None
        if self.pooled is not None:
            if encoder.pooled_dim is None:
                raise AtollError(f"{vectors}: the text encoder {encoder.name!r} has no pooled vector; leave it out")
            pooled = _checked(vectors, self.pooled, (rows, encoder.pooled_dim))
        elif encoder.pooled_dim is not None and _reads_pooled(loaded.ensemble):
            raise AtollError(
                f"{embeds} without {vectors}: experts or router read the pooled vector, too; pass "
                f"[{rows}, {encoder.pooled_dim}] (encode_prompt returns it)"
            )
        mask = _checked_mask(masks, self.mask, states, encoder, embeds)
        return move_to((Condition(states, mask, pooled),), device)


@dataclass(frozen=True, eq=False)
class Prompts:
    """The conditions of B images.

    Attributes:
        conditions: of B rows, one per text encoder.
        nulls: groups of rows [b] with their null condition of one row per text encoder: the ensemble's own, or a
            negative prompt's.
        zero_padding: whether the only text encoder pads with zeros, so that states tell their mask.
    """

    conditions: tuple[Condition, ...]
    nulls: Nulls
    zero_padding: bool

    def caches(self, ensemble: Ensemble, block_cache: float, limit: int) -> list[tuple[Tensor, PromptCache]]:
        """Return a prompt cache for each group of rows; arguments as in `Ensemble.prompt_cache`."""
        return [
            (rows, ensemble.prompt_cache(select_rows(self.conditions, rows), null, limit, block_cache))
            for rows, null in self.nulls
        ]

    def states(self, name: str) -> Tensor:
        """Return what a callback sees as "prompt_embeds" or "negative_prompt_embeds" [B, L, D], as a copy."""
        own = self.conditions[0].states
        if name == "prompt_embeds":
            return own.clone()
        states = torch.zeros_like(own)
        for rows, null in self.nulls:
            if null is not None:
                states[rows] = null[0].states.to(states)
        return states

    def changed(self, name: str, returned: Any) -> "Prompts":
        """Return the prompts with the states that a callback returned; themselves if it changed none.

        Callbacks that are written for Stable Diffusion cut the null condition off, which stands before the prompts
        there. Here they get the prompts alone, so the last rows of them are the prompts as they were.

        Raises:
            AtollError: no tensor, or one of another shape.
        """
        own = self.states(name)
        value = returned.to(own) if isinstance(returned, Tensor) else returned
        if isinstance(value, Tensor) and value.ndim and value.numel() and torch.equal(value, own[-len(value) :]):
            return self
        value = _checked(name, value, tuple(own.shape))
        if name == "prompt_embeds":
            return replace(self, conditions=(self._with(self.conditions[0], value),))
        # Each row may have its own null condition from here on.
        nulls = [
            (row[None], (self._with(null[0], value[row][None]),))
            for rows, null in self.nulls
            if null is not None
            for row in rows
        ]
        return replace(self, nulls=tuple(nulls))

    def _with(self, condition: Condition, states: Tensor) -> Condition:
        """Return a condition with other states, and the mask that goes with them."""
        return replace(condition, states=states, mask=_nonzero(states) if self.zero_padding else condition.mask)


def encode_prompts(
    positive: PromptSide,
    negative: PromptSide,
    loaded: LoadedEnsemble,
    *,
    images: int,
    device: torch.device,
) -> Prompts:
    """Return the conditions of all images, those of one prompt consecutive.

    Args:
        positive: P prompts.
        negative: none, one, or P of them.
        loaded: the ensemble with its text encoders.
        images: of each prompt, so that B = P images.
        device: of the conditions.

    Raises:
        AtollError: a side that is neither text nor states, or both, or of a type, shape or number that does not fit.
    """
    # The prompts' conditions, then a row for each image.
    if positive.missing and positive.mask is None and positive.pooled is None:
        raise AtollError("no prompt; expected prompt, a string or a list of at least one, or prompt_embeds")
    conditions = positive.condition(loaded, device)
    if conditions is None:
        conditions = move_to(loaded.encoder(positive.texts()), device)
    count = len(conditions[0])
    owners = [number for number in range(count) for _ in range(images)]  # the prompt of each image
    nulls = _nulls(negative, loaded, owners, count, device)

    # Without a pooled vector on one side, none reads it (or an error was raised): both go without.
    conditions = select_rows(conditions, torch.tensor(owners, device=device))
    sides = [conditions, *(null for _, null in nulls if null is not None)]
    if len(conditions) == 1 and any(side[0].pooled is None for side in sides):
        conditions = (replace(conditions[0], pooled=None),)
        nulls = tuple((rows, None if null is None else (replace(null[0], pooled=None),)) for rows, null in nulls)
    return Prompts(conditions, nulls, len(conditions) == 1 and loaded.encoder.encoders[0].zero_padding)


def _nulls(negative: PromptSide, loaded: LoadedEnsemble, owners: list[int], count: int, device: torch.device) -> Nulls:
    """Return the rows [b] of each negative prompt with its condition, or all rows with the ensemble's own null."""
    # The ensemble's own null condition, for all rows.
    states = negative.condition(loaded, device)
    if negative.missing:
        null = loaded.ensemble.null
        return ((torch.arange(len(owners), device=device), None if null is None else move_to(null, device)),)

    # One for all prompts, or one per prompt; equal texts are one group.
    keys: Sequence[Any] = range(len(states[0])) if states is not None else negative.texts()
    keys = list(keys) * count if len(keys) == 1 and not isinstance(negative.text, list | tuple) else list(keys)
    if len(keys) != count:
        raise AtollError(f"{len(keys)} negative prompts for {count} prompts; expected one, or one for each")

    # Rows with equal negative prompts share one cache.
    groups = []
    for key in dict.fromkeys(keys):
        rows = torch.tensor([row for row, owner in enumerate(owners) if keys[owner] == key], device=device)
        null = loaded.encoder([key]) if states is None else select_rows(states, torch.tensor([key], device=device))
        groups.append((rows, move_to(null, device)))
    return tuple(groups)


def check_texts(name: str, value: Any) -> list[str]:
    """Return a prompt argument as a list of texts; raise AtollError for another type."""
    # A single string is one prompt.
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) for text in texts):
        raise AtollError(f"{name} is {value!r:.60}; expected a string, or a list of at least one")
    return list(texts)


def only_encoder(encoder: PromptEncoder, name: str, instead: str) -> TextEncoder:
    """Return the only text encoder; raise AtollError if experts read several.

    Args:
        encoder: the ensemble's.
        name: the argument that needs a single one.
        instead: what to pass in its place.
    """
    if len(encoder.encoders) != 1:
        names = ", ".join(one.name for one in encoder.encoders)
        raise AtollError(
            f"{name}: the experts read {len(encoder.encoders)} text encoders ({names}), whose conditions one tensor "
            f"cannot hold; use {instead}"
        )
    return encoder.encoders[0]


def _reads_pooled(ensemble: Ensemble) -> bool:
    """Whether an expert's network or the router reads the condition's pooled vector, by their configurations."""
    configs = [getattr(expert.network, "config", None) for expert in ensemble.experts]
    configs.append(getattr(ensemble.router, "config", None))
    return any(
        getattr(config, "pooled_dim", None) is not None or getattr(config, "cls", None) in READ_POOLED
        for config in configs
    )


def _checked(name: str, value: Any, shape: tuple[int, ...]) -> Tensor:
    """Return finite numbers of this shape as float32; raise AtollError for anything else."""
    # Another shape would broadcast, or fail deep inside the networks.
    if not isinstance(value, Tensor) or tuple(value.shape) != shape or not value.is_floating_point():
        got = f"{list(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise AtollError(f"{name} are {got}; expected a floating-point tensor {list(shape)}")
    if not value.isfinite().all():
        raise AtollError(f"{name} contain NaN or infinity; expected finite numbers")
    return value.float()


def _nonzero(states: Tensor) -> Tensor:
    """Return the mask [P, L] of states [P, L, D] whose padding is zeros; the first token is always one."""
    mask = states.ne(0).any(2)
    mask[:, 0] = True
    return mask


def _checked_mask(name: str, mask: Any, states: Tensor, encoder: TextEncoder, embeds: str) -> Tensor:
    """Return the mask [P, L] bool of a caller's states, with at least one token in each row."""
    shape = list(states.shape[:2])
    if mask is None:
        # Where padding is zeros, the states themselves tell the mask.
        if not encoder.zero_padding:
            raise AtollError(
                f"{embeds} without {name}: padding of the text encoder {encoder.name!r} would count as text; pass the "
                f"mask {shape} (encode_prompt returns it)"
            )
        return _nonzero(states)
    # Tokenizers return 0 and 1.
    if not isinstance(mask, Tensor) or list(mask.shape) != shape or not ((mask == 0) | (mask == 1)).all():
        got = f"{list(mask.shape)} {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        raise AtollError(f"{name} is {got}; expected {shape}, True at a token and False at padding")
    tokens = mask.bool().to(states.device)
    if not tokens.any(1).all():
        raise AtollError(f"{name} has a row without a token; expected at least one True in each")
    return tokens
