"""A plain torch module as an expert: train it, check it against the oracle, sample it together with another one.

    python examples/bring_your_own_network.py            # twenty seconds on one core; writes runs/own/samples.png

Nothing here comes from `atoll.nn`. An expert needs a callable `network(x, time, condition)` and the objective that it
was trained with; the loop is ordinary PyTorch. The data are two spiral arms of Gaussians, one arm per cluster, so the
best possible velocity is known in closed form (`atoll.testing`), and the trained expert is compared with it.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import plane
import torch
from torch import Tensor, nn

from atoll.ensemble import Ensemble, Expert
from atoll.objective import Objective
from atoll.schedule import PATH, Cosine, Linear
from atoll.solver import sample
from atoll.testing import GaussianMixture, sliced_wasserstein
from atoll.train.calibrate import measure_calibration

# The mean relative error of a velocity that a few seconds of training must reach.
TOLERANCE = 0.15


class Mine(nn.Module):
    """Your network: a perceptron on the point and a few waves of the time. It knows nothing of Atoll."""

    def __init__(self, width: int = 192):
        super().__init__()
        self.register_buffer("frequency", torch.arange(1, 9) * torch.pi)
        self.layers = nn.Sequential(
            nn.Linear(2 + 16, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, 2),
        )  # fmt: skip

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angle = t[:, None] * self.frequency  # [B, 8]
        return self.layers(torch.cat([x, angle.sin(), angle.cos()], dim=1))  # [B, 2]


class Theirs(nn.Module):
    """Another owner's network: residual layers, each shifted by the time."""

    def __init__(self, width: int = 160, depth: int = 3):
        super().__init__()
        self.enter, self.leave = nn.Linear(2, width), nn.Linear(width, 2)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.shifts = nn.ModuleList(nn.Linear(3, width) for _ in range(depth))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = torch.stack([t, t.square(), t.sqrt()], dim=1)  # [B, 3]
        h = self.enter(x)
        for layer, shift in zip(self.layers, self.shifts, strict=True):
            h = h + layer(nn.functional.silu(h + shift(time)))
        return self.leave(h)


def as_network(module: nn.Module) -> Callable[..., Tensor]:
    """The call that an expert makes: network(x [B, ...], time [B], condition) -> [B, ...].

    The time arrives multiplied by the objective's time_scale. These modules want t in [0, 1], so their objectives have
    time_scale 1. They read no condition.
    """

    def network(x: Tensor, time: Tensor, condition: object = None) -> Tensor:
        return module(x, time)

    return network


def train(module: nn.Module, objective: Objective, data: GaussianMixture, steps: int, batch: int = 512) -> nn.Module:
    """Ordinary training: the objective draws the times, adds the noise and computes the loss."""
    generator = torch.Generator().manual_seed(0)
    network = as_network(module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x0 = data.sample(batch, generator)[0].float()
        eps = torch.randn(x0.shape, generator=generator)
        t = objective.sample_time(batch, generator)
        output = network(objective.schedule.diffuse(x0, eps, t), t * objective.time_scale)
        loss = objective.loss(output, x0, eps, t).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    return module.eval().requires_grad_(False)


def make_expert(module: nn.Module, objective: Objective, data: GaussianMixture, cluster: int, name: str) -> Expert:
    """The trained module with its objective and a calibration measured on points that training did not see."""
    held_out = data.sample(2000, torch.Generator().manual_seed(99))[0].float()
    calibration = measure_calibration(as_network(module), objective, held_out, None)
    return Expert(as_network(module), objective, clusters=(cluster,), calibration=calibration, name=name)


def oracle_error(expert: Expert, data: GaussianMixture) -> float:
    """Mean over t of |u - u*| / |u*| on the linear path, u* the exact velocity of the cluster."""
    errors = []
    generator = torch.Generator().manual_seed(5)
    for at in torch.linspace(0.1, 0.9, 9):
        t = at.expand(1000)
        x0 = data.sample(len(t), generator)[0].float()
        x = PATH.diffuse(x0, torch.randn(x0.shape, generator=generator), t)
        exact = data.velocity(x.double(), t.double())
        errors.append(float((expert.velocity(x, t) - exact).norm() / exact.norm()))
    return sum(errors) / len(errors)


def bring(directory: Path, steps: int = 1500, points: int = 2000) -> dict[str, float]:
    """Train both experts, compare them with the oracle, sample the ensemble and write an image.

    Returns:
        Each expert's error against the oracle, and the distance of the ensemble's samples to the data.
    """
    torch.manual_seed(0)
    mixture = plane.pinwheel(arms=2)
    numbers: dict[str, float] = {}

    # Each owner sees the points of one cluster, and chooses network and objective alone.
    experts = []
    for cluster, module, objective, name in (
        (0, Mine(), Objective("eps", Cosine(), time_scale=1.0), "mine: eps, cosine"),
        (1, Theirs(), Objective("flow", Linear(), time_scale=1.0), "theirs: flow, linear"),
    ):
        data = mixture.cluster(cluster)
        expert = make_expert(train(module, objective, data, steps), objective, data, cluster, name)
        numbers[f"oracle error, {name}"] = oracle_error(expert, data)
        experts.append(expert)

    # The router is the mixture's own here; in a run, `atoll train router` trains one.
    ensemble = Ensemble(experts, router=mixture.router, routing="top-2")
    generator = torch.Generator().manual_seed(1)
    real, cluster = mixture.sample(points, generator)
    drawn = sample(ensemble.velocity, torch.randn(points, 2, generator=generator), steps=40, method="heun").double()
    numbers["floor"] = sliced_wasserstein(mixture.sample(points, generator)[0], real)
    numbers["distance of the samples"] = sliced_wasserstein(drawn, real)

    directory.mkdir(parents=True, exist_ok=True)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 5.1), layout="constrained")
    plane.scatter(left, real, plane.RGB[cluster])
    plane.scatter(right, drawn, plane.RGB[mixture.router(drawn, torch.full((points,), 0.02)).argmax(1)])
    left.set_title("the data")
    right.set_title("two plain torch modules, sampled as one model")
    plane.save(figure, directory / "samples.png", dpi=130)
    plt.close(figure)
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?", default=Path("runs/own"), help="where the image goes")
    parser.add_argument("--steps", type=int, default=1500, help="training steps of each expert")
    options = parser.parse_args()
    numbers = bring(options.directory, options.steps)
    for name, value in numbers.items():
        print(f"{name:<40} {value:.3f}")
    worst = max(value for name, value in numbers.items() if name.startswith("oracle error"))
    if worst > TOLERANCE:
        raise SystemExit(f"oracle error {worst:.3f}; expected at most {TOLERANCE}: train for more steps")
    print(f"both experts pass the oracle at a tolerance of {TOLERANCE}")


if __name__ == "__main__":
    main()
