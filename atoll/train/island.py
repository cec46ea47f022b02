"""The processes that train one part together: one, or as many as torchrun starts on the GPUs of one node.

Each process trains on its rows of every batch, and the gradients are averaged. No communication leaves the island.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from atoll.errors import AtollError
from atoll.train.targets import PROJECTOR

# Process groups that this process has left. Whatever holds the last reference to one, such as DDP's reducer, frees it
# under Python's lock and waits for its threads; one of these may wait for that lock to free the tensors of the last
# reduction. On a busy machine both then wait for ever. Kept here, a group is freed when the process ends.
_LEFT: list[Any] = []


@dataclass(frozen=True)
class Island:
    """One process of an island.

    Attributes:
        rank: the number of this process, 0..world-1.
        world: number of processes.
        device: where this process trains.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes files."""
        return self.rank == 0

    @staticmethod
    @contextmanager
    def join(device: str, threads: int) -> "Iterator[Island]":
        """Join the island that torchrun's environment describes; without one, this process alone is the island.

        Args:
            device: "auto", "cpu" or "cuda".
            threads: of this process on a CPU.

        Raises:
            AtollError: CUDA is requested and there is none, or fewer GPUs than processes.
        """
        # torchrun's variables; `atoll.train.workers` sets the same ones.
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        # One GPU per process, in the order of the local ranks.
        own_device = _device(device, int(os.environ.get("LOCAL_RANK", "0")))
        # Several processes on one machine share its CPU cores.
        torch.set_num_threads(threads)
        if world == 1:
            yield Island(0, 1, own_device)
            return
        # The communication between the processes, NCCL for GPUs.
        if own_device.type == "cuda":
            torch.cuda.set_device(own_device)
        torch.distributed.init_process_group("nccl" if own_device.type == "cuda" else "gloo")
        try:
            yield Island(rank, world, own_device)
            torch.distributed.barrier()  # a process that leaves early closes the connections of the others
        finally:
            _LEFT.append(torch.distributed.group.WORLD)
            torch.distributed.destroy_process_group()

    def local_rows(self, batch: int, parts: int = 1) -> slice:
        """Return the rows of a batch that this process trains on.

        Args:
            batch: rows of the whole batch.
            parts: each process divides its rows into so many equal parts.

        Raises:
            AtollError: the batch cannot be divided evenly among the processes and parts.
        """
        # Equal parts, so that the mean of the means is the batch's mean.
        if batch % (self.world * parts):
            cut = f" in {parts} parts each (train.accumulate)" if parts > 1 else ""
            raise AtollError(
                f"a batch of {batch} cannot be divided among {self.world} processes{cut}; "
                f"choose a multiple of {self.world * parts}"
            )
        # Consecutive rows, in the order of the ranks.
        size = batch // self.world
        return slice(self.rank * size, (self.rank + 1) * size)

    def wrap(self, module: nn.Module, sharding: str) -> nn.Module:
        """Return the module for several processes: "replicate" (DDP) or "shard" (FSDP2, block by block).

        Raises:
            AtollError: a kept network of diffusers cannot be sharded.
        """
        if self.world == 1:
            return module
        if sharding == "replicate":
            # DDP averages the gradients during backward.
            ids = [self.device.index] if self.device.type == "cuda" else None
            # Some parameters may have no gradient in some steps, see `atoll.train.targets`.
            unused = hasattr(module, PROJECTOR)
            return nn.parallel.DistributedDataParallel(module, device_ids=ids, find_unused_parameters=unused)
        from torch.distributed.fsdp import fully_shard

        if not hasattr(module, "blocks"):
            raise AtollError(
                f"train.sharding: shard cuts Atoll's own networks into blocks; a {type(module).__name__} has others: "
                "set train.sharding: replicate"
            )
        # Block by block, so that the whole network is never gathered at once.
        mesh = torch.distributed.device_mesh.init_device_mesh(self.device.type, (self.world,))
        for block in module.blocks:  # type: ignore[union-attr]
            fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh)
        return module

    def accumulating(self, module: nn.Module, last: bool) -> Any:
        """Return a context in which gradients are averaged over the processes only for the last part of a batch."""
        # A single process has nothing to average.
        if self.world == 1:
            return nullcontext()
        if isinstance(module, nn.parallel.DistributedDataParallel):
            return nullcontext() if last else module.no_sync()
        # FSDP2 has a switch instead of a context.
        module.set_requires_gradient_sync(last)  # type: ignore[operator]
        return nullcontext()

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean of `value` over the processes; changes it in place."""
        if self.world > 1:
            torch.distributed.all_reduce(value)
            value /= self.world
        return value

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set in any process."""
        if self.world == 1:
            return flag
        # A flag becomes a number, since collectives work on tensors.
        count = torch.tensor(float(flag), device=self.device)
        torch.distributed.all_reduce(count)
        return bool(count > 0)

    def barrier(self) -> None:
        """Wait until every process has arrived here."""
        if self.world > 1:
            torch.distributed.barrier()


def gather(tensor: Tensor) -> Tensor:
    """Return the full tensor of a sharded one, in every process; other tensors are returned as they are."""
    # Only sharded tensors need communication.
    return tensor.full_tensor() if isinstance(tensor, torch.distributed.tensor.DTensor) else tensor


def gathered_state(module: nn.Module, *, trained_only: bool = False) -> dict[str, Tensor]:
    """Return the module's state on the CPU, gathered one tensor at a time; every process must call this.

    Args:
        module: the network.
        trained_only: leave out buffers, and parameters that are frozen.
    """
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    state = {name: value for name, value in module.state_dict().items() if name in trained or not trained_only}
    return {name: gather(tensor.detach()).cpu() for name, tensor in state.items()}


def _device(requested: str, local_rank: int) -> torch.device:
    # CPU if chosen, or if there is no GPU to choose.
    if requested == "cpu" or (requested == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise AtollError("train.device is cuda, and torch finds no CUDA device here; set it to auto or cpu")
    # Each process needs a GPU for itself.
    if local_rank >= torch.cuda.device_count():
        raise AtollError(f"process {local_rank} has no GPU: there are {torch.cuda.device_count()}; lower --nproc")
    return torch.device("cuda", local_rank)
