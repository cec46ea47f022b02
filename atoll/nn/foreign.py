"""diffusers' own networks as experts, unchanged: PixArt, DiT, PRX, SD3, Sana, Lumina2, FLUX and FLUX.2.

The network is diffusers' class, built from its own configuration, which the card holds. `foreign_calls` adapts the
call. The card's objective says what it predicts. `atoll.convert.foreign` makes such experts, and they can be trained
further.
"""

import inspect
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, StrictBool, model_serializer, model_validator
from torch import Tensor, nn

from atoll.condition import Condition
from atoll.errors import AtollError
from atoll.nn.foreign_calls import STYLES, CallSettings, Class, PackedTokens
from atoll.nn.inputs import check_input
from atoll.runtime.libraries import quiet
from atoll.storage import bounds
from atoll.storage.memory import refuse_out_of_memory

# Bounds for diffusers' configurations: cards come from strangers and must not request absurd memory or time.
MOST = bounds.MAX_DIM
_Number = Annotated[int, Field(ge=0, le=MOST)] | Annotated[float, Field(ge=0, le=MOST)]
Value = StrictBool | _Number | str | None | Annotated[list[_Number], Field(max_length=512)]
_BLOCKS = ("num_layers", "depth", "num_single_layers", "num_refiner_layers")
LIMITS = dict.fromkeys(_BLOCKS, 512) | {"sample_size": 1024, "pos_embed_max_size": 512}  # sides in latent pixels
_TABLE = 2**29  # numbers in a table of positions. SD3.5's has 384^2 x 1536


