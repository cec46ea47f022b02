"""Agreement of images with their prompts: by a CLIP, or without one by a regression on real images."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from atoll.condition import Condition
from atoll.encoders.feature import Feature, build_feature
from atoll.encoders.text import TextEncoder, build_encoder
from atoll.errors import AtollError
from atoll.evaluate.metrics.frechet import Features, Moments, metric_name
from atoll.randomness import cpu_generator, random_rows

CANDIDATES = 100  # prompts among which an image's own should be the nearest: AttnGAN's R-precision
# Ridge parameters to try, relative to the mean variance of a feature's dimension.
RELATIVE_LAMBDAS = tuple(10.0 ** (power / 4) for power in range(-32, 17))
FREEDOM = 0.95  # of n: a regression with more degrees of freedom cannot be judged by cross-validation
EQUAL = 1e-9  # cosines nearer than this are a tie


class CLIPScore:
    """100 max(cos(image, prompt), 0) between the two halves of one CLIP.

    Hessel et al. 2021, with the factor 100 that is usual for generated images instead of their 2.5, and without their
    prefix "A photo depicts". CLIP reads 77 tokens of a prompt. Images are resized by the shorter side to the network's
    size and centre-cropped.

    Args:
        images: "clip-image".
        texts: "clip" with pooled: projected, of the same CLIP. `load` builds both.

    Raises:
        AtollError: the halves do not share a space.
    """

    def __init__(self, images: Feature, texts: TextEncoder):
        # A cosine needs two vectors of one space.
        if texts.pooled_dim != images.dim:
            raise AtollError(
                f"the CLIP's images have {images.dim} dimensions, its texts {texts.pooled_dim}; "
                "name two halves of one CLIP"
            )
        self._images, self._texts = images, texts
        halves = f"{images.config()['sha256']} {texts.config()['sha256']}"
        self.name = f"CLIPScore [{hashlib.sha256(halves.encode()).hexdigest()[:8]}]"

    @classmethod
    def load(cls, weights: str) -> "CLIPScore":
        """Load both halves from a transformers directory (or repository) with a whole CLIP and its tokenizer.

        Raises:
            AtollError: as `build_feature` and `build_encoder`.
        """
        images = build_feature({"name": "clip-image", "weights": weights})
        return cls(images, build_encoder({"name": "clip", "weights": weights, "pooled": "projected"}))

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Images [B, C, H, W] in [0, 1] and their B prompts -> scores [B], 0 to 100; NaN for a non-finite image.

        Raises:
            AtollError: the numbers of prompts and images differ.
        """
        if len(images) != len(prompts):
            raise AtollError(f"{len(images)} images and {len(prompts)} prompts; expected one prompt for each image")
        image_vectors = self._images(images)  # [B,D]
        text_vectors = self._texts.encode(self._texts.tokenize(prompts).to(image_vectors.device)).pooled  # [B,D]
        assert text_vectors is not None  # the projected vector
        # A negative cosine counts as 0, as published.
        score = 100 * F.cosine_similarity(image_vectors, text_vectors).clamp(min=0)
        return score.masked_fill(~torch.isfinite(images).flatten(1).all(1).to(score.device), torch.nan)


@dataclass(frozen=True)
class Agreement:
    """Agreement of images with their prompts.

    Attributes:
        r_precision: fraction of images whose own prompt is the nearest.
        cosine: mean cosine between the predicted vector of an image and its own prompt, both centred.
        images: number of images.
        candidates: number of prompts to choose from; chance gives r_precision 1 / candidates.
    """

    r_precision: float
    cosine: float
    images: int
    candidates: int


