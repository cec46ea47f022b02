"""AdamW with 8 bits per moment (torchao), the same for one process, replicas and sharded weights.

A moment is quantised in blocks that share a scale (Dettmers et al., arXiv 2110.02861). torchao cuts the local part of a
tensor into blocks of 256, so that other shards are another quantisation. Here no block crosses a row of the whole
tensor, and the whole tensor's size decides what is quantised at all. FSDP shards by rows, so every block lies in one
shard, and a checkpoint of shards holds the same codes as one of a single process.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from atoll.errors import AtollError

BLOCK = 256  # values that share a scale, at most
SMALLEST_BLOCK = 64  # below it the scales take more room than is worth it
LEAST_VALUES = 4096  # of a tensor whose moments are quantised, as in bitsandbytes and torchao


def block_size(shape: Sequence[int]) -> int | None:
    """Values per block for a tensor of this shape; None: its moments stay in float32.

    The largest divisor of a row's length, up to BLOCK.
    """
    # A vector has no rows to shard by, and small tensors are not worth quantising.
    row = math.prod(shape[1:])
    if len(shape) < 2 or shape[0] * row < LEAST_VALUES:
        return None
    # The largest block that divides a row, so none crosses into the next.
    block = next(size for size in range(min(BLOCK, row), 0, -1) if row % size == 0)
    return block if block >= SMALLEST_BLOCK else None


def adamw_8bit(parameters: list[nn.Parameter], options: dict[str, Any]) -> torch.optim.Optimizer:
    """torchao's AdamW8bit, with moments in the blocks of `block_size`.

    Args:
        parameters: whole, or sharded by rows (DTensor).
        options: AdamW's arguments.

    Raises:
        AtollError: torchao is not installed.
    """
    try:
        from torchao.optim import AdamW8bit
        from torchao.optim.subclass_8bit import OptimState8bit
    except ImportError:
        raise AtollError("train.optimizer_state: 8bit needs torchao: pip install 'atoll[lowbit]'") from None
    # The moments exist from the start, in blocks of ours instead of torchao's.
    optimizer: torch.optim.Optimizer = AdamW8bit(parameters, **options)

    def moment(parameter: Tensor, signed: bool) -> Tensor:
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        # The whole tensor's shape decides. A process may have no row of a short tensor.
        block = block_size(parameter.shape)
        # Small tensors, and shards without rows, keep their moments in float32.
        if block is None or not local.numel():
            value = torch.zeros_like(local)
        else:
            value = OptimState8bit.zeros(local.shape, signed, block, local.device, dtype=local.dtype)
        return _sharded_as(parameter, value, parameter.shape) if isinstance(parameter, DTensor) else value

    # Both moments of each parameter: the first is signed, the second is not.
    with torch.no_grad():
        for p in parameters:
            moments = {"exp_avg": moment(p, signed=True), "exp_avg_sq": moment(p, signed=False)}
            optimizer.state[p] = {"step": torch.tensor(0.0), **moments}
    return optimizer


@contextmanager
def eager_on_cpu(device: torch.device) -> Iterator[None]:
    """Within it torchao's step, which is compiled for each shape of a tensor, runs uncompiled on a CPU.

    Compilation would take minutes there, and brings nothing.
    """
    # Only the CPU's step is uncompiled.
    if device.type != "cpu":
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@torch.no_grad()
def moment_tensors(name: str, value: Tensor) -> dict[str, Tensor]:
    """The tensors that a checkpoint stores for one entry of this optimizer's state, sharing memory with it.

    A quantised moment [R, ...] has NAME#codes [R, ...] uint8, NAME#scale [R, blocks per row] and NAME#qmap [256]: the
    same shapes and values for whole and for sharded weights.
    """
    block = block_size(value.shape)
    # Moments that are not quantised are stored as they are.
    if block is None:
        return {name: value.detach()}
    # This process's codes and scales, one row of scales for each row of codes.
    local: Any = value.to_local() if isinstance(value, DTensor) else value
    per_row = math.prod(value.shape[1:]) // block
    if local.numel():
        codes, scale, qmap = local.codes, local.scale.view(-1, per_row), {f"{name}#qmap": local.qmap}
    else:  # a process without rows of this tensor takes part with empty shards
        codes, scale, qmap = local.to(torch.uint8), local.new_zeros(0, per_row), {}
    # Both are sharded as the moment is.
    if isinstance(value, DTensor):
        codes = _sharded_as(value, codes, value.shape)
        scale = _sharded_as(value, scale, (value.shape[0], per_row))
    return {f"{name}#codes": codes, f"{name}#scale": scale, **qmap}


def _sharded_as(like: DTensor, local: Tensor, shape: Sequence[int]) -> Tensor:
    """The DTensor of `shape`, contiguous, whose rows are sharded as those of `like`; this process's are `local`."""
    # The strides of a contiguous tensor.
    stride = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=torch.Size(shape), stride=tuple(stride)
    )
