"""An expert's calibration: how far its x0 estimate can be trusted at each noise level, as measured on held-out latents.

An error of eps grows by 1/(1 - t) in velocity, so an eps-expert explodes at high noise unless something stops it.
HDDM clamps and damps by hand; here the slope s(log-SNR) of the least-squares line through the origin from (x0_hat - m)
to (x0 - m) is measured (`atoll.train.calibrate`), m being the cluster's mean latent, and x0_hat <- m + s (x0_hat - m).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from atoll.errors import AtollError
from atoll.interpolation import bracket
from atoll.schedule import PATH
from atoll.shapes import per_sample

# Path times at which experts are measured: denser towards noise, where they change; 0.9995 stands for t = 1.
NODES = (
    *(0.02, 0.06, 0.12, 0.2, 0.3, 0.4, 0.5, 0.6, 0.68, 0.75),
    *(0.81, 0.86, 0.9, 0.93, 0.96, 0.98, 0.99, 0.997, 0.9995),
)

_CURVES = ("log_snr", "slope", "x0_mse", "x0_mse_raw")


@dataclass(frozen=True)
class Calibration:
    """Measured at M log-SNR nodes.

    Attributes:
        mean: the cluster's mean latent, [...] as one latent.
        log_snr: nodes [M], increasing.
        slope: s at each node [M].
        x0_mse: mean squared error of the corrected x0 at each node [M].
        x0_mse_raw: the same before correction [M].
    """

    mean: Tensor
    log_snr: Tensor
    slope: Tensor
    x0_mse: Tensor
    x0_mse_raw: Tensor

    @classmethod
    def identity(cls, mean: Tensor) -> "Calibration":
        """The calibration that corrects nothing, of an expert that is right everywhere."""
        ends = torch.tensor([-10.0, 10.0])
        return cls(mean, ends, torch.ones(2), torch.zeros(2), torch.zeros(2))

    def shrinkage_over_sigma(self, log_snr: Tensor) -> Tensor:
        """(1 - s)/sigma at log_snr [B], sigma on the linear path: linear between nodes, constant beyond them.

        This ratio is what is interpolated because it is what enters the velocity: it stays finite at both ends, so
        no division by sigma or alpha is left where the correction is applied.
        """
        nodes = self.log_snr.to(log_snr)
        values = (1 - self.slope.to(log_snr)) / PATH.sigma(PATH.time_at(nodes))
        left, offset = bracket(nodes, log_snr)
        return values[left] + offset * (values[left + 1] - values[left])

    def correct(self, x0: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x0 <- m + s (x0 - m), and eps so that x stays explained on the linear path. x0, eps [B, ...], t [B]."""
        excess = per_sample(self.shrinkage_over_sigma(PATH.log_snr(t)), x0) * (x0 - self.mean.to(x0))
        return x0 - per_sample(PATH.sigma(t), x0) * excess, eps + per_sample(PATH.alpha(t), x0) * excess

    @property
    def velocity_mse(self) -> Tensor:
        """Mean squared error of the corrected velocity at each node [M]: on the linear path u = (x - x0)/sigma."""
        return self.x0_mse / PATH.sigma(PATH.time_at(self.log_snr)) ** 2

    def tensors(self) -> dict[str, Tensor]:
        """What goes into the artifact's safetensors: the mean."""
        return {"mean": self.mean}

    def config(self) -> dict[str, Any]:
        """What goes into the card: the curves."""
        names = ("log_snr", "slope", "x0_mse", "x0_mse_raw", "velocity_mse")
        return {name: [float(value) for value in getattr(self, name)] for name in names}

    @classmethod
    def load(cls, config: dict[str, Any], mean: Tensor) -> "Calibration":
        """The inverse of `config` and `tensors`. Other keys, and velocity_mse, which follows, are not read.

        Raises:
            AtollError: curves that are no equally long lists of numbers, or log-SNR nodes that do not increase.
        """
        try:
            curves = {name: torch.tensor([float(value) for value in config[name]]) for name in _CURVES}
        except (TypeError, ValueError) as error:
            raise AtollError(f"calibration: {error}; expected lists of numbers") from None
        nodes = curves["log_snr"]
        if len(nodes) < 2 or any(len(c) != len(nodes) for c in curves.values()) or not (nodes.diff() > 0).all():
            raise AtollError(
                "calibration: expected at least 2 increasing log-SNR nodes and a value of each curve there"
            )
        return cls(mean=mean, **curves)