class RidgeAgreement:
    """Predicts the prompt's vector from an image's features, by a ridge regression fitted on real images.

    It needs no CLIP and is as good as its features: held-out real images with their prompts give the ceiling, shuffled
    prompts the floor. It predicts best for the images that it was fitted on, so measure with prompts of other images:
    otherwise a model that memorised would score above the ceiling.

    R-precision as in AttnGAN (Xu et al. 2018, section 4), with this regression instead of their trained encoders. `fit`
    makes one.
    """

    def __init__(self, features: Features, mean: Tensor, target_mean: Tensor, weights: Tensor, ridge: float):
        """mean [D], target_mean [P], weights [D, P]; ridge: the chosen parameter, in units of a variance."""
        self.features, self.ridge = features, ridge
        self._mean, self._target_mean, self._weights = mean, target_mean, weights
        # The name identifies the fit: scores of another fit are not comparable.
        digest = hashlib.sha256(features.sha256.encode())
        for part in (mean, target_mean, weights):
            digest.update(part.float().contiguous().numpy().tobytes())
        self.name = f"{metric_name('R-precision', features).rsplit(' ', 1)[0]} [{digest.hexdigest()[:8]}]"

    @classmethod
    def fit(cls, features: Features, pairs: Iterable[tuple[Tensor, Tensor]]) -> "RidgeAgreement":
        """Fit on batches of (features [B, D], prompts' vectors [B, P]) of real training images.

        Vectors are normalised to unit length and centred. Closed form from their joint moments, in float64: memory is
        (D + P)^2, however many images. Of 49 ridge parameters between 1e-8 and 1e4 times the features' mean variance,
        the one with the least generalised cross-validation error is taken (Golub, Heath & Wahba 1979).

        Raises:
            AtollError: fewer than 3 images; features or vectors that are not finite, or all equal.
        """
        # Joint moments of features and vectors.
        moments: Moments | None = None
        for features_batch, vectors in pairs:
            joint = torch.cat([features_batch.detach().cpu().double(), _unit(vectors)], dim=1)  # [B,D+P]
            moments = moments or Moments(joint.shape[1])
            moments.update(joint)
        if moments is None or moments.count < 3:
            raise AtollError(f"a regression on {moments.count if moments else 0} images; expected at least 3")
        if not moments.finite:
            raise AtollError("features or prompts' vectors of real images that are not finite; look at the data")
        # Split the covariance into its blocks and solve.
        n, dim = moments.count, features.dim
        covariance = moments.covariance * ((n - 1) / n)
        xx, xy, yy = covariance[:dim, :dim], covariance[:dim, dim:], covariance[dim:, dim:]
        # Without variance on one side, a regression predicts a constant.
        if float(xx.trace()) <= 0 or float(yy.trace()) <= 0:
            raise AtollError("all images have the same features, or all prompts the same vector: nothing to tell apart")
        weights, ridge = _ridge(xx, xy, float(yy.trace()), n)
        return cls(features, moments.mean[:dim], moments.mean[dim:], weights, ridge)

    def predict(self, features: Tensor) -> Tensor:
        """Features [n, D] -> centred vectors [n, P] of their prompts, float64."""
        return (features.detach().cpu().double() - self._mean) @ self._weights

    def score(self, features: Tensor, prompts: Sequence[str], vectors: Tensor, seed: int = 0) -> Agreement:
        """Score images with features [n, D] against their n prompts with vectors [n, P].

        The candidates are an image's own prompt and 99 random others of the distinct prompts (all, if there are at
        most 100). Prompts with equal vectors share a hit. Two sets of images for the same prompts get the same
        candidates.

        Raises:
            AtollError: numbers that do not fit, features that are not finite, or fewer than two distinct prompts.
        """
        if not len(features) == len(prompts) == len(vectors):
            raise AtollError(
                f"{len(features)} images, {len(prompts)} prompts and {len(vectors)} vectors; expected as many of each"
            )
        if not bool(torch.isfinite(features).all()):
            raise AtollError("features that are not finite: the sampling diverged")
        # The distinct prompts, and which of them is each image's own.
        number = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        if len(number) < 2:
            raise AtollError(f"{len(number)} distinct prompts; expected at least 2 to tell apart")
        own = torch.tensor([number[prompt] for prompt in prompts])  # [n]
        # The first image of each prompt provides its vector.
        first = {prompt: row for row, prompt in reversed(list(enumerate(prompts)))}
        distinct = F.normalize(_unit(vectors[[first[prompt] for prompt in number]]) - self._target_mean)  # [M,P]
        # Is the own prompt the nearest? Ties share the hit.
        predicted = F.normalize(self.predict(features))  # [n,P]
        cosines = (predicted * distinct[own]).sum(1)  # [n]
        generator = cpu_generator(seed)
        hits = 0.0
        for row, mine in enumerate(own.tolist()):
            others = _others(mine, len(distinct), generator)
            # Cosines with the other candidates; both sides have unit length.
            rivals = distinct[others] @ predicted[row]  # [99] or fewer
            if bool((rivals <= cosines[row] + EQUAL).all()):
                hits += 1 / (1 + int((rivals >= cosines[row] - EQUAL).sum()))
        candidates = min(CANDIDATES, len(distinct))
        return Agreement(hits / len(own), float(cosines.mean()), len(own), candidates)


