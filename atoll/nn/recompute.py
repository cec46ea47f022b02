"""Gradient checkpointing: the backward pass computes activations again instead of storing them."""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from atoll.choices import Checkpointing

_Output = TypeVar("_Output", Tensor, tuple[Tensor, Tensor])
_aten = torch.ops.aten
# Expensive operations: selective checkpointing stores their results and computes everything else again.
_STORED = [
    *(_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default),
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_fused_attention_overrideable.default,
]


def recomputed(function: Callable[..., _Output], kind: Checkpointing, *inputs: Tensor | None) -> _Output:
    """Compute function(*inputs); gradients are bit-identical for every kind.

    Args:
        function: must draw no random numbers, since it may run twice.
        kind: "none" stores all that the backward pass needs; "selective" stores the results of matrix products and
            attention, and computes norms, activations and modulations again; "full" stores the inputs only.
    """
    if kind == "none" or not torch.is_grad_enabled():
        return function(*inputs)
    if kind == "full":
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    contexts = partial(create_selective_checkpoint_contexts, _STORED)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
