"""Experts whose weights are not there yet: they are loaded when a sampler first evaluates them."""

from collections.abc import Callable
from typing import cast

import torch
from torch import nn

from atoll.calibration import Calibration
from atoll.ensemble.expert import Expert
from atoll.ensemble.offload import ExpertCache, WeightDtype, bytes_of, cast_weights
from atoll.nn import build_network
from atoll.objective import Objective
from atoll.storage.cards import ExpertCard
from atoll.storage.claims import require_fit

UNLIMITED = 1 << 62  # bytes of a budget that everything fits into


def deferred_expert(
    card: ExpertCard,
    cache: ExpertCache,
    weights: WeightDtype | None,
    load: Callable[[], Expert],
    device: str | torch.device,
) -> Expert:
    """Build an expert from its card alone.

    Args:
        card: its card.
        cache: loads the network when it is first evaluated.
        weights: the dtype that its weights will be rounded to.
        load: returns the whole expert, in host memory.
        device: where it is evaluated.

    Raises:
        AtollError: the card claims a network that its weights cannot hold.
    """
    # The size of the weights file bounds what may be built; each number takes at least one byte.
    size = card.weights.bytes if card.weights else 0
    require_fit(card.network, size, size, card.name)
    with torch.device("meta"):
        network = build_network(card.network)
    # The mean is in the weights file. A network is always evaluated before its calibration is used.
    mean = torch.zeros(card.latent_shape, device=device)
    calibration = None if card.calibration is None else Calibration.load(card.calibration.model_dump(), mean)

    def fetch() -> nn.Module:
        """Load the network, and fill in the calibration's mean."""
        expert = load()
        if expert.calibration is not None:
            mean.copy_(expert.calibration.mean)
        return cast("nn.Module", expert.network)

    placeholder = cache.add(card.name, bytes_of(cast_weights(network, weights)), fetch)
    return Expert(placeholder, Objective(**card.objective), card.clusters, calibration, card.name)
