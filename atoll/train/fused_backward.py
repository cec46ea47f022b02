"""The optimizer's step within the backward pass: a parameter is updated, and its gradient freed, once it is complete.

Gradients of the whole network then never exist at the same time (torch's tutorial "How to save memory by fusing the
optimizer step into the backward pass"; LOMO, arXiv 2306.09782). Each parameter is stepped by an optimizer of its own,
with the operations of the common one, so the weights are the same to the bit. What needs all gradients at once, their
clipping by the norm, or their sum over parts of a batch, is not possible.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class FusedBackward:
    """Steps parameters in the backward pass.

    Args:
        optimizers: of each parameter, its own.
        step: steps one of them.
    """

    def __init__(self, optimizers: Mapping[nn.Parameter, Optimizer], step: Callable[[Optimizer], None]):
        self._optimizers, self._step = optimizers, step
        # In the order of the parameters, so that their norm is summed as without this.
        self._norms: dict[nn.Parameter, Tensor | None] = dict.fromkeys(optimizers)
        for parameter in optimizers:
            parameter.register_post_accumulate_grad_hook(self._complete)

    def _complete(self, parameter: Tensor) -> None:
        """Step a parameter whose gradient is complete, and free the gradient."""
        assert isinstance(parameter, nn.Parameter)
        assert parameter.grad is not None
        self._norms[parameter] = torch.linalg.vector_norm(parameter.grad)
        self._step(self._optimizers[parameter])
        parameter.grad = None

    def norm(self) -> Tensor:
        """Return the norm of all gradients of the last backward pass, and forget it."""
        norms = [norm for norm in self._norms.values() if norm is not None]
        self._norms = dict.fromkeys(self._norms)
        # Gradients of swapped blocks are on the CPU (`atoll.train.block_swap`).
        total: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
        return total
