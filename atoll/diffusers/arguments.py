"""The arguments of a call of `AtollPipeline` that are not prompts: numbers, sizes, generators and latents."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from atoll.ensemble.loading import LoadedEnsemble
from atoll.errors import AtollError
from atoll.image_size import ImageSize
from atoll.runtime.libraries import quiet

with quiet("diffusers"):
    from diffusers.utils.torch_utils import randn_tensor

OUTPUTS = ("pil", "np", "pt", "latent")


@dataclass(frozen=True)
class Numbers:
    """The checked numbers of a call.

    Attributes:
        steps: N.
        scale: the guidance scale.
        images: images of each prompt.
    """

    steps: int
    scale: float
    images: int


def check_numbers(loaded: LoadedEnsemble, steps: Any, scale: Any, images: Any) -> Numbers:
    """Return the numbers, completed by the ensemble's defaults.

    Args:
        loaded: the ensemble.
        steps: a number, a numpy number or a tensor of no dimension; None: the ensemble's.
        scale: likewise.
        images: likewise; None: 1.

    Raises:
        AtollError: a number of another type or outside its range.
    """
    defaults = loaded.sampling
    return Numbers(
        _count("num_inference_steps", defaults.steps_or(50) if steps is None else steps),
        guidance("guidance_scale", defaults.guidance_or(1.0) if scale is None else scale),
        _count("num_images_per_prompt", 1 if images is None else images),
    )


def guidance(name: str, value: Any) -> float:
    """Return a guidance scale as a Python number; raise AtollError if it is none, or not finite."""
    number = _plain(value)
    if not isinstance(number, int | float) or not isfinite(number):
        raise AtollError(f"{name} is {value!r:.60}; expected a number")
    return number


def _count(name: str, value: Any) -> int:
    """Return a whole number from 1 as a Python number."""
    number = _plain(value)
    if not isinstance(number, int) or number < 1:
        raise AtollError(f"{name} is {value!r:.60}; expected a whole number from 1")
    return number


def _plain(value: Any) -> Any:
    """Return the Python number in a numpy number or in a tensor of no dimension; anything else as it is."""
    if isinstance(value, np.generic | np.ndarray | Tensor) and value.ndim == 0:
        return value.item()
    return value


def check_size(loaded: LoadedEnsemble, height: Any, width: Any) -> ImageSize:
    """Return the size of the images for a height and width in pixels; None is the ensemble's own.

    Raises:
        AtollError: a side that is no whole number, or that the networks do not take.
    """
    sides = []
    for value in (height, width):
        number = _plain(value)
        sides.append(int(number) if isinstance(number, float) and number.is_integer() else number)
    return loaded.sizes.choose(*sides)


def initial(
    shape: tuple[int, ...],
    latents: Tensor | None,
    generator: torch.Generator | list[torch.Generator] | None,
    device: torch.device,
) -> Tensor:
    """Return x at t = 1: the given latents, or noise; with several generators, each row from its own."""
    # A caller's latents replace the noise.
    if latents is not None:
        return checked_latents(latents, shape, device)
    # One generator per image makes an image independent of the others.
    if isinstance(generator, list) and len(generator) != shape[0]:
        raise AtollError(f"{len(generator)} generators for {shape[0]} images; expected one, or one for each")
    for one in generator if isinstance(generator, list) else [generator]:
        if one is not None and not isinstance(one, torch.Generator):
            raise AtollError(f"generator is a {type(one).__name__}; expected a torch.Generator, or a list of them")
    return cast(Tensor, randn_tensor(shape, generator=generator, device=device, dtype=torch.float32))


def checked_latents(latents: Tensor, shape: Sequence[int], device: torch.device) -> Tensor:
    """Return a user's latents in float32, the dtype of the integration."""
    # Another shape would fail deep inside the networks.
    if not isinstance(latents, Tensor) or tuple(latents.shape) != tuple(shape):
        got = list(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
        raise AtollError(f"latents are {got}; expected a tensor {list(shape)}")
    return latents.to(device, torch.float32)
