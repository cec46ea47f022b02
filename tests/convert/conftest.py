"""A DiT of random weights in the layout of facebookresearch/DiT: width 24, 3 blocks, 4 heads, 2 channels, 6 classes."""

import pytest
import torch
from torch import Tensor

WIDTH, DEPTH, HEADS, CHANNELS, PATCH, SIDE, CLASSES = 24, 3, 4, 2, 2, 8, 6


def shapes() -> dict[str, tuple[int, ...]]:
    def linear(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}

    found: dict[str, tuple[int, ...]] = {
        "x_embedder.proj.weight": (WIDTH, CHANNELS, PATCH, PATCH),
        "x_embedder.proj.bias": (WIDTH,),
        "pos_embed": (1, (SIDE // PATCH) ** 2, WIDTH),
        "y_embedder.embedding_table.weight": (CLASSES + 1, WIDTH),
        **linear("t_embedder.mlp.0", WIDTH, 256),
        **linear("t_embedder.mlp.2", WIDTH, WIDTH),
        **linear("final_layer.adaLN_modulation.1", 2 * WIDTH, WIDTH),
        **linear("final_layer.linear", 2 * CHANNELS * PATCH**2, WIDTH),
    }
    for i in range(DEPTH):
        found |= linear(f"blocks.{i}.adaLN_modulation.1", 6 * WIDTH, WIDTH)
        found |= linear(f"blocks.{i}.attn.qkv", 3 * WIDTH, WIDTH)
        found |= linear(f"blocks.{i}.attn.proj", WIDTH, WIDTH)
        found |= linear(f"blocks.{i}.mlp.fc1", 3 * WIDTH, WIDTH)
        found |= linear(f"blocks.{i}.mlp.fc2", WIDTH, 3 * WIDTH)
    return found


@pytest.fixture
def dit() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {name: 0.3 * torch.randn(shape, generator=g) for name, shape in shapes().items()}
