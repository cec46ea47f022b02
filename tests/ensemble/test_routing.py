"""Routings: log-probabilities of clusters become weights, by hand and by property."""

from contextlib import suppress
from dataclasses import FrozenInstanceError, dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atoll.ensemble.routing import (
    ROUTINGS,
    Full,
    Nucleus,
    Oracle,
    Routing,
    RoutingContext,
    Sample,
    Threshold,
    TimeSwitch,
    TopK,
    parse_routing,
)
from atoll.errors import AtollError

SAMPLES, ANY = 5, ("top-1", "top-3", "full", "threshold-0.2", "nucleus-0.8", "nucleus-0.8@0.5", "sample-1", "sample-3")


def log_probabilities(clusters: int, seed: int, count: int = SAMPLES) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.log_softmax(2 * torch.randn(count, clusters, generator=g), 1)


def context(seed: int = 0, count: int = SAMPLES, cluster: torch.Tensor | None = None) -> RoutingContext:
    return RoutingContext(torch.randn(count, 2, 3, generator=torch.Generator().manual_seed(seed)), cluster=cluster)


@given(st.integers(1, 9), st.sampled_from(ANY), st.integers(0, 2**31), st.data())
def test_weights_are_a_distribution_over_clusters_with_experts(clusters, routing, seed, data) -> None:
    log_p = log_probabilities(clusters, seed)
    missing = data.draw(st.sets(st.integers(0, clusters - 1), max_size=clusters - 1))
    log_p[:, list(missing)] = -torch.inf
    weights = parse_routing(routing).weights(log_p, context(seed))
    assert weights.shape == log_p.shape
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(SAMPLES))
    assert (weights[:, list(missing)] == 0).all()


@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 2**31))
def test_top_k_keeps_the_k_largest(clusters, k, seed) -> None:
    log_p = log_probabilities(clusters, seed)
    weights = parse_routing(f"top-{k}").weights(log_p, context())
    assert ((weights > 0).sum(1) == min(k, clusters)).all()
    expected = torch.where(weights > 0, log_p.exp(), 0)
    torch.testing.assert_close(weights, expected / expected.sum(1, keepdim=True))
    assert (expected.amax(1) == log_p.exp().amax(1)).all()


def test_full_keeps_the_routers_probabilities() -> None:
    log_p = log_probabilities(4, 0)
    torch.testing.assert_close(parse_routing("full").weights(log_p, context()), log_p.exp())


@given(st.integers(1, 9), st.floats(0, 0.99), st.integers(0, 2**31))
def test_threshold_keeps_probabilities_that_reach_it(clusters, minimum, seed) -> None:
    p = log_probabilities(clusters, seed).exp()
    weights = parse_routing(f"threshold-{minimum:.6f}").weights(p.log(), context())
    expected = torch.where(p >= round(minimum, 6) - 1e-6, p, 0)
    expected = torch.where(expected.sum(1, keepdim=True) > 0, expected, torch.where(p == p.amax(1, keepdim=True), p, 0))
    torch.testing.assert_close(weights, expected / expected.sum(1, keepdim=True), atol=2e-5, rtol=0)


def test_nucleus_by_hand() -> None:
    p = torch.tensor([[0.1, 0.5, 0.15, 0.25]])
    cases = {"0.4": [0, 1, 0, 0], "0.5": [0, 1, 0, 0], "0.6": [0, 2 / 3, 0, 1 / 3], "1": [0.1, 0.5, 0.15, 0.25]}
    for share, expected in cases.items():
        weights = parse_routing(f"nucleus-{share}").weights(p.log(), context(count=1))
        torch.testing.assert_close(weights, torch.tensor([expected], dtype=torch.float32))
    cold = p**2 / (p**2).sum()
    torch.testing.assert_close(parse_routing("nucleus-1@0.5").weights(p.log(), context(count=1)), cold)


