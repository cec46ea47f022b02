"""When isolated experts beat one model: error by size, images seen, number of clusters and share of a common start.

    ATOLL_DATA=... ATOLL_MIXTURE=... python benchmarks/map.py run OUT [--sets eurosat] [--networks 64x2] [--part 1/2]
    ATOLL_DATA=... python benchmarks/map.py tune OUT [--sets eurosat] [--networks 64x2] [--images 384] [--clusters 4]
    ATOLL_DATA=... python benchmarks/map.py distances OUT [--networks 64x2] [--images 384]

Each cell has the same total training FLOPs for the monolith and for all experts together: N images pass through the
monolith, f N through the common model, and (1 - f) N / K through each expert. The monolith trains at a constant rate;
for each N a copy of it decays over the last 40 % (the warm-up, stable, decay schedule), so that long and short
trainings share their first part, and the common models are its states at f N. Experts are evaluated on their own
clusters' held-out images ("oracle" routing). OUT/cells.jsonl has one line per cell; finished cells are skipped.
`tune` tries batches and rates, as many for the monolith as for the experts. `distances` draws images for captions of
training rows, each by its row's own expert, and writes their Fréchet distances to OUT/distances.jsonl.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from efficiency import Images
from small import Data, Levelled, Lines, Training, errors, load, mean, network_config, over_clusters, training_flops
from torch import Tensor, nn

from atoll.manifest import TrainSettings
from atoll.nn import build_network
from atoll.objective import Objective, Prediction, Weighting
from atoll.randomness import Stream, seeded
from atoll.solver import sample as solve

FLOW = Objective("flow", "linear")
DECAY_FROM = 0.6
# The best of what `tune` tried, over EuroSAT and emoji.
MONOLITH: dict[str, Any] = {"batch": 32, "lr": 5e-3}
EXPERT: dict[str, Any] = {"batch": 32, "lr": 5e-3, "decay_from": 0.2}
# Batches, rates, and where their decay begins, that `tune` tries: as many for the monolith (1) as for the experts (2).
TRIED = {
    1: ((64, 8e-3), (64, 5e-3), (32, 8e-3), (32, 5e-3), (32, 3e-3), (32, 5e-3, 0.2)),
    2: ((32, 8e-3), (32, 5e-3), (32, 3e-3), (16, 5e-3), (16, 3e-3), (32, 5e-3, 0.2)),
}
# Thousands of images, by width and depth.
IMAGES = {(64, 1): (96, 384), (64, 2): (96, 384), (64, 4): (96,), (128, 2): (192,)}
CLUSTERS = (4, 16)
DRAWN, STEPS = 1000, 15
SHARES = (0.0, 0.5)
# By level, the generalist denoises the fine end and the experts the rest; tenths of the time, half at the edges.
FINE = (1, 1, 0.5, 0, 0, 0, 0, 0, 0, 0)
COARSE = (0, 0.5, 1, 1, 1, 1, 1, 1, 1, 1)
SWITCH = 0.2  # the time from which on the experts denoise
GENERALIST = 0.25  # the generalist's share of the images after the common start


@dataclass(frozen=True)
class Cell:
    """One point of the map."""

    name: str  # of the set
    size: int
    width: int
    depth: int
    seed: int
    images: int
    k: int  # 1: the monolith
    share: float = 0.0
    by_level: bool = False  # a generalist denoises the fine end, the experts the rest
    method: str = "balanced"  # of the clustering
    others: int = 0  # so many experts have a prediction of their own on the cosine schedule; the rest predicts the flow
    prediction: str = "eps"  # theirs
    others_start: bool = True  # whether they start from the common model, too, which predicts the flow

    def objective(self, cluster: int) -> Objective:
        """Of a cluster's expert."""
        if cluster >= self.others:
            return Levelled(COARSE, is_weighted=False) if self.by_level else FLOW
        weighting: Weighting = "min-snr" if self.prediction == "eps" else "none"
        levels = (SWITCH, 1) if self.by_level else None
        return Objective(cast(Prediction, self.prediction), "cosine", weighting=weighting, levels=levels)

    @property
    def key(self) -> str:
        """Its name in cells.jsonl."""
        share = (f" f={self.share:g}" if self.k > 1 or self.by_level else "") + (" by-level" if self.by_level else "")
        share += f" {self.method}" if self.method != "balanced" else ""
        share += f" {self.prediction}={self.others}{'' if self.others_start else ' new'}" if self.others else ""
        shape = f"{self.name}-{self.size} {self.width}x{self.depth}"
        return f"{shape} N={self.images} K={self.k}{share} seed={self.seed}"


