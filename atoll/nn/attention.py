"""Self-attention of image tokens, cross-attention to text tokens, and cached text keys and values.

Letters as in `atoll.nn.dit`: B batch, N image tokens, L text tokens, D width, h heads, d = D / h.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atoll.nn.block_cache import BlockCache

CACHED_SCORES = 2**20  # scores of attention that fit the cache of one core, 2 MiB in bfloat16


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v in every head; q [B,N,D], k and v [B,M,D], bias [B,1,1,M] -> [B,N,D].

    Uses torch's fused kernel, except in bfloat16 on a CPU: there, plain products are 1.5 times faster forward, and
    2 (at 256 tokens) to 8 times faster (at 16) forward and backward. Measured with AVX512-BF16, torch 2.13.
    """
    # Split the width into heads.
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # [B,h,N or M,d]
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        x = attention_by_products(q, k, v, bias)  # [B,h,N,d]
    else:
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # [B,h,N,d]
    return x.transpose(1, 2).flatten(2)  # [B,N,D]


def attention_by_products(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """The same for q [B,h,N,d], k and v [B,h,M,d] -> [B,h,N,d], by two batched matrix products."""
    # bmm wants one batch dimension: heads join it.
    B, h, _, d = q.shape
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)  # [B*h,N or M,d]
    # The scale goes into q, or into the fused product with the bias: no extra pass over the scores.
    if bias is None:
        scores = torch.bmm(q * d**-0.5, k.transpose(1, 2))  # [B*h,N,M]
    else:
        bias = bias.expand(B, h, 1, -1).flatten(0, 1)  # [B*h,1,M]
        scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=d**-0.5)  # [B*h,N,M]
    # torch's softmax of short rows is 2 to 4 times slower in bfloat16 than in float32; of long rows it is faster.
    weights = scores.softmax(-1, dtype=torch.float32 if k.shape[1] < 128 else None)  # [B*h,N,M]
    return torch.bmm(weights.to(v.dtype), v).unflatten(0, (B, h))  # [B,h,N,d]


def head_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention of heads that are split already: q [B,h,N,d], k and v [B,h,M,d] -> [B,N,D].

    Chooses between kernels as `attention` does; the products take some heads at a time, whose scores stay in the
    processor's cache (1.4 times faster at 256 tokens).

    Args:
        bias: [B,1,1,M], -inf where masked, or None.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        B, h, N, _ = q.shape
        count = max(1, CACHED_SCORES // (N * k.shape[2]))  # heads at a time
        inputs = [x.flatten(0, 1).split(count) for x in (q, k, v)]  # [count,N or M,d] each
        if bias is not None:
            inputs.append(bias.expand(B, h, 1, -1).flatten(0, 1).split(count))  # [count,1,M] each
        parts = []
        for part in zip(*inputs, strict=True):
            q, k, v, *biases = (x[None] for x in part)  # [1,count,N or M,d] each, [1,count,1,M]
            parts.append(attention_by_products(q, k, v, biases[0] if biases else None))  # [1,count,N,d]
        x = torch.cat(parts, dim=1).unflatten(1, (B, h)).squeeze(0)  # [B,h,N,d]
    else:
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # [B,h,N,d]
    return x.transpose(1, 2).flatten(2)  # [B,N,D]


class SelfAttention(nn.Module):
    """Attention of the image tokens to each other; [B,N,D] -> [B,N,D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        # One product for all three projections.
        q, k, v = self.qkv(x).chunk(3, dim=2)  # [B,N,D] each
        return self.out(attention(q, k, v, self.heads))  # [B,N,D]


class CrossAttention(nn.Module):
    """Attention of the image tokens to the text tokens; [B,N,D] and [B,L,2D] -> [B,N,D].

    `forward` takes the keys and values, `kv(states [B,L,D])`, ready-made: they depend on the text alone and can be
    computed once for all steps.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, keys_values: Tensor, bias: Tensor | None = None) -> Tensor:
        # The text side is ready-made; only the query depends on the image tokens.
        k, v = keys_values.chunk(2, dim=2)  # [B,L,D] each
        return self.out(attention(self.q(x), k, v, self.heads, bias))  # [B,N,D]


# (block, x [b,N,D], the batch's rows that these are, bias, keys and values [b,L,2D]) -> [b,N,D]
AskBlock = Callable[[Any, Tensor, Tensor | slice, Tensor | None, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class TextKV:
    """The text keys and values of all cross-attentions of one network: independent of time and latent.

    Attributes:
        keys_values: [B,depth,L,2D].
        bias: [B,1,1,L], -inf where masked; None if no token is masked.
        pooled: [B,P] or None.
        cache: the first-block cache; None runs all blocks.
        keys: for the cache, which sample and guidance branch each row is.
    """

    keys_values: Tensor
    bias: Tensor | None
    pooled: Tensor | None
    cache: BlockCache | None = None
    keys: tuple[Hashable, ...] = ()

    def __len__(self) -> int:
        return len(self.keys_values)

    @property
    def nbytes(self) -> int:
        return self.keys_values.nbytes

    def index(self, rows: Tensor) -> "TextKV":
        """The given rows ([b] int64), in their order; without the cache."""
        bias, pooled = (None if part is None else part[rows] for part in (self.bias, self.pooled))
        return TextKV(self.keys_values[rows], bias, pooled)

    def through(self, blocks: Iterable[nn.Module], tokens: Tensor, ask: AskBlock) -> Tensor:
        """Run the tokens [B,N,D] through all blocks, or only through those that the cache does not skip."""
        first, *others = zip(blocks, self.keys_values.unbind(1), strict=True)  # each block with its [B,L,2D]

        def through(parts: Sequence[tuple[nn.Module, Tensor]], x: Tensor, rows: Tensor | slice) -> Tensor:
            bias = None if self.bias is None else self.bias[rows]  # [b,1,1,L]
            for block, keys_values in parts:
                x = ask(block, x, rows, bias, keys_values[rows])  # [b,N,D]
            return x

        # The first block always runs: its residual decides whether the cache skips the others.
        once = through([first], tokens, slice(None))
        if self.cache is None:
            return through(others, once, slice(None))
        return self.cache.through(self.keys, tokens, once, lambda rows, x: through(others, x, rows))

    @staticmethod
    def cat(prompts: "Sequence[TextKV]") -> "TextKV":
        """Join along the batch. All must come from one network; the cache is not carried over."""
        # Unmasked prompts have no bias; those of one network either all have a pooled vector or none.
        biases = [prompt.bias for prompt in prompts if prompt.bias is not None]
        pooled = [prompt.pooled for prompt in prompts if prompt.pooled is not None]
        return TextKV(
            torch.cat([prompt.keys_values for prompt in prompts]),
            torch.cat(biases) if biases else None,
            torch.cat(pooled) if pooled else None,
        )


def read_states(network: nn.Module, states: Tensor, bias: Tensor | None = None, pooled: Tensor | None = None) -> TextKV:
    """Compute the keys and values of `states` [B,L,D] for all cross-attentions of `network`, in block order."""
    keys_values = [module.kv(states) for module in network.modules() if isinstance(module, CrossAttention)]
    return TextKV(torch.stack(keys_values, dim=1), bias, pooled)
