"""Sections of atoll.yaml about training: images to watch it by, and low-rank updates."""

from typing import Any

from pydantic import Field, PositiveInt

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
