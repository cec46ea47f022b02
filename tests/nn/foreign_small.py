"""Small random networks of diffusers' classes, and conditions that fit them."""

from typing import Any

import torch
from torch import nn

from atoll.condition import Condition
from atoll.nn import Foreign, build_network

TEXT, POOLED = 10, 6  # widths of text states and pooled vectors
SMALL: dict[str, dict[str, Any]] = {
    "PRXTransformer2DModel": {
        "in_channels": 4,
        "context_in_dim": TEXT,
        "hidden_size": 16,
        "num_heads": 2,
        "depth": 2,
        "axes_dim": [4, 4],
        "mlp_ratio": 2.0,
    },
    "SD3Transformer2DModel": {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT,
        "caption_projection_dim": 16,
        "pooled_projection_dim": POOLED,
        "pos_embed_max_size": 12,
        "dual_attention_layers": [0],
        "qk_norm": "rms_norm",
    },
    "SanaTransformer2DModel": {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": TEXT,
        "sample_size": 8,
    },
    "Lumina2Transformer2DModel": {
        "sample_size": 8,
        "in_channels": 4,
        "hidden_size": 24,
        "num_layers": 2,
        "num_refiner_layers": 1,
        "num_attention_heads": 2,
        "num_kv_heads": 1,
        "multiple_of": 4,
        "axes_dim_rope": [4, 4, 4],
        "axes_lens": [20, 16, 16],
        "cap_feat_dim": TEXT,
    },
    "FluxTransformer2DModel": {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 12,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT,
        "pooled_projection_dim": POOLED,
        "axes_dims_rope": [4, 4, 4],
        "guidance_embeds": True,
    },
    "Flux2Transformer2DModel": {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT,
        "axes_dims_rope": [4, 4, 4, 4],
        "guidance_embeds": True,
    },
}
GUIDANCE = 3.5
TIME_SCALES = dict.fromkeys(SMALL, 1.0) | {"SD3Transformer2DModel": 1000.0, "SanaTransformer2DModel": 1000.0}
MASKED = ("PRXTransformer2DModel", "SanaTransformer2DModel", "Lumina2Transformer2DModel")
UNMASKED = tuple(cls for cls in SMALL if cls not in MASKED)


def card_entry(cls: str, **changes: Any) -> dict[str, Any]:
    """The card's entry of a small network."""
    config = SMALL[cls] | changes
    size = {} if "sample_size" in config else {"size": [8, 8]}
    guidance = {"guidance": GUIDANCE} if config.get("guidance_embeds") else {}
    return {"name": "diffusers", "class": cls, "config": config, **size, **guidance}


def small(cls: str, **changes: Any) -> Foreign:
    network = build_network(card_entry(cls, **changes))
    assert isinstance(network, Foreign)
    torch.manual_seed(0)
    for parameter in network.parameters():  # fresh ones hold zeros, which would hide what is computed
        nn.init.normal_(parameter, std=0.3)
    return network.eval().requires_grad_(False)


def condition_for(network: Foreign, rows: int = 3, length: int = 5, seed: int = 1) -> Condition:
    """Random text, a token more in every row for the classes that mask; all tokens for the others."""
    g = torch.Generator().manual_seed(seed)
    states = torch.randn(rows, length, network.condition_width, generator=g)
    mask = torch.ones(rows, length, dtype=torch.bool)
    if network.config.cls in MASKED:
        mask = torch.arange(length) < torch.arange(2, rows + 2)[:, None]
    width = network.pooled_width
    return Condition(states, mask, None if width is None else torch.randn(rows, width, generator=g))


def latents(network: Foreign, rows: int = 3, height: int = 8, width: int = 12) -> torch.Tensor:
    return torch.randn(rows, network.channels, height, width, generator=torch.Generator().manual_seed(2))
