"""A tour of the mathematics on a mixture in the plane: schedules, alignment, calibration, fusion, samples.

    python examples/tour.py                  # half a minute on one core; writes runs/tour/*.png and numbers.json
    python examples/tour.py docs/tour --small

The data are a pinwheel of Gaussians. Each of its four arms is one cluster, and each cluster has one expert with an
objective of its own:

    cluster 0    eps     cosine        DDPM (Ho et al. 2020) on Nichol & Dhariwal's schedule
    cluster 1    flow    linear        Flow Matching (Lipman et al. 2023)
    cluster 2    x0      linear-beta   the schedule of DDPM and DiT, 1000 steps
    cluster 3    v       cosine        v-prediction (Salimans & Ho 2022)

The experts are exact: for a mixture of Gaussians the best possible denoiser is known in closed form (`atoll.testing`).
Whatever error is left is therefore an error of the conversion, and it must be zero up to rounding.

References: HDDM is arXiv 2603.06741, DDM is arXiv 2501.05450.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import plane
import torch
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from plane import COLOURS, EXACT, LIMIT, RGB
from torch import Tensor

from atoll.calibration import Calibration
from atoll.ensemble import Ensemble, Expert
from atoll.objective import Objective
from atoll.schedule import PATH, Cosine, LinearBeta, Schedule
from atoll.solver import sample
from atoll.testing import GaussianMixture, sliced_wasserstein
from atoll.train.calibrate import measure_calibration

# PATH is the path that the sampler follows: x_t = (1 - t) x0 + t eps.
SCHEDULES: dict[str, Schedule] = {"linear": PATH, "cosine": Cosine(), "linear-beta": LinearBeta()}
SCHEDULE_COLOURS = {"linear": "#444444", "cosine": "#7b3294", "linear-beta": "#e08214"}

OBJECTIVES = (
    Objective("eps", SCHEDULES["cosine"]),
    Objective("flow", SCHEDULES["linear"]),
    Objective("x0", SCHEDULES["linear-beta"]),
    Objective("v", SCHEDULES["cosine"]),
)
NAMES = ("eps, cosine", "flow, linear", "x0, linear-beta", "v, cosine")
Numbers = dict[str, float]


@dataclass(frozen=True)
class Effort:
    """How much is computed.

    Attributes:
        samples: points drawn from the mixture, and by each ensemble.
        steps: steps of the solver.
        grid: arrows per side of a map.
        dpi: pixels per inch of the images.
    """

    samples: int = 2000
    steps: int = 60
    grid: int = 15
    dpi: int = 110


SMALL = Effort(samples=300, steps=20, grid=9, dpi=60)


def exact_experts(mixture: GaussianMixture) -> list[Expert]:
    """One exact expert per cluster, each with its own objective. Exact experts need no correction."""
    nothing_to_correct = Calibration.identity(torch.zeros(2, dtype=torch.float64))
    return [
        Expert(mixture.network(objective, k), objective, (k,), nothing_to_correct, name=NAMES[k])
        for k, objective in enumerate(OBJECTIVES)
    ]


def noisy_points(mixture: GaussianMixture, t: Tensor, seed: int = 0) -> Tensor:
    """x_t [B, 2] of the linear path for fresh x0 and eps, at times t [B]."""
    generator = torch.Generator().manual_seed(seed)
    x0, _ = mixture.sample(len(t), generator)
    eps = torch.randn(x0.shape, generator=generator, dtype=x0.dtype)
    return PATH.diffuse(x0, eps, t)


def relative_error(velocity: Tensor, exact: Tensor) -> float:
    """|u - u*| / |u*| over a batch [B, 2]."""
    return float((velocity - exact).norm() / exact.norm())


# ----------------------------------------------------------------------------------------------------------------------
# 1. Schedules
#
# A schedule is two functions of time: x_t = alpha(t) x0 + sigma(t) eps, with t = 0 for data and t = 1 for noise. What a
# denoiser can know depends on their ratio alone, the log-SNR
#
#     lambda(t) = log(alpha(t)^2 / sigma(t)^2)                                        (Kingma et al. 2021, Eq. 3)
#
# So two schedules mean the same noise level where their log-SNR is equal, not where their t is equal. The sampler is at
# time t of the linear path. An expert of another schedule is evaluated at the time tau of its own schedule with
#
#     lambda_expert(tau) = lambda_path(t)        and the input        c x,   c = alpha_expert(tau) / alpha_path(t)
#
# since c x then has the very distribution that the expert was trained on at time tau.
# ----------------------------------------------------------------------------------------------------------------------
def show_schedules(at: float = 0.35) -> tuple[Figure, Numbers]:
    """alpha, sigma and log-SNR of three schedules, and how tau is read off for the sampler's time t = `at`."""
    t = torch.linspace(0.001, 0.999, 800, dtype=torch.float64)
    here = torch.tensor([at], dtype=torch.float64)
    log_snr = float(PATH.log_snr(here))
    figure, (coefficients, ratio, times) = plt.subplots(1, 3, figsize=(11.5, 4.3), layout="constrained")
    numbers: Numbers = {}

    for name, schedule in SCHEDULES.items():
        colour = SCHEDULE_COLOURS[name]
        coefficients.plot(t, schedule.alpha(t), color=colour, label=name)
        coefficients.plot(t, schedule.sigma(t), color=colour, linestyle="--")
        ratio.plot(t, schedule.log_snr(t), color=colour)

        # The time of equal log-SNR: along the horizontal line to the curve, then down to the axis.
        tau = float(schedule.time_at(torch.tensor([log_snr], dtype=torch.float64)))
        ratio.plot([tau, tau], [-14, log_snr], color=colour, linewidth=1.2, linestyle=":")
        ratio.plot([tau], [log_snr], "o", color=colour, markersize=7)
        numbers[f"tau of {name} at t = {at}"] = tau
        times.plot(t, schedule.time_at(PATH.log_snr(t)), color=colour)
        times.plot([at], [tau], "o", color=colour, markersize=7)

    ratio.axhline(log_snr, color="#999999", linewidth=1, zorder=0)
    ratio.text(
        0.42, 7.2, f"t = {at} on the linear path:\nλ = {log_snr:.2f}. The dots have\nthe same λ, each at its τ",
        fontsize=10, color="#555555",
    )  # fmt: skip
    times.axvline(at, color="#999999", linewidth=1, zorder=0)
    coefficients.set(title="x = α(t) x0 + σ(t) eps", xlabel="t", ylabel="α (solid), σ (dashed)")
    ratio.set(title="log-SNR λ(t) = log(α² / σ²)", xlabel="t", ylabel="λ", ylim=(-14, 14))
    times.set(title="time τ of the expert", xlabel="t of the sampler", ylabel="τ with the same λ")
    figure.legend(*coefficients.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure, numbers


# ----------------------------------------------------------------------------------------------------------------------
# 2. Alignment
#
# Whatever an expert predicts, its output gives the pair (x0, eps): x = alpha x0 + sigma eps is one equation, the
# prediction is the other (`atoll.objective`). At the aligned point (c x, tau) the pair holds for x itself, so
#
#     u = dx/dt = alpha_path' x0 + sigma_path' eps = eps - x0                         (exact: `alignment="snr"`)
#
# HDDM's Eqs. 5-8, read literally, evaluate the expert at the same x and the same t, and use the derivatives of the
# expert's own schedule (`alignment="native"`, with the paper's safeguards). That is right for a flow expert on the
# linear path and for no other.
# ----------------------------------------------------------------------------------------------------------------------
def show_alignment(mixture: GaussianMixture, effort: Effort, at: float = 0.6) -> tuple[Figure, Numbers]:
    """The relative velocity error of both alignments over t, and one expert's two fields at time `at`."""
    figure, (curves, left, right) = plt.subplots(
        1, 3, figsize=(12.5, 4.7), layout="constrained", width_ratios=(1.05, 1, 1)
    )
    times = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)
    numbers: Numbers = {}

    # Each expert knows the whole mixture here, so that the exact velocity is the mixture's own.
    for objective, name, colour in zip(OBJECTIVES, NAMES, COLOURS, strict=True):
        expert = Expert(mixture.network(objective), objective, calibration=Calibration.identity(torch.zeros(2)))
        errors: dict[str, list[float]] = {"native": [], "snr": []}
        for number, t in enumerate(times):
            batch = t.expand(128)
            x = noisy_points(mixture, batch, seed=number)
            exact = mixture.velocity(x, batch)
            errors["native"].append(relative_error(expert.velocity(x, batch, alignment="native"), exact))
            errors["snr"].append(relative_error(expert.velocity(x, batch, alignment="snr"), exact))
        # A flow expert on the linear path has nothing to convert: its error is 0, which a logarithmic axis cannot show.
        curves.semilogy(times, [max(e, 1e-17) for e in errors["native"]], color=colour, linestyle="--")
        curves.semilogy(times, [max(e, 1e-17) for e in errors["snr"]], color=colour, label=name)
        numbers[f"native: largest relative error of {name}"] = max(errors["native"])
        numbers[f"snr: largest relative error of {name}"] = max(errors["snr"])
    curves.text(0.5, 30, "native (dashed): HDDM Eqs. 5-8", ha="center", fontsize=10, color="#555555")
    curves.text(0.5, 2e-13, "snr (solid): exact up to rounding", ha="center", fontsize=10, color="#555555")
    curves.set(title="relative error of the velocity", xlabel="t", ylim=(1e-17, 1e3), xlim=(0, 1))
    curves.legend(frameon=False, loc=(0.05, 0.36))

    # The fields of the eps-expert at one time: the exact one lies below in grey.
    objective = OBJECTIVES[0]
    expert = Expert(mixture.network(objective), objective, calibration=Calibration.identity(torch.zeros(2)))
    x = plane.lattice(effort.grid)
    t = torch.full((len(x),), at, dtype=torch.float64)
    exact = mixture.velocity(x, t)
    for axes, alignment, title in (
        (left, "native", "native: same x, same t"),
        (right, "snr", "snr: same log-SNR"),
    ):
        velocity = expert.velocity(x, t, alignment=alignment)  # type: ignore[arg-type]
        plane.map_of_plane(axes, f"{title}   (t = {at})", mixture, at)
        plane.arrows(axes, x, exact, EXACT, width=0.014)
        plane.arrows(axes, x, velocity, COLOURS[0])
        axes.set_xlabel(f"{NAMES[0]} (blue) over exact (grey)")
    return figure, numbers


