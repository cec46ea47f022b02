"""The cost of drawing an image: floating-point operations, counted during the real sampling call."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from atoll.errors import AtollError


@dataclass(frozen=True)
class SamplingCost:
    """Floating-point operations of one image.

    Attributes:
        by_operator: operations by torch operator, largest first; they sum to `flops`.
    """

    flops: float
    by_operator: Mapping[str, float]

    @property
    def gflops(self) -> float:
        return self.flops / 1e9


def count_flops(draw: Callable[[], object], images: int) -> SamplingCost:
    """Run `draw`, which draws `images` images, once and count its operations per image.

    Counts matrix products, convolutions and attention (both products, masked parts included) by torch's formulas, a
    multiply-add as 2: FLOPs, not MACs. Ignores cheap operations: normalisation, softmax, activations, sums. Everything
    that `draw` calls counts: all experts evaluated, the router, both branches of guidance, encoder and codec.

    Only the calling thread is observed, and no compiled module: draw eagerly, and without `side_by_side`.

    Raises:
        AtollError: nothing was counted.
        ValueError: fewer than one image.
    """
    if images < 1:
        raise ValueError(f"the cost of {images} images; expected at least 1")
    with FlopCounterMode(display=False, custom_mapping=_unknown_to_torch()) as counter:
        draw()
    # Zero means that the counter saw nothing, not that it was free.
    total = counter.get_total_flops()
    if total == 0:
        raise AtollError(
            "no operations were counted: the images were drawn in another thread, or by a compiled network; draw "
            "them eagerly in the calling thread"
        )
    # "Global" sums over all modules.
    counts = counter.get_flop_counts()["Global"]
    shares = sorted(((str(operator), count / images) for operator, count in counts.items()), key=lambda x: -x[1])
    return SamplingCost(total / images, dict(shares))


def _unknown_to_torch() -> dict[Any, Any]:
    """Formulas for operators that torch does not count: the fused attention of CPUs in torch 2.13."""
    packet = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    return {} if packet is None else {packet: _attention_flops}


def _attention_flops(q: Any, k: Any, v: Any, *_: object, out_shape: Any = None, **__: object) -> int:
    value: int = sdpa_flop_count(q, k, v)
    return value
