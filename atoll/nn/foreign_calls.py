"""How diffusers' networks are called: one adapter per call style, not per class.

    ClassLabels    DiT                              a class number; no text
    MaskedText     PixArt, PRX, Sana, Lumina2       text states with a mask
    JointText      SD3                              text states that are all read, and a pooled vector
    PackedTokens   FLUX, FLUX.2                     the same, with the latent as tokens [B,N,C] and explicit positions

An adapter is stateless. It calls the network as its diffusers pipeline does, but for two points. Times stay per sample
and in float32: FLUX and FLUX.2 would round them to the dtype of the latents, in bfloat16 to steps of 1/256. A text mask
that a network does not read is an error, where the pipeline would read padding as text.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from atoll.condition import Condition
from atoll.errors import AtollError
from atoll.nn.inputs import compute_dtype
from atoll.nn.paris import require_condition

Class = Literal[
    "PixArtTransformer2DModel",
    "DiTTransformer2DModel",
    "PRXTransformer2DModel",
    "SD3Transformer2DModel",
    "SanaTransformer2DModel",
    "Lumina2Transformer2DModel",
    "FluxTransformer2DModel",
    "Flux2Transformer2DModel",
]
# Those that read the condition's pooled vector.
READ_POOLED: tuple[Class, ...] = ("DiTTransformer2DModel", "SD3Transformer2DModel", "FluxTransformer2DModel")


@dataclass(frozen=True)
class CallSettings:
    """Constants of the card that some networks read beside their inputs.

    Attributes:
        pixels: (height, width) of the images, for a PixArt of 1024 px.
        guidance: the guidance scale that a guidance-distilled network embeds.
    """

    pixels: tuple[int, int] | None = None
    guidance: float | None = None


@dataclass(frozen=True)
class CallStyle(ABC):
    """One way to call a network of diffusers. Subclasses are final.

    Attributes:
        states: the keys of the configuration that hold the width of the text states; the first that is set counts.
        square: the network computes only the square of its `sample_size`.
        reads_mask: whether padding of the text is masked, or there is no text.
    """

    states: tuple[str, ...] = ()
    square: bool = False
    reads_mask: ClassVar[bool] = True

    @abstractmethod
    def __call__(
        self, network: Any, x: Tensor, time: Tensor, condition: Condition | None, settings: CallSettings
    ) -> Tensor:
        """Return the network's output [B, C or 2C, H, W] for x [B,C,H,W], time [B] and a condition of B rows."""

    def channels(self, own: Any) -> int:
        """Return C of the latent. own: the network's configuration."""
        return own.in_channels

    def multiple(self, own: Any) -> int:
        """Return the number that the latent's sides must be multiples of."""
        return own.patch_size

    def limit(self, own: Any) -> tuple[int, int] | None:
        """Return the largest (H, W) of a latent; None if there is none."""
        return None

    def states_dim(self, own: Any) -> int:
        """Return the width of the text states."""
        return next(own[key] for key in self.states if own[key] is not None)

    def pooled_dim(self, own: Any) -> int | None:
        """Return the width of the condition's pooled vector; None if the network reads none."""
        return None

    def prepare(self, network: Any) -> None:  # noqa: B027 - most styles need nothing
        """Check a new network and, where the style needs it, register hooks that keep no state."""

    def reads_guidance(self, own: Any) -> bool:
        """Return whether the network embeds a guidance scale."""
        return bool(own.get("guidance_embeds", False))


