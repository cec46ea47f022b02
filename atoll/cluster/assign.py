"""The assignment: which cluster an image belongs to, as a function that new images can be put through later."""

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
from atoll.storage.shards import Shard

ClusterMethod = Literal["balanced", "free", "random"]
CENTROIDS = "centroids.safetensors"


@dataclass(frozen=True, eq=False)
class Assigned:
    """A part's clusters [n] int64 and, for those made from features, the distances [n] to the coarse centroids.

    blank: how many rows have a zero vector for a feature: all of these are nearest to one and the same centroid.
    """

    part: Shard
    features: Tensor  # [n,D], at unit length
    clusters: Tensor
    distances: Tensor
    blank: int


@dataclass(frozen=True, eq=False)
class Assignment:
    """The coarse cluster of the nearest fine centroid or, at "random", a hash of the key.

    fine: [F,D]. coarse_of_fine: [F] int64, the cluster of each. coarse: [k,D], the means. "random" has none of these.
    """

    method: ClusterMethod
    k: int
    seed: int
    fine: Tensor | None = None
    coarse_of_fine: Tensor | None = None
    coarse: Tensor | None = None

    def __call__(self, part: Shard, where: Path) -> Assigned:
        """All rows of a part, of the shards at `where`. Raises AtollError if a feature is not finite."""
        features = unit_features(part, torch.arange(len(part)), where)
        blank = int((features == 0).all(1).sum())
        if self.fine is None or self.coarse_of_fine is None or self.coarse is None:
            drawn = draw(hash_keys(part.keys), self.seed, "cluster") % self.k
            clusters, distances = torch.from_numpy(drawn.astype("int64")), torch.zeros(len(part))
        else:
            clusters = self.coarse_of_fine[nearest(features, self.fine)[0]]
            distances = (features - self.coarse[clusters]).norm(dim=1)
        return Assigned(part, features, clusters, distances, blank)

    def sha256(self, feature: Mapping[str, Any]) -> str:
        """The hash of the function: what experts and router of one ensemble must share. feature: the network's config.

        It does not change with the images that are put through it.
        """
        described: dict[str, Any] = {"method": self.method, "k": self.k}
        tensors = [tensor for tensor in (self.fine, self.coarse_of_fine) if tensor is not None]
        described |= {"feature": identity(feature)} if tensors else {"seed": self.seed}
        digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
        for tensor in tensors:
            digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, directory: Path) -> None:
        """Writes its centroids: fine [F,D], coarse [k,D], coarse_of_fine [F]; none of "random"."""
        from safetensors.torch import save

        named = {"fine": self.fine, "coarse": self.coarse, "coarse_of_fine": self.coarse_of_fine}
        write_bytes(directory / CENTROIDS, save({name: t for name, t in named.items() if t is not None}))


def load_assignment(directory: Path, card: ClustersCard) -> Assignment:
    """The assignment of a clusters/ directory with this card.

    Raises:
        AtollError: its centroids are missing, damaged or not those of the card.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = directory / CENTROIDS
    try:
        assignment = Assignment(card.method, card.k, card.seed, **load_file(file))
    except (OSError, SafetensorError, TypeError) as error:
        raise AtollError(f"{file}: cannot be read ({error}); `atoll cluster --force` makes {directory} again") from None
    if (found := assignment.sha256(card.feature)) != card.assignment:
        raise AtollError(
            f"{file}: gives the assignment {found[:12]}..., {directory}'s card says {card.assignment[:12]}...; "
            "the file was altered or damaged: `atoll cluster --force` makes it again"
        )
    return assignment
