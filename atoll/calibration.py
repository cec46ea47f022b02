"""Calibration: how far an expert's x0 estimate can be trusted at each noise level, measured on held-out latents.

An error of eps grows by 1/(1 - t) in velocity, so an uncorrected eps-expert explodes at high noise. HDDM clamps and
damps it with hand-set constants. Atoll measures the slope s(log-SNR) of the least-squares line through the origin from
(x0_hat - m) to (x0 - m), where m is the cluster's mean latent (`atoll.train.calibrate`), and corrects
x0_hat <- m + s (x0_hat - m).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
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


def nodes_within(low: float, high: float) -> tuple[float, ...]:
    """Return the path times among `NODES` from low to high; two between them if the window holds fewer."""
    inside = tuple(t for t in NODES if low <= t <= high)
    # Curves need two nodes at least.
    return inside if len(inside) > 1 else (low + (high - low) / 4, low + 3 * (high - low) / 4)


def resized(mean: Tensor, size: tuple[int, ...]) -> Tensor:
    """Return a mean latent [C,h,w] at another size (H, W), bilinearly: [C,H,W]; unchanged at its own."""
    if tuple(mean.shape[1:]) == tuple(size):
        return mean
    return F.interpolate(mean[None], size, mode="bilinear", align_corners=False, antialias=True)[0]


def mean_like(mean: Tensor, x: Tensor) -> Tensor:
    """Return a mean latent for latents x [B, ...]: in their dtype, on their device, at their size.

    Images of several sizes share one mean. Its correction is measured with it, so it need not be the mean of each.
    """
    mean = mean.to(x)
    return resized(mean, tuple(x.shape[2:])) if mean.ndim == 3 and x.ndim == 4 else mean


@dataclass(frozen=True)
class Calibration:
    """Measurements of one expert at M log-SNR nodes.

    Attributes:
        mean: the cluster's mean latent, [...] as one latent; resized for latents of another size.
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
        """Return the calibration of an exact expert, which corrects nothing."""
        # Two nodes suffice: the slope is 1 everywhere.
        ends = torch.tensor([-10.0, 10.0])
        return cls(mean, ends, torch.ones(2), torch.zeros(2), torch.zeros(2))

    def shrinkage_over_sigma(self, log_snr: Tensor) -> Tensor:
        """Return (1 - s)/sigma at log_snr [B], sigma on the linear path: linear between nodes, constant beyond them.

        This ratio is interpolated because it is what enters the velocity: it stays finite at both ends, so the
        correction divides by neither sigma nor alpha.
        """
        nodes = self.log_snr.to(log_snr)
        # Nodes and slopes follow the sampler's dtype and device.
        values = (1 - self.slope.to(log_snr)) / PATH.sigma(PATH.time_at(nodes))
        left, offset = bracket(nodes, log_snr)
        return values[left] + offset * (values[left + 1] - values[left])

    def correct(self, x0: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Move x0 to m + s (x0 - m), and eps so that x = (1 - t) x0 + t eps stays the same.

        Args:
            x0: estimates [B, ...].
            eps: estimates [B, ...].
            t: times [B] of the linear path.

        Returns:
            The corrected (x0, eps), each [B, ...].
        """
        # x0 - m times 1 - s, over sigma: moves x0 by -sigma and eps by +alpha of it, so x stays.
        excess = per_sample(self.shrinkage_over_sigma(PATH.log_snr(t)), x0) * (x0 - mean_like(self.mean, x0))
        return x0 - per_sample(PATH.sigma(t), x0) * excess, eps + per_sample(PATH.alpha(t), x0) * excess

    @property
    def velocity_mse(self) -> Tensor:
        """Mean squared error of the corrected velocity at each node [M]; on the linear path u = (x - x0)/sigma."""
        return self.x0_mse / PATH.sigma(PATH.time_at(self.log_snr)) ** 2

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that belong into the artifact's safetensors file: the mean."""
        return {"mean": self.mean}

    def config(self) -> dict[str, Any]:
        """Return the card's entry: the curves, as lists of M numbers."""
        names = ("log_snr", "slope", "x0_mse", "x0_mse_raw", "velocity_mse")
        # Plain numbers, since a card is JSON.
        return {name: [float(value) for value in getattr(self, name)] for name in names}

    @classmethod
    def load(cls, config: dict[str, Any], mean: Tensor) -> "Calibration":
        """Return the calibration that `config` and `tensors` were written from.

        Args:
            config: the card's entry. Other keys, and velocity_mse, which follows from the others, are ignored.
            mean: the cluster's mean latent, [...] as one latent.

        Raises:
            AtollError: curves that are not lists of numbers of one length, or log-SNR nodes that do not increase.
        """
        try:
            # The card may come from anywhere: check before use.
            curves = {name: torch.tensor([float(value) for value in config[name]]) for name in _CURVES}
        except (TypeError, ValueError) as error:
            raise AtollError(f"calibration: {error}; expected lists of numbers") from None
        nodes = curves["log_snr"]
        if len(nodes) < 2 or any(len(c) != len(nodes) for c in curves.values()) or not (nodes.diff() > 0).all():
            raise AtollError(
                "calibration: expected at least 2 increasing log-SNR nodes and one value of each curve per node"
            )
        return cls(mean=mean, **curves)
