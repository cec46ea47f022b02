"""Does a converted DiT give an expert a head start? HDDM (arXiv 2603.06741): 1.2 times fewer steps than from scratch.

    python benchmarks/convert.py --minutes 30 --out runs/convert      # three seeds, one core

A class-conditional eps-DiT (class_dit.py, linear-beta) is pretrained on one half of EuroSAT at 32 pixels, saved in
facebookresearch/DiT's layout, and converted by `atoll.convert` in every way. Each conversion, and a new network, is
then trained as a flow expert (linear path, captions) on the other half, or on flowers. Within a seed all of them use
the same images, noise and times. It prints how far each conversion's eps is from the original's at step 0; then the
held-out loss over the steps, and the steps in which each reaches the last loss of "scratch". `--out` gets dit.pt, and
convert.json and convert.png after every seed. The minutes are divided by the speed measured at the start: one part
pretrains (unless `--dit` names an existing dit.pt), two go to the experts.
"""

import argparse
import io
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from class_dit import CLASSES, DEPTH, HEADS, PATCH, SIDE, WIDTH, ClassDiT
from torch import Tensor, nn

from atoll.condition import Condition
from atoll.convert import MODULATIONS, convert
from atoll.encoders.text import HashEncoder
from atoll.ensemble.loading import load_expert
from atoll.nn import DiT, DiTConfig
from atoll.objective import Objective
from atoll.runtime.device import has_bf16
from atoll.storage.artifact import write_json

DATA = Path(__file__).parents[1].parent / "shared" / "data"
BATCH, LR, WARMUP, EMA = 32, 5e-4, 100, 0.995
EPS, FLOW = Objective("eps", "linear-beta"), Objective("flow", "linear")
ENCODER = HashEncoder(dim=64, length=12)
TARGETS = {"eurosat": "eurosat64_1of2.parquet", "flowers": "flowers128.parquet"}
HELD_OUT, POINTS = 256, 14  # images; points of a curve


def autocast() -> torch.autocast:
    """bf16 products, as in `atoll train` on a CPU that multiplies bf16."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=has_bf16(torch.device("cpu")))


@dataclass(frozen=True)
class Images:
    """latents [N,3,32,32] of about unit variance, labels [N], and the captions [N] encoded."""

    latents: Tensor
    labels: Tensor
    condition: Condition

    def part(self, rows: slice) -> "Images":
        return Images(self.latents[rows], self.labels[rows], self.condition.index(torch.arange(len(self.labels))[rows]))


def read_images(name: str, limit: int | None = None) -> Images:
    """The images of a parquet file, in random order."""
    import numpy as np
    import pyarrow.parquet as pq
    from PIL import Image

    rows = pq.read_table(DATA / name).to_pylist()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()[:limit]
    rows = [rows[i] for i in order]
    images = []
    for row in rows:
        with Image.open(io.BytesIO(row["image_bytes"])) as image:
            resized = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
        images.append(torch.from_numpy(np.asarray(resized).copy()))
    latents = torch.stack(images).permute(0, 3, 1, 2).float() / 127.5 - 1  # [N,3,32,32]
    labels = torch.tensor([row["label"] for row in rows])
    return Images((latents - latents.mean()) / latents.std(), labels, ENCODER([row["caption"] for row in rows]))


class Trainer:
    """Steps of AdamW with warm-up and EMA; the content of a step depends on the seed and the step only."""

    def __init__(self, network: nn.Module, objective: Objective, data: Images, seed: int) -> None:
        self.network, self.objective, self.data, self.seed = network, objective, data, seed
        self.weights = [p for p in network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.weights, lr=LR, betas=(0.9, 0.99), weight_decay=0.0)
        self.ema = [p.detach().clone() for p in self.weights]

    def step(self, step: int) -> None:
        g = torch.Generator().manual_seed(1_000_003 * self.seed + step)
        rows = torch.randint(len(self.data.latents), (BATCH,), generator=g)
        x0 = self.data.latents[rows]
        t, eps = self.objective.sample_time(BATCH, g), torch.randn(x0.shape, generator=g)
        dropped = torch.rand(BATCH, generator=g) < 0.1
        x, told = self.objective.schedule.diffuse(x0, eps, t), self.given(rows, dropped)
        with autocast():
            output = self.network(x, t * self.objective.time_scale, told)
        self.objective.loss(output, x0, eps, t).mean().backward()
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = LR * min(1.0, (step + 1) / WARMUP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(self.ema, [p.detach() for p in self.weights], 1 - min(EMA, step / (step + 9)))

    def given(self, rows: Tensor, dropped: Tensor) -> Any:
        """The network's condition: the rows' labels, or their captions."""
        if isinstance(self.network, ClassDiT):
            return torch.where(dropped, CLASSES, self.data.labels[rows])
        told, null = self.data.condition.index(rows), ENCODER.null(len(rows))
        states = torch.where(dropped[:, None, None], null.states, told.states)
        return Condition(states, torch.where(dropped[:, None], null.mask, told.mask))

    @torch.no_grad()
    def use_ema(self) -> list[Tensor]:
        """Copy the EMA into the weights, and return the previous weights."""
        own = [p.detach().clone() for p in self.weights]
        torch._foreach_copy_(self.weights, self.ema)
        return own

    def averaged_loss(self, test: Images) -> float:
        """Held-out loss of the EMA's weights."""
        own = self.use_ema()
        loss = held_out_loss(self.network, test)
        with torch.no_grad():
            torch._foreach_copy_(self.weights, own)
        return loss


