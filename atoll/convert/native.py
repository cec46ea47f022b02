"""The native network, the target of all conversions, and the steps that the conversions share."""

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from torch import Tensor

from atoll.convert.read import Checkpoint
from atoll.errors import AtollError
from atoll.nn import describe
from atoll.nn.positions import sincos_positions


@dataclass(frozen=True)
class Native:
    """A network of `atoll.nn.dit`, as far as a checkpoint determines it.

    Attributes:
        config: fields of a DiTConfig; without states_dim if the checkpoint reads no text.
        weights: entries of the network's state_dict; missing ones start as in a new network.
        notes: what the card records of the conversion.
        time_scale: the network reads times t * time_scale, t in [0, 1].
    """

    config: dict[str, Any]
    weights: dict[str, Tensor]
    notes: dict[str, Any]
    time_scale: float = 999.0


class DiffusersConfig(BaseModel):
    """A config.json of diffusers: the keys that matter, with the values that can be converted.

    Unknown keys are refused unless their value is null or false, as they may change the network.
    """

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    @model_validator(mode="after")
    def _known(self) -> "DiffusersConfig":
        # Old versions of diffusers wrote many keys that switch nothing on.
        extra = {k: v for k, v in (self.model_extra or {}).items() if not k.startswith("_") and v not in (None, False)}
        for key, value in extra.items():
            raise ValueError(f"got {key} {value!r}, which no conversion knows")
        return self


DiffusersConfigT = TypeVar("DiffusersConfigT", bound=DiffusersConfig)


def foreign_config(checkpoint: Checkpoint, kind: type[DiffusersConfigT]) -> DiffusersConfigT:
    """Validate the checkpoint's config.json. Raises AtollError if there is none, or it cannot be converted."""
    # Neither heads nor patch positions follow from the tensors of diffusers' layout.
    if checkpoint.config is None:
        raise AtollError(
            f"{checkpoint.where}: no config.json beside it, which tells the number of heads; put the one that "
            "diffusers wrote with these weights there"
        )
    try:
        return kind.model_validate(checkpoint.config)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {describe(e)}" for e in error.errors())
        raise AtollError(
            f"{checkpoint.where}: config.json: {problems.removeprefix(': ')}; cannot be converted"
        ) from None


def fill(weights: dict[str, Tensor], name: str, layer: tuple[Tensor, Tensor]) -> None:
    """Put a linear layer's (weight, bias) into `weights` under the network's `name`."""
    weights[f"{name}.weight"], weights[f"{name}.bias"] = layer


def stacked(*layers: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Concatenate linear layers of the same input to one layer, such as q, k and v."""
    # The rows of each part stay together.
    return torch.cat([weight for weight, _ in layers]), torch.cat([bias for _, bias in layers])


def patch_kernel(kernel: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Convert a patch embedding's convolution [D, C, p, p] to a linear layer [D, p*p*C] in (p, p, C) order."""
    # The native network cuts patches by reshaping, so the kernel becomes a matrix.
    return kernel.permute(0, 2, 3, 1).flatten(1), bias


def keep_channels(layer: tuple[Tensor, Tensor], patch: int, channels: int) -> tuple[Tensor, Tensor]:
    """Select a final layer's outputs for the first `channels` channels, the prediction. The others are a variance.

    Args:
        layer: weight [p*p*out, D] and bias [p*p*out], rows in (p, p, out) order.
        patch: p.
        channels: the number of channels to keep.

    Returns:
        Weight and bias, rows in (p, p, channels) order.
    """
    # The channels are the fastest axis, so a slice of the last one.
    weight, bias = (values.unflatten(0, (patch * patch, -1))[:, :channels].flatten(0, 1) for values in layer)
    return weight, bias


def positions(size: tuple[int, int], patch: int, width: int, base: float) -> Tensor:
    """Compute fixed positions [N, D] for a latent of `size` (H, W) in a network trained on `base` tokens per side.

    They span the range of the training with another step, as in PixArt and diffusers' PatchEmbed.
    """
    return sincos_positions(size[0] // patch, size[1] // patch, width, span=base)
