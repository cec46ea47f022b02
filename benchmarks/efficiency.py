"""Training FLOPs and seconds to today's result: `fast`, by Muon or AdamW, against `baseline`, and each option alone.

    ATOLL_DATA=... python benchmarks/efficiency.py curves OUT [--sets eurosat-16] [--seeds 0 1 2] [--part 1/2]
    ATOLL_DATA=... python benchmarks/efficiency.py parts OUT [--seeds 0 1 2] [--part 1/2]
    ATOLL_DATA=... python benchmarks/efficiency.py spectra OUT [--sets eurosat-16] [--kinds monolith]

efficiency_report.py makes tables and a plot of them.

`curves` trains the monolith (all images) and one expert of K = 4 (its cluster, a quarter of the images in each step)
by each recipe. A training runs at a constant rate, and for each length a copy of it decays to zero: every point
of a curve is a training that ended. `parts` changes one option at a time at a third of the budget. Measured on
held-out images: the denoising error over ten levels. On images drawn for captions of training images: Fréchet distances
in two feature spaces, of 64 principal components each. OUT/curves.jsonl and OUT/parts.jsonl have one line per point;
finished points are skipped. `spectra` compares the drawn images' power by spatial frequency with that of real ones.
"""

import argparse
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
FAST_ADAMW = replace(FAST, optimizer="adamw", lr=2e-3)
RECIPES = {"baseline": BASELINE, "fast": FAST, "fast-adamw": FAST_ADAMW}
# The lengths of the curves, as fractions of the budget.
LENGTHS = {"baseline": (1 / 3, 1.0), "fast": (1 / 6, 1 / 3, 1 / 2), "fast-adamw": (1 / 3, 1 / 2)}


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

    def distances(self, network: nn.Module, objective: Objective) -> dict[str, float]:
        """Draw images, and measure them."""
        return self.distances_of(self.draw(network, objective))

    @torch.inference_mode()
    def draw(self, network: nn.Module, objective: Objective, steps: int = STEPS) -> Tensor:
        """Draw images for captions of training rows (their number is not limited): [n,C,H,W]."""
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

            drawn.append(sample(velocity, noise, steps=steps, method="dpm++2m"))
        return torch.cat(drawn)

    @torch.inference_mode()
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
    """All recipes and sets, monolith and expert."""
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
        images = images_of(options.out, name, kind)
        curve(lines, images, f"{name}, {kind}", which, RECIPES[which], IMAGES[name], seed)


# One option at a time, at a third of the budget. `fast` and `baseline` at that length are points of the curves.
PARTS = {
    "AdamW": FAST_ADAMW,
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


def power(images: Tensor) -> Tensor:
    """The mean power of images [n,C,H,W] by spatial frequency, in rings of one cycle an image: [H/2]."""
    side = images.shape[-1]
    spectrum = torch.fft.fft2(images.clamp(-1, 1)).abs().square().mean((0, 1))
    k = torch.fft.fftfreq(side) * side
    ring = (k[:, None].square() + k[None].square()).sqrt().long()
    return torch.stack([spectrum[ring == r].mean() for r in range(side // 2)])


def spectra(options: argparse.Namespace) -> None:
    """Print, for each training of the curves, the drawn images' power and features' variance, over the real ones'."""
    for path in sorted((options.out / "weights").glob("*seed=0.pt")):
        label = path.stem.partition(" seed")[0]
        name, _, rest = label.partition(", ")
        kind = next(kind for kind in KINDS if rest.startswith(kind))
        if name not in options.sets or kind not in options.kinds:
            continue
        images, kept = images_of(options.out, name, kind), torch.load(path)
        network = build_network(kept["config"])
        network.load_state_dict(kept["weights"])
        drawn = images.draw(network.eval(), Objective("flow", "linear"), options.steps)
        real = images.data.x0[images.data.training(images.cluster)]
        space, moments = images.spaces["FD-MNv2"]
        variance = images._moments(space, drawn).covariance.trace() / moments.covariance.trace()
        ratios = " ".join(f"{ratio:.2f}" for ratio in (power(drawn) / power(real)).tolist())
        print(f"{label}: power by frequency {ratios}; variance of MobileNetV2's features {variance:.2f};", end=" ")
        print(images.distances_of(drawn), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("curves", "parts", "spectra"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--sets", nargs="+", default=list(IMAGES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["monolith"], help="of parts")
    parser.add_argument("--recipes", nargs="+", choices=LENGTHS, default=list(LENGTHS))
    parser.add_argument("--steps", type=int, default=STEPS, help="of the solver, in spectra")
    parser.add_argument("--part", default="1/1", help="which of so many processes this is, as 1/2")
    options = parser.parse_args()
    torch.set_num_threads(1)
    {"curves": curves, "parts": parts, "spectra": spectra}[options.command](options)


if __name__ == "__main__":
    main()