@torch.no_grad()
def held_out_loss(network: nn.Module, data: Images) -> float:
    """Mean flow loss with fixed noise and fixed, evenly spaced times."""
    g = torch.Generator().manual_seed(7)
    n = len(data.latents)
    t = (torch.arange(n) + 0.5)[torch.randperm(n, generator=g)] / n
    eps = torch.randn(data.latents.shape, generator=g)
    x = FLOW.schedule.diffuse(data.latents, eps, t)
    with autocast():
        outputs = [network(x[r], t[r] * FLOW.time_scale, data.condition.index(r)) for r in torch.arange(n).split(256)]
    return FLOW.loss(torch.cat(outputs), data.latents, eps, t).mean().item()


@torch.no_grad()
def distance(network: nn.Module, original: ClassDiT, data: Images) -> float:
    """Relative error of eps against the original at its null class: norm of the difference over norm."""
    g = torch.Generator().manual_seed(8)
    x0 = data.latents[:256]
    t, eps = torch.linspace(0, 1, len(x0)), torch.randn(x0.shape, generator=g)
    x, told = EPS.schedule.diffuse(x0, eps, t), t * EPS.time_scale
    theirs = original(x, told, torch.full((len(x0),), CLASSES))
    ours = network(x, told, ENCODER.null(len(x0)))
    return ((ours - theirs).norm() / theirs.norm()).item()


def pretrain(data: Images, steps: int) -> ClassDiT:
    torch.manual_seed(0)
    original = ClassDiT()
    trainer = Trainer(original, EPS, data, seed=99)
    for step in range(steps):
        trainer.step(step)
    trainer.use_ema()
    return original.requires_grad_(False)


def start(variant: str, seed: int, converted: Path) -> nn.Module:
    """The initial network of a variant's training."""
    if variant == "scratch":
        torch.manual_seed(seed)
        sizes = {"patch": PATCH, "width": WIDTH, "depth": DEPTH, "heads": HEADS}
        config = {"size": (SIDE, SIDE), "channels": 3, "states_dim": ENCODER.dim, **sizes}
        return DiT(DiTConfig.model_validate(config))
    network = load_expert(converted / f"{variant}-{seed}").expert.network
    assert isinstance(network, nn.Module)
    return network.train().requires_grad_(True)


def curve(network: nn.Module, data: Images, test: Images, seed: int, steps: int, every: int) -> dict[int, float]:
    """Held-out loss of the EMA by step, from one run."""
    trainer = Trainer(network, FLOW, data, seed)
    losses = {0: held_out_loss(network, test)}
    for step in range(steps):
        trainer.step(step)
        if (step + 1) % every == 0:
            losses[step + 1] = trainer.averaged_loss(test)
    return losses


def steps_to(losses: dict[int, float], wanted: float) -> float | None:
    """The step at which a curve first reaches `wanted`, interpolated linearly; None if it never does."""
    points = list(losses.items())
    for (a, high), (b, low) in pairwise(points):
        if low <= wanted:
            return float(b) if high <= low or high <= wanted else a + (b - a) * (high - wanted) / (high - low)
    return None


def seconds_per_step(data: Images) -> float:
    """Speed of an expert's training, measured on this machine."""
    trainer = Trainer(start("scratch", 0, Path()), FLOW, data, 0)
    trainer.step(0)
    began = time.perf_counter()
    for step in range(10):
        trainer.step(step)
    return (time.perf_counter() - began) / 10


def the_original(options: argparse.Namespace, steps: int) -> ClassDiT:
    """The pretrained DiT, from `--dit` or trained now; options.out/dit.pt is its checkpoint."""
    file = options.out / "dit.pt"
    if options.dit is None:
        source = read_images("eurosat64_0of2.parquet", options.images)
        print(f"pretraining: {steps} steps on {len(source.latents)} images", flush=True)
        torch.save({"ema": pretrain(source, steps).state_dict(), "steps": steps}, file)
    elif options.dit != file:
        shutil.copyfile(options.dit, file)
    original = ClassDiT()
    original.load_state_dict(torch.load(file, weights_only=True)["ema"])
    return original.requires_grad_(False)


