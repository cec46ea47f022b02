"""Convert PixArt (arXiv 2310.00426) in the layout of diffusers' `PixArtTransformer2DModel` to a native network.

Every part has a counterpart: the block is PixArt's own, the text goes through two layers (`text_layers: 2`), and the
fixed positions are stored, stretched by PixArt's interpolation scale. The 1024 px models also read the image's
resolution and aspect ratio; a native network has one size, so those embeddings are constants, and they go into the bias
of the time embedding's last layer. Variance outputs are dropped.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from atoll.convert.dit import LatentSize, Transformer, attention, embedding
from atoll.convert.native import Native, fill, foreign_config, keep_channels, stacked
from atoll.convert.read import Checkpoint, Taker
from atoll.errors import AtollError
from atoll.nn.dit import NORM_EPS, TIME_FEATURES, time_features


class PixArt(Transformer):
    """config.json of a PixArtTransformer2DModel, with that class's defaults."""

    out_channels: PositiveInt | None = 8
    cross_attention_dim: PositiveInt = 1152
    sample_size: int = Field(128, ge=1, le=4096)
    interpolation_scale: PositiveFloat | None = None
    use_additional_conditions: bool | None = None
    caption_channels: PositiveInt | None = None
    norm_eps: float = Field(NORM_EPS, ge=NORM_EPS, le=NORM_EPS)
    norm_type: Literal["ada_norm_single"] = "ada_norm_single"
    activation_fn: Literal["gelu-approximate"] = "gelu-approximate"
    norm_elementwise_affine: Literal[False] = False
    attention_type: Literal["default"] = "default"
    num_embeds_ada_norm: int | None = 1000  # these four change nothing at inference
    dropout: float = 0.0
    norm_num_groups: int = 32
    upcast_attention: bool = False


def from_pixart(checkpoint: Checkpoint, size: LatentSize | None = None, factor: int = 8) -> Native:
    """Convert a checkpoint of diffusers' PixArtTransformer2DModel with its config.json. The result is exact.

    Args:
        size: (H, W) of the latent; None: the square that the checkpoint was trained on.
        factor: image pixels per latent pixel of the codec, default 8; for networks that read the resolution.

    Raises:
        AtollError: no config.json, one of another network, or tensors missing, misshapen or unknown.
    """
    # Sizes from the config, then patch embedding and positions.
    config = foreign_config(checkpoint, PixArt)
    patch, channels, width = config.patch_size, config.in_channels, config.width
    size = size or (config.sample_size, config.sample_size)
    interpolation = config.interpolation_scale or max(config.sample_size // 64, 1)
    taker, weights = embedding(checkpoint, config, size, config.sample_size // patch / interpolation)
    taker.drop("caption_projection.y_embedding")  # the null caption in training, which older versions stored
    # Blocks.
    for i in range(config.num_layers):
        block, ours = f"transformer_blocks.{i}", f"blocks.{i}"
        weights[f"{ours}.modulation.table"] = taker.take(f"{block}.scale_shift_table", 6, width)
        attention(taker, weights, block, ours, width, config.attention_bias)
        fill(weights, f"{ours}.cross.q", taker.linear(f"{block}.attn2.to_q", width, width, config.attention_bias))
        parts = [taker.linear(f"{block}.attn2.to_{part}", width, width, config.attention_bias) for part in "kv"]
        fill(weights, f"{ours}.cross.kv", stacked(*parts))
        fill(weights, f"{ours}.cross.out", taker.linear(f"{block}.attn2.to_out.0", width, width))
    # Final layer and shared modulation.
    weights["final_modulation.table"] = taker.take("scale_shift_table", 2, width)
    fill(weights, "final", keep_channels(taker.linear("proj_out", config.outputs, width), patch, channels))
    fill(weights, "conditioner.shared", taker.linear("adaln_single.linear", 6 * width, width))
    # Time and text. By diffusers' default, networks for 1024 px read the resolution.
    reads = config.use_additional_conditions
    reads = config.sample_size == 128 if reads is None else reads
    pixels = (size[0] * factor, size[1] * factor) if reads else None
    _time(taker, weights, width, pixels)
    text = _text(taker, weights, config, width)
    taker.done()
    return Native(
        {
            "size": list(size),
            "channels": channels,
            "patch": patch,
            "width": width,
            "depth": config.num_layers,
            "heads": config.num_attention_heads,
            "modulation": "single",
            **text,
        },
        weights,
        {"resolution": list(pixels)} if pixels else {},
    )


def _time(taker: Taker, weights: dict[str, Tensor], width: int, pixels: LatentSize | None) -> None:
    """Convert the time embedder, with the constants for images of `pixels` (height, width) if it reads them."""
    # The embedders of time, resolution and aspect ratio share a prefix.
    name = "adaln_single.emb"
    fill(weights, "conditioner.time.0", taker.linear(f"{name}.timestep_embedder.linear_1", width, TIME_FEATURES))
    last, bias = taker.linear(f"{name}.timestep_embedder.linear_2", width, width)
    # A native network has one size, so the embeddings of resolution and aspect ratio are constants.
    if pixels is not None:
        height, wide = pixels
        resolution = _embedded(
            taker, f"{name}.resolution_embedder", width // 3, torch.tensor([height, wide])
        )  # [2,D/3]
        aspect = _embedded(taker, f"{name}.aspect_ratio_embedder", width // 3, torch.tensor([height / wide]))  # [1,D/3]
        bias = bias + torch.cat([resolution, aspect]).flatten()  # [D]
    fill(weights, "conditioner.time.2", (last, bias))


def _embedded(taker: Taker, name: str, width: int, values: Tensor) -> Tensor:
    """Evaluate an embedder of numbers on `values` [n]: [n, width]."""
    # The embedder reads numbers as the time embedder reads times.
    hidden = F.silu(F.linear(time_features(values), *taker.linear(f"{name}.linear_1", width, TIME_FEATURES)))
    return F.linear(hidden, *taker.linear(f"{name}.linear_2", width, width))


def _text(taker: Taker, weights: dict[str, Tensor], config: PixArt, width: int) -> dict[str, int]:
    """Convert the text's projection, or the identity if there is none. Return the config's entries for the text."""
    # A native network projects text to its own width.
    if config.cross_attention_dim != width:
        raise AtollError(
            f"{taker.where}: cross_attention_dim {config.cross_attention_dim}, the network is {width} wide; "
            "expected both to be equal, as in PixArt: this cannot be converted"
        )
    # Without a projection the states go into cross-attention as they are.
    if config.caption_channels is None:
        fill(weights, "embed_states", (torch.eye(width), torch.zeros(width)))
        return {"states_dim": width, "text_layers": 1}
    fill(weights, "embed_states.0", taker.linear("caption_projection.linear_1", width, config.caption_channels))
    fill(weights, "embed_states.2", taker.linear("caption_projection.linear_2", width, width))
    return {"states_dim": config.caption_channels, "text_layers": 2}
