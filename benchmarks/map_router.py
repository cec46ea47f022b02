"""The ensembles of map.py by a router that was trained, in place of the cluster that each image is known to be in.

    ATOLL_DATA=... ATOLL_MIXTURE=... python benchmarks/map_router.py OUT

One router for each set, its clusters, network, number of images and seed: half of the experts' width, one block,
trained on an eighth of the images besides what map.py counts. It sees x_t, t and the prompt. OUT/routed.jsonl has a
line for each cell whose weights `map.py run` has kept: the held-out denoising error by top-1 and by all experts, and
the router's accuracy, by level.
"""

import argparse
import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from map import FINE, FLOW, Cell, data_of
from small import LEVELS, Data, Lines, mean, velocities
from torch import Tensor, nn

from atoll.manifest import TrainSettings
from atoll.nn import build_network
from atoll.randomness import Stream, seeded
from atoll.schedule import PATH
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


@torch.inference_mode()
def routed(cell: Cell, kept: dict[str, Any], router: nn.Module, data: Data) -> dict[str, Any]:
    """Measure an ensemble by its router on the held-out rows."""
    rows = data.held_out()
    experts = [
        velocities(kept["config"], weights, cell.objective(cluster), data, rows)
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


def _error(output: Tensor, true: Tensor) -> float:
    return round(float((output - true).square().mean()), 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    lines, cells = Lines(out / "routed.jsonl"), Lines(out / "cells.jsonl").rows

    @functools.cache
    def router_of(of: Cell) -> nn.Module:
        return trained_router(data_of(out, of), of.k, of.width // 2, of.images // PART, of.seed)

    fields = vars(Cell("", 0, 0, 0, 0, 0, 0))
    for key, row in cells.items():
        path = out / "weights" / f"{key}.pt"
        cell = Cell(**{field: row.get(field, default) for field, default in fields.items()})
        if cell.k > 1 and key not in lines.rows and path.is_file():
            # Ensembles of the same clusters share their router.
            router = router_of(replace(cell, share=0.0, by_level=False, depth=0, eps=0, eps_start=True))
            lines.add(key, {**vars(cell), **routed(cell, torch.load(path), router, data_of(out, cell))})


if __name__ == "__main__":
    main()
