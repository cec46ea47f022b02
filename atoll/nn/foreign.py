"""diffusers' own networks as experts, unchanged: PixArtTransformer2DModel and DiTTransformer2DModel.

The network is diffusers' class, built from its own configuration, which the card holds; this file only adapts the call.
The card's objective says what it predicts. `atoll.convert.foreign` makes such experts, and they can be trained further.
"""

import inspect
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, StrictBool, model_serializer, model_validator
from torch import Tensor, nn

from atoll.condition import Condition
from atoll.errors import AtollError
from atoll.nn.inputs import check_input, compute_dtype
from atoll.nn.paris import require_condition
from atoll.runtime.libraries import quiet
from atoll.storage import bounds
from atoll.storage.memory import refuse_out_of_memory

Class = Literal["PixArtTransformer2DModel", "DiTTransformer2DModel"]
# Bounds for diffusers' configurations: cards come from strangers and must not request absurd memory or time.
MOST = bounds.MAX_DIM
Value = StrictBool | Annotated[int, Field(ge=0, le=MOST)] | Annotated[float, Field(ge=0, le=MOST)] | str | None
LIMITS = {"num_layers": 512, "sample_size": 1024}  # blocks; latent pixels per side


class ForeignConfig(BaseModel):
    """The configuration of a foreign network, saved in the card under "name", "class", "config", "pixels".

    Raises pydantic.ValidationError for another class, or a configuration that is out of bounds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False)

    name: Literal["diffusers"] = "diffusers"
    cls: Class = Field(alias="class")  # one of these two, never another name from a file
    config: dict[str, Value]  # arguments of the class; missing ones keep their defaults
    # (height, width) of the images, for a PixArt that reads them (those of 1024 px)
    pixels: tuple[bounds.Side, bounds.Side] | None = None

    @model_validator(mode="after")
    def _check(self) -> "ForeignConfig":
        for key, most in LIMITS.items():
            value = self.config.get(key)
            if isinstance(value, int | float) and value > most:
                raise ValueError(f"{key} {value}; expected at most {most}")
        # Positions [N, D] are computed in Python: both must be within the limits of a native network.
        side, patch = self._number("sample_size", 32), max(1, self._number("patch_size", 2))
        width = self._number("num_attention_heads", 16) * self._number("attention_head_dim", 72)
        if (side // patch) ** 2 > bounds.MAX_PATCHES or width > bounds.MAX_DIM:
            raise ValueError(
                f"{side // patch} x {side // patch} tokens of width {width}; expected at most {bounds.MAX_PATCHES:,} "
                f"tokens of width {bounds.MAX_DIM:,}"
            )
        return self

    def _number(self, key: str, default: int) -> int:
        # Missing keys keep diffusers' defaults.
        value = self.config.get(key)
        return int(value) if isinstance(value, int | float) else default

    @model_serializer
    def _plain(self) -> dict[str, Any]:
        pixels = {} if self.pixels is None else {"pixels": list(self.pixels)}
        return {"name": self.name, "class": self.cls, "config": dict(self.config), **pixels}


class Foreign(nn.Module):
    """forward(x [B,C,H,W], time [B], condition) -> [B,C,H,W], in the dtype of x; H = W = config.sample_size.

    `time` is scaled already, as the network was trained (0..999 for both published ones). If the network also
    predicts a variance, the second half of its channels, that half is cut off.

    - PixArt reads the condition's states [B,L,D] and mask [B,L];
    - DiT reads a class: the largest entry of the pooled vector [B,n], which the encoder "label" makes one-hot. A row of
      zeros, the encoder's null condition, is the network's null class, number n.

    Raises:
        AtollError: diffusers is not installed or cannot build this network; an input does not fit it.
    """

    def __init__(self, config: ForeignConfig) -> None:
        super().__init__()
        self.config = config
        # The network, and what it expects.
        self.network = _build(config)
        own = self.network.config
        self.channels, self.size = own.in_channels, (own.sample_size, own.sample_size)
        # Refuse networks whose output is no prediction of the latent.
        outputs = own.out_channels or own.in_channels
        if outputs not in (own.in_channels, 2 * own.in_channels):
            raise AtollError(
                f"{config.cls}: {outputs} channels out, {own.in_channels} in; expected as many, or twice as many "
                "(with a variance)"
            )
        # A PixArt of 1024 px cannot run without the size of the images.
        if self._reads_pixels() and config.pixels is None:
            raise AtollError(f"{config.cls}: this network reads the image's size; set pixels: [height, width]")
        _place_positions(self.network)
        if config.cls == "DiTTransformer2DModel":
            for block in self.network.transformer_blocks:
                # In training it would drop labels by global random numbers; our loop drops conditions by seed and step.
                block.norm1.emb.class_embedder.dropout_prob = 0.0

    @property
    def condition_width(self) -> int:
        """The width of the states that PixArt reads, or the number of classes that DiT reads."""
        own = self.network.config
        if self.config.cls == "DiTTransformer2DModel":
            return own.num_embeds_ada_norm
        return own.caption_channels or own.cross_attention_dim

    def forward(self, x: Tensor, time: Tensor, condition: Condition | None) -> Tensor:
        # diffusers' networks do not cast their input.
        check_input(x, time, self.channels, self.size)
        x_cast = x.to(compute_dtype(self.network.pos_embed.proj.weight, x))  # [B,C,H,W]
        if self.config.cls == "DiTTransformer2DModel":
            output = self.network(x_cast, time, class_labels=self._labels(condition, len(x))).sample  # [B,C or 2C,H,W]
        else:
            condition = require_condition(condition, len(x), self.condition_width)
            output = self.network(
                x_cast,
                encoder_hidden_states=condition.states.to(x_cast.dtype),  # [B,L,D]
                timestep=time,
                added_cond_kwargs=self._image_size(len(x), x.device),
                encoder_attention_mask=condition.mask,  # [B,L]
            ).sample  # [B,C or 2C,H,W]
        # A predicted variance is in the second half of the channels: drop it.
        return output[:, : self.channels].to(x.dtype)  # [B,C,H,W]

    def _labels(self, condition: Condition | None, rows: int) -> Tensor:
        """Class numbers [B] int64; the null class is the last plus one."""
        # The encoder "label" makes the vector one-hot, zeros for no class.
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

    def _image_size(self, rows: int, device: torch.device) -> dict[str, Tensor] | None:
        """The size conditions of a PixArt of 1024 px: resolution [B,2] and aspect ratio [B,1] of the images."""
        if not self._reads_pixels() or self.config.pixels is None:
            return None
        pixels = torch.tensor([self.config.pixels], dtype=torch.float32, device=device)  # [1,2]
        return {
            "resolution": pixels.expand(rows, 2),
            "aspect_ratio": (pixels[:, :1] / pixels[:, 1:]).expand(rows, 1),
        }


def _place_positions(network: Any) -> None:
    """Compute the positions of a network that was built on the meta device: diffusers does not save them."""
    embed, own = network.pos_embed, network.config
    if embed.pos_embed.is_meta:
        with torch.device("cpu"):
            on_cpu = type(embed)(
                own.sample_size,
                own.sample_size,
                own.patch_size,
                own.in_channels,
                embed.pos_embed.shape[2],
                interpolation_scale=embed.interpolation_scale,
            )
        embed.pos_embed = on_cpu.pos_embed


def arguments_of(cls: Class) -> set[str]:
    """The arguments that this class of diffusers accepts."""
    with quiet("diffusers") as library:
        return set(inspect.signature(getattr(library, cls).__init__).parameters) - {"self"}


def _build(config: ForeignConfig) -> Any:
    """Build diffusers' network, freshly initialised."""
    # An unknown argument would be a warning there; here it is an error.
    if unknown := sorted(config.config.keys() - arguments_of(config.cls)):
        raise AtollError(f"{config.cls}: config.{unknown[0]}: unknown key; remove it")
    with quiet("diffusers") as library:
        try:
            return getattr(library, config.cls)(**config.config)
        except Exception as error:  # sizes that do not fit each other: whatever the library and torch raise
            refuse_out_of_memory(error, config.cls)
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise AtollError(f"{config.cls}: cannot be built from its config ({reason}); correct it") from None