class ForeignConfig(BaseModel):
    """The configuration of a foreign network, saved in the card under "name", "class", "config" and what else is set.

    Raises pydantic.ValidationError for another class, or a configuration that is out of bounds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False)

    name: Literal["diffusers"] = "diffusers"
    cls: Class = Field(alias="class")  # one of these, never another name from a file
    config: dict[str, Value]  # arguments of the class; missing ones keep their defaults
    # (H, W) of the latents that it was trained on; None: the square of its sample_size
    size: tuple[bounds.Side, bounds.Side] | None = None
    # (height, width) of the images, for a PixArt that reads them (those of 1024 px)
    pixels: tuple[bounds.Side, bounds.Side] | None = None
    guidance: float | None = Field(None, ge=0, le=bounds.MAX_GUIDANCE)  # the scale that a distilled network embeds

    @model_validator(mode="after")
    def _check(self) -> "ForeignConfig":
        for key, most in LIMITS.items():
            value = self.config.get(key)
            if isinstance(value, int | float) and value > most:
                raise ValueError(f"{key} {value}; expected at most {most}")
        # Positions [N, D] are computed in Python: both must be within the limits of a native network.
        side, patch = self._number("sample_size", 32), max(1, self._number("patch_size", 2))
        heads = self._number("num_attention_heads", 16) * self._number("attention_head_dim", 72)
        width = self._number("hidden_size", 1) if "hidden_size" in self.config else heads
        height, across = (side, side) if self.size is None else self.size
        tokens = max(height // patch, 1) * max(across // patch, 1)
        if tokens > bounds.MAX_PATCHES or width > bounds.MAX_DIM:
            raise ValueError(
                f"{height // patch} x {across // patch} tokens of width {width}; expected at most "
                f"{bounds.MAX_PATCHES:,} tokens of width {bounds.MAX_DIM:,}"
            )
        lengths, dims = (self.config.get(key) for key in ("axes_lens", "axes_dim_rope"))
        table = self._number("pos_embed_max_size", 0) ** 2 * width
        if isinstance(lengths, list) and isinstance(dims, list):
            table = max(table, int(max(lengths, default=0) * max(dims, default=0)))
        if table > _TABLE:
            raise ValueError(f"a table of {table:,} positions; expected at most {_TABLE:,} numbers")
        return self

    @property
    def token_side(self) -> int:
        """The side of a token in latent pixels."""
        style = STYLES[self.cls]
        return style.fold if isinstance(style, PackedTokens) else max(1, self._number("patch_size", 2))

    def _number(self, key: str, default: int) -> int:
        # Missing keys keep diffusers' defaults.
        value = self.config.get(key)
        return int(value) if isinstance(value, int | float) else default

    @model_serializer
    def _plain(self) -> dict[str, Any]:
        more = {
            "size": None if self.size is None else list(self.size),
            "pixels": None if self.pixels is None else list(self.pixels),
            "guidance": self.guidance,
        }
        entries = {"name": self.name, "class": self.cls, "config": dict(self.config)}
        return entries | {key: value for key, value in more.items() if value is not None}


class Foreign(nn.Module):
    """forward(x [B,C,H,W], time [B], condition) -> [B,C,H,W], in the dtype of x.

    `time` is scaled already, as the card's objective says: 0..999 for PixArt and DiT, 0..1000 for SD3 and Sana, 0..1
    for PRX, Lumina2, FLUX and FLUX.2. It is data at 0 and noise at the other end for all of them. If the network also
    predicts a variance, the second half of its channels, that half is cut off.

    PixArt and DiT compute latents of their own size only; the others compute any size whose sides are multiples of
    their patch, within their tables of positions.

    Attributes:
        channels: C.
        size: (H, W) of the latents that it was trained on.
        style: how it is called, see `atoll.nn.foreign_calls`: which parts of the condition it reads.

    Raises:
        AtollError: diffusers is not installed or cannot build this network; an input does not fit it.
    """

    def __init__(self, config: ForeignConfig) -> None:
        super().__init__()
        self.config = config
        # The network, and what it expects.
        self.style = STYLES[config.cls]
        self.network = _build(config)
        own = self.network.config
        self.style.prepare(self.network)
        self.channels, self.size = self.style.channels(own), self._size()
        # Refuse networks whose output is no prediction of the latent.
        outputs = own.get("out_channels") or own.in_channels
        if outputs not in (own.in_channels, 2 * own.in_channels):
            raise AtollError(
                f"{config.cls}: {outputs} channels out, {own.in_channels} in; expected as many, or twice as many "
                "(with a variance)"
            )
        self._check_constants()
        _place_positions(self.network)
        # A training step is a function of (seed, step) alone, without global random numbers.
        for module in self.network.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0

    @property
    def condition_width(self) -> int:
        """The width of the text states that it reads, or the number of classes."""
        return self.style.states_dim(self.network.config)

    @property
    def pooled_width(self) -> int | None:
        """The width of the pooled vector that it reads; None if it reads none."""
        return self.style.pooled_dim(self.network.config)

    @property
    def reads_mask(self) -> bool:
        """Whether it masks text padding, or reads no text; otherwise padding would be text."""
        return self.style.reads_mask

    def forward(self, x: Tensor, time: Tensor, condition: Condition | None) -> Tensor:
        self._check_input(x, time)
        # Times keep the digits that a network in bfloat16 would drop.
        time = time.to(torch.promote_types(time.dtype, torch.float32))
        settings = CallSettings(self.config.pixels, self.config.guidance)
        output = self.style(self.network, x, time, condition, settings)  # [B,C or 2C,H,W]
        # A predicted variance is in the second half of the channels: drop it.
        return output[:, : self.channels].to(x.dtype)  # [B,C,H,W]

    def _size(self) -> tuple[int, int]:
        """Return (H, W) of the latents that it was trained on."""
        own, cls = self.network.config, self.config.cls
        side = own.get("sample_size")
        size = (side, side) if self.config.size is None else self.config.size
        if side is None and self.config.size is None:
            raise AtollError(f"{cls}: its config has no size of the latents; set size: [height, width]")
        if self.style.square and size != (side, side):
            raise AtollError(f"{cls}: size {list(size)}; expected its sample_size, {side}: leave size out")
        return size

    def _check_constants(self) -> None:
        """Raise AtollError unless the card has the constants that this network reads, and no others."""
        cls, own = self.config.cls, self.network.config
        # A PixArt of 1024 px cannot run without the size of the images.
        if getattr(self.network, "use_additional_conditions", False) and self.config.pixels is None:
            raise AtollError(f"{cls}: this network reads the image's size; set pixels: [height, width]")
        if self.config.pixels is not None and cls != "PixArtTransformer2DModel":
            raise AtollError(
                f"{cls}: pixels {list(self.config.pixels)}, but it reads no image's size; leave pixels out"
            )
        reads, guidance = self.style.reads_guidance(own), self.config.guidance
        if reads and guidance is None:
            raise AtollError(f"{cls}: this network embeds a guidance scale; set guidance, such as guidance: 3.5")
        if guidance is not None and not reads:
            raise AtollError(f"{cls}: guidance {guidance:g}, but this network embeds none; leave guidance out")

    def _check_input(self, x: Tensor, time: Tensor) -> None:
        """Raise AtollError unless x [B,C,H,W] is a latent that this network computes, and time is [B]."""
        if self.style.square or x.ndim != 4:
            check_input(x, time, self.channels, self.size)
            return
        own, (height, width) = self.network.config, x.shape[2:]
        check_input(x, time, self.channels, (height, width))
        # diffusers would fail deep inside, or cut rows off.
        multiple, limit = self.style.multiple(own), self.style.limit(own)
        if height % multiple or width % multiple or not height or not width:
            raise AtollError(
                f"latent: got {height} x {width}, {self.config.cls} packs squares of {multiple} x {multiple}; use "
                f"sides that are multiples of {multiple}"
            )
        if limit is not None and (height > limit[0] or width > limit[1]):
            raise AtollError(
                f"latent: got {height} x {width}, {self.config.cls} has positions for at most {limit[0]} x {limit[1]}; "
                "use a smaller size"
            )


def _place_positions(network: Any) -> None:
    """Compute the positions of a network that was built on the meta device: diffusers does not save them."""
    own = network.config
    with torch.device("cpu"):
        # Sines and cosines per patch: PixArt, DiT, and a Sana with an interpolation_scale.
        for name in ("pos_embed", "patch_embed"):
            embed: Any = getattr(network, name, None)
            if "pos_embed" in getattr(embed, "_non_persistent_buffers_set", ()) and embed.pos_embed.is_meta:
                on_cpu = type(embed)(
                    own.sample_size,
                    own.sample_size,
                    own.patch_size,
                    own.in_channels,
                    embed.pos_embed.shape[2],
                    interpolation_scale=embed.interpolation_scale,
                )
                embed.pos_embed = on_cpu.pos_embed
        # Rotations per axis, plain attributes: Lumina2.
        rope = getattr(network, "rope_embedder", None)
        if rope is not None and rope.freqs_cis[0].is_meta:
            rope.freqs_cis = rope._precompute_freqs_cis(rope.axes_dim, rope.axes_lens, rope.theta)


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