@dataclass(frozen=True)
class ClassLabels(CallStyle):
    """DiT reads a class: the largest entry of the pooled vector [B,n], one-hot; zeros are the null class, number n."""

    def states_dim(self, own: Any) -> int:
        return own.num_embeds_ada_norm

    def pooled_dim(self, own: Any) -> int | None:
        return own.num_embeds_ada_norm

    def prepare(self, network: Any) -> None:
        for block in network.transformer_blocks:
            # In training it would drop labels by global random numbers; our loop drops conditions by seed and step.
            block.norm1.emb.class_embedder.dropout_prob = 0.0

    def __call__(
        self, network: Any, x: Tensor, time: Tensor, condition: Condition | None, settings: CallSettings
    ) -> Tensor:
        classes = self.states_dim(network.config)
        pooled = None if condition is None else condition.pooled
        if pooled is None or pooled.shape != (len(x), classes):
            got = "none" if pooled is None else f"shape {list(pooled.shape)}"
            raise AtollError(
                f"class, as the condition's pooled vector: got {got}, expected [{len(x)}, {classes}] of one-hot rows; "
                f"use the encoder 'label' with the network's {classes} classes"
            )
        labels = torch.where(pooled.any(1), pooled.argmax(1), classes)  # [B]
        x = _cast(network, x)
        return network(x, time, class_labels=labels).sample  # [B,C or 2C,H,W]


@dataclass(frozen=True)
class MaskedText(CallStyle):
    """The network reads text states [B,L,D] and masks them itself.

    Attributes:
        mask: the argument for the mask [B,L].
        reversed: the network has data at time 1 and predicts the velocity towards it: it is called at 1 - time, and
            its output is negated.
        left: the network takes the first tokens of a row for its text, as many as the mask has: they are moved there.
    """

    mask: str = "encoder_attention_mask"
    reversed: bool = False
    left: bool = False

    def limit(self, own: Any) -> tuple[int, int] | None:
        # Lumina2 has a table of rotations per axis: text, rows, columns.
        axes = own.get("axes_lens")
        return None if axes is None else (axes[1] * own.patch_size, axes[2] * own.patch_size)

    def prepare(self, network: Any) -> None:
        if self.reads_guidance(network.config):
            raise AtollError(
                f"{type(network).__name__}: guidance_embeds belongs to Sana-Sprint, whose output is no velocity on a "
                "fixed path; use a Sana without it"
            )

    def __call__(
        self, network: Any, x: Tensor, time: Tensor, condition: Condition | None, settings: CallSettings
    ) -> Tensor:
        condition = require_condition(condition, len(x), self.states_dim(network.config))
        if self.left:
            condition = _left_aligned(condition, network)
        x = _cast(network, x)
        extra = {} if settings.pixels is None else {"added_cond_kwargs": _image_size(settings.pixels, x)}
        output = network(
            hidden_states=x,
            encoder_hidden_states=condition.states.to(x.dtype),  # [B,L,D]
            timestep=1 - time if self.reversed else time,
            **{self.mask: condition.mask},  # [B,L]
            **extra,
        ).sample  # [B,C or 2C,H,W]
        return -output if self.reversed else output


@dataclass(frozen=True)
class JointText(CallStyle):
    """SD3 reads all text states [B,L,D], which it does not mask, and a pooled vector [B,P]."""

    reads_mask = False

    def limit(self, own: Any) -> tuple[int, int] | None:
        side = own.pos_embed_max_size * own.patch_size  # its positions are cut out of a table of this size
        return side, side

    def pooled_dim(self, own: Any) -> int | None:
        return own.pooled_projection_dim

    def __call__(
        self, network: Any, x: Tensor, time: Tensor, condition: Condition | None, settings: CallSettings
    ) -> Tensor:
        x = _cast(network, x)
        states, pooled = _unmasked(self, network, condition, x)
        return network(
            hidden_states=x, encoder_hidden_states=states, pooled_projections=pooled, timestep=time
        ).sample  # [B,C,H,W]


