"""The cost of sampling one image of the main size, by the number of experts that are evaluated at each step."""

import re

from atoll.manifest import Manifest
from atoll.plan.types import PlannedExpert, PlannedRouter, PlannedSampling


def sampling_cost(manifest: Manifest, experts: tuple[PlannedExpert, ...], router: PlannedRouter) -> PlannedSampling:
    """Compute the cost with the recipe's steps and guidance; experts of different cost count by their mean.

    Guidance takes a second evaluation of each expert, for the null condition or, of equal size, by a weak ensemble.
    """
    sampling, clusters = manifest.sampling, manifest.clusters.k
    calls = 1 if sampling.guidance_scale == 1 else 2
    # One evaluation of an expert; the router's cost is three forward passes in training.
    one = sum(expert.sizes[0].forward_flops for expert in experts) / len(experts)
    routing = re.fullmatch(r"top-(\d+)", sampling.routing)
    active = {"top-1": 1, **({sampling.routing: int(routing[1])} if routing else {}), "full": clusters}
    return PlannedSampling(
        sampling.steps,
        calls,
        {name: sampling.steps * (calls * min(k, clusters) * one + router.flops / 3) for name, k in active.items()},
    )
