"""Precision, recall, density and coverage against their short definitions; kernel distances against loops."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atoll.errors import AtollError
from atoll.evaluate.metrics.fidelity import (
    ManifoldScores,
    kernel_distance,
    manifold_scores,
    rbf_distance,
)


def drawn(n: int, dim: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)) + shift


def brute(real: Tensor, fake: Tensor, pr_k: int, dc_k: int) -> ManifoldScores:
    """As the papers say it. Squared distances of small whole numbers are exact."""
    x, y = real.double().numpy(), fake.double().numpy()
    squared = lambda a, b: np.square(a[:, None] - b[None]).sum(-1)  # noqa: E731
    radius = lambda a, k: np.sort(squared(a, a) + np.diag([-1.0] * len(a)), 1)[:, k]  # itself stands first  # noqa: E731
    xy = squared(x, y)
    return ManifoldScores(
        precision=float((xy <= radius(x, pr_k)[:, None]).any(0).mean()),
        recall=float((xy <= radius(y, pr_k)[None]).any(1).mean()),
        density=float((xy < radius(x, dc_k)[:, None]).sum(0).mean() / dc_k),
        coverage=float((xy.min(1) < radius(x, dc_k)).mean()),
    )


def values(scores: ManifoldScores) -> tuple[float, ...]:
    return scores.precision, scores.recall, scores.density, scores.coverage


class TestManifolds:
    @given(
        n=st.integers(6, 30),
        m=st.integers(6, 30),
        ks=st.tuples(st.integers(1, 5), st.integers(1, 5)),
        chunk=st.integers(1, 40),
        spread=st.sampled_from([0, 1, 3, 1000]),
        offset=st.sampled_from([0, 2**20]),
        seed=st.integers(0, 99),
    )
    @settings(max_examples=80)
    def test_manifold_metrics_equal_definitions_with_ties_and_duplicates(
        self, n, m, ks, chunk, spread, offset, seed
    ) -> None:
        g = torch.Generator().manual_seed(seed)
        real = torch.randint(-spread, spread + 1, (n, 3), generator=g).float() + offset
        fake = torch.randint(-spread, spread + 1, (m, 3), generator=g).float() + offset
        assert values(manifold_scores(real, fake, *ks, chunk=chunk)) == pytest.approx(values(brute(real, fake, *ks)))

    def test_manifold_metrics_of_a_set_and_itself(self) -> None:
        features = drawn(40, 4, 0)
        assert values(manifold_scores(features, features)) == pytest.approx((1, 1, 1, 1))

    def test_copies_have_distance_zero(self) -> None:
        # Every ball ends at its centre: it holds the copies with its edge (precision, recall), and nothing without.
        real = drawn(20, 64, 0).repeat(3, 1)
        fake = real[torch.randperm(60, generator=torch.Generator().manual_seed(1))]
        assert values(manifold_scores(real, fake, pr_k=2, dc_k=2)) == (1, 1, 0, 0)

    def test_manifold_metrics_of_sets_far_apart_are_zero(self) -> None:
        assert values(manifold_scores(drawn(40, 4, 0), drawn(30, 4, 1, shift=100))) == (0, 0, 0, 0)

    def test_one_mode_of_two_is_precise_but_does_not_cover(self) -> None:
        real = torch.cat([drawn(100, 2, 0), drawn(100, 2, 1, shift=50)])
        scores = manifold_scores(real, drawn(150, 2, 2))
        assert min(scores.precision, scores.density) > 0.8
        assert max(scores.recall, scores.coverage) <= 0.5

    def test_one_outlier_spoils_precision_but_not_density(self) -> None:
        real = torch.cat([drawn(99, 2, 0), torch.full((1, 2), 30.0)])  # its ball reaches back to the others
        scores = manifold_scores(real, drawn(60, 2, 1, shift=15))
        assert scores.precision > 0.9
        assert scores.density < 0.25

    def test_refusals(self) -> None:
        good = drawn(9, 3, 0)
        with pytest.raises(AtollError, match=r"shapes \[9, 3\] and \[9, 4\]; expected \[n, D\] and \[m, D\]"):
            manifold_scores(good, drawn(9, 4, 0))
        with pytest.raises(AtollError, match="5 drawn images; expected at least 6"):
            manifold_scores(good, good[:5])
        with pytest.raises(AtollError, match="drawn images that are not finite"):
            manifold_scores(good, good / 0)


def cubic_mmd(x: Tensor, y: Tensor) -> float:
    """The unbiased estimator of Gretton et al. 2012, Eq. 3, term by term."""
    k = lambda a, b: (float(a @ b) / len(a) + 1) ** 3  # noqa: E731
    n, m = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i, j in product(range(n), repeat=2) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i, j in product(range(m), repeat=2) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


class TestKernelDistance:
    def test_kernel_distance_equals_the_sum_term_by_term(self) -> None:
        x, y = drawn(9, 4, 0).double(), drawn(9, 4, 1, shift=0.5).double()
        found = kernel_distance(x, y)
        assert found.mean == pytest.approx(cubic_mmd(x, y))
        assert (found.std, found.subsets, found.size) == (0, 1, 9)  # every subset would be the whole

    def test_kernel_distance_equals_torchmetrics(self) -> None:
        kid = pytest.importorskip("torchmetrics.image.kid")

        class Identity(torch.nn.Module):
            num_features = 6

            def forward(self, x: Tensor) -> Tensor:
                return x

        x, y = drawn(50, 6, 0), drawn(50, 6, 1, shift=0.3)
        theirs = kid.KernelInceptionDistance(Identity(), subsets=2, subset_size=50)
        theirs.update(x, real=True)
        theirs.update(y, real=False)
        assert kernel_distance(x, y).mean == pytest.approx(float(theirs.compute()[0]), rel=1e-4)

    def test_kernel_distance_is_unbiased_with_few_images(self) -> None:
        # Sets of one distribution: the mean over many is 0 within its error, at 4 images as at 30.
        for size in (4, 30):
            many = torch.tensor([kernel_distance(drawn(size, 2, s), drawn(size, 2, 9999 + s)).mean for s in range(300)])
            assert abs(float(many.mean())) < 3 * float(many.std()) / math.sqrt(300)
            assert (many < 0).any()

    def test_the_seed_determines_the_subsets(self) -> None:
        x, y = drawn(40, 3, 0), drawn(30, 3, 1, shift=0.2)
        found = kernel_distance(x, y, subsets=8, size=10, seed=4)
        assert found == kernel_distance(x, y, subsets=8, size=10, seed=4)
        assert found != kernel_distance(x, y, subsets=8, size=10, seed=5)
        assert (found.subsets, found.size) == (8, 10)
        assert found.std > 0
        exact = cubic_mmd(x.double(), y.double())
        many = kernel_distance(x, y, subsets=400, size=10)
        assert abs(many.mean - exact) < 4 * many.std / math.sqrt(400)
        # The larger side is drawn from too, where the smaller is taken whole.
        assert kernel_distance(x, y, subsets=5).std > 0

    def test_refuses_one_image(self) -> None:
        with pytest.raises(AtollError, match="1 real images; expected at least 2"):
            kernel_distance(drawn(1, 3, 0), drawn(5, 3, 1))


class TestRbfDistance:
    def test_rbf_distance_of_two_points(self) -> None:
        # All reals at e1, all fakes at 2 e2, of length 1 then: 1000 (1 + 1 - 2 exp(-2 / 200)).
        x, y = torch.zeros(7, 3), torch.zeros(5, 3)
        x[:, 0], y[:, 1] = 1, 2
        assert rbf_distance(x, y) == pytest.approx(2000 * (1 - math.exp(-0.01)))
        assert rbf_distance(x, x) == pytest.approx(0, abs=1e-9)

    @pytest.mark.parametrize("chunk", [1, 4, 100])
    def test_rbf_distance_equals_the_means_term_by_term(self, chunk) -> None:
        x, y = drawn(9, 4, 0).double(), drawn(6, 4, 1, shift=0.7).double()

        def mean(a: Tensor, b: Tensor) -> float:
            a, b = a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True)
            return sum(math.exp(-float((p - q).square().sum()) / 18) for p in a for q in b) / (len(a) * len(b))

        expected = 500 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))
        assert rbf_distance(x, y, sigma=3, scale=500, chunk=chunk) == pytest.approx(expected)

    def test_rbf_distance_ignores_the_vectors_length(self) -> None:
        x, y = drawn(9, 4, 0), drawn(6, 4, 1)
        assert rbf_distance(x, y) == pytest.approx(rbf_distance(3 * x, y * torch.arange(1.0, 7)[:, None]), rel=1e-5)

    def test_rbf_distance_has_the_documented_bias(self) -> None:
        # Two sets of one distribution, without a common direction: |x - x'|^2 is 2 in the mean.
        found = np.mean([rbf_distance(drawn(20, 50, s), drawn(30, 50, 999 + s)) for s in range(200)])
        assert found == pytest.approx(10 * (1 / 20 + 1 / 30), rel=0.05)

    def test_rbf_distance_refuses_zero_vectors(self) -> None:
        with pytest.raises(AtollError, match="a feature of zeros has no direction"):
            rbf_distance(torch.zeros(3, 4), drawn(5, 4, 0))
