"""The ensembles of map.py by a router that was trained, in place of the cluster that each image is known to be in.

    ATOLL_DATA=... ATOLL_MIXTURE=... python benchmarks/map_router.py errors OUT
    ATOLL_DATA=... ATOLL_MIXTURE=... python benchmarks/map_router.py distances OUT [--images 384] [--clusters 4]

One router for each set, its clusters, network, number of images and seed: half of the experts' width, one block,
trained on an eighth of the images besides what map.py counts. It sees x_t, t and the prompt. OUT/routed.jsonl has a
line for each cell whose weights `map.py run` has kept: the held-out denoising error by top-1 and by all experts, and
the router's accuracy, by level. Experts that predict eps or v are calibrated, as Atoll's are.
OUT/routed-distances.jsonl has the Fréchet distances of images drawn by both.
"""

import argparse
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from efficiency import Images
from map import FINE, FLOW, STEPS, SWITCH, Cell, cell_of, data_of, drawn_rows, networks_of
from small import LEVELS, Data, Lines, load, mean, velocities
from torch import Tensor, nn

from atoll.manifest import TrainSettings
from atoll.nn import build_network
from atoll.objective import Objective
from atoll.randomness import Stream, seeded
from atoll.schedule import PATH
from atoll.solver import sample as solve
from atoll.train.batches import SeededSampler, drop_condition
from atoll.train.state import State

BATCH, LR = 32, 3e-3
PART = 8  # of the cell's images is what a router trains on


