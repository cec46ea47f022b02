"""Atoll's speed on one GPU: one command, a JSON file that grows with every result, and a table.

    python benchmarks/gpu.py --json gpu.json                 # all parts, within 9 minutes
    python benchmarks/gpu.py --parts training --json t.json  # some of them
    python benchmarks/gpu.py --table gpu.json                # the table for docs/benchmarks.md
    python benchmarks/gpu.py --device cpu --tiny             # test the code without a GPU; its numbers mean nothing

Parts, in order: ceiling (bf16 matrix products), training (DiT's B/2 and XL/2 against diffusers' PixArt, MMDiT's B/2
against PRX, with dual blocks against SD3; eager and compiled per block), correct (the device against the CPU, a resumed
training against an uninterrupted one), sampling (eight XL/2 experts and a B/2 router), batch (the largest in 24 and 48
GB, predicted and measured).
Variants alternate within each round, and medians count. A part that fails is recorded, and the others continue.
"""

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from gpu_batch import largest
from gpu_correct import correct
from gpu_measure import Evaluator, release
from gpu_sampling import sampling
from gpu_table import table
from gpu_training import ceiling, training

PARTS: dict[str, Callable[[Evaluator], None]] = {
    "ceiling": ceiling,
    "training": training,
    "correct": correct,
    "sampling": sampling,
    "batch": largest,
}


def machine(device: torch.device) -> dict[str, Any]:
    """The machine and versions that the numbers belong to."""
    about: dict[str, Any] = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "torch": torch.__version__}
    about["command"] = " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]])
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        return {**about, "device": torch.cuda.get_device_name(), "memory_gb": memory / 1e9, "cuda": torch.version.cuda}
    return {**about, "device": "cpu"}


def run(bench: Evaluator, parts: Sequence[str]) -> int:
    """Run the parts; return the number of failures."""
    failed = 0
    for name in parts:
        began = time.monotonic()
        torch.compiler.reset()
        try:
            PARTS[name](bench)
        except Exception as error:  # the parts after it are worth having too
            failed += 1
            traceback.print_exc()
            bench.keep(name, {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"})
        release(bench.device)
        bench.keep(name, {"part_seconds": time.monotonic() - began})
    return failed


def listed(text: str) -> list[str]:
    """ "a,b" -> ["a", "b"], of known parts, in the order of PARTS."""
    names = text.split(",")
    if unknown := set(names) - set(PARTS):
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(sorted(unknown))}; expected some of {','.join(PARTS)}")
    return [part for part in PARTS if part in names]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=listed, default=list(PARTS), help=",".join(PARTS))
    parser.add_argument("--minutes", type=float, default=8.5, help="nothing is begun that would end later")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU, to try the code")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="compiled variants too; on a GPU, yes")
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--table", type=Path, metavar="JSON", help="print the table of a finished run, and no more")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not options.table and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device here; --device cpu --tiny tries the code without one")
    if options.device == "cpu" and not options.tiny:
        parser.error("on a CPU only --tiny sizes are possible; benchmarks/step.py and ensemble.py measure a CPU")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    deadline = time.monotonic()
    options = parse(arguments)
    if options.table:
        print(table(json.loads(options.table.read_text(encoding="utf-8"))))
        return 0
    device = torch.device(options.device)
    compiled = options.device == "cuda" if options.compile is None else options.compile
    bench = Evaluator(device, options.tiny, compiled, options.rounds, deadline + 60 * options.minutes, options.json)
    bench.report.update(machine(device), tiny=options.tiny, rounds=options.rounds)
    failed = run(bench, options.parts)
    print(table(bench.report))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
