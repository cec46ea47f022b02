"""The effect of calibration on a trained ensemble, and the number of latents that it needs.

    python benchmarks/calibrated_run.py runs/demo

Experts of the run are calibrated as in their training, and again on fewer of the held-out latents. Each ensemble's
Frechet distance is measured by `atoll evaluate`'s own code, over several seeds (each with other prompts, noise and real
images), and compared with HDDM's formulas, HDDM's clamp, and no correction. Mean and standard deviation.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from atoll.calibration import Calibration
from atoll.encoders.text import build_encoder
from atoll.ensemble import Ensemble, Expert
from atoll.evaluate import EvaluateSettings, Variant, evaluate
from atoll.evaluate.run import OpenRun, open_run
from atoll.manifest import load_manifest
from atoll.storage.shards import Shards
from atoll.train.calibrate import calibrate
from atoll.train.calibrate_expert import shards_of
from atoll.train.denoiser import split_holdout

FEW = (8, 16, 32, 64)


def ensembles_of(run: Path, opened: OpenRun) -> tuple[dict[str, Ensemble], dict[str, Any]]:
    """Ensembles by name, and for each number of latents the gap of its slopes to those from all held-out latents."""
    base = opened.loaded.ensemble
    slopes: dict[str, Any] = {}

    def changed(experts: list[Expert]) -> Ensemble:
        return replace(base, experts=experts, alignment="snr", replicas="equal")

    ensembles = {
        "native": replace(base, alignment="native"),
        "snr alone": changed([replace(e, calibration=Calibration.identity(_mean(e))) for e in base.experts]),
        "snr + x0 clamp": changed([replace(e, calibration=None) for e in base.experts]),
        "snr + calibration": base,
    }
    for count in FEW:
        again = [_recalibrated(run, opened, expert, count) for expert in base.experts]
        gaps = [
            float((one.calibration.slope - all_.calibration.slope).abs().max())
            for one, all_ in zip(again, base.experts, strict=True)
            if one.calibration is not None and all_.calibration is not None
        ]
        slopes[str(count)] = {"largest gap of a slope": max(gaps), "of each expert": gaps}
        ensembles[f"snr + calibration on {count} latents"] = changed(again)
    return ensembles, slopes


def _mean(expert: Expert) -> torch.Tensor:
    assert expert.calibration is not None
    return expert.calibration.mean


def _recalibrated(run: Path, opened: OpenRun, expert: Expert, count: int) -> Expert:
    """The expert calibrated on the first `count` latents that were held out from its training."""
    path = run / "experts" / expert.name
    card = json.loads((path / "card.json").read_text())
    shards = [Shards(place) for place in shards_of(path)]
    encoder = build_encoder(card["condition"])
    trained = card["training"]
    _, back, _ = split_holdout(shards, encoder, trained["calibration_holdout"])
    device = torch.device("cpu")
    few = calibrate(
        expert.network, expert.objective, back, mean=_mean(expert), seed=trained["seed"], device=device, rows=count
    )
    return replace(expert, calibration=few)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    opened = open_run(options.run)
    settings: EvaluateSettings = load_manifest(options.run).evaluate
    ensembles, slopes = ensembles_of(options.run, opened)
    distances: dict[str, list[float]] = {name: [] for name in ("floor", *ensembles)}
    for seed in range(options.seeds):
        variants = [Variant(name, ensemble) for name, ensemble in ensembles.items()]
        results = evaluate(variants, opened.reference, settings.model_copy(update={"seed": seed, "held_out": 16}))
        distances["floor"].append(results.floor)
        for score in results.scores:
            distances[score.name].append(float("nan") if score.frechet is None else score.frechet)
        print(f"seed {seed} done", flush=True)
    print(f"{results.frechet_name}, {results.images} images a seed, {options.seeds} seeds: mean (standard deviation)")
    for name, values in distances.items():
        print(f"{name:38} {statistics.mean(values):8.3f} ({statistics.stdev(values):.3f})")
    for count, gap in slopes.items():
        print(f"{count:>4} latents: slopes within {gap['largest gap of a slope']:.3f} of those of all held back")
    if options.json:
        result = {"distances": distances, "slopes": slopes, "date": time.strftime("%Y-%m-%d")}
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
