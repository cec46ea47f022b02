"""Any discrete schedule, of 10 to 4,000 steps, with or without zero terminal SNR.

The ensemble's velocity is exact inside the expert's support, finite everywhere, and continuous at the edges.
"""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.calibration import NODES, Calibration
from atoll.ensemble import Ensemble, Expert
from atoll.objective import Objective
from atoll.schedule import PATH, TableSchedule
from atoll.testing import GaussianMixture

SHAPE = (2, 3, 1)
MIXTURE = GaussianMixture.random(components=6, clusters=2, shape=SHAPE, seed=4)
PREDICTIONS = ("eps", "x0", "v", "flow")


@st.composite
def tables(draw) -> TableSchedule:
    """alpha-bar that falls in steps of any size, from near 1 to near 0 or exactly 0."""
    steps = draw(st.sampled_from((10, 37, 250, 1000, 4000)))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rough = draw(st.floats(0.0, 3.0))
    falls = torch.exp(rough * torch.randn(steps - 1, generator=g, dtype=torch.float64))
    first, last = draw(st.floats(0.5, 0.99999)), draw(st.floats(1e-5, 0.3))
    log_snr = torch.logit(torch.tensor(first)) - (
        torch.cat([torch.zeros(1), falls.cumsum(0) / falls.sum()])
        * (torch.logit(torch.tensor(first)) - torch.logit(torch.tensor(last)))
    )
    table = torch.sigmoid(log_snr.double())
    if draw(st.booleans()):
        table[-1] = 0.0
    return TableSchedule(table)


@st.composite
def ensembles(draw) -> tuple[Ensemble, list[Objective]]:
    objectives = [
        Objective(draw(st.sampled_from(PREDICTIONS)), draw(tables()), time_scale=draw(st.sampled_from((1.0, 999.0))))
        for _ in range(2)
    ]
    experts = []
    for k, objective in enumerate(objectives):
        identity = Calibration.identity(torch.zeros(SHAPE, dtype=torch.float64))
        calibration = identity if draw(st.booleans()) else None
        experts.append(Expert(MIXTURE.network(objective, k), objective, (k,), calibration, str(k)))
    return Ensemble(experts, MIXTURE.router, "full"), objectives


def edges(objective: Objective) -> torch.Tensor:
    """The ends of the support as times of the linear path, [2], clean and noisy."""
    return PATH.time_at(objective.schedule.log_snr(torch.tensor(objective.support, dtype=torch.float64)))


def batch(t: torch.Tensor, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x0, _ = MIXTURE.sample(len(t), g)
    return PATH.diffuse(x0, torch.randn(x0.shape, generator=g, dtype=x0.dtype), t)


@settings(max_examples=40)
@given(ensembles(), st.integers(0, 2**31))
def test_velocity_is_exact_inside_the_support(drawn, seed) -> None:
    ensemble, objectives = drawn
    low = max(float(edges(objective)[0]) for objective in objectives)
    high = min(float(edges(objective)[1]) for objective in objectives)
    if low >= high:
        return
    t = low + (high - low) * torch.rand(20, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = batch(t, seed)
    torch.testing.assert_close(ensemble.velocity(x, t), MIXTURE.velocity(x, t), atol=1e-6, rtol=1e-6)


@settings(max_examples=40)
@given(ensembles(), st.integers(0, 2**31))
def test_velocity_is_finite_at_every_time(drawn, seed) -> None:
    ensemble, _ = drawn
    ends = torch.tensor([0.0, 1e-12, 1e-6, *NODES, 1 - 1e-6, 1 - 1e-12, 1.0], dtype=torch.float64)
    t = torch.cat([ends, torch.rand(30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)])
    assert ensemble.velocity(batch(t, seed), t).isfinite().all()
    x_float32 = batch(t, seed).float()
    assert ensemble.velocity(x_float32, t.float()).isfinite().all()


@settings(max_examples=40)
@given(ensembles(), st.integers(0, 2**31))
def test_velocity_is_continuous_at_the_edges_of_the_support(drawn, seed) -> None:
    ensemble, objectives = drawn
    for edge in torch.cat([edges(objective) for objective in objectives]):
        if not 1e-3 < edge < 1 - 1e-3:  # closer to the ends the mixture's own velocity is lost to rounding
            continue
        x = batch(edge.expand(1), seed).expand(2, *SHAPE)
        below, above = ensemble.velocity(x, edge + torch.tensor([-1e-9, 1e-9], dtype=torch.float64))
        torch.testing.assert_close(below, above, atol=1e-5, rtol=1e-5)
