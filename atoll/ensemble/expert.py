"""One expert: a trained denoiser of any objective, brought to the linear sampling path."""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from atoll.alignment import native_velocity, snr_velocity
from atoll.calibration import Calibration
from atoll.ensemble.prompt_cache import NetworkCondition
from atoll.objective import Objective

Alignment = Literal["snr", "native"]


class Network(Protocol):
    def __call__(self, x: Tensor, time: Tensor, condition: Any, /) -> Tensor:
        """Return the prediction [B, ...] for x [B, ...], time [B] (t * time_scale) and a condition of B rows or None.

        A condition is a `Condition`, or what the network's own `read_prompt` returned for one, if it has that method.
        """


class RouterNetwork(Protocol):
    def __call__(self, x: Tensor, t: Tensor, pooled: Tensor | None = None) -> Tensor:
        """Return log p(cluster | x, t) [B, K] for x [B, ...], t [B] in [0, 1] and a pooled condition [B, P]."""


@dataclass(frozen=True)
class Expert:
    """A trained denoiser.

    Attributes:
        network: network(x [B, ...], time [B], condition) -> [B, ...]; a `torch.nn.Module` or any callable.
        objective: what it was trained with.
        clusters: the clusters it covers; a generalist covers several, a monolith all.
        calibration: measured after training; None applies HDDM's x0 clamp to eps-experts instead.
        name: for messages and traces.
        encoder: the index of the text encoder whose condition it reads.
    """

    network: Network
    objective: Objective
    clusters: tuple[int, ...] = (0,)
    calibration: Calibration | None = None
    name: str = "expert"
    encoder: int = 0

    @property
    def levels(self) -> tuple[float, float]:
        """The path times (low, high) at which it is evaluated: low <= t < high, and t = 1 if high is 1."""
        return self.objective.levels or (0.0, 1.0)

    def velocity(
        self,
        x: Tensor,
        t: Tensor,
        condition: NetworkCondition | None = None,
        alignment: Alignment = "snr",
        raw: bool = False,
    ) -> Tensor:
        """Return dx/dt on the linear sampling path, [B, ...].

        Args:
            x: samples [B, ...].
            t: their times [B].
            condition: of B rows; None for an unconditional network.
            alignment: "snr" (exact) or "native" (HDDM's formulas).
            raw: neither calibrate nor clamp x0; what `Stacking` combines.
        """

        # Alignment calls the network at the expert's own time and scale.
        def predict(x_scaled: Tensor, time: Tensor) -> Tensor:
            return self.network(x_scaled, time, condition)

        # HDDM's formulas evaluate at the same x and t.
        if alignment == "native":
            return native_velocity(predict, self.objective, x, t)
        # Raw: an identity calibration turns off both the correction and HDDM's clamp.
        calibration = Calibration.identity(torch.zeros((), dtype=x.dtype)) if raw else self.calibration
        return snr_velocity(predict, self.objective, x, t, calibration)
