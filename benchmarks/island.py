"""Overhead of a training beside its steps: waiting for data, stalls by checkpoints, and the start.

    python benchmarks/island.py --threads 2                # all three, on a DiT-S/2 and random latents 4x32x32
    python benchmarks/island.py --modes start --size B/2

loading: fraction of the time in which the loop waits for a batch. checkpoint: what a save adds to the steps around it
(the copy that blocks training, and the cost of writing in the background), over the default interval.
start: `atoll train expert 0` with train.compile, from the shell to the end of the first step, with an empty compiler
cache on the disk.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml

import atoll.train.loop
from atoll.manifest import TrainSettings, load_manifest
from atoll.nn import SIZES
from atoll.storage.shards import ShardWriter
from atoll.train.expert import train_expert

ROWS, SHAPE, WORDS = 512, (4, 32, 32), ["a", "photo", "of", "moss", "on", "an", "old", "wall"]


def write_run(path: Path, size: str, train: dict[str, Any]) -> Path:
    """A run with one cluster of random latents, as `atoll cluster` writes it."""
    condition = {"name": "hash", "dim": 768, "length": 77}
    frozen = {"codec": {"name": "pixels", "channels": 4}, "condition": condition}
    manifest = {
        "name": "benchmark",
        "condition": condition,
        "clusters": {"k": 1},
        "network": {**SIZES[size], "pooled": False},
        "train": {"track": "none", "validate_every": 0, **train},
        "experts": [{"cluster": 0, "objective": {"prediction": "flow", "schedule": "linear"}}],
    }
    path.mkdir(parents=True)
    (path / "atoll.yaml").write_text(yaml.safe_dump(manifest))
    latents = torch.randn(ROWS, *SHAPE, generator=torch.Generator().manual_seed(0)).half()
    captions = [" ".join([*WORDS[i % 3 :], str(i)]) for i in range(ROWS)]
    card = {**frozen, "latent_shape": list(SHAPE), "assignment": "none", "cluster": 0, "clusters": 1, "source": {}}
    with ShardWriter(path / "clusters" / "cluster-000", card) as writer:
        splits = ["val" if i < 8 else "train" for i in range(ROWS)]
        writer.append([f"{i:05d}" for i in range(ROWS)], captions, splits, {"latent": latents})
    return path


class Stop(Exception):
    pass


def clocked(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """The function, with the time of every call appended to `seconds`."""

    def call(*arguments: Any, **named: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*arguments, **named)
        finally:
            seconds.append(time.perf_counter() - began)

    return call


def loop(
    options: argparse.Namespace, directory: Path, checkpoint_every: int
) -> tuple[list[float], list[float], list[float]]:
    """Seconds of every step, of every wait for a batch, and of every save; without the first step."""
    train = {"steps": 10_000, "batch": options.batch, "threads": options.threads, "log_every": 1}
    run = write_run(directory, options.size, {**train, "checkpoint_every": checkpoint_every})
    ends: list[float] = []
    waits: list[float] = []
    saves: list[float] = []

    def progress(line: dict[str, Any]) -> None:
        ends.append(time.perf_counter())
        if len(ends) > options.steps:
            raise Stop

    feed, checkpoints = atoll.train.loop.Prefetcher, atoll.train.loop.Checkpoints
    feed_at, save = feed.at, checkpoints.save
    try:
        feed.at, checkpoints.save = clocked(feed_at, waits), clocked(save, saves)  # type: ignore[method-assign]
        train_expert(run, load_manifest(run), "0", progress=progress)
    except Stop:
        pass
    finally:
        feed.at, checkpoints.save = feed_at, save  # type: ignore[method-assign]
    steps = [after - before for before, after in pairwise(ends)]
    return steps, waits[1 : len(steps) + 1], saves[1:]


def loading(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    steps, waits, _ = loop(options, directory, 10_000)
    return {"step_s": statistics.median(steps), "waiting": sum(waits) / sum(steps), "goal": 0.02}


def checkpoint(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    every = 8
    steps, _, saves = loop(options, directory, every)
    # Step i of `steps` holds what follows the end of step i + 1: the save of step `every` is in steps[every - 1].
    around = [sum(steps[i - 1 : i + 3]) for i in range(every, len(steps) - 3, every)]
    calm = [step for i, step in enumerate(steps) if i % every not in (every - 1, 0, 1, 2)]
    step = statistics.median(calm)
    added = statistics.median(around) - 4 * step
    copy, interval = statistics.median(saves), TrainSettings().checkpoint_every * step
    shares = {"copy_share": copy / interval, "share": added / interval, "goal": 0.01}
    return {"step_s": step, "copy_s": copy, "added_s": added, **shares}


def start(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    train = {"steps": 1, "batch": options.batch, "threads": options.threads, "log_every": 1, "compile": True}
    run = write_run(directory / "run", options.size, train)
    command = [sys.executable, "-m", "atoll", "train", "expert", "0", "--run", str(run), "--quiet"]
    metrics = run / "experts" / ".train-0-flow-linear" / "metrics.jsonl"
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(directory / "inductor"), "TRITON_CACHE_DIR": str(directory / "triton")}
    began = time.perf_counter()
    process = subprocess.Popen(command, env={**os.environ, **cache}, stderr=subprocess.DEVNULL)
    while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None:
        time.sleep(0.05)
    seconds = time.perf_counter() - began
    process.kill()
    process.wait()
    return {"seconds": seconds, "goal": 20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="S/2", choices=list(SIZES))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=36)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--modes", default="loading,checkpoint,start")
    options = parser.parse_args()
    modes = {"loading": loading, "checkpoint": checkpoint, "start": start}
    for mode in options.modes.split(","):
        with tempfile.TemporaryDirectory() as directory:
            numbers = modes[mode](options, Path(directory) / mode)
        rounded = {key: round(value, 4) for key, value in numbers.items()}
        print(json.dumps({"mode": mode, "size": options.size, "batch": options.batch, **rounded}), flush=True)


if __name__ == "__main__":
    main()
