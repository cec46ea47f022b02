"""What examples/tour.py stands on: a mixture in the plane, an expert that errs, and maps drawn with matplotlib."""

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from atoll.schedule import PATH
from atoll.testing import GaussianMixture

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b5579a")  # one per cluster and expert, in every figure
RGB = torch.tensor([to_rgb(colour) for colour in COLOURS], dtype=torch.float64)
EXACT = "#bdbdbd"  # the exact field, below the one that is compared with it
LIMIT = 3.9  # a map of the plane shows [-LIMIT, LIMIT] squared


def pinwheel(arms: int = 4, per_arm: int = 7) -> GaussianMixture:
    """A spiral arm of Gaussians per cluster, [arms * per_arm] components in the plane, float64."""
    means, scales, clusters = [], [], []
    for arm in range(arms):
        for i in range(per_arm):
            position = i / (per_arm - 1)  # 0 at the hub, 1 at the tip
            radius, angle = 0.75 + 2.35 * position, 2 * math.pi * arm / arms + 1.25 * position
            means.append([radius * math.cos(angle), radius * math.sin(angle)])
            scales.append(0.14 + 0.12 * position)
            clusters.append(arm)
    count = len(means)
    return GaussianMixture(
        torch.tensor(means, dtype=torch.float64),
        torch.tensor(scales, dtype=torch.float64),
        torch.full((count,), 1 / count, dtype=torch.float64),
        torch.tensor(clusters),
    )


def with_error(network: Callable[..., Tensor], size: float, seed: int) -> Callable[..., Tensor]:
    """A network that errs like a trained one: its output plus a smooth function of x, of standard deviation `size`."""
    generator = torch.Generator().manual_seed(seed)
    frequency = 1.2 * torch.randn(2, 64, generator=generator, dtype=torch.float64)
    phase = 2 * math.pi * torch.rand(64, generator=generator, dtype=torch.float64)
    mixing = torch.randn(64, 2, generator=generator, dtype=torch.float64) * math.sqrt(2 / 64)

    def noisy(x: Tensor, time: Tensor, condition: Any = None) -> Tensor:
        return network(x, time) + size * torch.cos(x @ frequency + phase) @ mixing

    return noisy


def lattice(side: int) -> Tensor:
    """Points [side * side, 2] over the map, row by row from below."""
    line = torch.linspace(-LIMIT, LIMIT, side + 2, dtype=torch.float64)[1:-1]
    y, x = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], dim=1)


def axes_of(points: Tensor) -> tuple[Tensor, Tensor]:
    """The x and y of a square lattice [side * side, 2], each [side, side]."""
    side = math.isqrt(len(points))
    return points[:, 0].reshape(side, side), points[:, 1].reshape(side, side)


def density(mixture: GaussianMixture, points: Tensor, at: float) -> Tensor:
    """p(x_t) up to a factor at the points of a square lattice, [side, side]."""
    t = torch.full((len(points),), at, dtype=torch.float64)
    alpha, sigma = PATH.alpha(t)[:1], PATH.sigma(t)[:1]
    variance = (alpha * mixture.scales) ** 2 + sigma**2  # [M]
    squared = (points[:, None] - alpha * mixture.means).square().sum(-1)  # [B, M]
    p = (mixture.weights / variance * torch.exp(-squared / (2 * variance))).sum(1)
    side = math.isqrt(len(points))
    return (p / p.max()).reshape(side, side)


def colour_at(mixture: GaussianMixture, points: Tensor, at: float) -> Tensor:
    """The experts' colours mixed by the router's p(k | x_t): [B, 3] in [0, 1]."""
    t = torch.full((len(points),), at, dtype=torch.float64)
    return (mixture.router(points, t).exp() @ RGB[: int(mixture.clusters.max()) + 1]).clamp(0, 1)


def map_of_plane(axes: Axes, title: str, mixture: GaussianMixture | None, at: float, colour: str = "#888888") -> None:
    """An empty square map; with the density of x_t in pale colour if a mixture is passed."""
    frame(axes)
    axes.set_title(title)
    if mixture is not None:
        fine = lattice(120)
        levels = [0.05, 0.2, 0.4, 0.6, 0.8, 1.01]
        pale = [(*to_rgb(colour), opacity) for opacity in (0.08, 0.15, 0.22, 0.29, 0.36)]
        axes.contourf(*axes_of(fine), density(mixture, fine, at), levels, colors=pale)


def arrows(axes: Axes, points: Tensor, velocity: Tensor, colour: Any, width: float = 0.0055) -> None:
    """The way to the data: arrows along -u, since sampling runs from t = 1 to t = 0. points, velocity: [B, 2].

    An arrow's length grows with |u| and saturates at the distance between points.
    """
    spacing = 2 * LIMIT / (math.isqrt(len(points)) + 1)
    step = -velocity * spacing * 1.1 / (1 + velocity.norm(dim=1, keepdim=True))
    shape = {"headwidth": 2.6, "headlength": 3.2, "headaxislength": 3.0} if width > 0.01 else {}
    axes.quiver(*points.T, *step.T, color=colour, angles="xy", scale_units="xy", scale=1, width=width, **shape)


def scatter(axes: Axes, points: Tensor, colours: Tensor, limit: float = LIMIT) -> None:
    """A map of [-limit, limit] squared with dots. points: [B, 2], colours: [B, 3]."""
    frame(axes, limit)
    axes.scatter(*points.T, c=colours.numpy(), s=5, alpha=0.7, linewidths=0)


def frame(axes: Axes, limit: float = LIMIT) -> None:
    """The square of the plane that a map shows, in a pale frame."""
    axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[], yticks=[])
    axes.spines[:].set(visible=True, color="#dddddd")


def save(figure: Figure, path: Path, dpi: int) -> None:
    """Write a PNG with a palette of 64 colours, a quarter of the bytes of a full one."""
    with io.BytesIO() as full:
        figure.savefig(full, dpi=dpi)
        Image.open(full).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)
