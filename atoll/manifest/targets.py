"""The `targets` section: patch features that encoding stores beside the latents, for training to predict."""

from typing import Any

from pydantic import Field, model_validator

from atoll.manifest.base import Section
from atoll.storage import bounds


class TargetsSettings(Section):
    """Targets of representation: principal components of a frozen network's patch features (REPA, 2410.06940).

    `atoll encode` fits one set of components for the whole run and stores the targets beside the latents;
    `train.targets_weight` uses them.

    Attributes:
        feature: the network, configured as `feature` is: efficientnet-lite0, mobilenetv2, squeezenet, dinov2 or
            clip-image; null: no targets are stored.
        dims: components per place.
        grid: places per side of an image.
        like: a run, or its encoded/, relative to the run: its components are used; null: they are fitted.
    """

    feature: dict[str, Any] | None = None
    dims: int = Field(8, ge=1, le=bounds.MAX_TARGET_DIMS)
    grid: int = Field(8, ge=1, le=bounds.MAX_TARGET_GRID)
    like: str | None = None

    @model_validator(mode="after")
    def _used(self) -> "TargetsSettings":
        # Defaults may be written out.
        if self.feature is None and (unused := self.model_dump(exclude_defaults=True)):
            raise ValueError(f"{min(unused)}: without a feature, no targets are stored; set targets.feature")
        return self
