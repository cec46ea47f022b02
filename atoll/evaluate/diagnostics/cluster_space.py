"""Distances to the data of clusters: in latents or in features, to a mean or to the nearest of a sample."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from atoll.errors import AtollError

KEPT = 256  # vectors of each cluster for nearest neighbours


class ClusterSpace:
    """K clusters, each as the mean of its vectors and a sample of them.

    Args:
        centroids: [K, D]; NaN where a cluster has no data.
        samples: of each cluster, [n_k, D].
        features: estimates of x0 [B, ...] -> [B, D], such as `lambda x0: features(codec.decode(x0))`; None: the values
            of the latent itself.
        name: in words, for the report.
    """

    def __init__(
        self,
        centroids: Tensor,
        samples: Sequence[Tensor],
        features: Callable[[Tensor], Tensor] | None = None,
        name: str = "latents",
    ):
        self.centroids, self.samples, self.features, self.name = centroids, tuple(samples), features, name

    @classmethod
    def of(
        cls,
        batches: Iterable[tuple[Tensor, Tensor]],
        features: Callable[[Tensor], Tensor] | None = None,
        name: str = "latents",
        keep: int = KEPT,
    ) -> "ClusterSpace":
        """From batches of (latents [B, ...], clusters [B] int64), which may be as many as they like.

        Every vector goes into its cluster's mean, the first `keep` of each are kept for nearest neighbours: give them
        in random order. Distances are computed on the device of the batches.

        Raises:
            AtollError: no batches.
        """
        sums: dict[int, Tensor] = {}
        counts: dict[int, int] = {}
        kept: dict[int, Tensor] = {}
        for latents, clusters in batches:
            vectors = _vectors(latents, features)
            for k in clusters.unique().tolist():
                mine = vectors[clusters.to(vectors.device) == k]
                sums[k] = sums.get(k, torch.zeros_like(mine[0])) + mine.sum(0)
                counts[k] = counts.get(k, 0) + len(mine)
                kept[k] = torch.cat([kept.get(k, mine[:0]), mine[: keep - len(kept.get(k, ()))]])
        if not sums:
            raise AtollError("a cluster space of no latents; expected some of each cluster")
        some = next(iter(sums.values()))
        every = range(max(sums) + 1)
        centroids = torch.stack([sums[k] / counts[k] if k in sums else torch.full_like(some, math.nan) for k in every])
        return cls(centroids, [kept.get(k, some[None][:0]) for k in every], features, name)

    def distances(self, x0: Tensor) -> dict[str, Tensor]:
        """Root mean square per value between x0 [B, ...] and each cluster's mean ("centroid") and its nearest sample
        ("nearest neighbour"), [B, K]; infinite where a cluster has no data."""
        vectors = _vectors(x0, self.features).to(self.centroids)
        known = torch.tensor([len(sample) > 0 for sample in self.samples], device=vectors.device)
        centroid = torch.cdist(vectors, self.centroids.nan_to_num()).masked_fill(~known, math.inf)
        missing = vectors.new_full((len(vectors),), math.inf)
        nearest = [torch.cdist(vectors, sample).amin(1) if len(sample) else missing for sample in self.samples]
        scale = math.sqrt(vectors.shape[1])
        return {"centroid": centroid / scale, "nearest neighbour": torch.stack(nearest, dim=1) / scale}


def _vectors(latents: Tensor, features: Callable[[Tensor], Tensor] | None) -> Tensor:
    """[B, ...] -> [B, D], in float32 at least."""
    vectors = (latents if features is None else features(latents)).flatten(1)
    return vectors.to(torch.promote_types(vectors.dtype, torch.float32))
