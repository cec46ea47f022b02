"""Training FLOPs and seconds to today's result: the recipe `fast` against `baseline`, and each of its options alone.

    ATOLL_DATA=... python benchmarks/efficiency.py curves OUT [--sets eurosat-16] [--seeds 0 1 2] [--part 1/2]
    ATOLL_DATA=... python benchmarks/efficiency.py parts OUT [--seeds 0 1 2] [--part 1/2]
    python benchmarks/efficiency.py table OUT
    python benchmarks/efficiency.py plot OUT curves.svg

`curves` trains the monolith (all images) and one expert of K = 4 (its cluster, a quarter of the images in each step)
by both recipes. A training runs at a constant rate, and for each length a copy of it decays to zero: every point
of a curve is a training that ended. `parts` changes one option at a time at a third of the budget. Measured on held-out
images: the denoising error over ten levels, and Fréchet distances of images drawn for held-out captions (two feature
spaces, 64 principal components each). OUT/curves.jsonl and OUT/parts.jsonl have one line per point; finished points are
skipped.
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from small import MOBILENET, SQUEEZENET, Data, Lines, Training, errors, load, mean, network_config, training_flops
from torch import Tensor, nn

from atoll.condition import Condition
from atoll.evaluate import Moments, frechet_distance
from atoll.evaluate.metrics.spaces import FeatureSpace, SpaceFit, build_space_feature
from atoll.manifest import TrainSettings
from atoll.nn import build_network
from atoll.objective import Objective
from atoll.randomness import Stream, seeded
from atoll.solver import sample

WIDTH = 128
IMAGES = {"eurosat-16": 192_000, "eurosat-32": 48_000, "emoji-32": 48_000}  # of the monolith at the full budget
KINDS = {"monolith": None, "expert of 4": 0}  # the cluster
SPACES = {"FD-MNv2": MOBILENET, "FD-Squeeze": SQUEEZENET}
DRAWN, REAL, COMPONENTS, STEPS = 512, 3000, 64, 15


@dataclass(frozen=True)
class Recipe:
    """What differs between trainings.

    Attributes:
        network: "dit" or "mmdit".
        optimizer: of `train.optimizer`.
        lr: learning rate at the monolith's batch.
        batch: of the monolith; an expert of K clusters takes 1/K of it.
        ema: decay of the average.
        targets: weight of stored targets of representation, in the first half of the steps.
        objective: further arguments of the objective.
    """

    network: str = "dit"
    optimizer: str = "adamw"
    lr: float = 1e-3
    batch: int = 128
    ema: float = 0.995
    warmup: int = 100
    decay_from: float = 0.6
    targets: float = 0.0
    objective: tuple[tuple[str, Any], ...] = ()


BASELINE = Recipe()
FAST = Recipe(network="mmdit", optimizer="muon", lr=4e-3, batch=64, warmup=30)
# The lengths of the curves, as fractions of the budget.
LENGTHS = {"baseline": (1 / 3, 1.0), "fast": (1 / 6, 1 / 3, 1 / 2)}


def settings_of(recipe: Recipe, images: int, clusters: int, decay_from: float | None = None) -> TrainSettings:
    """The training of a network that sees 1/`clusters` of `images`."""
    batch = recipe.batch // clusters
    return TrainSettings(
        optimizer=recipe.optimizer,
        steps=images // recipe.batch,
        batch=batch,
        lr=recipe.lr,
        warmup=recipe.warmup,
        decay_from=recipe.decay_from if decay_from is None else decay_from,
        ema=recipe.ema,
        targets_weight=recipe.targets,
    )


class Images:
    """Real images of a cluster, or of all, in the feature spaces; and the distance of drawn ones from them."""

    def __init__(self, data: Data, cluster: int | None, cache: Path):
        self.data, self.cluster, self.cache = data, cluster, cache
        rows = data.training(cluster)
        rows = rows[torch.randperm(len(rows), generator=seeded(0, 2, Stream.SAMPLES))[:REAL]]
        # What was measured once is read again: two passes of two networks take minutes.
        known = torch.load(cache) if cache.is_file() else {}
        self.spaces: dict[str, tuple[FeatureSpace, Moments]] = {}
        for name, config in SPACES.items():
            feature = build_space_feature(config)
            if name not in known:
                fit = SpaceFit(feature, COMPONENTS)
                for part in rows.split(200):
                    fit.update(pixels(data.x0[part]))
                space = fit.done()
                real = self._moments(space, data.x0[rows])
                known[name] = (space.mean, space.basis, space.explained, real.count, real.mean, real._scatter)
            mean, basis, explained, count, centre, scatter = known[name]
            real = Moments(COMPONENTS)
            real.count, real.mean, real._scatter = count, centre, scatter
            self.spaces[name] = (FeatureSpace(feature, mean, basis, explained), real)
        torch.save(known, cache)

    @staticmethod
    def _moments(space: FeatureSpace, images: Tensor) -> Moments:
        moments = Moments(COMPONENTS)
        for part in images.split(200):
            moments.update(space(pixels(part)))
        return moments

    @torch.inference_mode()
    def distances(self, network: nn.Module, objective: Objective) -> dict[str, float]:
        """Draw images for captions of training rows (their number is not limited), and measure them."""
        rows = self.data.training(self.cluster)
        rows = rows[torch.randperm(len(rows), generator=seeded(0, 1, Stream.SAMPLES))[:DRAWN]]
        drawn = []
        for number, part in enumerate(rows.split(128)):
            noise = torch.randn(len(part), *self.data.x0.shape[1:], generator=seeded(0, number, Stream.SAMPLES))
            condition = self.data.encoder.encode(self.data.tokens.index(part))

            def velocity(x: Tensor, t: Tensor, condition: Condition = condition) -> Tensor:
                with torch.autocast("cpu", torch.bfloat16):
                    output: Tensor = network(x, t * objective.time_scale, condition)
                return objective.to_velocity(output.float(), x, t)

            drawn.append(sample(velocity, noise, steps=STEPS, method="dpm++2m"))
        return self.distances_of(torch.cat(drawn))

    def distances_of(self, latents: Tensor) -> dict[str, float]:
        """Measure images that were drawn, as latents."""
        return {
            name: round(float(frechet_distance(real, self._moments(space, latents))), 3)
            for name, (space, real) in self.spaces.items()
        }


def pixels(latents: Tensor) -> Tensor:
    """The codec `pixels` at its default scale: [-1, 1] -> [0, 1]."""
    return ((latents + 1) / 2).clamp(0, 1)


def measured(training: Training, images: Images) -> dict[str, Any]:
    """The metrics of a training that ended."""
    weights, data = training.weights(), training.data
    levels = errors(training.config, weights, training.objective, data, data.held_out(images.cluster))
    network = build_network(training.config)
    network.load_state_dict(weights)
    network.eval()
    seen = training.settings.steps * training.settings.batch
    return {
        "error": round(mean(levels), 6),
        "levels": [round(level, 5) for level in levels],
        **images.distances(network, training.objective),
        "flops": seen * training_flops(data, training.config),
        "seconds": round(training.seconds, 1),
    }


def begin(data: Data, cluster: int | None, recipe: Recipe, settings: TrainSettings, seed: int) -> Training:
    """A new training by a recipe."""
    objective = Objective("flow", "linear", **dict(recipe.objective))
    return Training(
        data, data.training(cluster), network_config(data, WIDTH, recipe.network), settings, objective, seed
    )


def curve(lines: Lines, images: Images, label: str, name: str, recipe: Recipe, budget: int, seed: int) -> None:
    """Train by a recipe, with a decay at each of its lengths."""
    clusters = 1 if images.cluster is None else 4
    keys = {fraction: f"{label} {name} {fraction:.3f} seed={seed}" for fraction in LENGTHS[name]}
    if all(key in lines.rows for key in keys.values()):
        return
    longest = settings_of(recipe, budget, clusters, decay_from=1.0)
    trunk = begin(images.data, images.cluster, recipe, longest, seed)
    for fraction, key in keys.items():
        if key in lines.rows:
            continue
        settings = settings_of(recipe, int(fraction * budget), clusters)
        trunk.run(int(recipe.decay_from * settings.steps))
        end = trunk.branch(settings)
        end.run(settings.steps)
        path = images.cache.parent / "weights" / f"{key}.pt"
        path.parent.mkdir(exist_ok=True)
        torch.save({"config": end.config, "weights": end.weights()}, path)
        lines.add(key, {"set": label, "recipe": name, "fraction": fraction, "seed": seed, **measured(end, images)})


@cache
def images_of(out: Path, name: str, kind: str, targets: bool = False) -> Images:
    """The real images of a set, or of a cluster of it."""
    base, side = name.split("-")
    cluster = KINDS[kind]
    data = load(out, base, int(side), 1 if cluster is None else 4, targets=targets)
    return Images(data, cluster, out / f"{name}-{kind}.real.pt")


def curves(options: argparse.Namespace) -> None:
    """Both recipes, all sets, monolith and expert."""
    lines = Lines(options.out / "curves.jsonl")
    jobs = [
        (seed, name, kind, recipe)
        for seed in options.seeds
        for name in options.sets
        for kind in KINDS
        for recipe in options.recipes
    ]
    part, parts = map(int, options.part.split("/"))
    for seed, name, kind, which in jobs[part - 1 :: parts]:
        recipe = BASELINE if which == "baseline" else FAST
        curve(lines, images_of(options.out, name, kind), f"{name}, {kind}", which, recipe, IMAGES[name], seed)


# One option at a time, at a third of the budget. `fast` and `baseline` at that length are points of the curves.
PARTS = {
    "AdamW": replace(FAST, optimizer="adamw", lr=2e-3),
    "the block `dit`": replace(FAST, network="dit"),
    "batch 128": replace(FAST, batch=128),
    "half the rate": replace(FAST, lr=2e-3),
    "targets of representation": replace(FAST, targets=0.5),
    "logit-normal times": replace(FAST, objective=(("time_sampling", "logit-normal"),)),
    "shift 2": replace(FAST, objective=(("shift", 2.0),)),
}


def parts(options: argparse.Namespace) -> None:
    """Train at a third of the budget, with one option changed."""
    lines = Lines(options.out / "parts.jsonl")
    part, count = map(int, options.part.split("/"))
    jobs = [
        (seed, name, kind, label)
        for seed in options.seeds
        for name in options.sets
        for kind in options.kinds
        for label in PARTS
    ]
    for seed, name, kind, label in jobs[part - 1 :: count]:
        key = f"{name}, {kind} {label} seed={seed}"
        if key not in lines.rows:
            recipe = PARTS[label]
            images = images_of(options.out, name, kind, targets=bool(recipe.targets))
            clusters = 1 if images.cluster is None else 4
            settings = settings_of(recipe, IMAGES[name] // 3, clusters)
            training = begin(images.data, images.cluster, recipe, settings, seed)
            training.run(training.settings.steps)
            lines.add(key, {"set": f"{name}, {kind}", "recipe": label, "seed": seed, **measured(training, images)})


def to_target(points: Sequence[dict[str, Any]], metric: str, target: float, cost: str) -> float | None:
    """The cost at which a curve reaches a target, between its points by the logarithm of the cost.

    None: not reached. The first point's cost if that is below the target already, so an upper bound.
    """
    points = sorted(points, key=lambda point: point["fraction"])
    before = None
    for point in points:
        if point[metric] <= target:
            if before is None:
                return float(point[cost])
            way = (before[metric] - target) / (before[metric] - point[metric])
            return math.exp((1 - way) * math.log(before[cost]) + way * math.log(point[cost]))
        before = point
    return None


def table(options: argparse.Namespace) -> None:
    """Print how many times fewer FLOPs `fast` needs for the baseline's final metrics, and every point."""
    rows = list(Lines(options.out / "curves.jsonl").rows.values())
    metrics = ("error", *SPACES)
    print("| set | " + " | ".join(f"{metric}: FLOPs, time" for metric in metrics) + " |")
    print("| --- " * (1 + len(metrics)) + "|")
    for label in dict.fromkeys(row["set"] for row in rows):
        cells = [label]
        for metric in metrics:
            flops, seconds = [], []
            for seed in sorted({row["seed"] for row in rows}):
                own = [row for row in rows if row["set"] == label and row["seed"] == seed]
                last = [row for row in own if row["recipe"] == "baseline" and row["fraction"] == 1]
                fast = [row for row in own if row["recipe"] == "fast"]
                if last and {row["fraction"] for row in fast} >= set(LENGTHS["fast"]):
                    for costs, cost in ((flops, "flops"), (seconds, "seconds")):
                        reached = to_target(fast, metric, last[0][metric], cost)
                        costs.append(last[0][cost] / reached if reached else math.nan)
            cells.append(f"{_spread(flops)}, {_spread(seconds)}")
        print("| " + " | ".join(cells) + " |")


