"""Which sections of atoll.yaml may have `objective.levels`, and what such a network cannot do."""

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
