"""Which sections of atoll.yaml may have `objective.levels`, and what such a network cannot do."""

from collections.abc import Iterable
from typing import Any

from atoll.storage.layout import MONOLITH, STUDENT


def check_part_levels(section: str, levels: object, train: dict[str, Any]) -> None:
    """Raise ValueError if a section's network is of some levels only, and has to denoise all of them.

    Args:
        section: its name.
        levels: of its objective; None for all of them.
        train: the settings of its training.
    """
    if levels is None:
        return
    if section in (MONOLITH, STUDENT):
        raise ValueError(f"{section}: objective.levels: it samples alone, at every level; leave them out")
    # Images that are drawn by the network alone.
    for key, off in (("sample_every", "0"), ("validation", "null")):
        if train[key]:
            raise ValueError(
                f"{section}: train.{key} with objective.levels: a network of some levels draws no image alone; set "
                f"{key}: {off} in its train"
            )


def check_covered(experts: Iterable[Any], generalist: Any) -> None:
    """Raise ValueError unless every cluster's experts, with the generalist, denoise every level.

    Args:
        experts: the sections of the experts.
        generalist: that of the generalist, None if there is none.
    """
    general = [] if generalist is None else [generalist.objective.levels]
    by_cluster: dict[int, list[Any]] = {}
    for expert in experts:
        by_cluster.setdefault(expert.cluster, list(general)).append(expert.objective.levels)
    for cluster, own in sorted(by_cluster.items()):
        # Up to here, every level has a network.
        end = 0.0
        for low, high in sorted((0.0, 1.0) if levels is None else levels for levels in own):
            if low > end:
                break
            end = max(end, high)
        if end < 1:
            above = min((levels[0] for levels in own if levels and levels[0] > end), default=1.0)
            raise ValueError(
                f"experts: no network denoises cluster {cluster} at the levels {end:g} to {above:g}; widen "
                "objective.levels of an expert, or add a `generalist:` of these levels"
            )
