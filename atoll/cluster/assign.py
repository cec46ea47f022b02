"""The assignment: the cluster of an image, as a function that can be applied to new images later."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from atoll.cluster.nearest import nearest, unit_features
from atoll.cluster.sampling import draw, hash_keys
from atoll.encoders.weights import identity
from atoll.errors import AtollError
from atoll.storage.artifact import write_bytes
from atoll.storage.cards import ClustersCard
from atoll.storage.memory import refuse_out_of_memory
from atoll.storage.shards import Shard

ClusterMethod = Literal["balanced", "free", "random"]
CENTROIDS = "centroids.safetensors"


@dataclass(frozen=True, eq=False)
class Assigned:
    """The clusters of a shard's rows.

    Attributes:
        part: the shard.
        features: [n,D] at unit length.
        clusters: [n] int64.
        distances: to the coarse centroids, [n]; 0 for method "random".
        blank: number of rows whose feature is a zero vector; all of them are nearest to the same centroid.
    """

    part: Shard
    features: Tensor
    clusters: Tensor
    distances: Tensor
    blank: int


@dataclass(frozen=True, eq=False)
class Assignment:
    """The coarse cluster of the nearest fine centroid or, for method "random", a hash of the key.

    Attributes:
        method: "balanced", "free" or "random".
        k: number of clusters.
        seed: of the clustering.
        fine: fine centroids [F,D]; None for "random".
        coarse_of_fine: the cluster of each fine centroid, [F] int64; None for "random".
        coarse: the clusters' means [k,D]; None for "random".
    """

    method: ClusterMethod
    k: int
    seed: int
    fine: Tensor | None = None
    coarse_of_fine: Tensor | None = None
    coarse: Tensor | None = None

    def __call__(self, part: Shard, path: Path) -> Assigned:
        """Assign all rows of a shard of the shards at `path`. Raises AtollError if a feature is not finite."""
        features = unit_features(part, torch.arange(len(part)), path)
        # Blank images have a zero feature; the report counts them.
        blank = int((features == 0).all(1).sum())
        # Random clusters need the keys alone.
        if self.fine is None or self.coarse_of_fine is None or self.coarse is None:
            numbers = draw(hash_keys(part.keys), self.seed, "cluster") % self.k
            clusters, distances = torch.from_numpy(numbers.astype("int64")), torch.zeros(len(part))
        else:
            # The nearest fine centroid decides, not the nearest coarse one, as in the fit.
            clusters = self.coarse_of_fine[nearest(features, self.fine)[0]]
            distances = (features - self.coarse[clusters]).norm(dim=1)
        return Assigned(part, features, clusters, distances, blank)

    def sha256(self, feature: Mapping[str, Any]) -> str:
        """Return the hash of the function, which experts and router of one ensemble must share.

        It does not depend on the images that are assigned.

        Args:
            feature: the feature network's config.
        """
        # Everything that determines the function, but nothing about the images.
        described: dict[str, Any] = {"method": self.method, "k": self.k}
        # The coarse means are left out: they describe the clusters but assign nothing.
        tensors = [tensor for tensor in (self.fine, self.coarse_of_fine) if tensor is not None]
        described |= {"feature": identity(feature)} if tensors else {"seed": self.seed}
        digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
        for tensor in tensors:
            # Dtype and shape too: equal bytes could be other centroids.
            digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, directory: Path) -> None:
        """Write the centroids: fine [F,D], coarse [k,D], coarse_of_fine [F]; an empty file for "random"."""
        from safetensors.torch import save

        # Random clusters have no tensors, but the file must exist to be loaded.
        named = {"fine": self.fine, "coarse": self.coarse, "coarse_of_fine": self.coarse_of_fine}
        write_bytes(directory / CENTROIDS, save({name: t for name, t in named.items() if t is not None}))


def load_assignment(directory: Path, card: ClustersCard) -> Assignment:
    """Load the assignment of a clusters/ directory with this card.

    Raises:
        AtollError: the centroids are missing, damaged or not those of the card.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = directory / CENTROIDS
    try:
        # A file with unknown names raises TypeError.
        assignment = Assignment(card.method, card.k, card.seed, **load_file(file))
    except (OSError, SafetensorError, TypeError, MemoryError) as error:
        refuse_out_of_memory(error, file)
        raise AtollError(f"{file}: cannot be read ({error}); `atoll cluster --force` makes {directory} again") from None
    # The centroids could have been altered since the card was written.
    if (digest := assignment.sha256(card.feature)) != card.assignment:
        raise AtollError(
            f"{file}: gives the assignment {digest[:12]}..., {directory}'s card says {card.assignment[:12]}...; "
            "the file was altered or damaged: `atoll cluster --force` makes it again"
        )
    return assignment
