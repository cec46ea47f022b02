"""Activations that are not kept for the backward pass but computed again in it (gradient checkpointing)."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from atoll.choices import Checkpointing

_aten = torch.ops.aten
# What is dear to compute: selective checkpointing keeps its results, and computes the rest again.
_KEPT = [
    *(_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default),
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_fused_attention_overrideable.default,
]


def recomputed(function: Callable[..., Tensor], kind: Checkpointing, *inputs: Tensor | None) -> Tensor:
    """function(*inputs), its gradients equal to the last bit whatever the kind; it must draw no random numbers.

    kind: "none" keeps all that the backward pass needs; "selective" the results of matrix products and attention,
    computing norms, activations and modulations again; "full" nothing but the inputs, for a second forward pass.
    """
    if kind == "none" or not torch.is_grad_enabled():
        return function(*inputs)
    if kind == "full":
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    contexts = partial(create_selective_checkpoint_contexts, _KEPT)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
