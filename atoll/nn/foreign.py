"""diffusers' own networks as experts, kept as they are: PixArtTransformer2DModel and DiTTransformer2DModel.

The network is diffusers' class, built from its own configuration, which our card holds; this file only adapts the call.
What is predicted is the card's objective. `atoll.convert.foreign` makes such experts, and training may go on from them.
"""

import inspect
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, StrictBool, model_serializer, model_validator
from torch import Tensor, nn

from atoll.condition import Condition
from atoll.errors import AtollError
from atoll.nn.dit import check_input, compute_dtype
from atoll.nn.paris import require_condition
from atoll.runtime.libraries import quiet

Class = Literal["PixArtTransformer2DModel", "DiTTransformer2DModel"]
# Of a configuration of diffusers. Cards come from strangers: none may ask for all memory or time there is.
MOST = 2**16
Value = StrictBool | Annotated[int, Field(ge=0, le=MOST)] | Annotated[float, Field(ge=0, le=MOST)] | str | None
LIMITS = {"num_layers": 512, "sample_size": 1024}


class ForeignConfig(BaseModel):
    """What a foreign network is built from; saved in the card under "name", "class", "config", "pixels".

    Raises pydantic.ValidationError for another class, or a configuration that is out of bounds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False)

    name: Literal["diffusers"] = "diffusers"
    cls: Class = Field(alias="class")  # one of these two, never a name that a file makes up
    config: dict[str, Value]  # arguments of the class; what is not there is its default
    # (height, width) of the images, for a PixArt that is told them (those of 1024 px)
    pixels: tuple[PositiveInt, PositiveInt] | None = None

    @model_validator(mode="after")
    def _check(self) -> "ForeignConfig":
        for key, most in LIMITS.items():
            value = self.config.get(key)
            if isinstance(value, int | float) and value > most:
                raise ValueError(f"{key} {value}; expected at most {most}")
        return self

    @model_serializer
    def _plain(self) -> dict[str, Any]:
        pixels = {} if self.pixels is None else {"pixels": list(self.pixels)}
        return {"name": self.name, "class": self.cls, "config": dict(self.config), **pixels}


class Foreign(nn.Module):
    """forward(x [B,C,H,W], time [B], condition) -> [B,C,H,W], in the dtype of x; H = W = config.sample_size.

    `time` is scaled already, as the network was trained with it (0..999 for both published ones). Where the network
    also tells a variance, the second half of its channels, that is cut off.

    - PixArt reads the condition's states [B,L,D] and mask [B,L];
    - DiT reads a class: the largest of the pooled vector [B,n], which the encoder "label" makes one-hot; a row of
      zeros, the encoder's null condition, is the network's null class, number n.

    Raises:
        AtollError: diffusers is not installed, or it does not build this; an input that does not fit the network.
    """

    def __init__(self, config: ForeignConfig) -> None:
        super().__init__()
        self.config = config
        self.network = _build(config)
        own = self.network.config
        self.channels, self.size = own.in_channels, (own.sample_size, own.sample_size)
        outputs = own.out_channels or own.in_channels
        if outputs not in (own.in_channels, 2 * own.in_channels):
            raise AtollError(
                f"{config.cls}: {outputs} channels out, {own.in_channels} in; expected as many, or twice as many "
                "(with a variance): this predicts something else"
            )
        if self._reads_pixels() and config.pixels is None:
            raise AtollError(f"{config.cls}: this one is told the image's size; pixels (height, width) is missing")
        _place_positions(self.network)
        if config.cls == "DiTTransformer2DModel":
            for block in self.network.transformer_blocks:
                # In training it drops labels by global random numbers. Ours drops conditions itself, by seed and step.
                block.norm1.emb.class_embedder.dropout_prob = 0.0

    @property
    def condition_width(self) -> int:
        """Of the states that PixArt reads, or of the one-hot vector that DiT does (its number of classes)."""
        own = self.network.config
        if self.config.cls == "DiTTransformer2DModel":
            return own.num_embeds_ada_norm
        return own.caption_channels or own.cross_attention_dim

    def forward(self, x: Tensor, time: Tensor, condition: Condition | None) -> Tensor:
        check_input(x, time, self.channels, self.size)
        asked = x.to(compute_dtype(self.network.pos_embed.proj.weight))  # [B,C,H,W]
        if self.config.cls == "DiTTransformer2DModel":
            output = self.network(asked, time, class_labels=self._labels(condition, len(x))).sample  # [B,C or 2C,H,W]
        else:
            condition = require_condition(condition, len(x), self.condition_width)
            output = self.network(
                asked,
                encoder_hidden_states=condition.states.to(asked.dtype),  # [B,L,D]
                timestep=time,
                added_cond_kwargs=self._told(len(x), x.device),
                encoder_attention_mask=condition.mask,  # [B,L]
            ).sample  # [B,C or 2C,H,W]
        return output[:, : self.channels].to(x.dtype)  # [B,C,H,W]

    def _labels(self, condition: Condition | None, rows: int) -> Tensor:
        """Class numbers [B] int64; the null class is one more than the last."""
        classes = self.condition_width
        pooled = None if condition is None else condition.pooled
        if pooled is None or pooled.shape != (rows, classes):
            got = "none" if pooled is None else f"shape {list(pooled.shape)}"
            raise AtollError(
                f"class, as the condition's pooled vector: got {got}, expected [{rows}, {classes}] of one-hot rows; "
                f"use the encoder 'label' with the network's {classes} classes"
            )
        return torch.where(pooled.any(1), pooled.argmax(1), classes)  # [B]

    def _reads_pixels(self) -> bool:
        return bool(getattr(self.network, "use_additional_conditions", False))

    def _told(self, rows: int, device: torch.device) -> dict[str, Tensor] | None:
        """What a PixArt of 1024 px is told: resolution [B,2] and aspect ratio [B,1] of the images."""
        if not self._reads_pixels() or self.config.pixels is None:
            return None
        pixels = torch.tensor([self.config.pixels], dtype=torch.float32, device=device)  # [1,2]
        return {
            "resolution": pixels.expand(rows, 2),
            "aspect_ratio": (pixels[:, :1] / pixels[:, 1:]).expand(rows, 1),
        }


def _place_positions(network: Any) -> None:
    """Computes the positions of a network that was built on the meta device: diffusers does not save them."""
    embed, own = network.pos_embed, network.config
    if embed.pos_embed.is_meta:
        with torch.device("cpu"):
            whole = type(embed)(
                own.sample_size,
                own.sample_size,
                own.patch_size,
                own.in_channels,
                embed.pos_embed.shape[2],
                interpolation_scale=embed.interpolation_scale,
            )
        embed.pos_embed = whole.pos_embed


def arguments_of(cls: Class) -> set[str]:
    """What a configuration of this class of diffusers may say."""
    with quiet("diffusers") as library:
        return set(inspect.signature(getattr(library, cls).__init__).parameters) - {"self"}


def _build(config: ForeignConfig) -> Any:
    """diffusers' network, freshly initialised."""
    if unknown := sorted(config.config.keys() - arguments_of(config.cls)):
        raise AtollError(f"{config.cls}: config.{unknown[0]}: unknown key; remove it")
    with quiet("diffusers") as library:
        try:
            return getattr(library, config.cls)(**config.config)
        except Exception as error:  # sizes that do not fit each other: whatever the library and torch raise
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise AtollError(f"{config.cls}: cannot be built from its config ({reason}); correct it") from None
