"""Rename PixArt's own `.pth` (alpha and sigma, arXiv 2310.00426 and 2403.04692) to the layout of diffusers.

The networks are the same; the names differ, and q, k and v are one tensor. The entries of diffusers' config.json follow
from the tensors: the sizes from their shapes, the positions' scale from the stored positions, and whether the
network reads the image's resolution from its embedders.
"""

import math
import re

import torch
from torch import Tensor

from atoll.convert.dit import LatentSize, published_heads
from atoll.convert.kind import PIXART_LAYOUT
from atoll.convert.read import Checkpoint, Taker
from atoll.errors import AtollError

SIGMA_LENGTH = 300  # tokens of a caption that sigma reads; alpha reads 120
# PixArt's names -> diffusers', for tensors that stay as they are.
RENAMED = {
    "x_embedder.proj": "pos_embed.proj",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1",
    "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "y_embedder.y_embedding": "caption_projection.y_embedding",
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "csize_embedder.mlp.0": "adaln_single.emb.resolution_embedder.linear_1",
    "csize_embedder.mlp.2": "adaln_single.emb.resolution_embedder.linear_2",
    "ar_embedder.mlp.0": "adaln_single.emb.aspect_ratio_embedder.linear_1",
    "ar_embedder.mlp.2": "adaln_single.emb.aspect_ratio_embedder.linear_2",
    "t_block.1": "adaln_single.linear",
    "final_layer.linear": "proj_out",
    "final_layer.scale_shift_table": "scale_shift_table",
}
IN_BLOCK = {
    "scale_shift_table": "scale_shift_table",
    "attn.proj": "attn1.to_out.0",
    "cross_attn.q_linear": "attn2.to_q",
    "cross_attn.proj": "attn2.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
SPLIT = {
    "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")


def is_original(checkpoint: Checkpoint) -> bool:
    """Return whether a checkpoint has PixArt's own tensor names."""
    # Both names together occur in PixArt's own files only.
    return all(name in checkpoint.tensors for name in PIXART_LAYOUT)


def as_diffusers(checkpoint: Checkpoint, size: LatentSize | None = None, heads: int | None = None) -> Checkpoint:
    """Rename a checkpoint's tensors as in diffusers, and derive the config.json of diffusers' conversion.

    Args:
        size: (H, W) of the latent; needed only if the file has no positions.
        heads: attention heads; None: those of the published sizes (XL/2: 16).

    Raises:
        AtollError: a size cannot be determined.
    """
    # Sizes come from the shapes; the heads come from the published sizes or the caller.
    taker = Taker(checkpoint)
    width, channels, patch, _ = taker.shape("x_embedder.proj.weight", 4)
    depth = taker.count("blocks")
    heads = heads or published_heads(checkpoint, width, depth)
    if width % heads:
        raise AtollError(
            f"{checkpoint.where}: width {width}, heads {heads}: the heads must divide the width; change one"
        )
    side, interpolation = _positions(checkpoint, patch, size)
    config = {
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": channels,
        "out_channels": taker.shape("final_layer.linear.weight", 2)[0] // patch**2,
        "num_layers": depth,
        "cross_attention_dim": width,
        "sample_size": side * patch,
        "patch_size": patch,
        "caption_channels": taker.shape("y_embedder.y_proj.fc1.weight", 2)[1],
        "interpolation_scale": interpolation,
        "use_additional_conditions": "csize_embedder.mlp.0.weight" in checkpoint.tensors,
    }
    return Checkpoint(
        _renamed(checkpoint.tensors), config, checkpoint.files, checkpoint.where, checkpoint.args, checkpoint.key
    )


def _renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors as in diffusers. Unknown ones keep their names, so that the conversion reports them."""
    renamed: dict[str, Tensor] = {}
    for name, value in tensors.items():
        # The positions follow from the config.
        if name == "pos_embed":
            continue
        # blocks.3.attn.qkv.weight: its block, its layer and its end.
        block = _BLOCK.fullmatch(name)
        inner = block[2] if block else name
        stem, end = (inner, "") if inner in RENAMED or inner in IN_BLOCK else inner.rpartition(".")[::2]
        end, table = f".{end}" if end else "", IN_BLOCK if block else RENAMED
        start = f"transformer_blocks.{block[1]}." if block else ""
        # A fused layer's rows are those of its parts, one after the other.
        parts = SPLIT.get(stem, ()) if block else ()
        if parts and len(value) % len(parts) == 0:
            for part, rows in zip(parts, value.chunk(len(parts)), strict=True):
                renamed[f"{start}{part}{end}"] = rows
        elif stem in table:
            renamed[f"{start}{table[stem]}{end}"] = value
        else:
            renamed[name] = value
    return renamed


def _positions(checkpoint: Checkpoint, patch: int, size: LatentSize | None) -> tuple[int, float]:
    """Return the tokens per side of the original positions, and the factor by which their steps are divided."""
    # A file may lack the positions, which are not trained.
    stored = checkpoint.tensors.get("pos_embed")
    if stored is None:
        return _published_positions(checkpoint, patch, size)
    # The first quarter of the width is the sine of the column, at frequency 1 first; the second is its cosine.
    side, quarter = math.isqrt(stored.shape[1]) if stored.ndim == 3 else 0, stored.shape[-1] // 4
    if side < 2 or side**2 != stored.shape[1] or quarter < 1:
        raise AtollError(
            f"{checkpoint.where}: pos_embed has shape {list(stored.shape)}; expected [1, N, D] with N a square"
        )
    # So the angle of the second column is the step between tokens.
    step = torch.atan2(stored[0, 1, 0].double(), stored[0, 1, quarter].double()).item()
    if not 0.05 < step < 3:
        raise AtollError(
            f"{checkpoint.where}: pos_embed's tokens are {step:.3g} apart; expected PixArt's positions, 0.25 to 2 apart"
        )
    # The published scales are 0.5, 1, 2 and 4; half-precision positions are a little off.
    scale, eighth = 1 / step, round(8 / step) / 8
    return side, eighth if abs(eighth - scale) < 2e-3 * scale else scale


def _published_positions(checkpoint: Checkpoint, patch: int, size: LatentSize | None) -> tuple[int, float]:
    """Return what `_positions` does, for a file without positions, from the published networks of that size."""
    if size is None or size[0] != size[1]:
        raise AtollError(
            f"{checkpoint.where}: no pos_embed in it, which tells the latent's size; say it: --size 64 for 512 px"
        )
    # Sigma and alpha scale positions differently below 512 px; the length of the null caption tells them apart.
    caption = checkpoint.tensors.get("y_embedder.y_embedding")
    is_sigma = caption is not None and len(caption) == SIGMA_LENGTH
    latent = size[0]
    return latent // patch, latent / 64 if is_sigma or latent >= 64 else 1.0
