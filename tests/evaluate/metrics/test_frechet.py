"""The Fréchet distance against closed forms and scipy, moments against torch, denoising error against the oracle."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atoll.errors import AtollError
from atoll.evaluate.metrics.frechet import (
    DenoisingError,
    Moments,
    PixelPCA,
    bias_warning,
    frechet_distance,
    metric_name,
    squared_errors,
)
from atoll.testing import GaussianMixture


def moments_of(features: Tensor) -> Moments:
    moments = Moments(features.shape[1])
    moments.update(features)
    return moments


def exactly(mean: Tensor, covariance: Tensor, count: int = 100) -> Moments:
    """Moments with this very mean and covariance."""
    moments = Moments(len(mean))
    moments.count, moments.mean, moments._scatter = count, mean.double(), covariance.double() * (count - 1)
    return moments


def random_covariance(dim: int, rank: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    factor = torch.randn(dim, rank, generator=g, dtype=torch.float64)
    return factor @ factor.T / rank


class TestMoments:
    @given(
        cuts=st.lists(st.integers(0, 30), max_size=5),
        offset=st.sampled_from([0.0, 1e6]),
    )
    @settings(max_examples=40)
    def test_batches_of_any_size_give_the_mean_and_covariance_of_all(self, cuts: list[int], offset: float) -> None:
        g = torch.Generator().manual_seed(3)
        features = torch.randn(30, 4, generator=g, dtype=torch.float64) + offset
        moments = Moments(4)
        edges = [0, *sorted(cuts), 30]
        for start, end in pairwise(edges):
            moments.update(features[start:end])
        assert moments.count == 30
        torch.testing.assert_close(moments.mean, features.mean(0))
        torch.testing.assert_close(moments.covariance, features.T.cov(), rtol=1e-7, atol=1e-8)

    def test_merging_equals_updating(self) -> None:
        features = torch.randn(25, 3, generator=torch.Generator().manual_seed(1))
        left, right = moments_of(features[:7]), moments_of(features[7:])
        left.merge(right)
        whole = moments_of(features)
        assert left.count == whole.count
        torch.testing.assert_close(left.mean, whole.mean)
        torch.testing.assert_close(left.covariance, whole.covariance)

    def test_merging_an_empty_set_changes_nothing(self) -> None:
        empty = Moments(3)
        empty.merge(Moments(3))
        assert empty.count == 0
        assert empty.finite

    def test_one_vector_has_no_covariance(self) -> None:
        with pytest.raises(AtollError, match="1 images; expected at least 2"):
            _ = moments_of(torch.ones(1, 3)).covariance


class TestFrechetDistance:
    def test_distance_of_a_set_to_itself_is_zero(self) -> None:
        features = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
        assert frechet_distance(moments_of(features), moments_of(features)) < 1e-12

    def test_distance_of_a_shift_is_its_square(self) -> None:
        features = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        shift = torch.tensor([3.0, -4.0, 12.0], dtype=torch.float64)
        assert frechet_distance(moments_of(features), moments_of(features + shift)) == pytest.approx(169)

    def test_distance_of_a_scale_is_the_trace_by_its_excess(self) -> None:
        # S_b = c^2 S_a and equal means: tr(S_a) (c - 1)^2
        features = torch.randn(50, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        a = moments_of(features - features.mean(0))
        b = moments_of(3 * (features - features.mean(0)))
        assert frechet_distance(a, b) == pytest.approx(4 * float(a.covariance.trace()))

    def test_distance_of_covariances_that_commute(self) -> None:
        # Rotated diagonals: sum of (sqrt(a_i) - sqrt(b_i))^2.
        rotation = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).Q
        a, b = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 16.0, 1.0]).double()
        zero = torch.zeros(3)
        distance = frechet_distance(
            exactly(zero, rotation @ a.diag() @ rotation.T), exactly(zero, rotation @ b.diag() @ rotation.T)
        )
        assert distance == pytest.approx(1 + 4 + 4)

    def test_distance_in_two_dimensions_in_closed_form(self) -> None:
        # tr((AB)^(1/2)) = sqrt(tr(AB) + 2 sqrt(det(AB))) for 2x2 positive matrices.
        a = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
        b = torch.tensor([[1.0, -0.7], [-0.7, 3.0]], dtype=torch.float64)
        root = math.sqrt(float((a @ b).trace()) + 2 * math.sqrt(float(torch.linalg.det(a @ b))))
        expected = float(a.trace() + b.trace()) - 2 * root
        assert frechet_distance(exactly(torch.zeros(2), a), exactly(torch.zeros(2), b)) == pytest.approx(expected)

    @pytest.mark.parametrize(("dim", "rank_a", "rank_b"), [(5, 9, 9), (12, 30, 20), (8, 3, 16)])
    def test_distance_equals_scipys_square_root(self, dim: int, rank_a: int, rank_b: int) -> None:
        from scipy.linalg import sqrtm

        a, b = random_covariance(dim, rank_a, 0), random_covariance(dim, rank_b, 1)
        mean = torch.arange(dim).double() / 7
        root = sqrtm((a @ b).numpy())
        expected = float(mean.square().sum() + a.trace() + b.trace()) - 2 * root.trace().real
        measured = frechet_distance(exactly(torch.zeros(dim), a), exactly(mean, b))
        # sqrtm itself loses half the digits where the product is singular
        assert measured == pytest.approx(expected, rel=1e-9 if rank_a >= dim else 1e-5)

    @pytest.mark.parametrize("dim", [3, 11])
    def test_distance_of_a_gaussian_and_its_symmetric_map(self, dim: int) -> None:
        # x -> A x + c with A positive is the optimal transport from N(m, S) to N(A m + c, A S A) (Knott & Smith 1984):
        # the distance is E |A x + c - x|^2 = |A m + c - m|^2 + tr((A - 1) S (A - 1)). S and A S A do not commute.
        one = torch.eye(dim, dtype=torch.float64)
        s, a = random_covariance(dim, 2 * dim, 0), random_covariance(dim, 2 * dim, 1) + 0.1 * one
        m, c = torch.linspace(-1, 2, dim).double(), torch.linspace(3, 1, dim).double()
        expected = (a @ m + c - m).square().sum() + ((a - one) @ s @ (a - one)).trace()
        measured = frechet_distance(exactly(m, s), exactly(a @ m + c, a @ s @ a))
        assert measured == pytest.approx(float(expected), rel=1e-9)

    def test_distance_equals_torchmetrics(self) -> None:
        fid = pytest.importorskip("torchmetrics.image.fid")

        class Identity(torch.nn.Module):
            num_features = 6

            def forward(self, x: Tensor) -> Tensor:
                return x

        g = torch.Generator().manual_seed(0)
        real = torch.randn(50, 6, generator=g) @ torch.randn(6, 6, generator=g)
        fake = torch.randn(40, 6, generator=g) @ torch.randn(6, 6, generator=g) + 0.7
        theirs = fid.FrechetInceptionDistance(Identity())
        theirs.update(real, real=True)
        theirs.update(fake, real=False)
        assert frechet_distance(moments_of(real), moments_of(fake)) == pytest.approx(float(theirs.compute()), rel=1e-5)

    def test_distance_is_symmetric(self) -> None:
        a = exactly(torch.zeros(6), random_covariance(6, 9, 3))
        b = exactly(torch.ones(6), random_covariance(6, 4, 4))
        assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a))

    def test_distance_refuses_non_finite_statistics(self) -> None:
        good = moments_of(torch.randn(5, 2, generator=torch.Generator().manual_seed(0)))
        bad = moments_of(torch.tensor([[1.0, torch.nan], [0.0, 1.0], [1.0, 1.0]]))
        with pytest.raises(AtollError, match="diverged"):
            frechet_distance(good, bad)


class TestBias:
    def test_five_images_per_dimension_give_no_warning(self) -> None:
        assert bias_warning(320, 10_000, 64) is None
        assert bias_warning(10_000, 319, 64) is not None

    def test_the_warning_has_the_rule_and_the_fix_in_one_line(self) -> None:
        said = bias_warning(512, 20_000, 1280)
        assert said is not None
        assert "512 against 20,000 images in 1,280 dimensions is biased upwards" in said
        assert "5 images per dimension (6,400)" in said
        assert "at most 102 components" in said
        assert bias_warning(512, 512, 102) is None
        assert "kernel distance" in said
        assert said.isprintable()

    def test_the_warning_mentions_a_singular_covariance(self) -> None:
        assert "singular" in str(bias_warning(64, 1000, 64))
        assert "singular" not in str(bias_warning(65, 1000, 64))
        g = torch.Generator().manual_seed(0)
        for count, rank in ((64, 63), (65, 64)):
            moments = moments_of(torch.randn(count, 64, generator=g, dtype=torch.float64))
            assert torch.linalg.matrix_rank(moments.covariance) == rank

    def test_the_bias_equals_the_documented_formula(self) -> None:
        # n = 5 D, m = 7 D: (D + 5)/4 (1/n + 1/m) of the total variance, to second order.
        dim, g = 20, torch.Generator().manual_seed(0)
        draw = lambda n: moments_of(torch.randn(n, dim, generator=g))  # noqa: E731
        found = sum(frechet_distance(draw(5 * dim), draw(7 * dim)) for _ in range(40)) / 40
        assert found / dim == pytest.approx((dim + 5) / 4 * (1 / (5 * dim) + 1 / (7 * dim)), rel=0.05)


class TestMetricName:
    class Space:
        dim, explained, sha256 = 2048, 1.0, "3fa9c2d1" + "0" * 56

        def __init__(self, name: str):
            self.name = name

        def __call__(self, images: Tensor, /) -> Tensor:
            return images.flatten(1)

    @pytest.mark.parametrize(
        ("kind", "space", "name"),
        [
            ("FD", "MNv2-pca64", "FD-MNv2-pca64"),
            ("FD", "Inception", "FID"),
            ("FD", "Inception-pca64", "FD-Inception-pca64"),
            ("KD", "Inception", "KID"),
            ("KD", "DINOv2", "KD-DINOv2"),
            ("MMD", "CLIP", "CMMD"),
            ("MMD", "MNv2", "MMD-MNv2"),
            ("FD", "CLIP", "FD-CLIP"),
            ("precision", "Inception", "precision-Inception"),
        ],
    )
    def test_a_metric_has_its_own_name_only_in_its_papers_space(self, kind, space, name) -> None:
        assert metric_name(kind, self.Space(space)) == f"{name} [3fa9c2d1]"

    def test_metric_names_of_pixels(self) -> None:
        features = PixelPCA.fit([torch.rand(6, 1, 4, 5, generator=torch.Generator().manual_seed(0))], 3)
        assert metric_name("FD", features) == f"FD-pca3 [{features.sha256[:8]}]"


class TestPixelPCA:
    def images(self, count: int = 40) -> Tensor:
        """Images [count, 1, 4, 6] with two directions of unequal variance and a little noise."""
        g = torch.Generator().manual_seed(5)
        directions = torch.linalg.qr(torch.randn(24, 2, generator=g)).Q
        weights = torch.randn(count, 2, generator=g) * torch.tensor([3.0, 1.0])
        return (weights @ directions.T + 0.01 * torch.randn(count, 24, generator=g) + 0.5).reshape(count, 1, 4, 6)

    def test_pixel_components_equal_the_singular_vectors(self) -> None:
        images = self.images()
        features = PixelPCA.fit(images.split(7), components=2)
        centred = (images - images.mean(0)).flatten(1)
        expected = torch.linalg.svd(centred, full_matrices=False).Vh[:2].T
        torch.testing.assert_close((features.basis.T @ expected).abs(), torch.eye(2), atol=1e-4, rtol=0)
        assert (features.basis.gather(0, features.basis.abs().argmax(0, keepdim=True)) > 0).all()  # signs are fixed
        assert features.name == "pca2"
        assert features.explained == pytest.approx(1, abs=1e-3)
        assert PixelPCA.fit([images], components=1).explained == pytest.approx(
            float(torch.linalg.svdvals(centred)[0].square() / centred.square().sum()), abs=1e-5
        )
        assert features(images).shape == (40, 2)
        assert features(images).mean(0).abs().max() < 1e-5

    def test_pixel_components_do_not_depend_on_the_batches(self) -> None:
        images = self.images()
        whole, parts = PixelPCA.fit([images], 3), PixelPCA.fit(images.split(3), 3)
        torch.testing.assert_close(whole.basis, parts.basis, atol=1e-5, rtol=0)

    def test_components_are_limited_by_the_number_of_images(self) -> None:
        assert PixelPCA.fit([self.images(5)], components=48).dim == 4
        assert PixelPCA.fit([self.images(40)], components=48).dim == 24

    def test_large_images_are_averaged_first(self) -> None:
        images = torch.rand(6, 3, 64, 96, generator=torch.Generator().manual_seed(0))
        features = PixelPCA.fit([images], components=3)
        assert features.pool == 8  # 18432 values: 1152 by 4 are more than 1024, 288 by 8 are not
        assert features(images).shape == (6, 3)

    def test_the_hash_differs_between_bases(self) -> None:
        a, b = PixelPCA.fit([self.images()], 2), PixelPCA.fit([self.images() + 0.1], 2)
        assert a.sha256 == PixelPCA.fit([self.images()], 2).sha256
        assert a.sha256 != b.sha256

    def test_pixel_components_refuse_no_images(self) -> None:
        with pytest.raises(AtollError, match="no images"):
            PixelPCA.fit([])


class TestDenoisingError:
    def test_error_of_the_exact_velocity_is_the_posterior_variance(self) -> None:
        # One Gaussian N(0, s^2): var(eps - x0 | x_t) = s^2 / ((1-t)^2 s^2 + t^2) per value.
        scale, levels = 0.5, (0.1, 0.5, 0.9)
        mixture = GaussianMixture(torch.zeros(1, 2, 5, 4).double(), torch.tensor([scale]).double(), *_one())
        x0, _ = mixture.sample(400, torch.Generator().manual_seed(0))
        errors = squared_errors(lambda x, t, _: mixture.velocity(x, t), x0, None, levels, range(400))
        measured = DenoisingError.of(levels, errors)
        expected = [scale**2 / ((1 - t) ** 2 * scale**2 + t**2) for t in levels]
        assert measured.by_level == pytest.approx(expected, rel=0.05)
        assert measured.mean == pytest.approx(sum(measured.by_level) / 3)
        assert abs(measured.mean - sum(expected) / 3) < 4 * measured.standard_error

    def test_a_constant_offset_adds_its_square(self) -> None:
        mixture = GaussianMixture.random(3, 2, (1, 3, 4), seed=1)
        x0, _ = mixture.sample(300, torch.Generator().manual_seed(0))

        def off(x: Tensor, t: Tensor, _: object) -> Tensor:
            return mixture.velocity(x, t) + 2

        exact = squared_errors(lambda x, t, _: mixture.velocity(x, t), x0, None, (0.3,), range(300)).mean()
        # the cross term has mean 0
        assert float(squared_errors(off, x0, None, (0.3,), range(300)).mean() - exact) == pytest.approx(4, abs=0.4)

    def test_noise_depends_only_on_seed_and_level(self) -> None:
        x0 = torch.randn(5, 1, 3, 4, generator=torch.Generator().manual_seed(0))
        seeds, levels = [10, 11, 12, 13, 14], (0.2, 0.7)
        together = squared_errors(lambda x, t, _: x, x0, None, levels, seeds)
        apart = torch.cat(
            [squared_errors(lambda x, t, _: x, x0[i : i + 1], None, levels, seeds[i : i + 1]) for i in range(5)]
        )
        torch.testing.assert_close(together, apart)
        same = squared_errors(lambda x, t, _: x, x0[:1].expand(2, -1, -1, -1), None, (0.5, 0.5), [0, 1])
        assert len(same.unique()) == 4  # other noise for each image and level

    def test_standard_error_in_closed_form(self) -> None:
        error = DenoisingError.of((0.1, 0.9), torch.tensor([[1.0, 3.0], [2.0, 6.0], [3.0, 9.0]]))
        assert error.by_level == (2.0, 6.0)
        assert error.mean == 4.0
        assert error.standard_error == pytest.approx(2 / math.sqrt(3))


def _one() -> tuple[Tensor, Tensor]:
    """Weight and cluster of a mixture of one."""
    return torch.ones(1).double(), torch.zeros(1).long()