# ----------------------------------------------------------------------------------------------------------------------
# 3. Calibration
#
# Trained experts are not exact. On the linear path an eps-expert's velocity is
#
#     u = eps - x0,   x0 = (x - t eps) / (1 - t)        so        u = (eps - x) / (1 - t)
#
# and an error of eps grows by 1 / (1 - t): it explodes at high noise. HDDM clamps and damps by hand. Atoll measures, on
# held-out points of the cluster and at each log-SNR, the slope of the least-squares line through the origin from
# (x0_hat - m) to (x0 - m):
#
#     s(lambda) = <x0_hat - m, x0 - m> / <x0_hat - m, x0_hat - m>,        x0_hat <- m + s (x0_hat - m)
#
# with the cluster's mean m. Where the expert knows nothing, s = 0 and its answer is the mean. No constant is tuned.
# ----------------------------------------------------------------------------------------------------------------------
def show_calibration(mixture: GaussianMixture, effort: Effort, size: float = 0.1) -> tuple[Figure, Numbers]:
    """Four noisy eps-experts before and after their calibration.

    Args:
        mixture: the data.
        effort: how much is computed.
        size: the standard deviation of the experts' eps-error; that of eps is 1.
    """
    objective = OBJECTIVES[0]
    generator = torch.Generator().manual_seed(7)
    real, cluster = mixture.sample(effort.samples, generator)
    floor = sliced_wasserstein(mixture.sample(effort.samples, generator)[0], real)
    noise = torch.randn(effort.samples, 2, generator=generator, dtype=torch.float64)
    figure, grid = plt.subplots(2, 2, figsize=(9.6, 9.4), layout="constrained")
    panels = grid.flatten()

    # Measure every expert on held-out points of its own cluster.
    before, after = [], []
    for k in range(4):
        network = plane.with_error(mixture.network(objective, k), size, seed=k)
        held_out = mixture.cluster(k).sample(effort.samples, torch.Generator().manual_seed(k))[0]
        calibration = measure_calibration(network, objective, held_out, None, seed=k)
        before.append(Expert(network, objective, (k,), Calibration.identity(calibration.mean)))
        after.append(Expert(network, objective, (k,), calibration))
        t = PATH.time_at(calibration.log_snr)
        panels[0].plot(t, calibration.slope, color=COLOURS[k], marker="o", markersize=3.5)
    panels[0].set(title="measured slope s", xlabel="t", ylim=(-0.05, 1.08))
    note = f"four eps-experts, eps-error {size:.0%}:\nhow far x0 can be trusted"
    panels[0].text(0.04, 0.08, note, color="#555555")

    # Sample both ensembles from the same noise. The distance is the sliced 1-Wasserstein distance to real points.
    numbers: Numbers = {"calibration: floor": floor}
    panels[1].set_title(f"the data   (floor {floor:.3f})")
    plane.scatter(panels[1], real, RGB[cluster])
    for axes, experts, name in ((panels[2], before, "before"), (panels[3], after, "after")):
        ensemble = Ensemble(experts, mixture.router, routing="full")
        drawn = sample(ensemble.velocity, noise, steps=effort.steps, method="euler")
        distance = sliced_wasserstein(drawn, real)
        numbers[f"calibration: distance {name}"] = distance
        axes.set_title(f"{name} calibration   (distance {distance:.3f})")
        zoom = 1 if name == "after" else 5
        plane.scatter(axes, drawn, plane.colour_at(mixture, drawn, 0.02), zoom * LIMIT)
        if zoom > 1:
            axes.add_patch(Rectangle((-LIMIT, -LIMIT), 2 * LIMIT, 2 * LIMIT, fill=False, edgecolor="#555555"))
            axes.text(-4.7 * LIMIT, -4.7 * LIMIT, "square: the extent of the other maps", color="#555555")
    return figure, numbers


