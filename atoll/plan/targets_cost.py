"""What targets of representation cost an expert: a projector in training, and bytes in the shards."""

from dataclasses import dataclass

from atoll.manifest import Manifest, TrainSettings
from atoll.plan.cost import NetworkSizes

_STATE = 20  # bytes of a parameter: weight, gradient, two moments and average in float32


@dataclass(frozen=True)
class TargetsCost:
    """Of one training.

    Attributes:
        parameters: of the projector.
        flops: per image in training, the mean over all steps, some of which have no targets.
        state_bytes: of the projector's weights, gradients, moments and average.
    """

    parameters: int
    flops: float
    state_bytes: int


def targets_cost(n: NetworkSizes, dims: int, train: TrainSettings) -> TargetsCost | None:
    """Return the cost of the projector of `atoll.train.targets`; None without targets."""
    if not train.targets_weight:
        return None
    D = n.width
    # The backward pass costs two forwards.
    flops = 3 * 2 * n.image_tokens * (2 * D * D + D * dims) * train.targets_until
    parameters = 2 * (D + 1) * D + (D + 1) * dims
    return TargetsCost(parameters, flops, _STATE * parameters)


def target_bytes(manifest: Manifest) -> int:
    """Return the bytes of an image's targets in the shards."""
    chosen = manifest.targets
    return 2 * chosen.dims * chosen.grid**2 if chosen.feature is not None else 0
