"""Does a converted DiT give an expert a head start? HDDM (arXiv 2603.06741): 1.2 times fewer steps than from scratch.

    python benchmarks/convert.py --minutes 60 --json convert.json      # three seeds; an hour on one core

A class-conditional eps-DiT (DiT's own network, linear-beta) is pretrained on one half of EuroSAT at 32 pixels, saved as
facebookresearch/DiT saves its own, and converted by `atoll.convert` in every way. Each conversion, and a new network,
is then trained as a flow expert (linear path, captions) on the other half, or on flowers. Within a seed all see the
same pictures, noise and times. Printed are, first, the distance of each conversion's eps from the original's at step
0; then the held-out loss over the steps, and in how many steps each reaches the last loss of "scratch".
The minutes are shared out by the speed measured at the start: one part pretrains, two go to the experts.
"""

import argparse
import io
import json
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
import torch.nn.functional as F
from torch import Tensor, nn

from atoll.condition import Condition, HashEncoder
from atoll.convert import convert
from atoll.loading import load_expert
from atoll.nn import DiT, DiTConfig
from atoll.nn.dit import Block, Conditioner, PerBlockModulation, modulate, patchify, sincos_positions, unpatchify, zero
from atoll.objective import Objective

DATA = Path(__file__).parents[1].parent / "shared" / "data"
SIDE, PATCH, WIDTH, DEPTH, HEADS, CLASSES = 32, 4, 96, 4, 4, 10
BATCH, LR, WARMUP, EMA = 64, 5e-4, 100, 0.995
EPS, FLOW = Objective("eps", "linear-beta"), Objective("flow", "linear")
ENCODER = HashEncoder(dim=64, length=12)
MODULATIONS = ("fit", "reinit", "per-block")
HELD_OUT, POINTS = 512, 16  # pictures; points of a curve


class ClassDiT(nn.Module):
    """The published DiT: forward(x [B,C,H,W], time [B], label [B]) -> eps; the label CLASSES is the null class."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH * PATCH * 3, WIDTH)
        self.positions = sincos_positions(SIDE // PATCH, SIDE // PATCH, WIDTH)
        self.conditioner = Conditioner(WIDTH, CLASSES + 1, "per-block")  # its "pooled vector" is a one-hot label
        self.blocks = nn.ModuleList(Block(WIDTH, HEADS, 4.0, "per-block", cross=False) for _ in range(DEPTH))
        self.final_modulation = PerBlockModulation(WIDTH, 2)
        self.final = nn.Linear(WIDTH, PATCH * PATCH * 3)
        for module in self.modules():
            if isinstance(module, PerBlockModulation):
                zero(module)
        zero(self.final)

    def forward(self, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        one_hot = F.one_hot(label, CLASSES + 1).float()  # [B,CLASSES+1]
        prepared, prepared_final = self.conditioner(time, one_hot, x.dtype)  # [B,D]
        tokens = self.embed(patchify(x, PATCH)) + self.positions  # [B,N,D]
        for block in self.blocks:
            tokens = block(tokens, prepared)  # [B,N,D]
        shift, scale = self.final_modulation(prepared_final, x.dtype).unbind(1)  # [B,1,D] each
        return unpatchify(self.final(modulate(tokens, shift, scale)), PATCH, (SIDE, SIDE))  # [B,C,H,W]

    def published(self) -> dict[str, Tensor]:
        """The weights under DiT's own names and in its shapes."""
        own = self.state_dict()
        names = {"conditioner.time": "t_embedder.mlp", "final_modulation.linear": "final_layer.adaLN_modulation.1"}
        names |= {"final": "final_layer.linear", "modulation.linear": "adaLN_modulation.1"}
        names |= {"attention.qkv": "attn.qkv", "attention.out": "attn.proj", "mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2"}
        kernel = own.pop("embed.weight").unflatten(1, (PATCH, PATCH, 3)).permute(0, 3, 1, 2)  # [D,C,p,p]
        labels, bias = own.pop("conditioner.pooled.weight"), own.pop("conditioner.pooled.bias")
        theirs = {"x_embedder.proj.weight": kernel, "x_embedder.proj.bias": own.pop("embed.bias")}
        theirs |= {"pos_embed": self.positions[None], "y_embedder.embedding_table.weight": labels.T + bias}
        for name, value in own.items():
            layer, _, kind = name.rpartition(".")
            prefix = ".".join(layer.split(".")[:2]) + "." if layer.startswith("blocks.") else ""
            rest = layer.removeprefix(prefix)
            index = ""
            if rest.startswith("conditioner.time."):
                rest, index = "conditioner.time", rest.removeprefix("conditioner.time")
            theirs[f"{prefix}{names[rest]}{index}.{kind}"] = value
        return {name: value.clone().contiguous() for name, value in theirs.items()}