def plot(options: argparse.Namespace) -> None:
    """Draw every curve: the three metrics against training FLOPs, a row of panels for each set."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.fonttype"] = "none"
    rows = list(Lines(options.out / "curves.jsonl").rows.values())
    labels = list(dict.fromkeys(row["set"] for row in rows))
    metrics = {"error": "denoising error", **{name: name for name in SPACES}}
    figure = Figure(figsize=(9, 2.1 * len(labels)), layout="constrained")
    panels = figure.subplots(len(labels), len(metrics), squeeze=False)
    colours = {"baseline": "#8a8a8a", "fast": "#0b6e99"}
    for label, line in zip(labels, panels, strict=True):
        for (metric, title), axes in zip(metrics.items(), line, strict=True):
            for recipe, colour in colours.items():
                for seed in sorted({row["seed"] for row in rows}):
                    own = [r for r in rows if (r["set"], r["recipe"], r["seed"]) == (label, recipe, seed)]
                    own.sort(key=lambda row: row["flops"])
                    name = recipe if seed == 0 else None
                    axes.plot(
                        [r["flops"] / 1e12 for r in own],
                        [r[metric] for r in own],
                        "o-",
                        ms=3,
                        lw=1,
                        c=colour,
                        label=name,
                    )
            axes.set(xscale="log", yscale="log")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter("{x:g}")
                axis.set_minor_formatter("{x:g}")
            axes.set_title(f"{label}: {title}", fontsize=8)
            axes.tick_params(labelsize=6, which="both")
    for axes in panels[-1]:
        axes.set_xlabel("training TFLOP", fontsize=8)
    panels[0][0].legend(fontsize=7, frameon=False)
    figure.savefig(options.file, metadata={"Date": None})


def _spread(values: Sequence[float]) -> str:
    """The mean of numbers, and their range."""
    known = [value for value in values if not math.isnan(value)]
    missed = f", {len(values) - len(known)} of {len(values)} not" if len(known) < len(values) else ""
    return f"{statistics.mean(known):.2f} ({min(known):.2f} to {max(known):.2f}){missed}" if known else "not reached"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("curves", "parts", "table", "plot"))
    parser.add_argument("out", type=Path)
    parser.add_argument("file", type=Path, nargs="?", default=Path("curves.svg"))
    parser.add_argument("--sets", nargs="+", default=list(IMAGES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["monolith"], help="of parts")
    parser.add_argument("--recipes", nargs="+", choices=LENGTHS, default=list(LENGTHS))
    parser.add_argument("--part", default="1/1", help="which of so many processes this is, as 1/2")
    options = parser.parse_args()
    torch.set_num_threads(1)
    {"curves": curves, "parts": parts, "table": table, "plot": plot}[options.command](options)


if __name__ == "__main__":
    main()
