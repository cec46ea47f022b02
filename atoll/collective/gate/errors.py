"""Errors of experts and references in velocity space: row by row, on the same rows with the same noise."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from atoll.collective.gate.linear import LinearDenoiser
from atoll.collective.gate.probe import Noisy, diffuse
from atoll.condition import Condition
from atoll.ensemble import Expert

_BATCH = 64  # rows per call of a network
NoisyVelocity = Callable[[Noisy], Tensor]  # velocities [n, ...] of n noisy rows


def expert_velocity(expert: Expert, condition: Condition, device: torch.device | str = "cpu") -> NoisyVelocity:
    """Return an expert's velocity as an ensemble evaluates it: aligned and calibrated.

    Args:
        expert: on `device`.
        condition: of every row.
        device: where it is evaluated.
    """

    def velocity(noisy: Noisy) -> Tensor:
        parts = []
        for rows in torch.arange(len(noisy.t)).split(_BATCH):
            own = condition.index(rows).to(device)
            parts.append(expert.velocity(noisy.x[rows].to(device), noisy.t[rows].to(device), own).float().cpu())
        return torch.cat(parts)

    return velocity


def linear_velocity(denoiser: LinearDenoiser) -> NoisyVelocity:
    """Return a linear denoiser's velocity."""
    return lambda noisy: denoiser.velocity(noisy.x, noisy.t)


@dataclass(frozen=True, eq=False)
class Draws:
    """Rows at some noise levels.

    Attributes:
        latents: x0 [n, ...].
        noisy: one per level.
        scale: the error that a Gaussian would show at each row's time [levels, n]. Errors are divided by it, so that
            within a level, too, every time counts alike.
    """

    latents: Tensor
    noisy: tuple[Noisy, ...]
    scale: Tensor

    @staticmethod
    def of(latents: Tensor, edges: Sequence[float], denoiser: LinearDenoiser, seed: int, first: int = 0) -> "Draws":
        """Draw noise and times.

        Args:
            latents: x0 [n, ...].
            edges: the ends of the levels, one more than levels.
            denoiser: of the cluster's latents.
            seed: of the gate's run.
            first: number of the first draw; different checks draw different noise.
        """
        noisy = tuple(
            diffuse(latents, low, high, seed, first + level) for level, (low, high) in enumerate(pairwise(edges))
        )
        return Draws(latents, noisy, torch.stack([denoiser.error(one.t) for one in noisy]).clamp(min=1e-12))

    def select(self, levels: Sequence[int]) -> "Draws":
        """Return some of the levels, with the same noise."""
        return Draws(self.latents, tuple(self.noisy[level] for level in levels), self.scale[list(levels)])

    @torch.inference_mode()
    def errors(self, velocity: NoisyVelocity) -> Tensor:
        """Return squared errors in units of `scale`, [levels, n]. An infinite or undefined one is inf."""
        parts = []
        for noisy in self.noisy:
            error = (velocity(noisy).double() - (noisy.eps - self.latents)).square().flatten(1).mean(1)
            parts.append(torch.nan_to_num(error, nan=torch.inf, posinf=torch.inf))
        return torch.stack(parts) / self.scale
