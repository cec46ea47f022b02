"""Sections of atoll.yaml about training: images to watch it by, tokens that skip blocks, and low-rank updates."""

from typing import Any

from pydantic import Field, PositiveInt, model_validator

from atoll.errors import AtollError
from atoll.manifest.base import Section


class ValidationSettings(Section):
    """Images that are drawn during training for your own prompts, always from the same noise.

    Attributes:
        prompts: a list of prompts, or a text file relative to the run with one per line.
        every: steps between two times; the first and the last step draw, too.
        images: of each prompt; their seeds count up from `seed`.
        guidance_scale: of the sampling; 1: none.
        steps: of the sampling.
    """

    prompts: tuple[str, ...] | str = Field(min_length=1)
    every: PositiveInt = 1000
    images: PositiveInt = 1
    seed: int = Field(0, ge=0)
    guidance_scale: float = 2.0
    steps: PositiveInt = 25


_NO_TOKENS = 64  # tokens of an image, of which none can be spared
FEW_TOKENS = 256  # tokens of an image, of which routing is known to cost quality


class TokenRouteSettings(Section):
    """Random image tokens skip the middle blocks in the first part of a training (TREAD, arXiv 2501.04765).

    Each image has its own random tokens at every step. The others skip blocks `first` to `last` - 1 and return to their
    places behind them. For the network mmdit.

    Attributes:
        keep: the fraction of an image's tokens that pass all blocks.
        first: the first block, from 0, that tokens skip.
        last: the block where they return; null: the network's last one.
        until: the fraction of steps after which all tokens pass all blocks; 1: never.
    """

    keep: float = Field(0.5, gt=0, le=1)
    first: int = Field(2, ge=0)
    last: int | None = Field(None, gt=0)
    until: float = Field(0.8, gt=0, le=1)

    @model_validator(mode="after")
    def _ordered(self) -> "TokenRouteSettings":
        if self.last is not None and self.last <= self.first:
            raise ValueError(f"last {self.last}, first {self.first}: expected last above first")
        return self

    def kept(self, tokens: int) -> int:
        """Return how many of an image's tokens pass all blocks."""
        return max(1, round(self.keep * tokens))

    def end(self, steps: int) -> int:
        """Return the first step at which all tokens pass all blocks."""
        return int(self.until * steps)

    def blocks(self, network: str, depth: int, tokens: int) -> tuple[int, int]:
        """Return (first, last) in a network of this name and depth, on images of at least so many tokens.

        Raises:
            AtollError: a network that routes no tokens or has too few blocks; too few tokens.
        """
        if network != "mmdit":
            raise AtollError(
                f"train.token_route: a network {network!r} routes no tokens; expected mmdit, or leave it out"
            )
        last = depth - 1 if self.last is None else self.last
        if not self.first < last <= depth:
            raise AtollError(
                f"train.token_route: got blocks {self.first} to {last}, expected first < last <= {depth}, the "
                "network's depth; change first and last"
            )
        if tokens <= _NO_TOKENS:
            raise AtollError(
                f"train.token_route: an image has {tokens} tokens, expected more than {_NO_TOKENS}, better 1,024: "
                "fewer have none to spare; leave it out"
            )
        return self.first, last


class LoraSettings(Section):
    """Low-rank updates of finished experts, which `atoll train expert 3 --lora RANK` trains.

    Attributes:
        alpha: the update is multiplied by alpha / rank; None: the rank, so by 1.
        targets: ends of the names of the layers to update, such as attention.qkv; none: every linear layer in a block.
        train: overrides the `train` section of the run and the expert, key by key.
    """

    alpha: float | None = Field(None, gt=0)
    targets: tuple[str, ...] = ()
    train: dict[str, Any] = Field(default_factory=dict)
