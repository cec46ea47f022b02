"""A router that grows: old clusters keep their ratios, parts sum to their parent, and the oracle agrees."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from atoll.ensemble import Ensemble, Expert
from atoll.errors import AtollError
from atoll.nn import Router, RouterConfig
from atoll.nn.router import grow
from atoll.objective import Objective
from atoll.storage.cards import Lineage
from atoll.testing import GaussianMixture
from tests.nn.test_router import POOLED, B, K, config, inputs, random_router

EPS = torch.finfo(torch.float32).eps
LOGITS = st.lists(st.floats(-200, 200, width=32), min_size=4, max_size=4)


@given(LOGITS, st.floats(-300, 300, width=32), st.sampled_from([None, 0, 2, 3]))
def test_old_probabilities_keep_their_ratios(logits: list[float], logit: float, parent: int | None) -> None:
    log_p = torch.tensor([logits]).log_softmax(1)
    after = grow(log_p, torch.tensor([logit]), parent)
    assert after.isfinite().all()
    size = float(max(log_p.abs().max(), after.abs().max()))  # of the numbers that are rounded
    torch.testing.assert_close(after.exp().sum(1), torch.ones(1), atol=8 * EPS * size, rtol=0)
    if parent is None:
        # One and the same number is added to all: differences change by rounding alone.
        old, new = log_p - log_p[:, :1], after[:, :4] - after[:, :1]
        torch.testing.assert_close(new, old, atol=4 * EPS * size, rtol=0)
    else:
        others = [k for k in range(4) if k != parent]
        assert torch.equal(after[:, others], log_p[:, others])  # to the bit
        together = torch.logaddexp(after[:, parent], after[:, 4])
        torch.testing.assert_close(together, log_p[:, parent], atol=8 * EPS * size, rtol=0)


def oracle(components: int) -> GaussianMixture:
    return GaussianMixture.random(components, components, (2, 3), seed=3)


def without_last(mixture: GaussianMixture) -> GaussianMixture:
    inside = mixture.clusters < int(mixture.clusters.max())
    weights = mixture.weights[inside] / mixture.weights[inside].sum()
    return GaussianMixture(mixture.means[inside], mixture.scales[inside], weights, mixture.clusters[inside])


def test_an_exact_router_grows_into_the_exact_router_of_more_clusters() -> None:
    large = oracle(5)
    small = without_last(large)
    x, t = torch.randn(7, 2, 3, dtype=torch.float64), torch.linspace(0.02, 1, 7, dtype=torch.float64)
    exact = large.router(x, t)
    # The exact logit of the new cluster is its log-odds against all others.
    logit = exact[:, 4] - torch.logsumexp(exact[:, :4], dim=1)
    torch.testing.assert_close(grow(small.router(x, t), logit, None), exact, atol=1e-12, rtol=0)
    # Merge clusters 1 and 4, then split them again.
    merged = GaussianMixture(large.means, large.scales, large.weights, torch.tensor([0, 1, 2, 3, 1]))
    torch.testing.assert_close(grow(merged.router(x, t), exact[:, 4] - exact[:, 1], 1), exact, atol=1e-12, rtol=0)


def test_an_ensemble_that_grew_has_the_exact_velocity_of_all_data() -> None:
    """Experts of the founding clusters, one of them split since, and one of new data; no old expert is retrained."""
    large = oracle(4)  # 0, 1 and its split-off part 2, and the new cluster 3
    merged = GaussianMixture(large.means[:3], large.scales[:3], large.weights[:3], torch.tensor([0, 1, 1]))
    x, t = torch.randn(5, 2, 3, dtype=torch.float64), torch.linspace(0.05, 0.95, 5, dtype=torch.float64)
    exact, objective = large.router(x, t), Objective("eps", "cosine")

    def router(x: Tensor, t: Tensor, pooled: Tensor | None = None) -> Tensor:
        exact = large.router(x, t)
        founding = merged.router(x, t)
        parts = grow(founding, exact[:, 2] - exact[:, 1], 1)
        return grow(parts, exact[:, 3] - torch.logsumexp(exact[:, :3], dim=1), None)

    torch.testing.assert_close(router(x, t), exact, atol=1e-12, rtol=0)
    lineage = Lineage("founding", 2).grown("split", 1).grown("now", None)
    old = [Expert(merged.network(objective, k), objective, lineage.now("founding", (k,)), name=str(k)) for k in (0, 1)]
    new = Expert(large.network(objective, 3), objective, (3,), name="3")
    ensemble = Ensemble([*old, new], router, "full")
    assert [expert.clusters for expert in ensemble.experts] == [(0,), (1, 2), (3,)]
    torch.testing.assert_close(ensemble.velocity(x, t), large.velocity(x, t), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("steps", [(None,), (2,), (None, 1, None, 6)])
def test_the_old_weights_give_the_old_probabilities(steps: tuple[int | None, ...]) -> None:
    old = random_router(pooled_dim=POOLED)
    router = Router(config(pooled_dim=POOLED, clusters=K + len(steps), grown=steps)).double()
    router.load_state_dict({**router.state_dict(), **old.state_dict()})
    for logit in router.grown:
        for parameter in logit.parameters():
            nn.init.normal_(parameter)
    x, t, pooled = inputs()
    before, after = old(x, t, pooled), router(x, t, pooled)
    assert after.shape == (B, K + len(steps))
    torch.testing.assert_close(after.exp().sum(1), torch.ones(B, dtype=torch.float64))
    # Sum the parts back into their parents, the last step first: what is left are the founding clusters.
    columns = list(after.unbind(1))
    for parent in reversed(steps):
        part = columns.pop()
        if parent is not None:
            columns[parent] = torch.logaddexp(columns[parent], part)
    left = torch.stack(columns, dim=1)
    torch.testing.assert_close(left.log_softmax(1), before, atol=1e-12, rtol=0)
    # Time and pooled vector count for the new logits, too.
    assert (router(x, t.flip(0), pooled) - after)[:, K:].abs().max() > 1e-2
    assert (router(x, t, pooled + 1) - after)[:, K:].abs().max() > 1e-2


@pytest.mark.parametrize("grown", [[None] * K, [K - 1], [None, K]])
def test_steps_that_cannot_be_are_refused(grown: list[int | None]) -> None:
    with pytest.raises(AtollError, match="expected steps from at least one cluster"):
        RouterConfig.model_validate({**config().model_dump(), "grown": grown})
