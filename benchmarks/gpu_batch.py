"""The largest batch that fits into a memory, measured and as predicted by `atoll plan`: a part of benchmarks/gpu.py.

    python benchmarks/gpu_batch.py XL/2 24 none      # one search; a JSON line per try

Each search is its own process, whose allocator may use the given memory, less the plan's reserve for CUDA's context. A
try is two training steps, compiled, as in `gpu_training`; between tries the allocator's cache is emptied.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from gpu_measure import Evaluator, release
from gpu_training import Training, build, cost_of

from atoll.choices import Checkpointing
from atoll.nn import SIZES
from atoll.plan.fit import RESERVED, Switches, largest_batch
from atoll.plan.rules import CUDA_BF16

SIZE = "XL/2"
SEARCHES: tuple[tuple[int, Checkpointing], ...] = ((24, "none"), (48, "none"), (24, "full"), (48, "full"))  # GB
SECONDS = 90  # that one search may take


def search(fits: Callable[[int], bool], start: int, grain: int) -> tuple[int, int]:
    """(the largest batch that fits, 0 if none; the smallest that does not), at most `grain` apart.

    The steps from `start` double until one batch fits and one does not, then halve.
    """
    step, low, high = grain, 0, 0
    batch = max(1, start)
    while not (low and high) and high != 1:
        if fits(batch):
            low = batch
            batch += step
        else:
            high = batch
            batch = max(1, batch - step)
        step *= 2
    while high - low > grain:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low, high


def predicted(size: str, gigabytes: int, checkpointing: Checkpointing) -> int:
    """The prediction of `atoll plan`."""
    return largest_batch(cost_of(size), CUDA_BF16, Switches(checkpointing), gigabytes * 1e9)


def fits(size: str, batch: int, checkpointing: Checkpointing) -> bool:
    """Try two compiled training steps; print the outcome as a JSON line."""
    device = torch.device("cuda")
    release(device)
    torch.compiler.reset()  # each batch is compiled for itself, as in a training of that batch
    try:
        training = Training(build("atoll", size, device), batch, device, checkpointing)
        for _ in range(2):
            training.step(compiled=True)
        torch.cuda.synchronize()
        done = True
    except torch.OutOfMemoryError:
        done = False
    peak = torch.cuda.max_memory_allocated() / 1e9
    print(json.dumps({"batch": batch, "fits": done, "peak_gb": round(peak, 2)}), flush=True)
    return done


def largest(bench: Evaluator) -> None:
    """Part "batch": for each memory and checkpointing the largest batch, predicted and measured."""
    if not bench.on_gpu:
        bench.keep("batch", {"needs": "a CUDA device: only its allocator can be held to a memory"})
        return
    total = torch.cuda.get_device_properties(bench.device).total_memory
    for gigabytes, checkpointing in SEARCHES:
        name = f"{SIZE} in {gigabytes} GB, checkpointing {checkpointing}"
        if total < gigabytes * 1e9:
            bench.leave_out("batch", f"{name}: there are {total / 1e9:.0f} GB")
        elif bench.has_time(SECONDS, "batch", name):
            bench.keep("batch", {name: searched(gigabytes, checkpointing, SECONDS)})


def searched(gigabytes: int, checkpointing: Checkpointing, seconds: float) -> dict[str, Any]:
    """One search in its own process: its result, or its best result when the seconds are over."""
    command = [sys.executable, str(Path(__file__)), SIZE, str(gigabytes), checkpointing]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        output, ended = process.stdout, process.stderr.strip().splitlines()[-1:] if process.returncode else []
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        ended = [f"stopped after {seconds:.0f} s"]
    return {**summary(output), "predicted": predicted(SIZE, gigabytes, checkpointing), "ended": ended}


def summary(output: str) -> dict[str, Any]:
    """The tries that a search printed: the largest that fits, and the smallest that does not; None if there is none."""
    tries = [json.loads(line) for line in output.splitlines() if line.startswith("{") and line.endswith("}")]
    good = [one["batch"] for one in tries if one["fits"]]
    bad = [one["batch"] for one in tries if not one["fits"]]
    return {"found": max(good, default=None), "too_large": min(bad, default=None), "tries": tries}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=list(SIZES))
    parser.add_argument("gigabytes", type=int)
    parser.add_argument("checkpointing", choices=get_args(Checkpointing))
    options = parser.parse_args()
    size, gigabytes, checkpointing = options.size, options.gigabytes, options.checkpointing
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((gigabytes * 1e9 - RESERVED) / total)
    start = predicted(size, gigabytes, checkpointing)
    search(lambda batch: fits(size, batch, checkpointing), start, max(1, start // 32))


if __name__ == "__main__":
    main()
