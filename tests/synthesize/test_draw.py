"""Drawing: exact experts reproduce their cluster's distribution, and rows do not depend on each other."""

import math
from dataclasses import replace

import pytest
import torch

from atoll.calibration import Calibration
from atoll.encoders.text import build_encoder
from atoll.ensemble import Expert
from atoll.ensemble.loading import LoadedExpert
from atoll.errors import AtollError
from atoll.objective import Objective
from atoll.solver import sample
from atoll.storage.cards import ExpertCard
from atoll.synthesize.draw import ClusterModel, Sampling
from atoll.synthesize.rows import noise
from atoll.testing import GaussianMixture
from tests.cards import expert_card

SHAPE = (2, 3, 1)
HASH = {"name": "hash", "dim": 8, "length": 4, "seed": 0}
SAMPLING = Sampling(steps=12, method="dpm++2m", guidance_scale=1.0, seed=5)
OBJECTIVES = [Objective("eps", "cosine"), Objective("flow", "linear"), Objective("x0", "linear-beta")]


def single(mixture: GaussianMixture) -> GaussianMixture:
    """The mixture in float32, the networks' dtype."""
    return GaussianMixture(mixture.means.float(), mixture.scales.float(), mixture.weights.float(), mixture.clusters)


MIXTURE = single(GaussianMixture.random(6, 3, SHAPE, seed=4))


def exact(cluster, name="exact", condition=HASH, mixture=MIXTURE, shape=SHAPE) -> LoadedExpert:
    objective = OBJECTIVES[cluster]
    identity = Calibration.identity(torch.zeros(shape))
    expert = Expert(mixture.network(objective, cluster), objective, (cluster,), identity, name)
    return LoadedExpert(expert, ExpertCard(**expert_card(latent_shape=shape, condition=condition)))


def failing(loaded, value, above=0.5) -> LoadedExpert:
    """The expert, returning `value` at times above `above`."""
    network_before = loaded.expert.network

    def network(x, time, condition=None):
        failing_rows = (time / loaded.expert.objective.time_scale > above).reshape(-1, 1, 1, 1)
        return torch.where(failing_rows, torch.full_like(x, value), network_before(x, time))

    return LoadedExpert(replace(loaded.expert, network=network), loaded.card)


def draw(experts, rows=range(40), cluster=0, sampling=SAMPLING, **options) -> torch.Tensor:
    return ClusterModel(cluster, experts).draw(["moss"] * len(rows), rows, sampling, **options)


@pytest.mark.parametrize("cluster", [0, 1, 2])
def test_draws_have_the_clusters_mean_and_covariance(cluster) -> None:
    count = 4000
    sampling = Sampling(steps=40, method="heun", guidance_scale=1.0, seed=1)
    x = draw([exact(cluster)], range(count), cluster, sampling, batch=count).double().flatten(1)
    own = MIXTURE.cluster(cluster)
    means, weights = own.means.double().flatten(1), own.weights.double()
    mean = weights @ means
    spread = (weights * own.scales.double().square()).sum() * torch.eye(6, dtype=torch.float64)
    covariance = spread + (weights[:, None] * means).T @ means - torch.outer(mean, mean)
    variance = covariance.diagonal()
    assert ((x.mean(0) - mean).abs() < 5 * (variance / count).sqrt()).all()
    error = ((torch.outer(variance, variance) + covariance.square()) / count).sqrt()
    assert ((x.T.cov() - covariance).abs() < 5 * error).all()


def test_a_row_does_not_depend_on_other_rows() -> None:
    whole = draw([exact(1)], range(11), cluster=1)
    assert whole.dtype == torch.float16
    assert torch.equal(whole, draw([exact(1)], range(11), cluster=1))
    torch.testing.assert_close(draw([exact(1)], range(11), cluster=1, batch=5), whole, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(draw([exact(1)], range(4, 9), cluster=1), whole[4:9], atol=2e-3, rtol=2e-3)
    assert not torch.equal(draw([exact(1)], range(11), cluster=1, sampling=replace(SAMPLING, seed=6)), whole)


def test_every_row_has_its_own_noise() -> None:
    rows = torch.cat([noise(seed, cluster, range(50), SHAPE) for seed in (0, 1) for cluster in (0, 1)])
    assert len(rows.flatten(1).unique(dim=0)) == 200
    assert torch.equal(noise(3, 2, range(7, 9), SHAPE), noise(3, 2, range(20), SHAPE)[7:9])


@pytest.mark.parametrize("conditions", [(HASH, HASH), (HASH, {**HASH, "seed": 1})], ids=["one encoder", "two"])
def test_replicas_draw_together_with_equal_weights(conditions) -> None:
    shifted = single(GaussianMixture.random(6, 3, SHAPE, seed=9))
    replicas = [exact(0, "a", conditions[0]), exact(0, "b", conditions[1], shifted)]

    def mean(x, t):
        return (replicas[0].expert.velocity(x, t) + replicas[1].expert.velocity(x, t)) / 2

    expected = sample(mean, noise(5, 0, range(9), SHAPE), 12, "dpm++2m").half()
    torch.testing.assert_close(draw(replicas, range(9)), expected, atol=2e-3, rtol=2e-3)


def test_captions_and_guidance_reach_the_expert() -> None:
    """A network that draws its caption's first number; with guidance 3 three times as far from the null condition's."""
    encoder = build_encoder(HASH)

    def network(x, time, condition):
        x0 = condition.pooled[:, :1, None, None].expand_as(x)
        return (x - x0) / (time / 999).reshape(-1, 1, 1, 1)  # the flow from any x to x0

    expert = Expert(network, Objective("flow", "linear"), (0,), Calibration.identity(torch.zeros(SHAPE)), "told")
    model = ClusterModel(0, [LoadedExpert(expert, ExpertCard(**expert_card(latent_shape=SHAPE, condition=HASH)))])
    captions = ["moss", "sand", "rain", "rust"]
    conditioned, null = encoder(captions).pooled[:, 0], encoder.null(1).pooled[0, 0]
    assert len({*conditioned.tolist(), float(null)}) == 5
    for scale in (1.0, 3.0):
        drawn = model.draw(captions, range(4), Sampling(1, "euler", scale, 0), batch=3)
        expected = (null + scale * (conditioned - null)).reshape(-1, 1, 1, 1).expand_as(drawn)
        torch.testing.assert_close(drawn.float(), expected, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_failing_expert_is_named_also_among_replicas(value, recwarn) -> None:
    with pytest.raises(AtollError, match="broken answered with NaN or infinity"):
        draw([failing(exact(0, "broken"), value)])
    with pytest.raises(AtollError, match="broken answered with NaN or infinity; train or convert it again"):
        draw([exact(0, "sound"), failing(exact(0, "broken"), value)])
    assert not [warning for warning in recwarn if "goes on" in str(warning.message)]


def test_a_latent_beyond_float16_is_refused() -> None:
    with pytest.raises(AtollError, match=r"cluster 1: a latent that wild drew is not finite in float16"):
        draw([failing(exact(1, "wild"), 3e5, above=0.0)], cluster=1)


def test_bad_solver_settings_are_refused_before_loading() -> None:
    with pytest.raises(AtollError, match=r"unknown method 'rk4'; expected one of euler, heun"):
        replace(SAMPLING, method="rk4")
    with pytest.raises(AtollError, match="steps is 0"):
        replace(SAMPLING, steps=0)