# ----------------------------------------------------------------------------------------------------------------------
# 4. Fusion
#
#     u(x, t) = sum_k p(k | x_t) u_k(x, t)                                            (HDDM Eq. 1, DDM Eq. 6)
#
# The global velocity is the mean of the clusters' velocities under the posterior of the cluster, which is what the
# router learns. With exact experts and the exact router the sum is the exact velocity, whatever the objectives are.
# ----------------------------------------------------------------------------------------------------------------------
def show_fusion(mixture: GaussianMixture, effort: Effort, at: float) -> tuple[Figure, Numbers]:
    """Each expert's field, the router's weights and the fused field over the exact one, at time `at`."""
    experts = exact_experts(mixture)
    ensemble = Ensemble(experts, mixture.router, routing="full")
    figure, grid = plt.subplots(2, 3, figsize=(11.5, 8), layout="constrained")
    panels = grid.flatten()
    figure.suptitle(f"t = {at}", fontsize=14)
    x, fine = plane.lattice(effort.grid), plane.lattice(240)
    t = torch.full((len(x),), at, dtype=torch.float64)

    # Each expert alone leads every point to its own arm.
    for k, expert in enumerate(experts):
        plane.map_of_plane(panels[k], f"expert {k}: {NAMES[k]}", mixture.cluster(k), at, COLOURS[k])
        plane.arrows(panels[k], x, expert.velocity(x, t), COLOURS[k])

    # The router: every point has the experts' colours, mixed by p(k | x_t); white lines are the density of x_t.
    plane.map_of_plane(panels[4], "router: p(k | x)", None, at)
    colours = plane.colour_at(mixture, fine, at).reshape(240, 240, 3)
    panels[4].imshow(colours, extent=(-LIMIT, LIMIT, -LIMIT, LIMIT), origin="lower", interpolation="bilinear")
    contours = plane.density(mixture, fine, at)
    panels[4].contour(*plane.axes_of(fine), contours, 5, colors="white", linewidths=0.8, alpha=0.8)

    # The fused field over the exact one.
    fused, exact = ensemble.velocity(x, t), mixture.velocity(x, t)
    error = float((fused - exact).abs().max())
    plane.map_of_plane(panels[5], f"fused over exact (error {error:.0e})", mixture, at)
    plane.arrows(panels[5], x, exact, EXACT, width=0.016)
    plane.arrows(panels[5], x, fused, plane.colour_at(mixture, x, at).numpy(), width=0.006)
    return figure, {f"fusion: largest error at t = {at}": error}