@dataclass(frozen=True)
class PackedTokens(CallStyle):
    """FLUX and FLUX.2 read the latent as tokens [B,N,C f^2], with the position of every token.

    Attributes:
        fold: f, the side of the square of latent pixels that becomes one token: 2 for FLUX. FLUX.2's codec has folded
            them already.
        text_axis: the axis of the positions that numbers the text's tokens; None: all of them are at 0.
    """

    fold: int = 1
    text_axis: int | None = None
    reads_mask = False

    def channels(self, own: Any) -> int:
        return own.in_channels // self.fold**2

    def multiple(self, own: Any) -> int:
        return self.fold

    def pooled_dim(self, own: Any) -> int | None:
        return own.get("pooled_projection_dim")

    def prepare(self, network: Any) -> None:
        own, name = network.config, type(network).__name__
        axes = 3 if self.text_axis is None else self.text_axis + 1
        if own.patch_size != 1 or own.in_channels % self.fold**2 or len(own.axes_dims_rope) != axes:
            raise AtollError(
                f"{name}: patch_size {own.patch_size}, in_channels {own.in_channels}, axes_dims_rope "
                f"{list(own.axes_dims_rope)}; expected patch_size 1, a multiple of {self.fold**2}, and {axes} axes"
            )
        # Exact times: FLUX's come with the pooled vector, which it passes on untouched. FLUX.2 gets float32 latents,
        # whose dtype its times take; three layers then cast their inputs.
        if self.pooled_dim(own) is not None:
            network.time_text_embed.register_forward_pre_hook(_take_exact)
            return
        embed = network.time_guidance_embed
        for layer in (network.x_embedder, embed.timestep_embedder, embed.guidance_embedder):
            if layer is not None:
                layer.register_forward_pre_hook(_cast_input)

    def __call__(
        self, network: Any, x: Tensor, time: Tensor, condition: Condition | None, settings: CallSettings
    ) -> Tensor:
        x_cast = _cast(network, x)
        states, pooled = _unmasked(self, network, condition, x_cast)
        guidance = None if settings.guidance is None else torch.full_like(time, settings.guidance)  # [B]
        exact = {}
        if pooled is not None:
            # FLUX multiplies both by 1000 before it embeds them.
            exact = {"pooled_projections": _Exact(pooled, 1000 * time, None if guidance is None else 1000 * guidance)}
        else:
            x_cast = x.to(torch.promote_types(x.dtype, torch.float32))
        output = network(
            hidden_states=self._packed(x_cast),  # [B,N,C f^2]
            encoder_hidden_states=states,  # [B,L,D]
            timestep=time,
            img_ids=self._positions(x),  # [N,axes]
            txt_ids=self._text_positions(states),  # [L,axes]
            guidance=guidance,
            **exact,
        ).sample  # [B,N,C f^2]
        return self._unpacked(output, x)

    def _packed(self, x: Tensor) -> Tensor:
        """[B,C,H,W] -> [B,N,C f^2], tokens row by row, each in the order (C, f, f)."""
        x = x.unflatten(3, (-1, self.fold)).unflatten(2, (-1, self.fold))  # [B,C,h,f,w,f]
        return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def _unpacked(self, tokens: Tensor, like: Tensor) -> Tensor:
        """Invert `_packed`: [B,N,C f^2] -> [B,C,H,W] of the shape of `like`."""
        f = self.fold
        height, width = like.shape[2] // f, like.shape[3] // f
        tokens = tokens.unflatten(2, (-1, f, f)).unflatten(1, (height, width))  # [B,h,w,C,f,f]
        return tokens.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)

    def _positions(self, x: Tensor) -> Tensor:
        """Return (0, row, column) of every token, and 0 on a fourth axis if there is one: [N,axes] float32."""
        axes = 3 if self.text_axis is None else self.text_axis + 1
        height, width = x.shape[2] // self.fold, x.shape[3] // self.fold
        ids = torch.zeros(height, width, axes, device=x.device)
        ids[..., 1] = torch.arange(height, device=x.device)[:, None]
        ids[..., 2] = torch.arange(width, device=x.device)
        return ids.flatten(0, 1)

    def _text_positions(self, states: Tensor) -> Tensor:
        """Return the positions of the text's tokens: [L,axes] float32."""
        count = states.shape[1]
        ids = torch.zeros(count, 3 if self.text_axis is None else self.text_axis + 1, device=states.device)
        if self.text_axis is not None:
            ids[:, self.text_axis] = torch.arange(count, device=states.device)
        return ids