def pooled_vectors(conditions: Sequence[Condition]) -> Tensor:
    """Return one vector per prompt, [B, P]: the pooled one, or the mean of the token states if there is none.

    Several encoders' vectors stand side by side, each at unit length.
    """
    vectors = [_pooled_vector(condition) for condition in conditions]
    return vectors[0] if len(vectors) == 1 else torch.cat([F.normalize(vector) for vector in vectors], dim=1)


def _pooled_vector(condition: Condition) -> Tensor:
    if condition.pooled is not None:
        return condition.pooled
    # Padding does not count in the mean.
    mask = condition.mask[..., None].to(condition.states.dtype)  # [B,L,1]
    return (condition.states * mask).sum(1) / mask.sum(1)


def _unit(vectors: Tensor) -> Tensor:
    """[n, P] at unit length, float64; zeros (a prompt of no class) stay zeros."""
    return F.normalize(vectors.detach().cpu().double())


def _others(own: int, count: int, generator: torch.Generator) -> Tensor:
    """At most 99 numbers of 0..count-1 without `own`."""
    if count <= CANDIDATES:
        return torch.tensor([other for other in range(count) if other != own])
    # Numbers from `own` on move up by one, which skips it.
    drawn = random_rows(count - 1, CANDIDATES - 1, generator)
    return drawn + (drawn >= own)


def _ridge(xx: Tensor, xy: Tensor, yy: float, n: int) -> tuple[Tensor, float]:
    """(weights [D, P], ridge parameter) of least GCV, from the covariances [D, D] and [D, P] and y's variance.

    GCV = |y - y_hat|^2 / n / (1 - tr(H) / n)^2; tr(H) counts the mean as one.
    """
    # In the eigenbasis every ridge parameter costs O(D).
    values, rotation = torch.linalg.eigh(xx)  # [D], [D,D]
    values = values.clamp(min=0)
    along = rotation.T @ xy  # [D,P]
    power = along.square().sum(1)  # [D]
    # Relative to the variance, so that the scale of the features does not matter.
    ridges = [relative * float(values.mean()) for relative in RELATIVE_LAMBDAS]
    best, chosen = float("inf"), ridges[-1]
    for ridge in ridges:
        residual = yy - float((power * (values + 2 * ridge) / (values + ridge).square()).sum())
        freedom = 1 + float((values / (values + ridge)).sum())
        # Nearly interpolating fits make the criterion 0 / 0.
        if freedom > FREEDOM * n:
            continue
        error = max(residual, 0.0) / (1 - freedom / n) ** 2
        if error < best:
            best, chosen = error, ridge
    # Back from the eigenbasis.
    return rotation @ (along / (values + chosen)[:, None]), chosen
