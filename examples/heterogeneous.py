"""One ensemble of four unlike experts, trained on glyphs, sampled with every routing and every treatment of replicas.

    python examples/heterogeneous.py runs/heterogeneous          # about half an hour on two cores; run again to resume
    python examples/heterogeneous.py runs/heterogeneous --measure-only --seeds 5
    python examples/heterogeneous.py runs/try --small --seeds 1

    0-eps-cosine     a DiT that predicts eps on the cosine schedule        cluster 0
    0-flow-linear    a smaller DiT that predicts the flow                  cluster 0: replicas
    1-x0-table       a DiT that predicts x0 on a table of 60 steps with zero terminal SNR    cluster 1
    2-pixart         diffusers' PixArtTransformer2DModel, unchanged, trained as eps on linear-beta    cluster 2

`atoll launch` trains each alone; `atoll assemble` computes the replicas' weights on rows that neither trained on. The
output is a Frechet distance (features: 48 principal components of the pixels, fitted to the data) from `atoll
evaluate`'s own code: each seed has other prompts, noise and real images. Mean and standard deviation over the seeds;
there is one seed of the training.
"""

import argparse
import json
import math
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from atoll.assemble import assemble_run
from atoll.calibration import Calibration
from atoll.cluster import cluster_run
from atoll.convert.foreign import keep
from atoll.data.encode import encode_run
from atoll.ensemble import Ensemble, Expert
from atoll.evaluate import EvaluateSettings, Variant, evaluate
from atoll.evaluate.run import OpenRun, open_run
from atoll.launch.run import launch_run
from atoll.manifest import load_manifest
from atoll.pipeline import Pipeline, grid
from atoll.storage.layout import RunLayout

# alpha-bar of 60 steps, cosine, ending in exactly 0: the last step has no signal (Lin et al. 2023).
TABLE = [round(math.cos(math.pi / 2 * (i + 0.5) / 60) ** 2, 6) for i in range(59)] + [0.0]
CONDITION = {"name": "hash", "dim": 64, "length": 12}
RUN = {
    "name": "heterogeneous",
    "data": {"source": "glyphs", "subset": "demo", "size": 16},
    "codec": {"name": "pixels", "channels": 1},
    "condition": CONDITION,
    "feature": {"name": "hog"},
    "clusters": {"k": 3, "method": "balanced"},
    "network": {"patch": 4, "width": 128, "depth": 4, "heads": 4},
    "train": {
        "steps": 1000, "batch": 64, "lr": 2.0e-3, "warmup": 50, "decay_from": 0.6, "ema": 0.995,
        "checkpoint_every": 250, "calibration_holdout": 0.05, "threads": 1,
    },
    "experts": [
        {"cluster": 0, "objective": {"prediction": "eps", "schedule": "cosine", "weighting": "min-snr"}},
        {"cluster": 0, "objective": {"prediction": "flow", "schedule": "linear"}, "network": {"width": 96, "depth": 3}},
        {
            "cluster": 1, "name": "x0-table",
            "objective": {"prediction": "x0", "schedule": {"name": "table", "alphas_cumprod": TABLE}},
        },
        {
            "cluster": 2, "name": "pixart",
            "objective": {"prediction": "eps", "schedule": "linear-beta", "weighting": "min-snr"},
            "train": {"init": "pixart"},
        },
    ],
    "router": {"network": {"patch": 4, "width": 64, "depth": 2, "heads": 2, "pooled": True}, "train": {"steps": 800}},
    "evaluate": {"images": 512, "steps": 15},
}  # fmt: skip
# What --small changes: every stage runs, in a minute or two; the numbers mean nothing.
SMALL = {
    "network": {"patch": 4, "width": 32, "depth": 1, "heads": 2},
    "train": {**RUN["train"], "steps": 4, "batch": 8, "warmup": 1, "checkpoint_every": 2},  # type: ignore[dict-item]
    "router": {"network": {"patch": 4, "width": 32, "depth": 1, "heads": 2, "pooled": True}, "train": {"steps": 4}},
    "evaluate": {"images": 64, "steps": 2},
}
ROUTINGS = ("top-1", "top-2", "full", "threshold-0.1", "nucleus-0.9", "nucleus-0.9@0.5", "sample-1")
REPLICAS = ("stacked", "inverse-error", "equal", "time-switch-0.5", "time-switch-0.25", "time-switch-0.1")
EPS, FLOW = "0-eps-cosine", "0-flow-linear"


def train(run: Path, small: bool = False) -> None:
    """The whole run, every stage by the function behind its command; finished stages are skipped."""
    run.mkdir(parents=True, exist_ok=True)
    file = RunLayout(run).manifest
    if not file.exists():
        file.write_text(yaml.safe_dump({**RUN, **SMALL} if small else RUN, sort_keys=False))
    manifest = load_manifest(run)
    encode_run(run, manifest, resume=True)
    cluster_run(run, manifest)
    if not (run / "pixart").exists():
        random_pixart(run / "pixart-as-it-came", run / "pixart")
    launch_run(run)
    assemble_run(run, manifest)


