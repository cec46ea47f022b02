"""Overhead of a training beside its steps: waiting for data, stalls by checkpoints, and the start.

    python benchmarks/island.py --threads 2                # all, on a DiT-S/2 and random latents 4x32x32
    python benchmarks/island.py --modes start --size B/2

loading: fraction of the time in which the loop waits for a batch.
buckets: the same for latents of one size and of five sizes with as many numbers and tokens, in turn (4x24x24, 4x36x16,
4x48x12, and these across); also the time that the prefetching thread takes for a batch, over a step, and the step
itself, as [median, least, most] over the rounds.
batches: CPU time that the prefetching thread needs for a batch, of one size and of the five; independent of other
programs.
checkpoint: what a save adds to the steps around it (the copy that blocks training, and the cost of writing in the
background), over the default interval.
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
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

import atoll.train.loop
from atoll.encoders.text import build_encoder
from atoll.manifest import TrainSettings, load_manifest
from atoll.nn import SIZES
from atoll.storage.shards import Shards, ShardWriter
from atoll.train.batches import CaptionedLatents, Rows
from atoll.train.expert import train_expert

ROWS, SHAPE = 512, (4, 32, 32)
_BATCHES = 200  # in a round of the mode batches
ONE = [(4, 24, 24)]
SEVERAL = [*ONE, (4, 36, 16), (4, 16, 36), (4, 48, 12), (4, 12, 48)]
WORDS = ["a", "photo", "of", "moss", "on", "an", "old", "wall"]


Shapes = Sequence[tuple[int, int, int]]


def write_run(path: Path, size: str, train: dict[str, Any], shapes: Shapes = (SHAPE,)) -> Path:
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
    generator = torch.Generator().manual_seed(0)
    card = {**frozen, "latent_shape": list(shapes[0]), "assignment": "none", "cluster": 0, "clusters": 1, "source": {}}
    with ShardWriter(path / "clusters" / "cluster-000", card, shapes={"latent": shapes[0]}) as writer:
        for number, shape in enumerate(shapes):
            rows = range(number, ROWS, len(shapes))
            latents = torch.randn(len(rows), *shape, generator=generator).half()
            captions = [" ".join([*WORDS[i % 3 :], str(i)]) for i in rows]
            splits = ["val" if i < 8 else "train" for i in rows]
            writer.append([f"{i:05d}" for i in rows], captions, splits, {"latent": latents})
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


class Seconds(NamedTuple):
    """Of every step, of every wait for a batch, of every save, and of every batch that is made; without the first."""

    steps: list[float]
    waits: list[float]
    saves: list[float]
    made: list[float]


def loop(options: argparse.Namespace, directory: Path, checkpoint_every: int, shapes: Shapes = (SHAPE,)) -> Seconds:
    train = {"steps": 10_000, "batch": options.batch, "threads": options.threads, "log_every": 1}
    run = write_run(directory, options.size, {**train, "checkpoint_every": checkpoint_every}, shapes)
    ends: list[float] = []
    waits: list[float] = []
    saves: list[float] = []
    made: list[float] = []

    def progress(line: dict[str, Any]) -> None:
        ends.append(time.perf_counter())
        if len(ends) > options.steps:
            raise Stop

    feed, checkpoints = atoll.train.loop.Prefetcher, atoll.train.loop.Checkpoints
    get, make, save = feed.get, feed._pinned, checkpoints.save
    try:
        feed.get, feed._pinned = clocked(get, waits), clocked(make, made)  # type: ignore[method-assign]
        checkpoints.save = clocked(save, saves)  # type: ignore[method-assign]
        train_expert(run, load_manifest(run), "0", progress=progress)
    except Stop:
        pass
    finally:
        feed.get, feed._pinned, checkpoints.save = get, make, save  # type: ignore[method-assign]
    steps = [after - before for before, after in pairwise(ends)]
    return Seconds(steps, waits[1 : len(steps) + 1], saves[1:], made[1 : len(steps) + 1])


def loading(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    seconds = loop(options, directory, 10_000)
    step = statistics.median(seconds.steps)
    return {"step_s": step, "waiting": sum(seconds.waits) / sum(seconds.steps), "goal": 0.02}


def buckets(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    rounds: dict[str, list[dict[str, float]]] = {"one": [], "several": []}
    for number in range(options.rounds):
        for name, shapes in (("one", ONE), ("several", SEVERAL)):
            steps, waits, _, made = loop(options, directory / f"{name}-{number}", 10_000, shapes)
            step, batch = statistics.median(steps), statistics.median(made)
            share = {"waiting": sum(waits) / sum(steps), "made_over_step": batch / step}
            rounds[name].append({"step_s": step, "made_s": batch, **share})
    numbers: dict[str, Any] = {"goal": 0.02}
    for name, results in rounds.items():
        for key in results[0]:
            values = sorted(result[key] for result in results)
            numbers[f"{name} {key}"] = [round(x, 6) for x in (statistics.median(values), values[0], values[-1])]
    ratios = [b["step_s"] / a["step_s"] for a, b in zip(*rounds.values(), strict=True)]
    return {**numbers, "step of several over one": statistics.median(ratios)}


def batches(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    data = {}
    for name, shapes in (("one", ONE), ("several", SEVERAL)):
        run = write_run(directory / name, options.size, {}, shapes)
        shards = Shards(run / "clusters" / "cluster-000")
        latents = CaptionedLatents(Rows.of([shards], "train"), build_encoder(shards.data_card.condition))
        data[name] = (latents, latents.sampler(options.batch, 0))
    seconds: dict[str, list[float]] = {name: [] for name in data}
    for number in range(options.rounds + 1):
        for name, (latents, sampler) in data.items():
            start = time.thread_time()
            for step in range(number * _BATCHES, (number + 1) * _BATCHES):
                latents.batch(sampler.at(step))
            seconds[name].append((time.thread_time() - start) / _BATCHES)
    # The first round reads the files and hashes the words.
    results = {f"{name} ms": three([1000 * x for x in times[1:]]) for name, times in seconds.items()}
    ratios = [several / one for one, several in zip(*(times[1:] for times in seconds.values()), strict=True)]
    return {**results, "several over one": three(ratios)}


def three(values: Sequence[float]) -> list[float]:
    """The median, the least and the most."""
    return [round(x, 4) for x in (statistics.median(values), min(values), max(values))]


def checkpoint(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    every = 8
    steps, _, saves, _ = loop(options, directory, every)
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
    parser.add_argument("--modes", default="loading,buckets,batches,checkpoint,start")
    parser.add_argument("--rounds", type=int, default=3, help="of the modes buckets and batches")
    options = parser.parse_args()
    modes = {"loading": loading, "buckets": buckets, "batches": batches, "checkpoint": checkpoint, "start": start}
    for mode in options.modes.split(","):
        with tempfile.TemporaryDirectory() as directory:
            numbers = modes[mode](options, Path(directory) / mode)
        rounded = {key: round(value, 4) if isinstance(value, float) else value for key, value in numbers.items()}
        print(json.dumps({"mode": mode, "size": options.size, "batch": options.batch, **rounded}), flush=True)


if __name__ == "__main__":
    main()
