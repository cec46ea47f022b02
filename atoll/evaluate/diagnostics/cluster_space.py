"""Distances to the data of clusters: in latents or features, to the mean or to the nearest of a sample."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from atoll.errors import AtollError

SAMPLES = 256  # vectors of each cluster for nearest neighbours


class ClusterSpace:
    """K clusters, each as the mean and a sample of its vectors.

    Args:
        centroids: [K, D]; NaN for a cluster without data.
        samples: vectors of each cluster, [n_k, D].
        features: maps estimates of x0 [B, ...] to [B, D], such as `lambda x0: features(codec.decode(x0))`; None: the
            values of the latent itself.
        name: text for the report.
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
        sample_size: int = SAMPLES,
    ) -> "ClusterSpace":
        """Build from batches of (latents [B, ...], clusters [B] int64), any number of them.

        Every vector counts in its cluster's mean; the first `sample_size` of each cluster are the sample for nearest
        neighbours, so pass them in random order. Distances are computed on the device of the batches.

        Raises:
            AtollError: no batches.
        """
        # Sum up the vectors of each cluster, and fill its sample.
        sums: dict[int, Tensor] = {}
        counts: dict[int, int] = {}
        samples: dict[int, Tensor] = {}
        for latents, clusters in batches:
            vectors = _vectors(latents, features)
            for k in clusters.unique().tolist():
                # Cluster by cluster, on the device of the batches.
                mine = vectors[clusters.to(vectors.device) == k]
                sums[k] = sums.get(k, torch.zeros_like(mine[0])) + mine.sum(0)
                counts[k] = counts.get(k, 0) + len(mine)
                samples[k] = torch.cat([samples.get(k, mine[:0]), mine[: sample_size - len(samples.get(k, ()))]])
        if not sums:
            raise AtollError("cluster space: got no latents; expected some from each cluster")
        # Clusters without data get NaN as centroid, and an empty sample.
        some = next(iter(sums.values()))
        clusters_in_order = range(max(sums) + 1)
        centroids = torch.stack(
            [sums[k] / counts[k] if k in sums else torch.full_like(some, math.nan) for k in clusters_in_order]
        )
        # Memory holds the sums and the samples, however many batches arrive.
        return cls(centroids, [samples.get(k, some[None][:0]) for k in clusters_in_order], features, name)

    def distances(self, x0: Tensor) -> dict[str, Tensor]:
        """Root mean square distances per value, [B, K], between x0 [B, ...] and each cluster's data.

        "centroid" is to the cluster's mean, "nearest neighbour" to the nearest vector of its sample; infinite for a
        cluster without data.
        """
        # Empty clusters are infinitely far away.
        vectors = _vectors(x0, self.features).to(self.centroids)
        known = torch.tensor([len(sample) > 0 for sample in self.samples], device=vectors.device)
        centroid = torch.cdist(vectors, self.centroids.nan_to_num()).masked_fill(~known, math.inf)
        # A cluster without a sample has no nearest neighbour.
        missing = vectors.new_full((len(vectors),), math.inf)
        nearest = [torch.cdist(vectors, sample).amin(1) if len(sample) else missing for sample in self.samples]
        # Per value, so that spaces of different size are comparable.
        scale = math.sqrt(vectors.shape[1])
        return {"centroid": centroid / scale, "nearest neighbour": torch.stack(nearest, dim=1) / scale}


def _vectors(latents: Tensor, features: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Features or flat latents [B, ...] -> [B, D], in float32 or float64."""
    # float16 would overflow in sums.
    vectors = (latents if features is None else features(latents)).flatten(1)
    return vectors.to(torch.promote_types(vectors.dtype, torch.float32))
