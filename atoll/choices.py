"""What several parts share, written once: what a user may choose, sizes of layers. Without torch: plans stay light."""

from typing import Literal

Checkpointing = Literal["none", "selective", "full"]  # which activations the backward pass computes again
Method = Literal["euler", "heun", "midpoint", "dpm++2m", "unipc"]  # of the sampler

MLP_RATIOS = {"dit": 4.0, "mmdit": 10 / 3}  # with these defaults, blocks of one width have equal FLOPs


def hidden_width(width: int, ratio: float) -> int:
    """Return F, the hidden width of an MMDiT's MLP: width * ratio, rounded to a multiple of 8."""
    return max(8, 8 * round(width * ratio / 8))
