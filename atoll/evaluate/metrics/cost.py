"""What an image costs to draw, counted while it is drawn: floating-point operations of the real sampling call."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from atoll.errors import AtollError


@dataclass(frozen=True)
class SamplingCost:
    """Floating-point operations of one image.

    by_operator: torch's operator -> its share of `flops`, largest first.
    """

    flops: float
    by_operator: Mapping[str, float]

    @property
    def gflops(self) -> float:
        return self.flops / 1e9


def count_flops(draw: Callable[[], object], images: int) -> SamplingCost:
    """Runs `draw`, which draws `images` images, once and counts its operations, per image.

    Counted, by torch's formulas, are matrix products, convolutions and attention (its two products, in full where a
    mask hides part of them), a multiply-add as 2: as papers that call them FLOPs and not MACs. Not counted is what is
    cheap beside them: normalisation, softmax, activations, sums. All that `draw` calls counts: every expert asked, the
    router, both branches of guidance, and encoder and codec where it runs them.

    Only the calling thread is seen, and no compiled module: draw eagerly, and without `side_by_side`.

    Raises:
        AtollError: nothing was counted.
        ValueError: fewer than one image.
    """
    if images < 1:
        raise ValueError(f"the cost of {images} images; expected at least 1")
    with FlopCounterMode(display=False, custom_mapping=_unknown_to_torch()) as counter:
        draw()
    total = counter.get_total_flops()
    if total == 0:
        raise AtollError(
            "no operations were counted: the images were drawn in another thread, or by a compiled network; draw "
            "them eagerly in the calling thread"
        )
    counts = counter.get_flop_counts()["Global"]
    shares = sorted(((str(operator), count / images) for operator, count in counts.items()), key=lambda x: -x[1])
    return SamplingCost(total / images, dict(shares))


def _unknown_to_torch() -> dict[Any, Any]:
    """Fused attention of CPUs, which torch 2.13 counts as nothing."""
    packet = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
    return {} if packet is None else {packet: _attention_flops}


def _attention_flops(q: Any, k: Any, v: Any, *_: object, out_shape: Any = None, **__: object) -> int:
    return sdpa_flop_count(q, k, v)
