"""The cost of sampling one image of the main size, by the number of experts that are evaluated at each step."""

import re
from collections.abc import Sequence

from atoll.manifest import Manifest
from atoll.plan.types import PlannedExpert, PlannedRouter, PlannedSampling


def sampling_cost(
    manifest: Manifest, experts: Sequence[PlannedExpert], router: PlannedRouter, generalist: PlannedExpert | None = None
) -> PlannedSampling:
    """Compute the cost with the recipe's steps and guidance; experts of different cost count by their mean.

    Guidance takes a second evaluation of each expert, for the null condition or, of equal size, by a weak ensemble.
    Where a cluster has no expert of a level, the generalist is evaluated, once for all such clusters. Without a
    generalist, the router's weight of such a cluster goes to the others.

    Args:
        experts: in the order of `manifest.experts`.
    """
    sampling = manifest.sampling
    clusters = manifest.clusters.k if generalist else len({part.cluster for part in manifest.experts})
    calls = 1 if sampling.guidance_scale == 1 else 2
    # What one evaluation of an expert costs at each step, and the fraction of clusters that have one there.
    shift, even = sampling.shift or 1.0, [1 - step / sampling.steps for step in range(sampling.steps)]
    # As atoll.time_shift.shift_time; a plan imports no torch.
    at_times = [_at(manifest, experts, shift * t / (shift * t + (1 - t)), clusters) for t in even]
    general = generalist.sizes[0].forward_flops if generalist else 0.0

    routing = re.fullmatch(r"top-(\d+)", sampling.routing)
    active = {"top-1": 1, **({sampling.routing: int(routing[1])} if routing else {}), "full": clusters}
    flops = {}
    for name, wanted in active.items():
        k = min(wanted, clusters)
        # The generalist stands in for any of k clusters; the router's cost is three forward passes in training.
        networks = sum(k * fraction * one + (1 - fraction**k) * general for one, fraction in at_times)
        flops[name] = calls * networks + sampling.steps * router.flops / 3
    return PlannedSampling(sampling.steps, calls, flops)


def _at(manifest: Manifest, experts: Sequence[PlannedExpert], t: float, clusters: int) -> tuple[float, float]:
    """The mean forward FLOPs of the experts that are used at a time, and the fraction of clusters that have one."""
    used = []
    for part, expert in zip(manifest.experts, experts, strict=True):
        low, high = part.objective.levels or (0.0, 1.0)
        if low <= t < high or (t == high == 1):
            used.append((part.cluster, expert.sizes[0].forward_flops))
    if not used:
        return 0.0, 0.0
    return sum(cost for _, cost in used) / len(used), len({cluster for cluster, _ in used}) / clusters
