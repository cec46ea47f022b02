"""DiT (arXiv 2212.09748) into a native network with per-block modulation, which has a place for all it holds.

Two layouts of the same network: that of facebookresearch/DiT ("dit"), and that of diffusers' `DiTTransformer2DModel`
("diffusers-dit"). Of the classes only the null class stays: its embedding is added to every time embedding, so it goes
into the bias of the time embedding's last layer. Of the outputs only eps stays.
"""

import math
from typing import Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from atoll.convert.native import (
    DiffusersConfig,
    Native,
    fill,
    foreign_config,
    keep_channels,
    patch_kernel,
    positions,
    stacked,
)
from atoll.convert.read import Checkpoint, Taker
from atoll.errors import AtollError
from atoll.nn.dit import SIZES, TIME_FEATURES, TIME_PERIOD

ImageSize = tuple[int, int]


def from_dit(checkpoint: Checkpoint, size: ImageSize | None = None, heads: int | None = None) -> Native:
    """A checkpoint in the layout of facebookresearch/DiT.

    Args:
        size: (H, W) of the latent; None: the square that the checkpoint was trained on.
        heads: None: as of the published sizes, S, B, L and XL.

    Raises:
        AtollError: sizes that cannot be told from the tensors, or tensors missing, misshapen or unknown.
    """
    taker = Taker(checkpoint)
    width, channels, patch, _ = taker.shape("x_embedder.proj.weight", 4)
    tokens = taker.shape("pos_embed", 3)[1]
    hidden = taker.shape("blocks.0.mlp.fc1.weight", 2)[0]
    classes = taker.shape("y_embedder.embedding_table.weight", 2)[0]
    outputs = taker.shape("final_layer.linear.weight", 2)[0]
    check_outputs(checkpoint, outputs, patch, channels)
    depth = taker.count("blocks")
    side = math.isqrt(tokens)
    trained_size = (side * patch, side * patch) if side * side == tokens else None
    size = size or trained_size
    if size is None:
        raise AtollError(f"{checkpoint.where}: {tokens} positions are no square; say the latent's size")
    weights: dict[str, Tensor] = {}
    kernel = taker.take("x_embedder.proj.weight", width, channels, patch, patch)
    fill(weights, "embed", patch_kernel(kernel, taker.take("x_embedder.proj.bias", width)))
    own = taker.take("pos_embed", 1, tokens, width)[0]
    fits = size == trained_size or (trained_size is None and (size[0] // patch) * (size[1] // patch) == tokens)
    weights["positions"] = own if fits else positions(size, patch, width, math.sqrt(tokens))
    null = taker.take("y_embedder.embedding_table.weight", classes, width)[-1]
    last, bias = taker.linear("t_embedder.mlp.2", width, width)
    fill(weights, "conditioner.time.0", taker.linear("t_embedder.mlp.0", width, TIME_FEATURES))
    fill(weights, "conditioner.time.2", (last, bias + null))
    for i in range(depth):
        theirs, ours = f"blocks.{i}", f"blocks.{i}"
        fill(weights, f"{ours}.modulation.linear", taker.linear(f"{theirs}.adaLN_modulation.1", 6 * width, width))
        fill(weights, f"{ours}.attention.qkv", taker.linear(f"{theirs}.attn.qkv", 3 * width, width))
        fill(weights, f"{ours}.attention.out", taker.linear(f"{theirs}.attn.proj", width, width))
        fill(weights, f"{ours}.mlp.0", taker.linear(f"{theirs}.mlp.fc1", hidden, width))
        fill(weights, f"{ours}.mlp.2", taker.linear(f"{theirs}.mlp.fc2", width, hidden))
    fill(weights, "final_modulation.linear", taker.linear("final_layer.adaLN_modulation.1", 2 * width, width))
    final = taker.linear("final_layer.linear", outputs, width)
    taker.done()
    fill(weights, "final", keep_channels(final, patch, channels))
    return Native(
        {
            "size": list(size),
            "channels": channels,
            "patch": patch,
            "width": width,
            "depth": depth,
            "heads": heads or published_heads(checkpoint, width, depth),
            "mlp_ratio": hidden / width,
            "modulation": "per-block",
        },
        weights,
        {"classes": classes - 1, "positions": "the checkpoint's" if fits else f"stretched from {tokens}"},
    )


def check_outputs(checkpoint: Checkpoint, outputs: int, patch: int, channels: int) -> None:
    """Raises AtollError unless a token's outputs are eps, or eps and a variance, of `channels` channels."""
    per_pixel = outputs / patch**2
    if per_pixel not in (channels, 2 * channels):
        raise AtollError(
            f"{checkpoint.where}: {outputs} outputs a token, {per_pixel:g} a pixel; expected {channels} (eps) or "
            f"{2 * channels} (eps and variance): this predicts something else"
        )


def published_heads(checkpoint: Checkpoint, width: int, depth: int) -> int:
    """The heads of DiT's own sizes. Raises AtollError for another size, whose tensors do not tell them."""
    for name, size in SIZES.items():
        if "/" in name and (size["width"], size["depth"]) == (width, depth):
            return size["heads"]
    raise AtollError(
        f"{checkpoint.where}: width {width} and depth {depth} are none of DiT's sizes, and no tensor tells the heads; "
        "say how many"
    )


class Transformer(DiffusersConfig):
    """What config.json of a DiTTransformer2DModel and of a PixArtTransformer2DModel have in common."""

    num_attention_heads: PositiveInt = 16
    attention_head_dim: PositiveInt = 72
    in_channels: PositiveInt = 4
    out_channels: PositiveInt | None = None
    num_layers: PositiveInt = 28
    attention_bias: bool = True
    sample_size: int = Field(32, ge=1, le=4096)
    patch_size: PositiveInt = 2

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def outputs(self) -> int:
        """Of a token."""
        return self.patch_size**2 * (self.out_channels or self.in_channels)


class DiffusersDiT(Transformer):
    """config.json of a DiTTransformer2DModel, with that class's defaults."""

    num_embeds_ada_norm: PositiveInt = 1000  # classes
    norm_eps: float = Field(1e-5, gt=0)  # of the norm before the MLP alone; the others have 1e-6
    norm_type: Literal["ada_norm_zero"] = "ada_norm_zero"
    activation_fn: Literal["gelu-approximate"] = "gelu-approximate"
    norm_elementwise_affine: Literal[False] = False
    attention_type: Literal["default"] = "default"
    dropout: float = 0.0  # these three change nothing at inference
    norm_num_groups: int = 32
    upcast_attention: bool = False


def from_diffusers_dit(checkpoint: Checkpoint, size: ImageSize | None = None) -> Native:
    """A checkpoint of diffusers' DiTTransformer2DModel, with its config.json; equal to what that class computes.

    That is not quite DiT: the sinusoids of the time lie in 127 steps instead of 128, and the norm before the MLP has
    an eps of 1e-5. Every block has an embedder of time and class of its own; they must be equal, as they are in what
    was converted from DiT.

    Raises:
        AtollError: no config.json, one of another network, or tensors missing, misshapen or unknown.
    """
    config = foreign_config(checkpoint, DiffusersDiT)
    patch, channels, width = config.patch_size, config.in_channels, config.width
    size = size or (config.sample_size, config.sample_size)
    taker, weights = embedding(checkpoint, config, size, config.sample_size // patch)
    embedders = []
    for i in range(config.num_layers):
        block, ours = f"transformer_blocks.{i}", f"blocks.{i}"
        embedders.append(_embedder(taker, f"{block}.norm1.emb", width, config.num_embeds_ada_norm))
        fill(weights, f"{ours}.modulation.linear", taker.linear(f"{block}.norm1.linear", 6 * width, width))
        attention(taker, weights, block, ours, width, config.attention_bias)
    fill(weights, "final_modulation.linear", taker.linear("proj_out_1", 2 * width, width))
    fill(weights, "final", keep_channels(taker.linear("proj_out_2", config.outputs, width), patch, channels))
    taker.done()
    for i, embedder in enumerate(embedders):
        if any(not torch.equal(embedder[name], embedders[0][name]) for name in embedder):
            raise AtollError(
                f"{checkpoint.where}: the embedders of time and null class of blocks 0 and {i} differ; expected equal "
                "ones, as in DiT, for a network has one: train it from DiT's own weights"
            )
    return Native(
        {
            "size": list(size),
            "channels": channels,
            "patch": patch,
            "width": width,
            "depth": config.num_layers,
            "heads": config.num_attention_heads,
            "modulation": "per-block",
            "mlp_eps": config.norm_eps,
            "time_period": TIME_PERIOD ** (128 / 127),
        },
        weights | embedders[0],
        {"classes": config.num_embeds_ada_norm},
    )


def embedding(
    checkpoint: Checkpoint, config: Transformer, size: ImageSize, base: float
) -> tuple[Taker, dict[str, Tensor]]:
    """Begins a conversion: the taker of all that is left, and the weights of patch embedding and positions.

    base: tokens a side that the positions were made for, as `positions` takes it.

    Raises:
        AtollError: the checkpoint has other blocks or another patch embedding than config.json says, or outputs that
            are no eps.
    """
    taker, weights = Taker(checkpoint), dict[str, Tensor]()
    patch, channels, width = config.patch_size, config.in_channels, config.width
    check_sizes(taker, config.num_layers, (width, channels, patch, patch))
    check_outputs(checkpoint, config.outputs, patch, channels)
    kernel = taker.take("pos_embed.proj.weight", width, channels, patch, patch)
    fill(weights, "embed", patch_kernel(kernel, taker.take("pos_embed.proj.bias", width)))
    taker.drop("pos_embed.pos_embed")  # older versions stored it; it follows from the config
    weights["positions"] = positions(size, patch, width, base)
    return taker, weights


def check_sizes(taker: Taker, layers: int, kernel: tuple[int, ...]) -> None:
    """Raises AtollError unless config.json tells of the blocks and the patch embedding [D,C,p,p] that are there."""
    found = (taker.count("transformer_blocks"), *taker.shape("pos_embed.proj.weight", 4))
    if found != (layers, *kernel):
        raise AtollError(
            f"{taker.where}: {found[0]} blocks and a patch embedding {list(found[1:])}, config.json says {layers} and "
            f"{list(kernel)}; get both from one place"
        )


def _embedder(taker: Taker, name: str, width: int, classes: int) -> dict[str, Tensor]:
    """One block's embedder of time, the null class in its last bias, under the conditioner's names."""
    weights: dict[str, Tensor] = {}
    null = taker.take(f"{name}.class_embedder.embedding_table.weight", classes + 1, width)[-1]
    last, bias = taker.linear(f"{name}.timestep_embedder.linear_2", width, width)
    fill(weights, "conditioner.time.0", taker.linear(f"{name}.timestep_embedder.linear_1", width, TIME_FEATURES))
    fill(weights, "conditioner.time.2", (last, bias + null))
    return weights


def attention(taker: Taker, weights: dict[str, Tensor], block: str, ours: str, width: int, bias: bool) -> None:
    """Self-attention and MLP of one of diffusers' BasicTransformerBlocks."""
    parts = [taker.linear(f"{block}.attn1.to_{part}", width, width, bias) for part in "qkv"]
    fill(weights, f"{ours}.attention.qkv", stacked(*parts))
    fill(weights, f"{ours}.attention.out", taker.linear(f"{block}.attn1.to_out.0", width, width))
    fill(weights, f"{ours}.mlp.0", taker.linear(f"{block}.ff.net.0.proj", 4 * width, width))
    fill(weights, f"{ours}.mlp.2", taker.linear(f"{block}.ff.net.2", width, 4 * width))
