"""The fit of a new cluster's logit: it finds exact log-odds, at the frequencies of the data."""

import math

import pytest
import torch

from atoll.encoders.text import build_encoder
from atoll.manifest import load_manifest
from atoll.nn import Router, RouterConfig
from atoll.storage.shards import Shards
from atoll.train import extend_router as extend_module
from atoll.train.extend_router import ClusterRows, _samples, _side
from atoll.train.grown_logit import LogitSamples, fit_logit
from tests.conftest import RUN, K


def two_gaussians(count: int, fraction: float, seed: int) -> LogitSamples:
    """Two unit Gaussians at (5 +- t) e_1, weighted: the log-odds are 2 t (x_1 - 5) + log(f / (1 - f))."""
    g = torch.Generator().manual_seed(seed)
    t, labels = torch.rand(count, generator=g), (torch.arange(count) % 2).float()
    features = torch.randn(count, 3, generator=g)
    features[:, 0] += 5 + (2 * labels - 1) * t
    return LogitSamples(features, t, labels, torch.where(labels == 1, fraction, 1 - fraction))


@pytest.mark.parametrize("fraction", [0.5, 0.05])
def test_the_exact_log_odds_are_found(fraction: float) -> None:
    fitted = fit_logit(two_gaussians(16_384, fraction, 0), two_gaussians(4096, fraction, 1))
    points, t = torch.randn(200, 3, generator=torch.Generator().manual_seed(2)), torch.linspace(0, 1, 200)
    points[:, 0] += 5
    exact = 2 * t * (points[:, 0] - 5) + math.log(fraction / (1 - fraction))
    # Within the error of estimation; a wrong frequency alone would be off by 2.9.
    assert (fitted.logit(points, t) - exact).square().mean().sqrt() < 0.15
    assert fitted.held_out_loss is not None


def test_without_held_out_latents_the_ridge_is_the_default() -> None:
    fitted = fit_logit(two_gaussians(512, 0.5, 0), None)
    assert (fitted.ridge, fitted.held_out_loss) == (1e-3, None)


def test_samples_stand_for_the_images_of_their_clusters(run, monkeypatch) -> None:
    monkeypatch.setattr(extend_module, "SAMPLES", 400)
    shards = [Shards(run / "clusters" / f"cluster-{k:03d}") for k in range(K)]
    # Of cluster 1 a few rows are here, of many images; clusters 0 and 1 are the old ones.
    few = shards[1].rows("train")[:3]
    sources = [ClusterRows(part, few if k == 1 else None, frozenset([k])) for k, part in enumerate(shards)]
    counts = [100, 300, 50]
    sides = [_side(sources, clusters, counts) for clusters in (frozenset([0, 1]), frozenset([2]))]
    config = {"size": (4, 8), "channels": 1, "clusters": 2, **RUN["router"]["network"]}
    router, encoder = Router(RouterConfig.model_validate(config)), build_encoder(RUN["condition"])
    settings = load_manifest(run).train
    samples = _samples(router, sides, encoder, settings, split="train", seed=0, step=2, device="cpu")
    assert samples is not None
    assert samples.labels.sum() == 200
    assert float(samples.weights[samples.labels == 1].sum() / samples.weights.sum()) == pytest.approx(50 / 450)
    assert len(samples) == 400
    held_out = _samples(router, sides, encoder, settings, split="val", seed=0, step=2, device="cpu")
    assert held_out is not None  # cluster 0 has some
    assert float(held_out.weights[held_out.labels == 1].sum() / held_out.weights.sum()) == pytest.approx(50 / 450)