# ----------------------------------------------------------------------------------------------------------------------
# 5. Samples
#
#     x <- x + (t_next - t) u(x, t)         from t = 1 to t = 0                       (Euler; Heun is used here)
#
# One noise, four experts that never met, one model. Each sample's path has the colour of the expert that the router
# trusts there. By the native formulas the same experts miss the data.
# ----------------------------------------------------------------------------------------------------------------------
def show_samples(mixture: GaussianMixture, effort: Effort) -> tuple[Figure, Numbers]:
    """The mixture, paths of the fused field, its samples, and the samples by the native formulas."""
    generator = torch.Generator().manual_seed(3)
    real, cluster = mixture.sample(effort.samples, generator)
    floor = sliced_wasserstein(mixture.sample(effort.samples, generator)[0], real)
    noise = torch.randn(effort.samples, 2, generator=generator, dtype=torch.float64)
    figure, grid = plt.subplots(2, 2, figsize=(9.6, 9.8), layout="constrained")
    panels = grid.flatten()
    plane.scatter(panels[0], real, RGB[cluster])
    panels[0].set_title(f"the data   (floor {floor:.3f})")
    numbers: Numbers = {"samples: floor": floor}

    points: list[Tensor] = [noise]
    ensemble = Ensemble(exact_experts(mixture), mixture.router, routing="full")
    drawn = sample(
        ensemble.velocity, noise, effort.steps, method="heun", callback=lambda _, x: points.append(x.clone())
    )
    paths = torch.stack(points)[:, :150]  # [steps + 1, 150, 2]
    for step, (start, end) in enumerate(itertools.pairwise(paths)):
        segments = torch.stack([start, end], dim=1).numpy()  # [150, 2, 2]
        colours = plane.colour_at(mixture, start, 1 - (step + 0.5) / effort.steps).numpy()
        panels[1].add_collection(LineCollection(list(segments), colors=colours, linewidths=1.1))
    plane.map_of_plane(panels[1], "paths from noise to data", None, 0)

    by_native = sample(
        Ensemble(exact_experts(mixture), mixture.router, routing="full", alignment="native").velocity,
        noise, effort.steps, method="heun",
    )  # fmt: skip
    for axes, x, name in ((panels[2], drawn, "fused, snr"), (panels[3], by_native, "fused, native")):
        distance = sliced_wasserstein(x, real)
        numbers[f"samples: distance of {name}"] = distance
        axes.set_title(f"{name}   (distance {distance:.3f})")
        plane.scatter(axes, x, plane.colour_at(mixture, x, 0.02))
    return figure, numbers


