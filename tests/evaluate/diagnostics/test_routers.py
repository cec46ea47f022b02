"""The router's scores against closed forms: an exact router is as accurate, as surprised and as sure as it must be."""

import math
from collections.abc import Sequence
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atoll.condition import Condition, select_rows
from atoll.errors import AtollError
from atoll.evaluate.diagnostics.routers import (
    BINS,
    HeldOut,
    Reliability,
    RouterScores,
    calibration_error,
    measure_router,
)
from atoll.evaluate.metrics.frechet import noisy_latents, squared_errors
from atoll.testing import GaussianMixture

LEVELS = (0.2, 0.5, 0.8)


@pytest.fixture(scope="module")
def mixture() -> GaussianMixture:
    return GaussianMixture.random(components=7, clusters=3, shape=(1, 2, 3), seed=4, spread=0.7)


def held_out_of(mixture: GaussianMixture, count: int, seed: int = 0) -> HeldOut:
    x0, labels = mixture.sample(count, torch.Generator().manual_seed(seed))
    return HeldOut(x0, labels, range(100, 100 + count))


def within(measured: float, values: Tensor, sigmas: float = 4) -> None:
    """measured is a mean of len(values) draws whose own expectations are `values` and whose variances are given."""
    expected, variance = values.unbind(-1)
    assert abs(measured - float(expected.mean())) < sigmas * math.sqrt(float(variance.mean()) / len(values))


class TestExactRouter:
    def test_accuracy_and_cross_entropy_are_those_of_the_posterior(self, mixture) -> None:
        held_out = held_out_of(mixture, 2000)
        scores = measure_router(mixture.router, held_out, LEVELS, batch=300)
        for level, (x, _, t) in enumerate(noisy_latents(held_out.x0, LEVELS, held_out.seeds)):
            log_p = mixture.router(x, t)
            p = log_p.exp()
            best, entropy = p.amax(1), -(p * log_p).sum(1)
            within(scores.accuracy[level], torch.stack([best, best * (1 - best)], dim=1))
            within(scores.cross_entropy[level], torch.stack([entropy, (p * log_p**2).sum(1) - entropy**2], dim=1))

    def test_accuracy_of_two_gaussians_is_the_error_function(self) -> None:
        # +-m with one variance s^2 and equal weights: the log-likelihood ratio for the true side is N(d^2/2, d^2),
        # d = 2 alpha |m| / sqrt(alpha^2 s^2 + sigma^2).
        m, s, n = torch.full((1, 2, 3), 0.4, dtype=torch.float64), 0.5, 4000
        pair = GaussianMixture(
            torch.stack([m, -m]), torch.full((2,), s).double(), torch.full((2,), 0.5).double(), torch.arange(2)
        )
        scores = measure_router(pair.router, held_out_of(pair, n), LEVELS, batch=1000)
        z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
        density = torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
        for level, t in enumerate(LEVELS):
            d = 2 * (1 - t) * float(m.norm()) / math.sqrt(((1 - t) * s) ** 2 + t**2)
            surprise = torch.nn.functional.softplus(-(d**2 / 2 + d * z))
            mean = float(torch.trapezoid(density * surprise, z))
            variance = float(torch.trapezoid(density * surprise**2, z)) - mean**2
            accuracy = 0.5 * (1 + math.erf(d / 2 / math.sqrt(2)))
            assert abs(scores.accuracy[level] - accuracy) < 4 * math.sqrt(accuracy * (1 - accuracy) / n)
            assert abs(scores.cross_entropy[level] - mean) < 4 * math.sqrt(variance / n)

    def test_the_posterior_is_calibrated_an_overconfident_router_not(self, mixture) -> None:
        def sure(x: Tensor, t: Tensor, pooled: Tensor | None = None) -> Tensor:
            return torch.log_softmax(3 * mixture.router(x, t), dim=1)

        held_out = held_out_of(mixture, 3000)
        exact, over = (measure_router(r, held_out, LEVELS, batch=500) for r in (mixture.router, sure))
        for level in range(len(LEVELS)):
            assert exact.ece[level] < 2 * exact.ece_floor[level] < 0.05
            assert over.accuracy[level] == exact.accuracy[level]
            assert over.cross_entropy[level] > exact.cross_entropy[level]
        assert over.ece[1] > 4 * over.ece_floor[1]
        assert over.ece[2] > 0.1


