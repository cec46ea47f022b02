"""The processes that train one part together: one, or as many as torchrun starts on the GPUs of one node.

Each has a share of every batch; gradients are averaged. Nothing here reaches beyond the island.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from atoll.errors import AtollError


@dataclass(frozen=True)
class Island:
    """rank: this process, of `world`. device: where its share is trained."""

    rank: int
    world: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process writes what there is to write."""
        return self.rank == 0

    @staticmethod
    @contextmanager
    def join(device: str, threads: int) -> "Iterator[Island]":
        """The island that torchrun's environment describes; this process alone without one.

        device: "auto", "cpu" or "cuda". threads: of this process on a CPU.

        Raises:
            AtollError: CUDA is asked for, or the process's GPU, and is not there.
        """
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        place = _device(device, int(os.environ.get("LOCAL_RANK", "0")))
        torch.set_num_threads(threads)
        if world == 1:
            yield Island(0, 1, place)
            return
        if place.type == "cuda":
            torch.cuda.set_device(place)
        torch.distributed.init_process_group("nccl" if place.type == "cuda" else "gloo")
        try:
            yield Island(rank, world, place)
            torch.distributed.barrier()  # a process that leaves early takes its connections along
        finally:
            torch.distributed.destroy_process_group()

    def share(self, batch: int, parts: int = 1) -> slice:
        """The rows of a batch that are this process's.

        Raises:
            AtollError: they cannot be dealt out evenly, or the share not be cut into so many parts.
        """
        if batch % (self.world * parts):
            cut = f" in {parts} parts each (train.accumulate)" if parts > 1 else ""
            raise AtollError(
                f"a batch of {batch} cannot be shared by {self.world} processes{cut}; "
                f"choose a multiple of {self.world * parts}"
            )
        size = batch // self.world
        return slice(self.rank * size, (self.rank + 1) * size)

    def wrap(self, module: nn.Module, sharding: str) -> nn.Module:
        """The module for several processes: replicated (DDP), or its weights sharded block by block (FSDP2)."""
        if self.world == 1:
            return module
        if sharding == "replicate":
            ids = [self.device.index] if self.device.type == "cuda" else None
            return nn.parallel.DistributedDataParallel(module, device_ids=ids)
        from torch.distributed.fsdp import fully_shard

        mesh = torch.distributed.device_mesh.init_device_mesh(self.device.type, (self.world,))
        for block in module.blocks:  # type: ignore[union-attr]
            fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh)
        return module

    def accumulating(self, module: nn.Module, last: bool) -> Any:
        """A context in which gradients stay in this process, until the last part of a batch."""
        if self.world == 1:
            return nullcontext()
        if isinstance(module, nn.parallel.DistributedDataParallel):
            return nullcontext() if last else module.no_sync()
        module.set_requires_gradient_sync(last)  # type: ignore[operator]
        return nullcontext()

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the processes."""
        if self.world > 1:
            torch.distributed.all_reduce(value)
            value /= self.world
        return value

    def any(self, here: bool) -> bool:
        """Whether it holds in any process."""
        if self.world == 1:
            return here
        found = torch.tensor(float(here), device=self.device)
        torch.distributed.all_reduce(found)
        return bool(found > 0)

    def barrier(self) -> None:
        """For the others."""
        if self.world > 1:
            torch.distributed.barrier()


def gather(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered, in every process; another one as it is."""
    return tensor.full_tensor() if isinstance(tensor, torch.distributed.tensor.DTensor) else tensor


def gathered_state(module: nn.Module) -> dict[str, Tensor]:
    """The module's state on the CPU, gathered one tensor at a time: every process must call this."""
    return {name: gather(tensor.detach()).cpu() for name, tensor in module.state_dict().items()}


def _device(asked: str, local_rank: int) -> torch.device:
    if asked == "cpu" or (asked == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise AtollError("train.device is cuda, and torch finds no CUDA device here; set it to auto or cpu")
    if local_rank >= torch.cuda.device_count():
        raise AtollError(f"process {local_rank} has no GPU: there are {torch.cuda.device_count()}; lower --nproc")
    return torch.device("cuda", local_rank)