def trained_router(data: Data, k: int, width: int, images: int, seed: int) -> nn.Module:
    """Train a router for a set and its clusters, as `atoll train router` does."""
    channels, *size = data.x0.shape[1:]
    torch.manual_seed(seed)
    shape = {"size": size, "channels": channels, "patch": 4, "pooled_dim": data.encoder.pooled_dim}
    router: nn.Module = build_network(
        {"name": "router", "clusters": k, "width": width, "depth": 1, "heads": max(1, width // 32), **shape}
    )
    settings = TrainSettings(steps=images // BATCH, batch=BATCH, lr=LR, warmup=50, decay_from=0.6, ema=0.99)
    state, rows = State(router, settings), data.training()
    order, null = SeededSampler(len(rows), BATCH, seed), data.encoder.null(1)
    router.train()
    for step in range(settings.steps):
        own, g = rows[order.at(step)], seeded(seed, step)
        t, x0 = torch.rand(BATCH, generator=g), data.x0[own]
        x = PATH.diffuse(x0, torch.randn(x0.shape, generator=g), t)
        dropped = torch.rand(BATCH, generator=g) < settings.dropout
        condition = drop_condition(data.encoder.encode(data.tokens.index(own)), null, dropped)
        state.begin()
        F.nll_loss(router(x, t, condition.pooled), data.cluster[own]).backward()
        state.clip()
        state.update()
    with torch.no_grad():
        for name, value in zip(state.names, state.ema, strict=True):
            router.get_parameter(name).copy_(value)
    return router.eval()


def calibrated(
    config: dict[str, Any], weights: dict[str, Tensor], objective: Objective, data: Data, rows: Tensor, cluster: int
) -> Iterator[tuple[float, Tensor, Tensor]]:
    """Yield what `velocities` does, corrected as Atoll corrects an expert (`atoll.calibration`).

    The slope of each level is measured on the cluster's images that are held out for it.
    """
    held = (data.calibration & ~data.val & (data.cluster == cluster)).nonzero().flatten()
    mean_x0 = data.x0[data.training(cluster)].mean(0)

    def noisy(number: int, t: float, own: Tensor) -> Tensor:
        # The noisy images that the network saw.
        eps = torch.randn(data.x0.shape, generator=seeded(0, number, Stream.VALIDATION))[own]
        return PATH.diffuse(data.x0[own], eps, torch.full((len(own),), t))

    both = zip(
        velocities(config, weights, objective, data, held),
        velocities(config, weights, objective, data, rows),
        strict=True,
    )
    for number, ((t, on_held, _), (_, output, true)) in enumerate(both):
        # On the path x0 is x - t u.
        found = noisy(number, t, held) - t * on_held - mean_x0
        slope = (found * (data.x0[held] - mean_x0)).sum() / found.square().sum()
        x = noisy(number, t, rows)
        x0 = mean_x0 + slope * (x - t * output - mean_x0)
        yield t, (x - x0) / t, true


@torch.inference_mode()
def routed(cell: Cell, kept: dict[str, Any], router: nn.Module, data: Data) -> dict[str, Any]:
    """Measure an ensemble by its router on the held-out rows."""
    rows = data.held_out()
    experts = [
        calibrated(kept["config"], weights, cell.objective(cluster), data, rows, cluster)
        if cluster < cell.others
        else velocities(kept["config"], weights, FLOW, data, rows)
        for cluster, weights in enumerate(kept["experts"])
    ]
    generalist = kept["generalist"]
    general = velocities(kept["config"], generalist, FLOW, data, rows) if generalist is not None else None
    condition = data.encoder.encode(data.tokens.index(rows))
    top, full, accuracy = [], [], []
    for number in range(len(LEVELS)):
        answers = [next(expert) for expert in experts]
        t, true = answers[0][0], answers[0][2]
        # The noisy images that the experts saw.
        eps = torch.randn(data.x0.shape, generator=seeded(0, number, Stream.VALIDATION))[rows]
        times = torch.full((len(rows),), t)
        p = router(PATH.diffuse(data.x0[rows], eps, times), times, condition.pooled).exp()  # [n,K]
        outputs = torch.stack([output for _, output, _ in answers], 1)  # [n,K,C,H,W]
        best = p.argmax(1)
        accuracy.append(float((best == data.cluster[rows]).float().mean()))
        one = outputs[torch.arange(len(rows)), best]
        every = torch.einsum("nk,nkchw->nchw", p, outputs)
        if general is not None:
            output = next(general)[1]
            one, every = (output, output) if FINE[number] == 1 else (one, every)
        top.append(_error(one, true))
        full.append(_error(every, true))
    return {"error": mean(top), "error_full": mean(full), "levels": top, "levels_full": full, "accuracy": accuracy}


@torch.inference_mode()
def draw(kept: dict[str, Any], router: nn.Module, data: Data, rows: Tensor, seed: int) -> dict[str, Tensor]:
    """Draw an image for each row's caption by the router, with all experts and with the best: [n,C,H,W] of each."""
    experts, general = networks_of(kept)
    drawn: dict[str, list[Tensor]] = {"full": [], "top-1": []}
    for routing, images in drawn.items():
        for part in torch.arange(len(rows)).split(128):
            condition = data.encoder.encode(data.tokens.index(rows[part]))

            def velocity(x: Tensor, t: Tensor, condition: Any = condition, routing: str = routing) -> Tensor:
                time = t * FLOW.time_scale
                with torch.autocast("cpu", torch.bfloat16):
                    if general is not None and t[0] < SWITCH:
                        alone: Tensor = general(x, time, condition)
                        return alone.float()
                    outputs = torch.stack([expert(x, time, condition) for expert in experts], 1).float()
                p = router(x, t, condition.pooled).exp()  # [n,K]
                if routing == "top-1":
                    p = F.one_hot(p.argmax(1), p.shape[1]).float()
                return torch.einsum("nk,nkchw->nchw", p, outputs)

            # The noise that map.py's `distances` begins with.
            noise = torch.randn(len(rows), *data.x0.shape[1:], generator=seeded(seed, 0, Stream.SAMPLES))[part]
            images.append(solve(velocity, noise, steps=STEPS, method="dpm++2m"))
    return {routing: torch.cat(images) for routing, images in drawn.items()}


def _error(output: Tensor, true: Tensor) -> float:
    return round(float((output - true).square().mean()), 5)


def cells(options: argparse.Namespace) -> Iterator[tuple[str, Cell, Path]]:
    """The ensembles whose weights are kept, of what was asked for, with their keys and weights."""
    for key, row in Lines(options.out / "cells.jsonl").rows.items():
        path = options.out / "weights" / f"{key}.pt"
        cell = cell_of(row)
        is_asked = cell.name in options.sets and (options.clusters is None or cell.k in options.clusters)
        is_asked = is_asked and (options.images is None or cell.images // 1000 in options.images)
        is_asked = is_asked and (cell.by_level or not options.only_by_level)
        if cell.k > 1 and path.is_file() and is_asked:
            yield key, cell, path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("errors", "distances"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--sets", nargs="+", default=["eurosat", "emoji", "mixture", "glyphs"])
    parser.add_argument("--only-by-level", action="store_true", help="ensembles with a generalist")
    parser.add_argument("--images", nargs="+", type=int, help="thousands; default: all")
    parser.add_argument("--clusters", nargs="+", type=int, help="default: all")
    options = parser.parse_args()
    torch.set_num_threads(1)
    is_errors = options.command == "errors"
    lines = Lines(
        options.out / ("routed.jsonl" if is_errors else "routed-distances.jsonl"), "error" if is_errors else "FD"
    )

    @functools.cache
    def router_of(of: Cell) -> nn.Module:
        return trained_router(data_of(options.out, of), of.k, of.width // 2, of.images // PART, of.seed)

    for key, cell, path in cells(options):
        if key in lines.rows or (not is_errors and cell.others):
            continue
        # Ensembles of the same clusters share their router.
        of = (cell.name, cell.size, cell.width, 0, cell.seed, cell.images, cell.k)
        router = router_of(Cell(*of, method=cell.method))
        kept, data = torch.load(path), data_of(options.out, cell)
        if is_errors:
            lines.add(key, {**vars(cell), **routed(cell, kept, router, data)})
            continue
        images = Images(load(options.out, cell.name, cell.size, 1), None, options.out / f"{cell.name}.real.pt")
        drawn = draw(kept, router, data, drawn_rows(data), cell.seed)
        measured = {
            f"{space} {routing}": distance
            for routing, x0 in drawn.items()
            for space, distance in images.distances_of(x0).items()
        }
        lines.add(key, {**vars(cell), "FD": measured["FD-MNv2 full"], **measured})


if __name__ == "__main__":
    main()
