"""Positions among nodes: linear inside, the outer nodes beyond them."""

import pytest
import torch

from atoll.interpolation import bracket

NODES = torch.tensor([-2.0, -1.0, 3.0, 3.5], dtype=torch.float64)


def interpolate(values, x):
    left, offset = bracket(NODES, x)
    return values[left] + offset * (values[left + 1] - values[left])


@pytest.mark.parametrize("shape", [(7,), (2, 5), ()])
def test_a_straight_line_is_reproduced_in_any_shape(shape) -> None:
    x = torch.empty(shape, dtype=torch.float64).uniform_(-2, 3.5)
    torch.testing.assert_close(interpolate(3 * NODES - 1, x), 3 * x - 1)


def test_nodes_give_their_values() -> None:
    values = torch.tensor([5.0, -1.0, 0.25, 9.0], dtype=torch.float64)
    assert torch.equal(interpolate(values, NODES), values)


def test_beyond_the_outer_nodes_values_stay_constant() -> None:
    left, offset = bracket(NODES, torch.tensor([-torch.inf, -3.0, 4.0, torch.inf], dtype=torch.float64))
    assert left.tolist() == [0, 0, 2, 2]
    assert offset.tolist() == [0, 0, 1, 1]
