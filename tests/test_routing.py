import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atoll.errors import AtollError
from atoll.routing import build_routing


@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 2**31))
def test_top_k_keeps_the_k_largest_and_sums_to_one(clusters, k, seed) -> None:
    log_p = torch.log_softmax(torch.randn(5, clusters, generator=torch.Generator().manual_seed(seed)), 1)
    weights = build_routing(f"top-{k}")(log_p)
    torch.testing.assert_close(weights.sum(1), torch.ones(5))
    assert ((weights > 0).sum(1) == min(k, clusters)).all()
    kept = torch.where(weights > 0, log_p.exp(), 0)
    torch.testing.assert_close(weights, kept / kept.sum(1, keepdim=True))
    assert (kept.amax(1) == log_p.exp().amax(1)).all()


def test_full_is_the_routers_own_probability() -> None:
    log_p = torch.log_softmax(torch.randn(5, 4), 1)
    torch.testing.assert_close(build_routing("full")(log_p), log_p.exp())


def test_a_cluster_without_expert_keeps_weight_zero() -> None:
    log_p = torch.tensor([[0.0, -torch.inf, -2.0]])
    for routing in ("full", "top-2", "top-3"):
        weights = build_routing(routing)(log_p)
        assert weights[0, 1] == 0
        assert weights.sum() == pytest.approx(1)


@pytest.mark.parametrize("name", ["top-0", "top", "top-2.5", "top--1", "FULL", "", "nucleus"])
def test_unknown_names_are_refused(name) -> None:
    with pytest.raises(AtollError, match="expected top-1, top-2"):
        build_routing(name)
