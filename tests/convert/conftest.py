"""A DiT of random weights in the layout of facebookresearch/DiT: width 24, 3 blocks, 4 heads, 2 channels, 6 classes."""

import pytest
import torch
from torch import Tensor

WIDTH, DEPTH, HEADS, CHANNELS, PATCH, SIDE, CLASSES = 24, 3, 4, 2, 2, 8, 6


def shapes(
    width: int = WIDTH, depth: int = DEPTH, channels: int = CHANNELS, tokens: int = (SIDE // PATCH) ** 2, ratio: int = 3
) -> dict[str, tuple[int, ...]]:
    def linear(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}

    found: dict[str, tuple[int, ...]] = {
        "x_embedder.proj.weight": (width, channels, PATCH, PATCH),
        "x_embedder.proj.bias": (width,),
        "pos_embed": (1, tokens, width),
        "y_embedder.embedding_table.weight": (CLASSES + 1, width),
        **linear("t_embedder.mlp.0", width, 256),
        **linear("t_embedder.mlp.2", width, width),
        **linear("final_layer.adaLN_modulation.1", 2 * width, width),
        **linear("final_layer.linear", 2 * channels * PATCH**2, width),
    }
    for i in range(depth):
        found |= linear(f"blocks.{i}.adaLN_modulation.1", 6 * width, width)
        found |= linear(f"blocks.{i}.attn.qkv", 3 * width, width)
        found |= linear(f"blocks.{i}.attn.proj", width, width)
        found |= linear(f"blocks.{i}.mlp.fc1", ratio * width, width)
        found |= linear(f"blocks.{i}.mlp.fc2", width, ratio * width)
    return found


def random_weights(**sizes: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {name: 0.3 * torch.randn(shape, generator=g) for name, shape in shapes(**sizes).items()}


@pytest.fixture
def dit() -> dict[str, Tensor]:
    return random_weights()


@pytest.fixture
def dit_of_the_run() -> dict[str, Tensor]:
    """As wide and deep as the tiny run's network, for its latents of 1 x 4 x 8: eight tokens of 2 x 2."""
    return random_weights(width=16, depth=1, channels=1, tokens=8, ratio=4)
