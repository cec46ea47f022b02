"""All metrics of one set of images against the real ones in one feature space."""

from collections.abc import Iterable

import torch
from torch import Tensor

from atoll.evaluate.metrics.fidelity import kernel_distance, manifold_scores, rbf_distance
from atoll.evaluate.metrics.frechet import Moments, Named, frechet_distance, metric_name
from atoll.evaluate.metrics.gaussian import Gaussian

_SUBSETS = 20  # for the kernel distance, of at most 1,000 images each
_NEIGHBOURS = 6  # minimum number of images for manifolds

# Kinds of metrics: the meaning, and whether larger is better.
KINDS = {
    "FD": ("Fréchet distance between Gaussians fitted to the features", False),
    "KD": ("kernel distance, unbiased: the mean over subsets of 1,000 images", False),
    "MMD": ("kernel distance of unit vectors, Gaussian kernel, times 1,000", False),
    "precision": ("fraction of the images within the real ones' manifold", True),
    "recall": ("fraction of the real images within the drawn ones' manifold", True),
    "density": ("real neighbourhoods that contain an image, over 5", True),
    "coverage": ("fraction of the real images with a drawn one in their neighbourhood", True),
    "R-precision": ("fraction of the images whose own prompt is the nearest", True),
    "CLIPScore": ("100 max(cos, 0) of image and prompt", True),
    "diversity": ("mean distance between the images of one prompt", True),
}


class Statistics:
    """The features of one set in one space: moments of all, and the first `max_features` themselves."""

    def __init__(self, dim: int, max_features: int):
        self.moments, self.max_features = Moments(dim), max_features
        self._first: list[Tensor] = []
        self._count = 0
        self.broken = 0  # images whose features are not finite

    @classmethod
    def of(cls, dim: int, max_features: int, batches: Iterable[Tensor]) -> "Statistics":
        """From batches of features [B, D]."""
        statistics = cls(dim, max_features)
        for features in batches:
            statistics.update(features)
        return statistics

    def update(self, features: Tensor) -> None:
        """Add features [n, D]."""
        self.moments.update(features)
        self.broken += int((~torch.isfinite(features).all(1)).sum())
        # The moments count all images; only the first ones are stored.
        if self._count < self.max_features:
            self._first.append(features[: self.max_features - self._count].detach().cpu().float())
            self._count += len(self._first[-1])

    @property
    def features(self) -> Tensor:
        """[min(n, max_features), D], in the order of arrival."""
        return torch.cat(self._first) if self._first else torch.zeros(0, len(self.moments.mean))


def image_metrics(
    space: Named, real: Statistics, drawn: Statistics, published: Gaussian | None = None
) -> dict[str, float | None]:
    """Compute every metric of the space, by its full name in the order of KINDS; None if images diverged.

    Args:
        published: reference statistics in this space; the Fréchet distance to them comes last, "FID [...] to NAME".
    """
    # Names first: they are the same for images that diverged.
    kinds = ["FD", "KD", *(["MMD"] if space.name == "CLIP" else [])]
    enough = min(len(real.features), len(drawn.features)) >= _NEIGHBOURS
    kinds += ["precision", "recall", "density", "coverage"] if enough else []
    names = {kind: metric_name(kind, space) for kind in kinds}
    if published is not None:
        names["published"] = f"{metric_name('FD', space)} to {published.name}"
    if drawn.broken:
        return dict.fromkeys(names.values())
    # Values.
    values: dict[str, float] = {"FD": frechet_distance(drawn.moments, real.moments)}
    values["KD"] = kernel_distance(real.features, drawn.features, _SUBSETS).mean
    if "MMD" in names:
        values["MMD"] = rbf_distance(real.features, drawn.features)
    if enough:
        manifold = manifold_scores(real.features, drawn.features)
        values |= {kind: getattr(manifold, kind) for kind in ("precision", "recall", "density", "coverage")}
    if published is not None:
        values["published"] = frechet_distance(drawn.moments, published)
    return {names[kind]: value for kind, value in values.items()}


def kind_of(metric: str) -> str:
    """The kind of a metric by its full name, a key of KINDS: "FD" for "FD-MNv2-pca64 [3fa9c2d1]"."""
    # FID, KID and CMMD are names of kinds in particular spaces.
    own = {"FID": "FD", "KID": "KD", "CMMD": "MMD"}
    word = metric.split(" ")[0]
    kind = next((kind for kind in KINDS if word == kind or word.startswith(f"{kind}-")), None)
    return kind or own.get(word, "diversity")
