"""What networks check of their inputs, and the dtype in which they compute."""

import math

import torch
from torch import Tensor

from atoll.condition import Condition
from atoll.errors import AtollError
from atoll.nn.attention import TextKV


def compute_dtype(weight: Tensor, x: Tensor) -> torch.dtype:
    """The dtype of matrix products of `weight` with x: autocast's if it is on, else the weight's own."""
    device = x.device.type  # an offloaded weight is on "meta" until its layer is called
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def check_input(x: Tensor, time: Tensor, channels: int, size: tuple[int, int]) -> None:
    """Raise AtollError unless x is [B,channels,*size] and time is [B]."""
    if x.shape[1:] != (channels, *size):
        raise AtollError(
            f"latent: got shape {list(x.shape)}, expected [B, {channels}, {size[0]}, {size[1]}]; "
            "encode with the codec and the size that the network was built for"
        )
    if time.shape != x.shape[:1]:
        raise AtollError(f"time: got shape {list(time.shape)}, expected [{len(x)}]; use time.expand({len(x)})")


def checked_rows(condition: Condition | TextKV | None, rows: int) -> Condition | TextKV:
    """Return the condition. Raises AtollError unless it has so many rows."""
    if condition is None or len(condition) != rows:
        got = "none" if condition is None else f"{len(condition)} rows"
        raise AtollError(f"condition: got {got}, expected {rows} rows; no prompt is encoder.null({rows})")
    return condition


def check_states(condition: Condition, expected: int) -> None:
    """Raise AtollError unless the condition's states are `expected` wide."""
    if (got := condition.states.shape[2]) != expected:
        raise AtollError(
            f"condition states: got {got} wide, expected {expected}; use the encoder that the network was trained with"
        )


def mask_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The attention bias of text tokens: mask [B,L] bool -> [B,1,1,L], 0 at a token and -inf at padding."""
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)  # [B,L]
    return bias.masked_fill_(~mask, -math.inf)[:, None, None]  # [B,1,1,L]
