"""Queries and keys of attention: RMS norm of each head and rotary position embedding, as one operation.

Letters: B batch, N tokens, h heads, d width of a head.

torch's `rms_norm` is slow on a CPU, and autograd would save several float32 copies of queries and keys. `normed_heads`
computes |x| by a reduction that is fast everywhere, and its backward pass needs only the result: with y = r x and
r = 1 / sqrt(mean(x^2) + eps), dx = r (dy - y mean(dy * y)), and a rotation R changes no inner product:

    out = R y,    dx = r R^-1 (g - out mean(g * out))    for the gradient g of out
"""

import math
from typing import Any

import torch
from torch import Tensor

NORM_EPS = 1e-6
ROPE_PERIOD = 10000.0  # the longest period is 2 pi times this, in tokens


def grid_positions(rows: int, columns: int, device: torch.device | None = None) -> Tensor:
    """(row, column) of every token of a grid, row by row: [rows*columns,2], float32."""
    row, column = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
    return torch.stack([row, column], dim=2).flatten(0, 1).float()  # [N,2]


def rotations(positions: Tensor, head_width: int) -> Tensor:
    """Axial rotary embedding: the first half of a head's pairs turns by the row, the second by the column.

    Not a buffer: `.to(torch.bfloat16)` would round it.

    Args:
        positions: (row, column) of every token, [N,2] or [B,N,2], whole numbers or not.
        head_width: d, a multiple of 4.

    Returns:
        Cosine and sine for every pair, [1 or B,1,N,d/2,2], float32 at least.
    """
    positions = positions.to(torch.promote_types(positions.dtype, torch.float32))
    count = head_width // 4  # frequencies of an axis
    index = torch.arange(count, device=positions.device, dtype=positions.dtype)  # [d/4]
    angles = positions[..., None] * torch.exp(-math.log(ROPE_PERIOD) * index / count)  # [N,2,d/4] or [B,N,2,d/4]
    angles = angles.flatten(-2)  # [N,d/2] or [B,N,d/2]
    angles = angles if angles.dim() == 3 else angles[None]  # [1 or B,N,d/2]
    return torch.stack([angles.cos(), angles.sin()], dim=-1)[:, None]  # [1 or B,1,N,d/2,2]


def rotate_(x: Tensor, rope: Tensor, inverse: bool = False) -> Tensor:
    """Turn neighbouring pairs of x [B,h,N,d], contiguous, by the angles of `rope` [1 or B,1,N,d/2,2], in place.

    Both have one dtype. Returns the result, which is x unless compiled.
    """
    pairs = x.unflatten(-1, (-1, 2))  # [B,h,N,d/2,2]
    # Compiled code has no complex numbers; uncompiled, they are 8 times faster on a CPU than strided halves.
    if torch.compiler.is_compiling():
        (a, b), (cos, sin) = pairs.unbind(-1), rope.unbind(-1)  # [B,h,N,d/2] each
        sin = -sin if inverse else sin
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)  # [B,h,N,d]
    turn = torch.view_as_complex(rope)  # [1 or B,1,N,d/2]
    torch.view_as_complex(pairs).mul_(turn.conj() if inverse else turn)  # [B,h,N,d/2]
    return x


class NormedHeads(torch.autograd.Function):
    """`normed_heads` with the backward pass of this file's head."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rope: Tensor | None) -> Tensor:
        # float32 at least, and heads before tokens: one copy does both.
        wide = torch.promote_types(x.dtype, torch.float32)
        y = x.transpose(1, 2).contiguous().to(wide, copy=True)  # [B,h,N,d]
        d = y.shape[-1]
        # r = 1 / sqrt(mean(x^2) + eps) by the norm of the head.
        length = torch.linalg.vector_norm(y, dim=-1, keepdim=True)  # [B,h,N,1]
        r = torch.rsqrt(length.square() / d + NORM_EPS)  # [B,h,N,1]
        y.mul_(r)  # [B,h,N,d]; in place: new memory costs more than the product
        out = (y if rope is None else rotate_(y, rope.to(wide))).to(x.dtype)  # [B,h,N,d]
        ctx.save_for_backward(out, r, rope)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        out, r, rope = ctx.saved_tensors
        wide = r.dtype
        g, y = gradient.contiguous().to(wide, copy=True), out.to(wide)  # [B,h,N,d]
        # Remove the part along the normalised vector, then undo the rotation.
        along = torch.linalg.vecdot(g, y)[..., None] / g.shape[-1]  # [B,h,N,1]
        g.addcmul_(y, along, value=-1).mul_(r)  # [B,h,N,d]
        g = g if rope is None else rotate_(g, rope.to(wide), inverse=True)  # [B,h,N,d]
        return g.to(out.dtype).transpose(1, 2), None  # [B,N,h,d]


def normed_heads(x: Tensor, rope: Tensor | None = None) -> Tensor:
    """Divide every head by its root mean square and rotate it, computed in float32 at least.

    Args:
        x: queries or keys, [B,N,h,d].
        rope: from `rotations`; None: no rotation.

    Returns:
        [B,h,N,d], contiguous, in the dtype of x.
    """
    out: Tensor = NormedHeads.apply(x, rope)  # type: ignore[no-untyped-call]
    return out