class TestCalibrationError:
    def test_calibration_error_in_closed_form(self) -> None:
        # One bin at 0.9 with half of it right, one at 0.6 with all of it right: 2/3 * 0.4 + 1/3 * 0.4.
        p = torch.tensor([[0.9, 0.1]] * 4 + [[0.6, 0.4]] * 2, dtype=torch.float64)
        labels = torch.tensor([0, 0, 1, 1, 0, 0])
        assert calibration_error(p.log(), labels) == pytest.approx(4 / 6 * 0.4 + 2 / 6 * 0.4)

    def test_calibration_error_of_certain_predictions(self) -> None:
        log_p = torch.tensor([[0.0, -torch.inf], [-torch.inf, 0.0]])
        assert calibration_error(log_p, torch.tensor([0, 1])) == 0
        assert calibration_error(log_p, torch.tensor([1, 1])) == 0.5

    def test_bins_hold_their_upper_edge(self) -> None:
        bins = Reliability()
        bins.update(torch.tensor([3 / 15, 3 / 15 + 1e-9, 1.0, 0.0], dtype=torch.float64), torch.ones(4).bool())
        assert bins.bins[:, 0].nonzero().squeeze(1).tolist() == [0, 2, 3, 14]

    @given(
        logits=st.lists(st.lists(st.floats(-6, 6), min_size=3, max_size=3), min_size=1, max_size=40),
        seed=st.integers(0, 99),
    )
    @settings(max_examples=60)
    def test_equals_a_loop_over_bins(self, logits: list[list[float]], seed: int) -> None:
        log_p = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), dim=1)
        labels = torch.randint(3, (len(logits),), generator=torch.Generator().manual_seed(seed))
        confidence, answers = log_p.exp().max(1)
        expected = 0.0
        for m in range(BINS):
            mine = (confidence * BINS > m) & (confidence * BINS <= m + 1)
            if mine.any():
                right = (answers[mine] == labels[mine]).double()
                expected += float(mine.double().mean() * (right.mean() - confidence[mine].mean()).abs())
        assert calibration_error(log_p, labels) == pytest.approx(expected, abs=1e-12)
        assert 0 <= expected <= 1

    def test_equals_torchmetrics(self) -> None:
        calibration = pytest.importorskip("torchmetrics.functional.classification.calibration_error")
        g = torch.Generator().manual_seed(3)
        p = torch.softmax(2 * torch.randn(500, 6, generator=g), dim=1)
        labels = torch.randint(6, (500,), generator=g)
        expected = calibration.multiclass_calibration_error(p, labels, num_classes=6, n_bins=BINS, norm="l1")
        assert calibration_error(p.log(), labels) == pytest.approx(float(expected), abs=1e-6)

    def test_floor_is_the_score_of_true_probabilities(self) -> None:
        g, n = torch.Generator().manual_seed(0), 400
        confidence = 0.3 + 0.7 * torch.rand(n, generator=g, dtype=torch.float64)
        errors = []
        for _ in range(300):
            bins = Reliability()
            bins.update(confidence, torch.rand(n, generator=g, dtype=torch.float64) < confidence)
            errors.append(bins.error)
        assert sum(errors) / len(errors) == pytest.approx(bins.floor, rel=0.05)


def always(cluster: int, clusters: int):
    def router(x: Tensor, t: Tensor, pooled: Tensor | None = None) -> Tensor:
        return torch.log_softmax(5.0 * torch.eye(clusters)[cluster].expand(len(x), -1), dim=1)

    return router


