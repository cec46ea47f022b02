"""One set of images against the real ones in one feature space, from features that arrive in batches."""

from collections.abc import Iterable

import torch
from torch import Tensor

from atoll.evaluate.metrics.fidelity import kernel_distance, manifold_scores, rbf_distance
from atoll.evaluate.metrics.frechet import Moments, Named, frechet_distance, metric_name
from atoll.evaluate.metrics.gaussian import Gaussian

_SUBSETS = 20  # of at most 1,000 images, for the kernel distance
_NEIGHBOURS = 6  # images at least, for manifolds

# What a metric's kind means, and whether more of it is better.
KINDS = {
    "FD": ("Fréchet distance between Gaussians fitted to the features", False),
    "KD": ("kernel distance, unbiased: the mean over subsets of 1,000 images", False),
    "MMD": ("kernel distance of unit vectors, Gaussian kernel, times 1,000", False),
    "precision": ("share of the images within the real ones' manifold", True),
    "recall": ("share of the real images within the drawn ones' manifold", True),
    "density": ("real neighbourhoods that an image lies in, over 5", True),
    "coverage": ("share of the real images with a drawn one in their neighbourhood", True),
    "R-precision": ("share of the images whose own prompt is read off them", True),
    "CLIPScore": ("100 max(cos, 0) of image and prompt", True),
    "diversity": ("mean distance between the images of one prompt", True),
}


class Statistics:
    """Of one set's features in one space: moments of all, and the first `kept` themselves."""

    def __init__(self, dim: int, kept: int):
        self.moments, self.kept = Moments(dim), kept
        self._first: list[Tensor] = []
        self._count = 0
        self.broken = 0  # images whose features are not finite

    @classmethod
    def of(cls, dim: int, kept: int, batches: Iterable[Tensor]) -> "Statistics":
        found = cls(dim, kept)
        for features in batches:
            found.update(features)
        return found

    def update(self, features: Tensor) -> None:
        """Adds features [n, D]."""
        self.moments.update(features)
        self.broken += int((~torch.isfinite(features).all(1)).sum())
        if self._count < self.kept:
            self._first.append(features[: self.kept - self._count].detach().cpu().float())
            self._count += len(self._first[-1])

    @property
    def features(self) -> Tensor:
        """[min(n, kept), D], in the order of arrival."""
        return torch.cat(self._first) if self._first else torch.zeros(0, len(self.moments.mean))


def image_metrics(
    space: Named, real: Statistics, drawn: Statistics, published: Gaussian | None = None
) -> dict[str, float | None]:
    """Every metric of the space by its whole name, in KINDS' order; None where images diverged.

    Args:
        published: reference statistics in this space; the Fréchet distance to them comes last, "FID [...] to NAME".
    """
    kinds = ["FD", "KD", *(["MMD"] if space.name == "CLIP" else [])]
    enough = min(len(real.features), len(drawn.features)) >= _NEIGHBOURS
    kinds += ["precision", "recall", "density", "coverage"] if enough else []
    names = {kind: metric_name(kind, space) for kind in kinds}
    if published is not None:
        names["published"] = f"{metric_name('FD', space)} to {published.name}"
    if drawn.broken:
        return dict.fromkeys(names.values())
    found: dict[str, float] = {"FD": frechet_distance(drawn.moments, real.moments)}
    found["KD"] = kernel_distance(real.features, drawn.features, _SUBSETS).mean
    if "MMD" in names:
        found["MMD"] = rbf_distance(real.features, drawn.features)
    if enough:
        manifold = manifold_scores(real.features, drawn.features)
        found |= {kind: getattr(manifold, kind) for kind in ("precision", "recall", "density", "coverage")}
    if published is not None:
        found["published"] = frechet_distance(drawn.moments, published)
    return {names[kind]: value for kind, value in found.items()}


def kind_of(metric: str) -> str:
    """ "FD" of "FD-MNv2-pca64 [3fa9c2d1]": a key of KINDS."""
    own = {"FID": "FD", "KID": "KD", "CMMD": "MMD"}
    word = metric.split(" ")[0]
    found = next((kind for kind in KINDS if word == kind or word.startswith(f"{kind}-")), None)
    return found or own.get(word, "diversity")
