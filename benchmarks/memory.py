"""Eight experts within a memory budget: peak memory, time, and whether the images are the same.

    python benchmarks/memory.py [--size XL/2] [--steps 2] [--rounds 2] [--json out.json]

One prompt, guided, routing "full": the worst case, in which every step evaluates all eight. The experts share one file
of random weights, each with its own link and card, so that the disk need not hold eight; each is mapped separately.
Every run is its own process, and the runs alternate within each round; "added" is the peak of resident memory (mapped
files included) above the process's memory before it loaded the ensemble, "step" one solver step.
"""

import argparse
import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from atoll.assemble import assemble
from atoll.ensemble.offload import Offloaded
from atoll.nn import build_network
from atoll.nn.dit import SIZES
from atoll.pipeline import Pipeline
from atoll.storage.artifact import WEIGHTS, read_card, save_artifact, write_json
from atoll.storage.cards import ExpertCard, RouterCard

EXPERTS = 8
SHARED = {
    "latent_shape": [3, 16, 16],
    "codec": {"name": "pixels", "channels": 3},
    "condition": {"name": "hash", "dim": 768, "length": 77},
    "assignment": "none",
}


def write(path: Path, size: str) -> int:
    """Write an ensemble of eight; return the bytes of one expert."""
    expert = {"name": "dit", "size": [16, 16], "channels": 3, "states_dim": 768, **SIZES[size]}
    router = {"name": "router", "size": [16, 16], "channels": 3, **SIZES["tiny"], "clusters": EXPERTS}
    about = {"objective": {"prediction": "flow", "schedule": "linear"}, "k": EXPERTS}
    for k in range(EXPERTS):
        card = {"network": expert, **SHARED, **about, "name": f"expert-{k}", "clusters": [k]}
        if k == 0:
            save_artifact(path / "0", ExpertCard(**card), random_weights(expert))
            continue
        (path / str(k)).mkdir()
        os.link(path / "0" / WEIGHTS, path / str(k) / WEIGHTS)
        first = read_card(path / "0", ExpertCard).plain()
        write_json(path / str(k) / "card.json", {**first, "name": f"expert-{k}", "clusters": [k]})
    save_artifact(path / "router", RouterCard(network=router, **SHARED, clusters=EXPERTS), random_weights(router))
    assemble([path / str(k) for k in range(EXPERTS)], path / "router", path / "ensemble", {"guidance_scale": 4.0})
    return (path / "0" / WEIGHTS).stat().st_size


def random_weights(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in build_network(config).state_dict().items()}
    return {f"network.{name}": 0.02 * torch.randn(shape) for name, shape in shapes.items()}


def status(key: str) -> int:
    """A line of Linux's /proc/self/status, in bytes."""
    return 1024 * int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def draw(path: Path, budget: int | None, weights: Any, steps: int) -> dict[str, Any]:
    """One run; runs in its own process."""
    torch.ones(8, 8) @ torch.ones(8, 8)
    before, start = status("VmRSS"), time.perf_counter()
    pipe = Pipeline.from_pretrained(path / "ensemble", memory_budget=budget, weights=weights, device="cpu")
    loaded = time.perf_counter()
    drawn = pipe("a red bicycle", seeds=[0], num_inference_steps=steps, routing="full")
    step = (time.perf_counter() - loaded) / steps
    network = pipe.loaded.ensemble.experts[0].network
    return {
        "load": loaded - start,
        "step": step,
        "added": status("VmHWM") - before,
        "fetched": network.cache.loads if isinstance(network, Offloaded) else EXPERTS,
        "image": hashlib.sha256(drawn.latents.numpy().tobytes()).hexdigest()[:12],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="XL/2", choices=SIZES)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        path, budget, weights = options.one
        print(json.dumps(draw(Path(path), int(budget) or None, weights or None, options.steps)))
        return
    rounds: list[dict[str, dict[str, Any]]] = []
    with tempfile.TemporaryDirectory() as directory:
        expert = write(Path(directory), options.size)
        router = (Path(directory) / "router" / WEIGHTS).stat().st_size
        runs = {
            "no budget": (0, ""),
            "three experts": (3 * expert + router, ""),
            "two experts": (2 * expert + router, ""),
            "bf16, two experts": (expert + router, "bf16"),
        }
        for _ in range(options.rounds):
            done = {}
            for name, (budget, weights) in runs.items():
                command = [sys.executable, __file__, "--steps", str(options.steps)]
                command += ["--one", directory, str(budget), weights]
                done[name] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
            rounds.append(done)
    print(f"one expert: {expert / 1e9:.2f} GB")
    for name in runs:
        load, step, added = (statistics.median(one[name][key] for one in rounds) for key in ("load", "step", "added"))
        ratio = statistics.median(one[name]["step"] / one["no budget"]["step"] for one in rounds)
        same = all(one[name]["image"] == one["no budget"]["image"] for one in rounds)
        print(
            f"{name:18s} load {load:6.1f} s   step {step:6.2f} s ({ratio:.2f} x)   added {added / expert:5.2f} experts"
            f"   brought {rounds[0][name]['fetched']:3d}   {'the same image' if same else 'another image'}"
        )
    if options.json:
        options.json.write_text(json.dumps({"size": options.size, "expert": expert, "rounds": rounds}, indent=2))


if __name__ == "__main__":
    main()
