"""Balance: the bounds on the clusters' weights hold, and no assignment within them is cheaper."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.cluster.balance import LARGEST, SMALLEST, balanced, most_images, transport
from atoll.errors import AtollError


def test_transport_is_the_cheapest_within_the_bounds() -> None:
    """Compared with all assignments; with weights of one the linear program splits no point."""
    g = torch.Generator().manual_seed(3)
    for _ in range(5):
        distances = torch.rand(7, 3, generator=g, dtype=torch.float64)
        weights = torch.ones(7, dtype=torch.float64)
        labels = transport(distances, weights, 2, 3)
        cost = {
            choice: sum(float(distances[i, c]) for i, c in enumerate(choice))
            for choice in itertools.product(range(3), repeat=7)
            if all(2 <= choice.count(c) <= 3 for c in range(3))
        }
        assert cost[tuple(labels.tolist())] == pytest.approx(min(cost.values()))


def test_transport_assigns_split_points_where_there_is_room() -> None:
    """All prefer the first label, then the second; five points of weight 2 do not fit as halves."""
    distances = torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64).expand(5, 3)
    labels = transport(distances, torch.full((5,), 2.0, dtype=torch.float64), 0, 5)
    assert labels.bincount(minlength=3).tolist() == [2, 2, 1]


def test_balance_repeats_until_nothing_changes() -> None:
    points = torch.rand(90, 3, generator=torch.Generator().manual_seed(1))
    weights = torch.ones(90, dtype=torch.float64)
    labels = balanced(points, weights, torch.arange(90) % 3, 3)
    means = torch.stack([points[labels == c].mean(0) for c in range(3)]).double()
    again = transport(torch.cdist(points.double(), means).square(), weights, SMALLEST * 30, LARGEST * 30)
    assert torch.equal(labels, again)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 8])
def test_few_images_are_spread_as_evenly_as_they_can_be(k) -> None:
    for count in range(k, 4 * k + 3):
        points = torch.randn(count, 6, generator=torch.Generator().manual_seed(count))
        labels = balanced(points, torch.ones(count, dtype=torch.float64), torch.arange(count) % k, k)
        sizes = labels.bincount(minlength=k)
        assert sizes.max() <= max(math.ceil(count / k), LARGEST * count / k)
        assert sizes.min() >= 1


@given(st.data())
@settings(max_examples=25)
def test_any_few_images_are_spread_within_the_bounds(data) -> None:
    k = data.draw(st.integers(1, 9))
    count = data.draw(st.integers(k, 60))
    distances = data.draw(st.integers(0, 2**31))
    points = torch.randn(count, 2, generator=torch.Generator().manual_seed(distances)).round()  # some are equal
    labels = balanced(points, torch.ones(count, dtype=torch.float64), torch.zeros(count, dtype=torch.int64), k)
    assert labels.bincount(minlength=k).max() <= most_images(count, k)


@given(st.data())
@settings(max_examples=40)
def test_a_balance_is_found_where_there_is_one(data) -> None:
    """Against all assignments of a few points of whole weights, which stand for equal images."""
    k = data.draw(st.integers(2, 3))
    weights = torch.tensor(data.draw(st.lists(st.integers(1, 6), min_size=k, max_size=7)), dtype=torch.float64)
    points = torch.randn(len(weights), 2, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    most = most_images(float(weights.sum()), k)
    largest = (
        torch.tensor(choice).bincount(weights, minlength=k).max()
        for choice in itertools.product(range(k), repeat=len(weights))
    )
    if min(largest) <= most:
        labels = balanced(points, weights, torch.arange(len(weights)) % k, k)
        assert labels.bincount(weights, minlength=k).max() <= most
        assert labels.bincount(minlength=k).min() >= 1
    else:
        with pytest.raises(AtollError, match="no balance"):
            balanced(points, weights, torch.arange(len(weights)) % k, k)


def test_equal_features_are_told_and_the_advice_helps() -> None:
    """12 of 20 images are equal: no number of fine centroids tells them apart."""
    points = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([12.0] + [1.0] * 8, dtype=torch.float64)
    labels = torch.arange(9) % 4
    with pytest.raises(
        AtollError, match=r"12 of the 20 training images have the same feature.*clusters\.k up to 2, or"
    ):
        balanced(points, weights, labels, 4, distinct=True)
    assert balanced(points, weights, labels % 2, 2, distinct=True).bincount(weights).max() <= most_images(20, 2)
    with pytest.raises(AtollError, match=r"one fine centroid has 12; raise clusters\.fine"):
        balanced(points, weights, labels, 4)
    weights[0] = 40
    with pytest.raises(AtollError) as raised:
        balanced(points, weights, labels, 4, distinct=True)
    assert "clusters.k" not in str(raised.value)  # one cluster would be the only balance


@given(st.data())
@settings(max_examples=15)
def test_balance_holds_where_no_point_weighs_a_quarter_of_the_mean(data) -> None:
    k = data.draw(st.integers(1, 4))
    weights = data.draw(st.lists(st.integers(1, 9), min_size=40 * k, max_size=60 * k))
    weights = torch.tensor(weights, dtype=torch.float64)
    points = torch.randn(len(weights), 3, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 9))))
    labels = balanced(points, weights, torch.zeros(len(weights), dtype=torch.int64), k)
    assert float(labels.bincount(weights, minlength=k).max()) <= LARGEST * float(weights.sum()) / k
