"""SiT's network (arXiv 2401.08740) under our convention of time, exactly.

SiT's path is x = s data + (1 - s) noise, and its network N predicts dx/ds. With t = 1 - s, dx/dt = -N(x, 1 - t). The
network reads time as sinusoids cos(f s), sin(f s) of fixed frequencies f, through a linear layer W = [C | S]. With

    cos(f (1 - t)) = cos f cos(f t) + sin f sin(f t)        sin(f (1 - t)) = sin f cos(f t) - cos f sin(f t)

reversing time is a rotation of each pair of that layer's columns, and the minus sign goes into the last layer.
"""

from dataclasses import replace

import torch
from torch import Tensor

from atoll.convert.native import Native
from atoll.nn.dit import TIME_FEATURES, TIME_PERIOD


def unscaled(native: Native) -> Native:
    """Mark a network as one that reads times in [0, 1], as SiT's and REPA's do. The weights stay the same."""
    return replace(native, time_scale=1.0)


def reversed_time(native: Native, negate: bool) -> Native:
    """Convert a network N(x, t) to N(x, 1 - t) or, with `negate`, -N(x, 1 - t), for times t in [0, 1].

    Args:
        native: the network N.
        negate: True for a velocity; False for a prediction that has no direction in time, such as eps.
    """
    weights = dict(native.weights)
    name = "conditioner.time.0.weight"
    weights[name] = reversed_columns(weights[name], native.config.get("time_period", TIME_PERIOD))
    if negate:
        weights |= {name: -weights[name] for name in ("final.weight", "final.bias")}
    return replace(native, weights=weights, time_scale=1.0)


def reversed_columns(weight: Tensor, period: float) -> Tensor:
    """Convert the weight [D, 256] of a layer that reads time features at 1 - t to one that reads them at t."""
    # In float64, so that the sum of two rotated columns is rounded only once.
    half = TIME_FEATURES // 2
    frequency = period ** -(torch.arange(half, dtype=torch.float64) / half)  # [128]
    cosine, sine = weight.double().split(half, dim=1)  # [D, 128] each
    return torch.cat(
        [cosine * frequency.cos() + sine * frequency.sin(), cosine * frequency.sin() - sine * frequency.cos()], dim=1
    ).to(weight.dtype)
