"""Is `atoll plan --gpu here` right? Predicts an expert's training on this machine, trains it, and compares.

    python benchmarks/plan.py                     # the demo's first expert, 300 steps, three rounds

Each round measures the rate (as the plan does) and then trains (as `atoll train` does: shards, captions, checkpoints,
metrics). Both are given in seconds of wall-clock time and of CPU time: if other programs use the machine, the former
shows how much of it was available, the latter the cost of the training itself (with one thread, as in the demo).
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import yaml

from atoll.cluster import cluster_run
from atoll.data.encode import encode_run
from atoll.manifest import load_manifest, recipe_path
from atoll.plan.measure_machine import measured_rate
from atoll.plan.recipe import latent_shape, network_of, text_of
from atoll.train.expert import train_expert

WARM = 20  # steps before the clocks start; the plan does not know about warming up either
CLOCKS = {"clock": time.perf_counter, "CPU": time.process_time}


def make_run(directory: Path, recipe: str, steps: int) -> Path:
    """A run of the recipe, encoded and clustered, whose experts train for `steps` steps."""
    content = yaml.safe_load(recipe_path(recipe).read_text(encoding="utf-8"))
    content["train"]["steps"] = steps + WARM
    content["train"]["log_every"] = 10
    (directory / "atoll.yaml").write_text(yaml.safe_dump(content))
    manifest = load_manifest(directory)
    encode_run(directory, manifest)
    cluster_run(directory, manifest)
    return directory


def trained_seconds(run: Path, expert: str) -> list[float]:
    """Seconds of each clock from step WARM to the last one."""
    marks: dict[int, list[float]] = {}

    def tell(line: dict[str, float]) -> None:
        marks[int(line["step"])] = [clock() for clock in CLOCKS.values()]

    train_expert(run, load_manifest(run), expert, restart=True, progress=tell)
    return [last - first for first, last in zip(marks[WARM], marks[max(marks)], strict=True)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to write all numbers")
    options = parser.parse_args(arguments)
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        run = make_run(Path(directory), options.recipe, options.steps)
        manifest = load_manifest(run)
        part = manifest.experts[0]
        train, text = manifest.train_of(part), text_of(manifest.condition)
        network = network_of(manifest, part, latent_shape(manifest), text)
        config = {"name": "dit", **{k: v for k, v in asdict(network).items() if k != "tokens"}}
        for _ in range(options.rounds):
            rates = [
                measured_rate(config, text.tokens, train.batch, train.threads, train.precision, clock=clock)
                for clock in CLOCKS.values()
            ]
            took = trained_seconds(run, part.full_name)
            said = [options.steps * train.batch / rate for rate in rates]
            rows.append({"predicted": said, "took": took, "ratio": [t / s for t, s in zip(took, said, strict=True)]})
            print(
                "  ".join(
                    f"{what}: predicted {s:.1f} s, took {t:.1f} s, ratio {t / s:.2f}"
                    for what, s, t in zip(CLOCKS, said, took, strict=True)
                ),
                flush=True,
            )
    medians = [statistics.median(row["ratio"][i] for row in rows) for i in range(2)]
    print(f"took / predicted, median of {options.rounds}: clock {medians[0]:.2f}, CPU {medians[1]:.2f}")
    if options.json:
        options.json.write_text(json.dumps({"rounds": rows, "median_ratio": medians}, indent=1) + "\n")


if __name__ == "__main__":
    main()
