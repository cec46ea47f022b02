"""A linear layer and its activation as one kernel of oneDNN, where that is faster: sampling in bfloat16 on a CPU.

There, an activation alone takes as long as half of the product before it, since it reads and writes everything again.
torch has the fused kernel for its compiler; it has no gradient. It rounds once instead of twice.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

_KERNEL = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
_ARGUMENTS = {"gelu": ("gelu", "tanh"), "silu": ("swish", "")}


def _flops(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    """Those of the product, from the shapes: for torch's `FlopCounterMode`, which does not know the kernel."""
    return 2 * math.prod(x) * weight[0]


if _KERNEL is not None:
    register_flop_formula(_KERNEL)(_flops)


def is_fused(x: Tensor, layer: nn.Module) -> bool:
    """Whether `activated` takes x and the layer's weight, and is faster.

    A layer with a low-rank update, 8-bit weights or a hook is called as a module.
    """
    return (
        _KERNEL is not None
        and type(layer) is nn.Linear
        and not (layer._forward_hooks or layer._forward_pre_hooks)
        and x.dtype == layer.weight.dtype == torch.bfloat16
        and x.device.type == layer.weight.device.type == "cpu"
        and type(layer.weight) is nn.Parameter
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def activated(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Literal["gelu", "silu"]) -> Tensor:
    """Return the activation of x weight^T + bias: [..., D] -> [..., F]. Only where `is_fused`.

    Args:
        weight: [F, D].
        bias: [F]; None for none.
        activation: "gelu" (its tanh form) or "silu".
    """
    assert _KERNEL is not None
    name, algorithm = _ARGUMENTS[activation]
    output: Tensor = _KERNEL(x, weight, bias, name, [], algorithm)
    return output


class GeluMLP(nn.Sequential):
    """linear, GELU (tanh), linear; [B,N,D] -> [B,N,D]."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(nn.Linear(width, hidden), nn.GELU("tanh"), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        first, gelu, last = self
        if isinstance(first, nn.Linear) and is_fused(x, first):
            hidden = activated(x, first.weight, first.bias, "gelu")
        else:
            hidden = gelu(first(x))
        output: Tensor = last(hidden)
        return output
