"""Position of a value among increasing nodes, the common part of every interpolation over a table."""

import torch
from torch import Tensor


def bracket(nodes: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Locate x between two neighbouring nodes; beyond the first and the last node, x counts as that node.

    Linear interpolation of `values` is then `values[left] + offset * (values[left + 1] - values[left])`.

    Args:
        nodes: [M], at least two, strictly increasing.
        x: any shape, of the dtype and on the device of `nodes`.

    Returns:
        (left, offset), both shaped like x: the index int64 in 0..M-2 of the node at or below x, and the position in
        [0, 1] between that node and the next.
    """
    # Beyond the ends the value of the end counts, so nothing is extrapolated.
    inside = x.clamp(nodes[0], nodes[-1])
    # The last node belongs to the last interval, at offset 1; contiguous, else searchsorted copies with a warning.
    left = (torch.searchsorted(nodes, inside.contiguous(), right=True) - 1).clamp(0, len(nodes) - 2)
    # The position between the neighbours, in [0, 1].
    return left, (inside - nodes[left]) / (nodes[left + 1] - nodes[left])