def tour(directory: Path, effort: Effort) -> Numbers:
    """Write every figure and numbers.json to a directory.

    Returns:
        What the figures show, by name.
    """
    directory.mkdir(parents=True, exist_ok=True)
    mixture = plane.pinwheel()
    numbers: Numbers = {}
    sections: dict[str, Callable[[], tuple[Figure, Numbers]]] = {
        "schedules": show_schedules,
        "alignment": lambda: show_alignment(mixture, effort),
        "calibration": lambda: show_calibration(mixture, effort),
        "fusion-1": lambda: show_fusion(mixture, effort, at=0.75),
        "fusion-2": lambda: show_fusion(mixture, effort, at=0.45),
        "fusion-3": lambda: show_fusion(mixture, effort, at=0.2),
        "samples": lambda: show_samples(mixture, effort),
    }
    style = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 12}
    with plt.rc_context(style):
        for name, show in sections.items():
            start = time.perf_counter()
            figure, shown = show()
            plane.save(figure, directory / f"{name}.png", effort.dpi)
            plt.close(figure)
            numbers |= shown
            print(f"{directory / name}.png   {time.perf_counter() - start:.1f} s")
            for label, value in shown.items():
                print(f"    {label:<52} {value:.3g}")
    (directory / "numbers.json").write_text(json.dumps(numbers, indent=2) + "\n")
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?", default=Path("runs/tour"), help="where the images go")
    parser.add_argument("--small", action="store_true", help="few points and small images, for a quick look")
    options = parser.parse_args()
    tour(options.directory, SMALL if options.small else Effort())


if __name__ == "__main__":
    main()