STYLES: dict[Class, CallStyle] = {
    "PixArtTransformer2DModel": MaskedText(("caption_channels", "cross_attention_dim"), square=True),
    "DiTTransformer2DModel": ClassLabels(square=True),
    "PRXTransformer2DModel": MaskedText(("context_in_dim",), mask="attention_mask"),
    "SD3Transformer2DModel": JointText(("joint_attention_dim",)),
    "SanaTransformer2DModel": MaskedText(("caption_channels",)),
    "Lumina2Transformer2DModel": MaskedText(("cap_feat_dim",), reversed=True, left=True),
    "FluxTransformer2DModel": PackedTokens(("joint_attention_dim",), fold=2),
    "Flux2Transformer2DModel": PackedTokens(("joint_attention_dim",), text_axis=3),
}


@dataclass(frozen=True)
class _Exact:
    """A pooled vector [B,P] with the times [B] and guidance scales [B] that were not rounded."""

    pooled: Tensor
    time: Tensor
    guidance: Tensor | None


def _take_exact(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Replace FLUX's rounded time and guidance, the inputs before its pooled vector, by the exact ones."""
    exact = inputs[-1]
    # Whoever calls diffusers' network itself passes a tensor.
    if not isinstance(exact, _Exact):
        return inputs
    return (exact.time, exact.pooled) if exact.guidance is None else (exact.time, exact.guidance, exact.pooled)


def _cast_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Cast the first input to the dtype of the layer's weights."""
    first, *others = inputs
    return first.to(compute_dtype(next(module.parameters()), first)), *others


def _cast(network: nn.Module, x: Tensor) -> Tensor:
    """Cast x to the dtype in which the network computes; diffusers' networks do not cast their input."""
    return x.to(compute_dtype(next(network.parameters()), x))


def _unmasked(style: CallStyle, network: Any, condition: Condition | None, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return text states [B,L,D], all of which are read, and the pooled vector [B,P] or None, in the dtype of x."""
    own, name = network.config, type(network).__name__
    condition = require_condition(condition, len(x), style.states_dim(own))
    if not condition.mask.all():
        raise AtollError(
            f"condition: got a mask with padding, which {name} would read as text; use the text encoder of its "
            "pipeline, whose padding is part of the training ('sd3', 'flux', 'flux2' or 'flux2-klein')"
        )
    width = style.pooled_dim(own)
    if width is None:
        return condition.states.to(x.dtype), None
    if condition.pooled is None or condition.pooled.shape[1] != width:
        got = "none" if condition.pooled is None else f"{condition.pooled.shape[1]} wide"
        raise AtollError(
            f"condition's pooled vector: got {got}, expected {width} wide; use the text encoder of {name}'s pipeline"
        )
    return condition.states.to(x.dtype), condition.pooled.to(x.dtype)


def _left_aligned(condition: Condition, network: Any) -> Condition:
    """Move the tokens of every row to its start, in their order."""
    longest, most = int(condition.mask.sum(1).max()), network.config.axes_lens[0] - 1
    if longest > most:
        raise AtollError(
            f"condition: got {longest} tokens, {type(network).__name__} reads at most {most}; lower condition.length"
        )
    order = condition.mask.int().argsort(dim=1, descending=True, stable=True)[:, :longest]  # [B,longest]
    states = condition.states.take_along_dim(order[..., None], 1)
    return Condition(states, condition.mask.take_along_dim(order, 1), condition.pooled)


def _image_size(pixels: tuple[int, int], x: Tensor) -> dict[str, Tensor]:
    """Return the size conditions of a PixArt of 1024 px: resolution [B,2] and aspect ratio [B,1] of the images."""
    size = torch.tensor([pixels], dtype=torch.float32, device=x.device)  # [1,2]
    return {
        "resolution": size.expand(len(x), 2),
        "aspect_ratio": (size[:, :1] / size[:, 1:]).expand(len(x), 1),
    }
