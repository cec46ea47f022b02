"""Experts compiled for sampling, with batches of a few sizes only.

Routing gives an expert a different number of rows at every step. Compiled for fixed shapes, each number would need its
own graph. Batches are therefore padded to the next of 1, 2, 3, 4, 6, 8, 12, 16, 24, ...: by less than half of their
rows, and to 14 sizes up to 128. The blocks of one network share their graphs, and so do experts of one architecture.
"""

from typing import Any

import torch
from torch import Tensor, nn

from atoll.ensemble.offload import Offloaded
from atoll.ensemble.prompt_cache import CachesPrompt, NetworkCondition
from atoll.errors import AtollError
from atoll.nn.attention import TextKV

_GRAPHS = 64  # per block: batch sizes, times the architectures in an ensemble


def padded_size(rows: int) -> int:
    """Return the smallest 2^k or 3 * 2^k that is at least `rows` (which is at least 1)."""
    # The power of two at or above `rows`, or three quarters of it if that suffices.
    power = 1 << (rows - 1).bit_length()
    return 3 * power // 4 if power >= 4 and 3 * power // 4 >= rows else power


class Padded:
    """A network that is always called with a batch of some `padded_size`; the added rows are copies of the first."""

    def __init__(self, network: nn.Module):
        self.network = network

    def __call__(self, x: Tensor, time: Tensor, condition: NetworkCondition | None) -> Tensor:
        count = len(x)
        # A batch of a known size needs no padding.
        extra = padded_size(count) - count
        if extra == 0:
            output: Tensor = self.network(x, time, condition)
            return output
        # Copies of the first row: any valid input does, and its output is cut off.
        rows = torch.cat([torch.arange(count), torch.zeros(extra, dtype=torch.long)]).to(x.device)
        filled: Tensor = self.network(x[rows], time[rows], None if condition is None else condition.index(rows))[:count]
        return filled


class PaddedReader(Padded):
    """A padded network with `read_prompt`."""

    def __call__(self, x: Tensor, time: Tensor, condition: NetworkCondition | None) -> Tensor:
        # A block cache decides by values how many rows the other blocks get: no fixed shape.
        if isinstance(condition, TextKV) and condition.cache is not None:
            raise AtollError("compiled experts evaluate all blocks; leave block_cache at 0, or do not compile")
        return super().__call__(x, time, condition)

    def read_prompt(self, condition: Any) -> Any:
        """Return the network's own `read_prompt(condition)`, which is not compiled."""
        # The text's keys and values are computed once per prompt, so compiling them gains nothing.
        assert isinstance(self.network, CachesPrompt)
        return self.network.read_prompt(condition)


def compile_network(network: object, **options: Any) -> Padded:
    """Compile a network by `compile_blocks` and pad its batches.

    Args:
        network: a `torch.nn.Module`; one that is compiled already is returned as it is.
        options: for torch.compile: backend, mode.

    Raises:
        AtollError: a network within a memory budget, which is loaded anew each time; or a callable that is no module.
    """
    # Compiling twice would pad twice.
    if isinstance(network, Padded):
        return network
    if isinstance(network, Offloaded):
        raise AtollError("experts within a memory budget cannot be compiled; load them without one")
    if not isinstance(network, nn.Module):
        raise AtollError(f"{type(network).__name__} cannot be compiled; expected a torch.nn.Module")
    # Only the blocks are compiled: the rest of the network is small.
    compile_blocks(network, **options)
    return (PaddedReader if isinstance(network, CachesPrompt) else Padded)(network)


def compile_blocks(network: nn.Module, **options: Any) -> None:
    """Compile the network's blocks for fixed shapes, in place; the whole network if it has no blocks.

    Args:
        network: a `torch.nn.Module`.
        options: for torch.compile: backend, mode.
    """
    # Each size is a graph; beyond its limit torch would continue uncompiled.
    torch._dynamo.config.recompile_limit = max(_GRAPHS, torch._dynamo.config.recompile_limit)
    # The first list of modules is the stack of blocks.
    blocks = next((module for module in network.modules() if isinstance(module, nn.ModuleList)), None)
    for part in blocks if blocks else [network]:
        part.compile(dynamic=False, **options)