@dataclass(frozen=True)
class Pictures:
    """latents [N,3,32,32] of about unit variance, labels [N], and the captions [N] encoded."""

    latents: Tensor
    labels: Tensor
    captions: list[str]
    condition: Condition


def read_pictures(names: Sequence[str], limit: int | None = None) -> Pictures:
    """The pictures of some parquet files, in an order of no meaning."""
    import numpy as np
    import pyarrow.parquet as pq
    from PIL import Image

    rows = [row for name in names for row in pq.read_table(DATA / name).to_pylist()]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()[:limit]
    rows = [rows[i] for i in order]
    pictures = []
    for row in rows:
        with Image.open(io.BytesIO(row["image_bytes"])) as image:
            resized = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
        pictures.append(torch.from_numpy(np.asarray(resized).copy()))
    latents = torch.stack(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1  # [N,3,32,32]
    captions = [row["caption"] for row in rows]
    labels = torch.tensor([row["label"] for row in rows])
    return Pictures((latents - latents.mean()) / latents.std(), labels, captions, ENCODER(captions))


class Trainer:
    """Steps of AdamW with warm-up and EMA; what a step sees depends on the seed and the step alone."""

    def __init__(self, network: nn.Module, objective: Objective, data: Pictures, seed: int) -> None:
        self.network, self.objective, self.data, self.seed = network, objective, data, seed
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=LR, betas=(0.9, 0.99), weight_decay=0.0)
        self.ema = [p.detach().clone() for p in network.parameters()]

    def step(self, step: int) -> None:
        g = torch.Generator().manual_seed(1_000_003 * self.seed + step)
        rows = torch.randint(len(self.data.latents), (BATCH,), generator=g)
        x0 = self.data.latents[rows]
        t, eps = self.objective.sample_time(BATCH, g), torch.randn(x0.shape, generator=g)
        dropped = torch.rand(BATCH, generator=g) < 0.1
        output = self.network(
            self.objective.diffuse(x0, eps, t), t * self.objective.time_scale, self.given(rows, dropped)
        )
        self.objective.loss(output, x0, eps, t).mean().backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = LR * min(1.0, (step + 1) / WARMUP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(self.ema, [p.detach() for p in self.network.parameters()], 1 - min(EMA, step / (step + 9)))

    def given(self, rows: Tensor, dropped: Tensor) -> Any:
        """What the network is told of the rows: their labels, or their captions."""
        if isinstance(self.network, ClassDiT):
            return torch.where(dropped, CLASSES, self.data.labels[rows])
        told, null = self.data.condition.index(rows), ENCODER.null(len(rows))
        states = torch.where(dropped[:, None, None], null.states, told.states)
        return Condition(states, torch.where(dropped[:, None], null.mask, told.mask))

    def use_ema(self) -> None:
        with torch.no_grad():
            torch._foreach_copy_(list(self.network.parameters()), self.ema)


@torch.no_grad()
def held_out_loss(network: nn.Module, data: Pictures) -> float:
    """Mean flow loss with noise and times that are always the same; the times are evenly spaced."""
    g = torch.Generator().manual_seed(7)
    n = len(data.latents)
    t = (torch.arange(n) + 0.5)[torch.randperm(n, generator=g)] / n
    eps = torch.randn(data.latents.shape, generator=g)
    x = FLOW.diffuse(data.latents, eps, t)
    outputs = [
        network(x[rows], t[rows] * FLOW.time_scale, data.condition.index(rows)) for rows in torch.arange(n).split(256)
    ]
    return FLOW.loss(torch.cat(outputs), data.latents, eps, t).mean().item()


@torch.no_grad()
def distance(network: nn.Module, original: ClassDiT, data: Pictures) -> float:
    """Relative error of eps against the original at its null class: norm of the difference over norm."""
    g = torch.Generator().manual_seed(8)
    x0 = data.latents[:256]
    t, eps = torch.linspace(0, 1, len(x0)), torch.randn(x0.shape, generator=g)
    x, told = EPS.diffuse(x0, eps, t), t * EPS.time_scale
    theirs = original(x, told, torch.full((len(x0),), CLASSES))
    ours = network(x, told, ENCODER.null(len(x0)))
    return ((ours - theirs).norm() / theirs.norm()).item()


def pretrain(data: Pictures, steps: int) -> ClassDiT:
    torch.manual_seed(0)
    original = ClassDiT()
    trainer = Trainer(original, EPS, data, seed=99)
    for step in range(steps):
        trainer.step(step)
    trainer.use_ema()
    return original.requires_grad_(False)


def start(variant: str, seed: int, converted: Path) -> nn.Module:
    """The network that a variant's training starts from."""
    if variant == "scratch":
        torch.manual_seed(seed)
        sizes = {"patch": PATCH, "width": WIDTH, "depth": DEPTH, "heads": HEADS}
        config = {"size": (SIDE, SIDE), "channels": 3, "states_dim": ENCODER.dim, **sizes}
        return DiT(DiTConfig.model_validate(config))
    network = load_expert(converted / f"{variant}-{seed}").expert.network
    assert isinstance(network, nn.Module)
    return network.train().requires_grad_(True)


def curve(network: nn.Module, data: Pictures, test: Pictures, seed: int, steps: int, every: int) -> dict[int, float]:
    """Held-out loss of the EMA weights' network by step, from one run."""
    trainer = Trainer(network, FLOW, data, seed)
    losses = {0: held_out_loss(network, test)}
    for step in range(steps):
        trainer.step(step)
        if (step + 1) % every == 0:
            now = [p.detach().clone() for p in network.parameters()]
            trainer.use_ema()
            losses[step + 1] = held_out_loss(network, test)
            with torch.no_grad():
                torch._foreach_copy_(list(network.parameters()), now)
    return losses


def steps_to(losses: dict[int, float], wanted: float) -> float | None:
    """The step at which a curve first reaches `wanted`, linear between its points; None: never."""
    points = list(losses.items())
    for (a, high), (b, low) in pairwise(points):
        if low <= wanted:
            return float(b) if high <= low or high <= wanted else a + (b - a) * (high - wanted) / (high - low)
    return None


def seconds_per_step(data: Pictures) -> float:
    """Of an expert's training, measured on this machine."""
    trainer = Trainer(start("scratch", 0, Path()), FLOW, data, 0)
    trainer.step(0)
    began = time.perf_counter()
    for step in range(10):
        trainer.step(step)
    return (time.perf_counter() - began) / 10


def run(options: argparse.Namespace, out: Path) -> dict[str, Any]:
    halves = ["eurosat64_0of2.parquet", "eurosat64_1of2.parquet"]
    source = read_pictures(halves[:1], options.pictures)
    every = read_pictures(halves[1:] if options.target == "eurosat" else ["flowers128.parquet"], options.pictures)
    cut = max(1, min(HELD_OUT, len(every.latents) // 5))
    rows = torch.arange(len(every.latents))
    test, data = (
        Pictures(every.latents[r], every.labels[r], [every.captions[i] for i in r.tolist()], every.condition.index(r))
        for r in (rows[:cut], rows[cut:])
    )
    variants = ("scratch", *MODULATIONS)
    budget = options.minutes * 60 / seconds_per_step(data)
    first = options.pretrain_steps or max(10, int(budget / 3))
    curves_cost = POINTS * cut / BATCH / 3  # in steps: a forward pass is a third of one
    steps = options.steps or max(10, int(budget * 2 / 3 / options.seeds / len(variants) - curves_cost))
    print(f"{len(source.latents)} pictures, {first} steps of pretraining; {steps} steps an expert", flush=True)
    original = pretrain(source, first)
    torch.save({"ema": original.published()}, out / "dit.pt")
    encoder = ENCODER.config()
    distances: dict[str, float] = {}
    residuals: dict[str, Any] = {}
    for seed in range(options.seeds):
        for modulation in MODULATIONS:
            path = out / f"{modulation}-{seed}"
            objective = {"prediction": "eps", "schedule": "linear-beta"}  # to compare with the original at step 0
            convert(
                out / "dit.pt",
                path,
                objective=objective,
                modulation=modulation,
                condition=encoder,
                heads=HEADS,
                seed=seed,
            )
            loaded = load_expert(path)
            distances[modulation] = distance(loaded.expert.network, original, test)
            residuals[modulation] = loaded.card["conversion"].get("residual")
    print("relative error of eps at step 0:", {k: f"{v:.2g}" for k, v in distances.items()}, flush=True)
    curves: dict[str, list[dict[int, float]]] = {variant: [] for variant in variants}
    for seed in range(options.seeds):
        for variant in variants:
            losses = curve(start(variant, seed, out), data, test, seed, steps, max(1, steps // POINTS))
            curves[variant].append(losses)
            print(f"seed {seed} {variant:10} " + " ".join(f"{v:.4f}" for v in list(losses.values())[::4]), flush=True)
    return {
        "pretraining_steps": first,
        "steps": steps,
        "distance_at_step_0": distances,
        "residual": residuals,
        "curves": {k: [{"step": list(c), "loss": list(c.values())} for c in v] for k, v in curves.items()},
        "table": table(curves),
    }


def table(curves: dict[str, list[dict[int, float]]]) -> list[dict[str, Any]]:
    """Per variant: last loss and speed-up over scratch (its last step over the step that reaches its last loss)."""
    rows = []
    print(f"{'start':10} {'last loss':>16} {'speed-up over scratch (each seed)':>40}")
    for variant, runs in curves.items():
        last = [list(c.values())[-1] for c in runs]
        speedups = []
        for c, scratch in zip(runs, curves["scratch"], strict=True):
            reached = steps_to(c, list(scratch.values())[-1])
            speedups.append(None if not reached else max(scratch) / reached)
        spread = statistics.stdev(last) if len(last) > 1 else 0.0
        shown = "  ".join("never" if s is None else f"{s:.2f}" for s in speedups)
        print(f"{variant:10} {statistics.mean(last):8.4f} ±{spread:.4f} {shown:>40}")
        rows.append({"start": variant, "last_loss": last, "speedup": speedups})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="of training, in all")
    parser.add_argument("--steps", type=int, help="of an expert, instead of what the minutes allow")
    parser.add_argument("--pretrain-steps", type=int, help="instead of what the minutes allow")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--target", choices=("eurosat", "flowers"), default="eurosat", help="what experts learn")
    parser.add_argument("--pictures", type=int, help="of each data set at most; none: all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where to write all numbers")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as directory:
        result = run(options, Path(directory))
    if options.json:
        about = {"command": " ".join(sys.argv), "torch": torch.__version__, "threads": options.threads}
        options.json.write_text(json.dumps(about | result, indent=1) + "\n")


if __name__ == "__main__":
    main()