def test_samples_average_to_full_and_depend_on_x_alone() -> None:
    log_p = torch.tensor([0.1, 0.6, 0.3]).log().expand(4000, -1)
    many = context(count=4000)
    weights = parse_routing("sample-1").weights(log_p, many)
    assert set(weights.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(weights.mean(0), torch.tensor([0.1, 0.6, 0.3]), atol=0.03, rtol=0)
    some = torch.tensor([7, 3999, 11])
    torch.testing.assert_close(
        parse_routing("sample-1").weights(log_p[some], RoutingContext(many.x[some])), weights[some]
    )
    three = parse_routing("sample-3").weights(log_p, many)
    torch.testing.assert_close(three * 3, (three * 3).round())
    torch.testing.assert_close(three.mean(0), torch.tensor([0.1, 0.6, 0.3]), atol=0.03, rtol=0)


def test_oracle_uses_the_given_cluster() -> None:
    log_p = log_probabilities(4, 3)
    cluster = torch.tensor([3, 0, 2, 2, 1])
    weights = parse_routing("oracle").weights(log_p, context(cluster=cluster))
    torch.testing.assert_close(weights, torch.nn.functional.one_hot(cluster, 4).float())
    assert (parse_routing("oracle-2").weights(log_p, context()).argmax(1) == 2).all()
    log_p[:, 2] = -torch.inf  # nobody is there: the others take over
    weights = parse_routing("oracle").weights(log_p, context(cluster=cluster))
    torch.testing.assert_close(weights[2], torch.softmax(log_p[2], 0))


def test_oracle_without_clusters_or_with_wrong_ones_is_refused() -> None:
    log_p = log_probabilities(4, 3)
    with pytest.raises(AtollError, match="needs each sample's cluster"):
        parse_routing("oracle").weights(log_p, context())
    for wrong in (torch.tensor([0, 1]), torch.tensor([0, 1, 2, 3, 4]), torch.tensor([0, 1, 2, 3, -1])):
        with pytest.raises(AtollError, match="expected 5 numbers below 4"):
            parse_routing("oracle").weights(log_p, context(cluster=wrong))
    with pytest.raises(AtollError, match="expected 5 numbers below 4"):
        parse_routing("oracle-4").weights(log_p, context())


def test_a_time_switch_names_two_experts() -> None:
    switch = parse_routing("time-switch-0.25:1-flow-linear:0-eps-cosine")
    assert switch == TimeSwitch(0.25, "1-flow-linear", "0-eps-cosine")


def test_a_time_switch_weighs_experts_by_time_alone() -> None:
    switch, names = TimeSwitch(0.5, "c", "a"), ("a", "b", "c")
    x, t = torch.randn(3, 2), torch.tensor([0.4, 0.5, 0.9])
    weights = switch.weights(x.new_zeros(3, 0), RoutingContext(x, t, names=names))
    assert weights.tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 1]]
    switch.check(names)
    for wrong in (("a", "b"), ("a", "c", "c")):
        with pytest.raises(AtollError, match="no expert 'c'; expected one of a, "):
            switch.check(wrong)


NAMES = {
    "top-3": (TopK(3), True),
    "full": (Full(), True),
    "threshold-0.1": (Threshold(0.1), True),
    "nucleus-0.9": (Nucleus(0.9), True),
    "nucleus-.9@0.7": (Nucleus(0.9, 0.7), True),
    "sample-2": (Sample(2), True),
    "oracle": (Oracle(), False),
    "oracle-3": (Oracle(3), False),
    "time-switch-0.5:a:b": (TimeSwitch(0.5, "a", "b"), False),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_parsed_routing_says_whether_it_needs_a_router(name) -> None:
    expected, needs_router = NAMES[name]
    routing = parse_routing(name)
    assert routing == expected
    assert routing.needs_router is needs_router


def test_every_routing_is_frozen() -> None:
    assert {type(routing) for routing, _ in NAMES.values()} == set(ROUTINGS)
    for routing, _ in NAMES.values():
        with pytest.raises(FrozenInstanceError):
            routing.needs_router = True


def test_a_new_routing_is_one_class_and_one_line(monkeypatch) -> None:
    @dataclass(frozen=True)
    class Uniform(Routing):
        examples = "uniform"
        needs_router = True

        @classmethod
        def parse(cls, text):
            return cls() if text == "uniform" else None

        def weights(self, log_p, context):
            return torch.full_like(log_p, 1 / log_p.shape[1])

    monkeypatch.setattr("atoll.ensemble.routing.ROUTINGS", (*ROUTINGS, Uniform))
    assert parse_routing("uniform") == Uniform()
    with pytest.raises(AtollError, match=r"unknown routing 'top-0'; expected top-1, .* or uniform"):
        parse_routing("top-0")


@pytest.mark.parametrize(
    "name",
    [
        *("top-0", "top", "top-2.5", "top--1", "FULL", "", "nucleus", "nucleus-0", "nucleus-1.1", "nucleus-0.9@0"),
        *("nucleus-0.9@", "threshold-1", "threshold-", "threshold--0.1", "threshold-0.1@2", "sample-0", "sample"),
        *("oracle-", "oracle--1", "oracle-x", "time-switch-2:a:b", "time-switch-0.5:a", "time-switch-0.5", "full-1"),
        *("threshold-nan", "nucleus-inf", "top-²", "oracle-²"),
    ],
)
def test_unknown_names_are_refused(name) -> None:
    with pytest.raises(AtollError, match="expected top-1, top-2"):
        parse_routing(name)


@given(st.text())
def test_any_text_is_a_routing_or_refused(name) -> None:
    with suppress(AtollError):
        assert isinstance(parse_routing(name), ROUTINGS)