class TestScores:
    def labelled(self, labels: Sequence[int]) -> HeldOut:
        x0 = torch.randn(len(labels), 1, 2, 3, generator=torch.Generator().manual_seed(0))
        return HeldOut(x0, torch.tensor(labels), range(len(labels)))

    def test_confusion_has_true_rows_and_predicted_columns(self) -> None:
        scores = measure_router(always(1, 4), self.labelled([0, 0, 0, 1, 2]), (0.1, 0.9), batch=2)
        assert scores.confusion == (((0, 3, 0, 0), (0, 1, 0, 0), (0, 1, 0, 0), (0, 0, 0, 0)),) * 2
        assert scores.accuracy == (0.2, 0.2)
        assert (scores.count, scores.majority) == (5, 0.6)
        assert scores.entropy == pytest.approx(-0.6 * math.log(0.6) - 0.4 * math.log(0.2))

    def test_a_uniform_router_has_cross_entropy_log_k(self) -> None:
        def flat(x: Tensor, t: Tensor, pooled: Tensor | None = None) -> Tensor:
            return torch.full((len(x), 8), -math.log(8))

        scores = measure_router(flat, self.labelled([0, 3, 7]), (0.5,))
        assert scores.cross_entropy == pytest.approx((math.log(8),))

    def test_probability_zero_of_the_truth_gives_infinite_cross_entropy(self) -> None:
        def wrong(x: Tensor, t: Tensor, pooled: Tensor | None = None) -> Tensor:
            return torch.tensor([0.0, -torch.inf]).expand(len(x), -1)

        assert measure_router(wrong, self.labelled([0, 1, 0]), (0.5,)).cross_entropy == (math.inf,)

    def test_results_do_not_depend_on_the_batches(self, mixture) -> None:
        held_out = held_out_of(mixture, 50)
        parts, together = (measure_router(mixture.router, held_out, LEVELS, batch=b) for b in (7, 50))
        assert parts.confusion == together.confusion
        assert parts.cross_entropy == pytest.approx(together.cross_entropy)
        assert parts.ece == pytest.approx(together.ece)

    def test_router_sees_the_noisy_latents_of_the_denoising_error(self, mixture) -> None:
        held_out = held_out_of(mixture, 5)
        of_error, of_router = [], []

        def velocity(x: Tensor, t: Tensor, _: object) -> Tensor:
            of_error.append((x, t))
            return x

        def router(x: Tensor, t: Tensor, pooled: Tensor | None) -> Tensor:
            of_router.append((x, t))
            return mixture.router(x, t)

        squared_errors(velocity, held_out.x0, None, LEVELS, held_out.seeds)
        measure_router(router, held_out, LEVELS)
        for (x, t), (expected_x, expected_t) in zip(of_router, of_error, strict=True):
            assert torch.equal(x, expected_x)
            assert torch.equal(t, expected_t)


def spoken(labels: Tensor) -> Condition:
    """Captions whose pooled vector is one-hot of the label."""
    n = len(labels)
    return Condition(torch.zeros(n, 2, 3), torch.ones(n, 2).bool(), 9 * torch.eye(3)[labels])


def reader(x: Tensor, t: Tensor, pooled: Tensor | None = None) -> Tensor:
    assert pooled is not None
    return torch.log_softmax(pooled, dim=1)


class TestCondition:
    labels = torch.tensor([0, 2, 1, 1, 0])
    x0 = torch.zeros(5, 1, 2, 3)

    def scores(self, condition, encoder: int = 0) -> RouterScores:
        return measure_router(
            reader, HeldOut(self.x0, self.labels, range(5), condition), (0.5,), encoder=encoder, batch=2
        )

    def test_the_router_sees_the_pooled_vector(self) -> None:
        assert self.scores(partial(select_rows, (spoken(self.labels),))).accuracy == (1.0,)

    def test_the_router_reads_its_own_encoder(self) -> None:
        condition = partial(select_rows, (spoken(1 - self.labels.clamp(max=1)), spoken(self.labels)))
        assert self.scores(condition, encoder=1).accuracy == (1.0,)
        assert self.scores(condition, encoder=0).accuracy == (0.0,)

    def test_a_condition_can_be_encoded_batch_by_batch(self) -> None:
        assert self.scores(lambda rows: (spoken(self.labels[rows]),)).accuracy == (1.0,)


class TestErrors:
    def test_a_label_beyond_the_routers_clusters_is_refused(self) -> None:
        held_out = HeldOut(torch.zeros(2, 1, 3), torch.tensor([0, 4]), range(2))
        with pytest.raises(AtollError, match=r"cluster 4, but the router has 3 clusters"):
            measure_router(always(0, 3), held_out)

    @pytest.mark.parametrize(
        ("x0", "labels", "seeds"),
        [
            (torch.zeros(0, 1, 3), torch.zeros(0).long(), range(0)),
            (torch.zeros(2, 1, 3), torch.zeros(3).long(), range(2)),
            (torch.zeros(2, 1, 3), torch.zeros(2).long(), range(3)),
            (torch.zeros(2, 1, 3), torch.zeros(2), range(2)),
            (torch.zeros(2, 1, 3), torch.tensor([0, -1]), range(2)),
        ],
    )
    def test_held_out_labels_and_seeds_that_do_not_fit_are_refused(
        self, x0: Tensor, labels: Tensor, seeds: Sequence[int]
    ) -> None:
        with pytest.raises(AtollError, match="expected"):
            HeldOut(x0, labels, seeds)