def settings(images: int, batch: int, lr: float, decay_from: float = DECAY_FROM) -> TrainSettings:
    """Of a training on so many images."""
    steps = max(1, images // batch)
    ema = 0.99 if steps < 3000 else 0.995
    return TrainSettings(
        optimizer="muon", steps=steps, batch=batch, lr=lr, warmup=min(50, steps // 10), decay_from=decay_from, ema=ema
    )


def data_of(out: Path, cell: Cell) -> Data:
    """The images of a cell, in its clusters."""
    return load(out, cell.name, cell.size, cell.k, **({"method": cell.method} if cell.method != "balanced" else {}))


def cell_of(row: dict[str, Any]) -> Cell:
    """The cell of a line of cells.jsonl; fields that it does not have yet are the defaults."""
    return Cell(**{field: row.get(field, default) for field, default in vars(Cell("", 0, 0, 0, 0, 0, 0)).items()})


def result(cell: Cell, levels: list[float], flops: float, seconds: float) -> dict[str, Any]:
    """A cell's line."""
    rounded = [round(level, 5) for level in levels]
    return {**vars(cell), "error": mean(levels), "levels": rounded, "flops": flops, "seconds": round(seconds, 1)}


def monolith(lines: Lines, name: str, shape: tuple[int, int], seed: int, options: argparse.Namespace) -> None:
    """Train the monolith of every length, and keep the common models in OUT/starts."""
    out, size = options.out, options.size
    lengths = [1000 * thousands for thousands in options.images or IMAGES[shape]]
    cells = {n: Cell(name, size, *shape, seed, n, 1) for n in lengths}
    starts = {int(f * n): start_path(out, cells[n], int(f * n)) for n in lengths for f in options.shares if f}
    cells = {n: cell for n, cell in cells.items() if cell.key not in lines.rows}
    starts = {n: path for n, path in starts.items() if not path.is_file()}
    if not cells and not starts:
        return
    # One trunk; at the events, in order, a copy decays or the averaged weights are kept.
    data = load(out, name, size, 1)
    config = network_config(data, shape[0], depth=shape[1])
    longest = settings(max(lengths), **{**MONOLITH, "decay_from": 1.0})
    trunk = Training(data, data.training(), config, longest, FLOW, seed)
    decay_from = MONOLITH.get("decay_from", DECAY_FROM)
    decays = {int(decay_from * n) // longest.batch: n for n in cells}
    keeps = {n // longest.batch: n for n in starts}
    for step in sorted({*decays, *keeps}):
        trunk.run(step)
        if step in keeps:
            path = starts[keeps[step]]
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(trunk.weights(), path)
        if step in decays:
            n = decays[step]
            # The decay of this length.
            end = trunk.branch(settings(n, **MONOLITH))
            end.run(end.settings.steps)
            levels = errors(config, end.weights(), FLOW, data, data.held_out())
            keep(out, cells[n], config, [end.weights()], None)
            lines.add(cells[n].key, result(cells[n], levels, n * training_flops(data, config), end.seconds))


def start_path(out: Path, cell: Cell, images: int) -> Path:
    """Where a common model is kept."""
    shape = f"{cell.name}-{cell.size}-{cell.width}x{cell.depth}"
    return out / "starts" / f"{shape}-seed{cell.seed}-{images}.pt"


def keep(
    out: Path,
    cell: Cell,
    config: dict[str, Any],
    experts: list[dict[str, Tensor]],
    generalist: dict[str, Tensor] | None,
) -> None:
    """Keep the weights of a cell, for `distances`."""
    path = out / "weights" / f"{cell.key}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"config": config, "experts": experts, "generalist": generalist}, path)


def ensemble(out: Path, lines: Lines, cell: Cell) -> None:
    """Train the experts of a cell and measure them on their own clusters."""
    if cell.key in lines.rows:
        return
    data = data_of(out, cell)
    config = network_config(data, cell.width, depth=cell.depth)
    common = int(cell.share * cell.images)
    start = torch.load(start_path(out, cell, common)) if common else None

    fine = int(GENERALIST * (cell.images - common)) if cell.by_level else 0
    each = (cell.images - common - fine) // cell.k
    per_cluster, counts, kept, seconds = [], [], [], 0.0
    generalist = None
    for cluster in range(cell.k):
        counts.append(len(data.held_out(cluster)))
        seed, objective, own = 1000 * cell.seed + cluster + 1, cell.objective(cluster), start
        if cluster < cell.others and not cell.others_start:
            own = None
        training = Training(data, data.training(cluster), config, settings(each, **EXPERT), objective, seed, own)
        training.run(training.settings.steps)
        held_out = data.held_out(cluster)
        levels = errors(config, training.weights(), objective, data, held_out) if counts[-1] else [0.0] * 10
        per_cluster.append(levels)
        kept.append(training.weights())
        seconds += training.seconds
    levels = over_clusters(per_cluster, counts)
    if cell.by_level:
        objective = Levelled(FINE, is_weighted=False)
        training = Training(data, data.training(), config, settings(fine, **MONOLITH), objective, cell.seed, start)
        training.run(training.settings.steps)
        generalist = training.weights()
        general = errors(config, generalist, FLOW, data, data.held_out())
        levels = [general[i] if FINE[i] == 1 else levels[i] for i in range(len(levels))]
        seconds += training.seconds
    keep(out, cell, config, kept, generalist)
    row = result(cell, levels, cell.images * training_flops(data, config), seconds)
    lines.add(cell.key, {**row, "clusters": [round(mean(each), 5) for each in per_cluster], "counts": counts})


def cells_of(name: str, shape: tuple[int, int], seed: int, options: argparse.Namespace) -> Iterator[Cell]:
    """The ensembles of the map for one set, network and seed."""
    for thousands in options.images or IMAGES[shape]:
        for k in options.clusters:
            for share in options.shares:
                for by_level in (False, True):
                    # One cluster is the monolith, unless it is divided by level.
                    if (by_level and options.by_level and share) or (not by_level and k > 1):
                        theirs = (options.others, options.prediction, options.others_start)
                        kind = (k, share, by_level, options.method, *theirs)
                        yield Cell(name, options.size, *shape, seed, 1000 * thousands, *kind)


def run(options: argparse.Namespace) -> None:
    """Train every cell that is not in OUT/cells.jsonl yet."""
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    part, parts = map(int, options.part.split("/"))
    shapes = [tuple(map(int, text.split("x"))) for text in options.networks]
    jobs = [(n, shape, s) for s in options.seeds for n in options.sets for shape in shapes]
    for name, shape, seed in jobs[part - 1 :: parts]:
        lines = Lines(options.out / "cells.jsonl")
        monolith(lines, name, shape, seed, options)
        for cell in cells_of(name, shape, seed, options):
            ensemble(options.out, lines, cell)


def tune(options: argparse.Namespace) -> None:
    """Try the same batches and rates for the monolith and for the experts; a line of OUT/tuning.jsonl each.

    The experts branch from the common model that `run` has kept, so they take the batch and rate of MONOLITH until
    there.
    """
    torch.set_num_threads(1)
    lines = Lines(options.out / "tuning.jsonl")
    shapes = [tuple(map(int, text.split("x"))) for text in options.networks]
    part, parts = map(int, options.part.split("/"))
    jobs = [
        (name, shape, seed, 1000 * thousands, k, tried)
        for seed in options.seeds
        for name in options.sets
        for shape in shapes
        for thousands in options.images or IMAGES[shape]
        for k in options.clusters
        for tried in TRIED[min(k, 2)]
    ]
    for name, shape, seed, images, k, tried in jobs[part - 1 :: parts]:
        cell = Cell(name, options.size, *shape, seed, images, k, 0.5 if k > 1 else 0.0)
        batch, lr, decay_from = (*tried, DECAY_FROM)[:3]
        key = f"{cell.key} batch={batch} lr={lr:g}" + (f" decay_from={decay_from:g}" if len(tried) == 3 else "")
        if key in lines.rows:
            continue
        data = load(options.out, name, options.size, k)
        config = network_config(data, shape[0], depth=shape[1])
        common = images // 2 if k > 1 else 0
        start = torch.load(start_path(options.out, cell, common)) if common else None
        per_cluster, counts, seconds = [], [], 0.0
        for cluster in range(k) if k > 1 else (None,):
            wanted = settings((images - common) // k, batch, lr, decay_from)
            own = seed if cluster is None else 1000 * seed + cluster + 1
            training = Training(data, data.training(cluster), config, wanted, FLOW, own, start)
            training.run(training.settings.steps)
            counts.append(len(data.held_out(cluster)))
            per_cluster.append(errors(config, training.weights(), FLOW, data, data.held_out(cluster)))
            seconds += training.seconds
        row = result(cell, over_clusters(per_cluster, counts), images * training_flops(data, config), seconds)
        lines.add(key, {**row, "batch": batch, "lr": lr, "decay_from": decay_from})


def drawn_rows(data: Data) -> Tensor:
    """The training rows for whose captions images are drawn, [n] int64."""
    rows = data.training()
    return rows[torch.randperm(len(rows), generator=seeded(0, 1, Stream.SAMPLES))[:DRAWN]]


def networks_of(kept: dict[str, Any]) -> tuple[list[nn.Module], nn.Module | None]:
    """The experts of a kept cell, and its generalist, if it has one."""

    def loaded(weights: dict[str, Tensor]) -> nn.Module:
        network: nn.Module = build_network(kept["config"])
        network.load_state_dict(weights)
        return network.eval()

    return [loaded(w) for w in kept["experts"]], None if kept["generalist"] is None else loaded(kept["generalist"])


@torch.inference_mode()
def draw(data: Data, kept: dict[str, Any], rows: Tensor, seed: int) -> Tensor:
    """Draw an image for each row's caption by its cluster's expert, and the generalist at the fine end: [n,C,H,W]."""
    experts, general = networks_of(kept)
    k = len(experts)
    drawn = torch.empty(len(rows), *data.x0.shape[1:])
    for cluster in range(k):
        own = (data.cluster[rows] == cluster).nonzero().flatten() if k > 1 else torch.arange(len(rows))
        for part in own.split(128):
            condition = data.encoder.encode(data.tokens.index(rows[part]))
            expert, generalist = experts[cluster], experts[cluster] if general is None else general

            def velocity(x: Tensor, t: Tensor, condition: Any = condition, pair: Any = (generalist, expert)) -> Tensor:
                with torch.autocast("cpu", torch.bfloat16):
                    output: Tensor = pair[bool(t[0] >= SWITCH)](x, t * FLOW.time_scale, condition)
                return output.float()

            # A row's noise is the same for every model.
            noise = torch.randn(len(rows), *data.x0.shape[1:], generator=seeded(seed, 0, Stream.SAMPLES))[part]
            drawn[part] = solve(velocity, noise, steps=STEPS, method="dpm++2m")
    return drawn


def distances(options: argparse.Namespace) -> None:
    """Measure the images of every kept cell of one prediction, of the sets, networks, images and seeds asked for."""
    torch.set_num_threads(1)
    lines, cells = Lines(options.out / "distances.jsonl", "FD-MNv2"), Lines(options.out / "cells.jsonl").rows
    for path in sorted((options.out / "weights").glob("*.pt")):
        cell = cell_of(cells[path.stem])
        thousands = options.images or [cell.images // 1000]
        is_asked = f"{cell.width}x{cell.depth}" in options.networks and cell.images // 1000 in thousands
        is_asked = is_asked and cell.name in options.sets and cell.seed in options.seeds
        if path.stem in lines.rows or not is_asked or cell.others:
            continue
        data = data_of(options.out, cell)
        images = Images(load(options.out, cell.name, cell.size, 1), None, options.out / f"{cell.name}.real.pt")
        measured = images.distances_of(draw(data, torch.load(path), drawn_rows(data), cell.seed))
        lines.add(path.stem, {**vars(cell), **measured})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "tune", "distances"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--sets", nargs="+", default=["eurosat", "emoji", "mixture", "glyphs"])
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--networks", nargs="+", default=[f"{w}x{d}" for w, d in IMAGES])
    parser.add_argument("--images", nargs="+", type=int, help="thousands; default: all lengths of the network")
    parser.add_argument("--clusters", nargs="+", type=int, default=list(CLUSTERS))
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES), help="of the common start")
    parser.add_argument("--method", choices=("balanced", "random"), default="balanced", help="of the clusters")
    parser.add_argument("--others", type=int, default=0, help="so many experts, from the first on, of --prediction")
    parser.add_argument("--prediction", choices=("eps", "v"), default="eps", help="of --others, on the cosine schedule")
    parser.add_argument("--others-start", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--by-level", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--part", default="1/1", help="which of so many processes this is, as 1/2")
    options = parser.parse_args()
    {"run": run, "tune": tune, "distances": distances}[options.command](options)


if __name__ == "__main__":
    main()
