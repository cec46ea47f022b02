"""The objective of an expert or of a model of all clusters, in atoll.yaml."""

from typing import Any

from pydantic import model_validator

from atoll.errors import AtollError
from atoll.manifest.base import Section


class ObjectiveSettings(Section):
    """The arguments of `atoll.objective.Objective`, which checks them."""

    prediction: str
    schedule: str | dict[str, Any]
    time_scale: float = 999.0
    time_sampling: str = "uniform"
    weighting: str = "none"
    # Times moved towards noise, as those of SD3 and FLUX: a number, {log_snr: 3}, {rule: sd3} or {rule: flux}.
    shift: float | dict[str, Any] | None = None
    # The noise levels [low, high] that the network is used at, as times of the linear path (0 data, 1 noise); null:
    # all. It is trained a little beyond them. At each level every cluster needs an expert, or a generalist.
    levels: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _known(self) -> "ObjectiveSettings":
        from atoll.objective import Objective

        try:
            Objective(**self.model_dump())
        except AtollError as error:
            raise ValueError(str(error)) from None
        return self
