"""Loading one expert: meta init and memory-mapped weights against torch.load; time and private memory.

    python benchmarks/loading.py [--size XL/2] [--rounds 3] [--json out.json]

- load_expert: `atoll.ensemble.loading.load_expert`: checks the file's sha256, then maps the file into memory.
- fetch: the same without the check: each load within a `memory_budget`.
- torch.load: the usual way: the network is built and initialised, its weights are read from a .pt file and copied.
- torch.load, meta: its fastest way: built on the meta device, and the weights assigned.
- torch.load, mmap: the same with mmap=True.

Each load is its own process, the variants alternate within each round, and files are in the page cache. torch's imports
for the meta device happen before, in all variants. "ready": until the network can be called; "read": until every weight
was read once as well, so that no variant gains by deferring work. The table shows medians of times, of the ratios to
torch.load within a round, and of the private (anonymous) memory that loading adds.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from atoll.ensemble.loading import load_expert
from atoll.ensemble.offload import read_weights
from atoll.nn import build_network
from atoll.nn.dit import SIZES, DiTConfig
from atoll.storage.artifact import WEIGHTS, save_artifact
from atoll.storage.cards import ExpertCard

BASE = "torch.load"


def write(path: Path, size: str) -> None:
    """An expert's artifact with random weights, and the same weights as a .pt file."""
    network = DiTConfig(size=(32, 32), channels=4, states_dim=768, **SIZES[size]).model_dump(mode="json")
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in build_network(network).state_dict().items()}
    state = {name: 0.02 * torch.randn(shape) for name, shape in shapes.items()}
    card = {
        "name": "random",
        "network": network,
        "objective": {"prediction": "flow", "schedule": "linear"},
        "clusters": [0],
        "k": 1,
        "codec": {"name": "pixels", "channels": 4},
        "condition": {"name": "hash", "dim": 768, "length": 77},
        "latent_shape": [4, 32, 32],
    }
    save_artifact(path / "expert", ExpertCard(**card), {f"network.{name}": value for name, value in state.items()})
    torch.save(state, path / "weights.pt")


def fetched(path: Path) -> nn.Module:
    network = on_meta(path)
    tensors = read_weights(path / "expert" / WEIGHTS)
    network.load_state_dict({name.removeprefix("network."): value for name, value in tensors.items()}, assign=True)
    return network


def on_meta(path: Path) -> nn.Module:
    with torch.device("meta"):
        return build_network(json.loads((path / "expert" / "card.json").read_text())["network"])


def copied(path: Path) -> nn.Module:
    network = build_network(json.loads((path / "expert" / "card.json").read_text())["network"])
    network.load_state_dict(torch.load(path / "weights.pt", weights_only=True))
    return network


def assigned(path: Path, mmap: bool) -> nn.Module:
    network = on_meta(path)
    network.load_state_dict(torch.load(path / "weights.pt", weights_only=True, mmap=mmap), assign=True)
    return network


def checked(path: Path) -> nn.Module:
    network = load_expert(path / "expert").expert.network
    assert isinstance(network, nn.Module)
    return network


VARIANTS: dict[str, Callable[[Path], nn.Module]] = {
    "load_expert": checked,
    "fetch": fetched,
    BASE: copied,
    "torch.load, meta": lambda path: assigned(path, mmap=False),
    "torch.load, mmap": lambda path: assigned(path, mmap=True),
}


def private() -> int:
    """The process's anonymous memory in bytes, which no file on disk backs."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def load(variant: str, path: Path) -> dict[str, float]:
    """Seconds and bytes of one load; runs in its own process."""
    torch.set_num_threads(1)
    with torch.device("meta"):  # what torch imports the first time, 2 to 3 s, whatever is loaded then
        build_network({"name": "dit", "size": (4, 4), "channels": 1, "states_dim": 8, **SIZES["tiny"]})
    before, start = private(), time.perf_counter()
    network = VARIANTS[variant](path)
    ready = time.perf_counter() - start
    for value in network.state_dict().values():
        value.sum()
    return {"ready": ready, "read": time.perf_counter() - start, "private": private() - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="XL/2", choices=SIZES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(load(options.one[0], Path(options.one[1]))))
        return
    rounds: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as directory:
        write(Path(directory), options.size)
        for _ in range(options.rounds):
            done = {}
            for variant in VARIANTS:
                command = [sys.executable, __file__, "--one", variant, directory]
                done[variant] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
            rounds.append(done)
    table = {}
    for variant in VARIANTS:
        row = {key: statistics.median(one[variant][key] for one in rounds) for key in ("ready", "read", "private")}
        row |= {f"{key} x": statistics.median(one[BASE][key] / one[variant][key] for one in rounds) for key in row}
        table[variant] = row
        print(
            f"{variant:18s} ready {row['ready']:6.2f} s ({row['ready x']:6.2f} x)   read {row['read']:6.2f} s "
            f"({row['read x']:5.2f} x)   private {row['private'] / 1e6:7.1f} MB (1/{row['private x']:.0f})"
        )
    if options.json:
        options.json.write_text(json.dumps({"size": options.size, "table": table, "rounds": rounds}, indent=2))


if __name__ == "__main__":
    main()
