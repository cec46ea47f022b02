"""Muon for the matrices of a network's blocks (Jordan 2024; scaled as in Liu et al., arXiv 2502.16982).

The step of a matrix is its momentum with all singular values brought to about 1, by five Newton-Schulz iterations in
bfloat16. Scaled by 0.2 sqrt(max(rows, columns)) it has the root mean square of an AdamW step, so a learning rate that
was found for AdamW serves both. torch.optim.Muon does the same for one matrix after the other. Here

- matrices of one shape are iterated as one batch, which takes less time;
- a layer that computes several things at once (queries, keys and values; gate and up) is as many matrices;
- the matrix of a sharded training is gathered for its step, so that any number of processes takes the same one, up to
  the rounding of its gradient.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from atoll.errors import AtollError
from atoll.nn.lora import A, B

MUON_MOMENTUM = "momentum"  # the name of its only moment in a state
_MOMENTUM = 0.95
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the iteration, by Jordan
_ITERATIONS = 5
_RMS = 0.2  # of an AdamW step, in learning rates
_EPS = 1e-7
# The layers that compute several things at once, by their names in the networks of `atoll.nn`.
_PARTS = {"qkv": 3, "kv": 2, "gate_up": 2}


def matrix_parts(name: str, parameter: Tensor) -> int:
    """Return of how many matrices a parameter of this name consists; 0: it is left to AdamW.

    The matrices of the blocks, without their modulation: embeddings, the first and last layer, vectors and whatever
    turns time and prompt into scales are left to AdamW. So are low-rank updates: only the product of the two counts.
    """
    if name.endswith((A, B)):
        return 0
    *path, layer, kind = ("", "", *name.split("."))
    if "blocks" not in path or "modulation" in path or kind != "weight" or parameter.ndim != 2:
        return 0
    return _PARTS.get(layer, 1)


def muon_matrices(trained: Iterable[tuple[str, nn.Parameter]]) -> dict[nn.Parameter, int]:
    """Return the parameters that Muon steps, each with its number of matrices.

    Raises:
        AtollError: there is none.
    """
    matrices = {p: parts for name, p in trained if (parts := matrix_parts(name, p))}
    if not matrices:
        raise AtollError(
            "train.optimizer muon: no trained parameter is a matrix of a block; it steps those of dit, mmdit and their "
            "routers, and no low-rank updates: set optimizer: adamw (of an update: lora.train.optimizer)"
        )
    return matrices


class Muon(torch.optim.Optimizer):
    """Muon with its momentum allocated, as checkpoints expect.

    Args:
        matrices: parameters [parts * R, C], whole or sharded by rows, each with its number of parts.
        lr: learning rate.
        weight_decay: decoupled, as AdamW's.
    """

    def __init__(self, matrices: Mapping[nn.Parameter, int], lr: float, weight_decay: float):
        self._parts = dict(matrices)
        super().__init__(list(self._parts), {"lr": lr, "weight_decay": weight_decay})
        for parameter in self._parts:
            self.state[parameter] = {MUON_MOMENTUM: torch.zeros_like(parameter)}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move every matrix that has a gradient."""
        (group,) = self.param_groups
        lr, decay = group["lr"], 1 - group["lr"] * group["weight_decay"]
        moved = [p for p in group["params"] if p.grad is not None]

        # Nesterov's momentum, cut into the matrices; by shape, so that each shape is one batch.
        by_shape: dict[tuple[int, ...], list[tuple[nn.Parameter, Tensor]]] = {}
        for p in moved:
            momentum = self.state[p][MUON_MOMENTUM].lerp_(p.grad, 1 - _MOMENTUM)
            update = _whole(p.grad.lerp(momentum, _MOMENTUM))
            parts = update.unflatten(0, (self._parts[p], -1))  # [P,R,C]
            by_shape.setdefault(tuple(parts.shape[1:]), []).append((p, parts))

        # One step for each matrix.
        for (rows, columns), group_parts in by_shape.items():
            steps = orthogonalised(torch.cat([parts for _, parts in group_parts]))  # [N,R,C]
            sizes = [len(parts) for _, parts in group_parts]
            for (p, _), own in zip(group_parts, steps.split(sizes), strict=True):
                step = own.flatten(0, 1).to(p.dtype)
                scale = -lr * _RMS * max(rows, columns) ** 0.5
                p.mul_(decay).add_(_own_rows(p, step), alpha=scale)


def orthogonalised(matrices: Tensor) -> Tensor:
    """Return U V^T of each matrix U S V^T [N,R,C], roughly: singular values from 0.7 to 1.2; in bfloat16."""
    a, b, c = _COEFFICIENTS
    x = matrices.bfloat16()
    # The smaller side first: its Gram matrix is the smaller one.
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    # No singular value above 1.
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=_EPS)
    for _ in range(_ITERATIONS):
        gram = x @ x.mT  # [N,R,R]
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _whole(x: Tensor) -> Tensor:
    """Return a tensor with all of its rows, gathered from all processes if it is sharded."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def _own_rows(like: Tensor, x: Tensor) -> Tensor:
    """Return this process's rows of a whole tensor that all processes have, if `like` is sharded."""
    if not isinstance(like, DTensor):
        return x
    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)