def convert_all(dit: Path, original: ClassDiT, test: Images, seeds: int, out: Path) -> dict[str, Any]:
    """Every conversion for every seed, at out/<modulation>-<seed>; for the first seed, the distance to the original."""
    errors: dict[str, Any] = {}
    for seed in range(seeds):
        for modulation in MODULATIONS:
            path = out / f"{modulation}-{seed}"
            # With the original's objective, to compare at step 0; the weights are the same with any other.
            convert(dit, path, modulation=modulation, condition=ENCODER.config(), heads=HEADS, seed=seed)
            if seed == 0:
                loaded = load_expert(path)
                error = distance(loaded.expert.network, original, test)
                errors[modulation] = {"eps_error": error, "residual": loaded.card.plain()["conversion"].get("residual")}
    print("relative error of eps at step 0:", {k: f"{v['eps_error']:.2g}" for k, v in errors.items()}, flush=True)
    return errors


def run(options: argparse.Namespace, scratch: Path) -> None:
    """The experiment; `scratch` holds the converted experts meanwhile."""
    every = read_images(TARGETS[options.target], options.images)
    cut = max(1, min(HELD_OUT, len(every.latents) // 5))
    test, data = every.part(slice(cut)), every.part(slice(cut, None))
    variants = ("scratch", *MODULATIONS)
    budget = options.minutes * 60 / seconds_per_step(data)
    first = options.pretrain_steps or max(10, int(budget / 3))
    curves_cost = POINTS * len(test.latents) / BATCH / 3  # in steps: a forward pass is a third of one
    steps = options.steps or max(10, int(budget * 2 / 3 / options.seeds / len(variants) - curves_cost))
    original = the_original(options, first)
    print(f"experts: {steps} steps on {len(data.latents)} images", flush=True)
    conversions = convert_all(options.out / "dit.pt", original, test, options.seeds, scratch)
    curves: dict[str, list[dict[int, float]]] = {variant: [] for variant in variants}
    about = {"command": " ".join(sys.argv), "torch": torch.__version__, "threads": options.threads, "steps": steps}
    for seed in range(options.seeds):
        for variant in variants:
            losses = curve(start(variant, seed, scratch), data, test, seed, steps, max(1, steps // POINTS))
            curves[variant].append(losses)
            print(f"seed {seed} {variant:10} " + " ".join(f"{v:.4f}" for v in list(losses.values())[::3]), flush=True)
        plain = {k: [{"step": list(c), "loss": list(c.values())} for c in v] for k, v in curves.items()}
        result = about | {"conversions": conversions, "curves": plain, "table": table(curves)}
        write_json(options.out / "convert.json", result)
        plot(plain, options.out / "convert.png")


def table(curves: dict[str, list[dict[int, float]]]) -> list[dict[str, Any]]:
    """Per variant: first and last loss, and speed-up over scratch (scratch's last step over the step at equal loss)."""
    rows = []
    print(f"{'start':10} {'loss at step 0':>14} {'last loss':>16} {'speed-up over scratch (each seed)':>36}")
    for variant, runs in curves.items():
        zero, last = ([list(c.values())[i] for c in runs] for i in (0, -1))
        speedups = []
        for c, scratch in zip(runs, curves["scratch"], strict=True):
            reached = steps_to(c, list(scratch.values())[-1])
            speedups.append(None if not reached else max(scratch) / reached)
        spread = statistics.stdev(last) if len(last) > 1 else 0.0
        shown = "  ".join("never" if s is None else f"{s:.2f}" for s in speedups)
        print(f"{variant:10} {statistics.mean(zero):14.4f} {statistics.mean(last):8.4f} ±{spread:.4f} {shown:>36}")
        rows.append({"start": variant, "first_loss": zero, "last_loss": last, "speedup": speedups})
    return rows


def plot(curves: dict[str, list[dict[str, list[float]]]], file: Path) -> None:
    """Held-out loss by step: the mean over the seeds as a line, their range as a band."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for variant, runs in curves.items():
        steps, losses = runs[0]["step"][1:], torch.tensor([c["loss"] for c in runs])[:, 1:]  # [seeds,points]
        (line,) = axes.plot(steps, losses.mean(0), label=variant)
        axes.fill_between(steps, losses.amin(0), losses.amax(0), color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel="steps of the flow expert", ylabel="held-out flow loss", yscale="log")
    axes.legend(title="start")
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="of training, in all")
    parser.add_argument("--steps", type=int, help="of an expert, instead of what the minutes allow")
    parser.add_argument("--pretrain-steps", type=int, help="instead of what the minutes allow")
    parser.add_argument("--dit", type=Path, help="a dit.pt of an earlier run, instead of pretraining")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--target", choices=tuple(TARGETS), default="eurosat", help="what experts learn")
    parser.add_argument("--images", type=int, help="of each data set at most; none: all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/convert"), help="gets convert.json and convert.png")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        run(options, Path(directory))
    print(f"{options.out}: dit.pt, convert.json and convert.png written")


if __name__ == "__main__":
    main()
