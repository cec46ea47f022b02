"""The `clusters` section."""

from typing import Literal

from pydantic import Field, PositiveInt

from atoll.manifest.base import Section


class ClusterSettings(Section):
    """The clustering.

    Attributes:
        k: number of clusters.
        fine: number of fine centroids; None: as many as the data supports.
        method: as in `atoll.cluster`.
        router_fraction: fraction of all images set apart as clusters/router for the router's training; None: it trains
            on all of encoded/.
    """

    k: PositiveInt = 4
    fine: PositiveInt | None = None
    method: Literal["balanced", "free", "random"] = "balanced"
    router_fraction: float | None = Field(None, gt=0, le=1)
