"""The bounds on the clusters' weights, and that nothing within them is cheaper."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.cluster.balance import LARGEST, SMALLEST, balanced, transport


def test_transport_is_the_cheapest_within_the_bounds() -> None:
    """Against all assignments: whole weights of one, so the linear program's answer is whole."""
    g = torch.Generator().manual_seed(3)
    for _ in range(5):
        distances = torch.rand(7, 3, generator=g, dtype=torch.float64)
        weights = torch.ones(7, dtype=torch.float64)
        found = transport(distances, weights, 2, 3)
        cost = {
            choice: sum(float(distances[i, c]) for i, c in enumerate(choice))
            for choice in itertools.product(range(3), repeat=7)
            if all(2 <= choice.count(c) <= 3 for c in range(3))
        }
        assert cost[tuple(found.tolist())] == pytest.approx(min(cost.values()))


def test_transport_puts_points_that_the_program_splits_where_there_is_room() -> None:
    """All want the first label, then the second; five points of weight 2 do not fit as halves."""
    distances = torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64).expand(5, 3)
    found = transport(distances, torch.full((5,), 2.0, dtype=torch.float64), 0, 5)
    assert found.bincount(minlength=3).tolist() == [2, 2, 1]


def test_balance_goes_on_until_nothing_changes() -> None:
    points = torch.rand(90, 3, generator=torch.Generator().manual_seed(1))
    weights = torch.ones(90, dtype=torch.float64)
    found = balanced(points, weights, torch.arange(90) % 3, 3)
    means = torch.stack([points[found == c].mean(0) for c in range(3)]).double()
    again = transport(torch.cdist(points.double(), means).square(), weights, SMALLEST * 30, LARGEST * 30)
    assert torch.equal(found, again)


@given(st.data())
@settings(max_examples=15)
def test_balance_holds_where_no_point_weighs_a_quarter_of_the_mean(data) -> None:
    k = data.draw(st.integers(1, 4))
    weights = data.draw(st.lists(st.integers(1, 9), min_size=40 * k, max_size=60 * k))
    weights = torch.tensor(weights, dtype=torch.float64)
    points = torch.randn(len(weights), 3, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 9))))
    found = balanced(points, weights, torch.zeros(len(weights), dtype=torch.int64), k)
    assert float(found.bincount(weights, minlength=k).max()) <= LARGEST * float(weights.sum()) / k
