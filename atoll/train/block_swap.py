"""Block swap: weights of some blocks rest in the CPU's memory, and are on the GPU only while their block computes.

    forward     the weights are copied to the GPU, the block computes, the copy is dropped
    backward    the same, as checkpointing computes the block again; each gradient goes to the CPU once it is complete
    step        on the CPU: weights, gradients, moments and average of these blocks stay there

Without checkpointing, autograd would hold the copies from the forward pass on. The copies use the stream of the
computation, which waits for them. On a CPU the same code copies within its memory, so that tests see every move.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class BlockSwap:
    """Places a network on a device, and lets its first blocks visit it.

    Attributes:
        fetched: parameters copied to the device so far.
        returned: gradients copied to the CPU so far.

    Args:
        network: with `blocks`; placed in this call.
        count: of blocks, the first ones, at most; a run's router has fewer than its experts.
        device: that computes.
        parts: micro-batches of a step, whose gradients are summed on the CPU.
    """

    def __init__(self, network: nn.Module, count: int, device: torch.device, parts: int = 1):
        blocks: list[Any] = list(network.blocks)[:count]  # type: ignore[arg-type]
        self.fetched = self.returned = 0
        self._device, self._parts = device, parts
        # Where each parameter rests; a copy from pinned memory does not block the CPU.
        self._homes: dict[Tensor, Tensor] = {}
        for parameter in [p for block in blocks for p in block.parameters()]:
            home = parameter.data.cpu()
            self._homes[parameter] = home.pin_memory() if device.type == "cuda" else home
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._return)
        # Sums of gradients, with the number of parts in them.
        self._sums: dict[Tensor, tuple[Tensor, int]] = {}
        self._place(network)
        for block in blocks:
            block._forward = self._visiting(block)

    def _place(self, network: nn.Module) -> None:
        """Move each parameter to where it rests, and every buffer to the device."""
        for parameter in network.parameters():
            home = self._homes.get(parameter)
            parameter.data = parameter.data.to(self._device) if home is None else home
        for module in network.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self._device)

    def _visiting(self, block: Any) -> Callable[..., Any]:
        """Return the block's computation with its weights on the device."""
        compute = block._forward

        def visiting(*inputs: Tensor | None) -> Any:
            with self._on_device(block):
                return compute(*inputs)

        return visiting

    @contextmanager
    def _on_device(self, block: nn.Module) -> Iterator[None]:
        """Give the block's parameters copies of their values on the device, and then their values at rest again.

        Autograd's records of what is computed within hold the copies until they are used.
        """
        # Autocast would hold its own copies until the end of the step.
        caches = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            for parameter in block.parameters():
                parameter.data = self._fetch(self._homes[parameter])
            yield
        finally:
            # Also where checkpointing stops early, once it has what it needs.
            torch.set_autocast_cache_enabled(caches)
            for parameter in block.parameters():
                parameter.data = self._homes[parameter]

    def _fetch(self, home: Tensor) -> Tensor:
        self.fetched += 1
        return home.to(self._device, copy=True, non_blocking=True)

    def _return(self, parameter: Tensor) -> None:
        """Move a complete gradient to the CPU; with several parts, the sum appears after the last one."""
        assert parameter.grad is not None
        self.returned += 1
        gradient = parameter.grad.to(self._homes[parameter].device)
        if self._parts > 1:
            total, count = self._sums.pop(parameter, (None, 0))
            gradient = gradient if total is None else total.add_(gradient)
            if count + 1 < self._parts:
                self._sums[parameter] = gradient, count + 1
                parameter.grad = None
                return
        parameter.grad = gradient