def random_pixart(directory: Path, out: Path) -> None:
    """A small random PixArt as diffusers saves it, converted for expert 2: a network that Atoll did not create."""
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    network: Any = PixArtTransformer2DModel(
        num_attention_heads=4, attention_head_dim=32, num_layers=4, cross_attention_dim=128, in_channels=1,
        out_channels=2, sample_size=16, patch_size=4, caption_channels=64, use_additional_conditions=False,
    )  # fmt: skip
    network.save_pretrained(directory)
    codec = {"name": "pixels", "channels": 1}
    keep(directory, out, condition=CONDITION, codec=codec, clusters=[2], k=3, name="2-pixart")


def variants_of(ensemble: Ensemble) -> dict[str, Ensemble]:
    """The variants to measure, by their row in the table."""
    named = {expert.name: expert for expert in ensemble.experts}

    def without(name: str) -> Ensemble:
        return replace(ensemble, experts=[expert for expert in ensemble.experts if expert.name != name])

    def changed(calibration: Calibration | None) -> Ensemble:
        experts = [replace(expert, calibration=calibration) for expert in ensemble.experts]
        return replace(ensemble, experts=experts, replicas="equal")

    mean = named[EPS].calibration.mean  # type: ignore[union-attr]
    return {
        **{f"routing {routing}": replace(ensemble, routing=routing) for routing in ROUTINGS},
        "native": replace(ensemble, alignment="native", replicas="equal"),
        "snr": changed(Calibration.identity(torch.zeros_like(mean))),
        "snr + x0 clamp": changed(None),
        "snr + calibration": replace(ensemble, replicas="equal"),
        **{f"replicas {mode}": replace(ensemble, replicas=mode) for mode in REPLICAS},
        "only the eps replica": without(FLOW),
        "only the flow replica": without(EPS),
    }


def in_cluster_0(ensemble: Ensemble) -> dict[str, Ensemble]:
    """The replicas alone, for everything in their cluster."""
    replicas: list[Expert] = [expert for expert in ensemble.experts if expert.clusters == (0,)]
    one = replace(ensemble, experts=replicas, routing="oracle-0")
    rows = {f"cluster 0, {mode}": replace(one, replicas=mode) for mode in REPLICAS}
    for expert in replicas:
        rows[f"cluster 0, only {expert.name}"] = replace(one, experts=[expert])
    return rows


def measure(run: Path, seeds: int) -> dict[str, list[float]]:
    """Frechet distances of every variant, one per seed."""
    opened = open_run(run)
    settings = load_manifest(run).evaluate
    whole = _distances(opened, variants_of(opened.loaded.ensemble), settings, seeds)
    cluster = replace(opened, encoded=opened.clusters[0])
    part = _distances(cluster, in_cluster_0(opened.loaded.ensemble), settings, seeds)
    return {**whole, **{("cluster 0, floor" if name == "floor" else name): value for name, value in part.items()}}


def _distances(
    opened: OpenRun, ensembles: dict[str, Ensemble], settings: EvaluateSettings, seeds: int
) -> dict[str, list[float]]:
    distances: dict[str, list[float]] = {name: [] for name in ("floor", *ensembles)}
    for seed in range(seeds):
        variants = [Variant(name, ensemble) for name, ensemble in ensembles.items()]
        results = evaluate(variants, opened.reference, settings.model_copy(update={"seed": seed, "held_out": 16}))
        distances["floor"].append(results.floor)
        for score in results.scores:
            distances[score.name].append(math.nan if score.frechet is None else score.frechet)
        print(f"seed {seed} measured", flush=True)
    return distances


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--measure-only", action="store_true")
    parser.add_argument("--small", action="store_true", help="tiny networks and few steps: every stage, no results")
    options = parser.parse_args()
    if not options.measure_only:
        train(options.run, options.small)
    distances = measure(options.run, options.seeds)
    for name, values in distances.items():
        print(f"| {name} | {statistics.mean(values):.3f} | {statistics.stdev(values) if len(values) > 1 else 0:.3f} |")
    result = {"distances": distances, "date": time.strftime("%Y-%m-%d")}
    (options.run / "distances.json").write_text(json.dumps(result, indent=2) + "\n")
    pipe = Pipeline.from_pretrained(options.run / "ensemble")
    prompts = ["latin capital letter a, serif bold", "digit seven, sans bold", "greek small letter omega, sans"]
    for routing in ("top-1", "full", "sample-1"):
        images = pipe(prompts * 2, seeds=range(6), num_inference_steps=25, guidance_scale=2.0, routing=routing).images
        grid(images, columns=3).save(options.run / f"{routing}.png")


if __name__ == "__main__":
    main()
