"""Evaluates a run: reads its directories, measures every way to sample it, writes report.html and report.json."""

import os
import platform
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import atoll
from atoll.artifact import CARD, read_json, sha256_file, write_bytes, write_json
from atoll.calibration import Calibration
from atoll.ensemble import Ensemble, Expert, Trace
from atoll.errors import AtollError
from atoll.evaluate.measure import (
    EvaluateSettings,
    Progress,
    Reference,
    Results,
    Variant,
    evaluate,
    side_by_side,
    worker_count,
)
from atoll.evaluate.metrics import seeded_noise
from atoll.evaluate.report import ClusterInfo, ExpertInfo, Grid, Report, Usage, to_html, to_json
from atoll.loading import LoadedEnsemble, load_ensemble
from atoll.objective import Objective
from atoll.schedule import Linear
from atoll.shards import Shards
from atoll.solver import sample
from atoll.weights import same
from atoll.words import count_words, telling_words

PICTURES_PER_CLUSTER = 24


@dataclass(frozen=True)
class Opened:
    """What stands in a run's directory. monolith and clusters may be missing."""

    path: Path
    encoded: Shards
    loaded: LoadedEnsemble
    monolith: LoadedEnsemble | None
    clusters: tuple[Shards, ...]
    clustering: dict[str, Any]

    @property
    def reference(self) -> Reference:
        return Reference(self.encoded, self.loaded.encoder, self.loaded.codec)


def evaluate_run(
    run_dir: str | Path,
    settings: EvaluateSettings | None = None,
    progress: Progress | None = None,
    device: str | torch.device = "cpu",
) -> Path:
    """Writes `run_dir`/report.html and report.json, each as a whole or not at all; returns the page's path.

    Reads encoded/ and ensemble/ (with the parts it names); monolith/ and clusters/ where they are.

    Raises:
        AtollError: a directory is missing or broken, or ensemble, monolith and data do not fit each other.
    """
    settings, start = settings or EvaluateSettings(), time.perf_counter()
    run = open_run(Path(run_dir), device)
    variants, groups, alignment = variants_of(run)
    results = evaluate(variants, run.reference, settings, progress, device)
    grid, usages = draw_grid(run, groups, variants, settings, device)
    report = Report(
        title=f"Atoll: {run.path.resolve().name}",
        made={
            "atoll": atoll.__version__,
            "torch": torch.__version__,
            "machine": _machine(device),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - start, 1),
        },
        settings=settings.model_dump(),
        hashes=hashes_of(run, results),
        results=results,
        groups=groups,
        alignment=alignment,
        experts=tuple(describe_expert(expert) for expert in run.loaded.ensemble.experts),
        grid=grid,
        usages=usages,
        clusters=tuple(describe_clusters(run, settings.seed)),
        clustered_by=_clustered_by(run.clustering),
    )
    html = run.path / "report.html"
    write_json(run.path / "report.json", to_json(report))
    write_bytes(html, to_html(report).encode())
    return html


def open_run(path: Path, device: str | torch.device = "cpu") -> Opened:
    """Opens a run's directories. Raises AtollError where they are missing or do not fit each other."""
    encoded = Shards(path / "encoded")
    loaded = load_ensemble(path / "ensemble", device=device)
    if encoded.shape("latent") != loaded.latent_shape:
        raise AtollError(
            f"{path}: the ensemble draws latents of shape {list(loaded.latent_shape)}, encoded/ holds "
            f"{list(encoded.shape('latent'))}; evaluate it on the data that it was trained on"
        )
    monolith = load_ensemble(path / "monolith", device=device) if (path / "monolith" / CARD).is_file() else None
    if monolith is not None and not same(monolith.encoder.config(), loaded.encoder.config()):
        raise AtollError(
            f"{path}: the monolith reads prompts with {monolith.encoder.config()}, the ensemble with "
            f"{loaded.encoder.config()}; train both with one condition encoder"
        )
    directories = sorted((path / "clusters").glob("cluster-*"))
    clustering = read_json(path / "clusters" / "clusters.json") if directories else {}
    return Opened(path, encoded, loaded, monolith, tuple(map(Shards, directories)), clustering)


def variants_of(run: Opened) -> tuple[list[Variant], dict[str, tuple[str, ...]], tuple[tuple[str, str], ...]]:
    """All that is measured; the names by group; (label, name) of those that compare the alignments."""
    ensemble = run.loaded.ensemble
    many = f"{len(ensemble.experts)} experts and their router"
    routings = ["top-1", "top-2", "full"] if len(ensemble.experts) > 1 else ["full"]
    routings += [ensemble.routing] if ensemble.routing not in routings else []
    routed = [Variant(r, ensemble.with_options(routing=r, alignment="snr"), f"{many}, {r}") for r in routings]
    alone = [
        Variant(expert.name, _alone(expert, ensemble), f"{say_objective(expert.objective)}, asked for everything")
        for expert in ensemble.experts
    ]
    dense = []
    if run.monolith is not None:
        objective = say_objective(run.monolith.ensemble.experts[0].objective)
        dense = [Variant("monolith", run.monolith.ensemble, f"one network trained on everything, {objective}")]
    clamped = _with_calibrations(ensemble, lambda expert: None)
    pure = _with_calibrations(ensemble, lambda expert: Calibration.identity(torch.zeros(run.loaded.latent_shape)))
    aligned = [
        Variant("native", ensemble.with_options(alignment="native"), f"{ensemble.routing}, HDDM's formulas"),
        Variant("snr + x0 clamp", clamped, f"{ensemble.routing}, |x₀| ≤ 20 for eps-experts instead of a calibration"),
        Variant("snr alone", pure, f"{ensemble.routing}, nothing corrected"),
    ]
    groups = {
        "ensemble": tuple(v.name for v in routed),
        "expert": tuple(v.name for v in alone),
        "monolith": tuple(v.name for v in dense),
    }
    labels = ("native", "snr + calibration", "snr + x0 clamp", "snr alone")
    names = ("native", ensemble.routing, "snr + x0 clamp", "snr alone")
    return [*routed, *alone, *dense, *aligned], groups, tuple(zip(labels, names, strict=True))


def _alone(expert: Expert, ensemble: Ensemble) -> Ensemble:
    """The expert as if it were all there is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said when the ensemble was loaded
        return Ensemble([replace(expert, clusters=(0,))], None, "full", null=ensemble.null)


def _with_calibrations(ensemble: Ensemble, choose: Callable[[Expert], Calibration | None]) -> Ensemble:
    """Replicas alike, since a stacking would take the calibrations' place."""
    experts = [replace(expert, calibration=choose(expert)) for expert in ensemble.experts]
    return ensemble.with_experts(experts, alignment="snr", replicas="equal")


def draw_grid(
    run: Opened,
    groups: dict[str, tuple[str, ...]],
    variants: Sequence[Variant],
    settings: EvaluateSettings,
    device: str | torch.device = "cpu",
) -> tuple[Grid, tuple[Usage, ...]]:
    """Each prompt with each seed by each routing and the monolith, as `atoll sample` draws; traces top-1 and full."""
    defaults = run.loaded.card["sampling"]
    steps, method = defaults.get("steps", 50), defaults.get("method", "euler")
    scale = defaults.get("guidance_scale", 1.0)
    prompts = settings.prompts or tuple(run.reference.captions(run.reference.held_out(settings)[:8]))
    seeds = tuple(range(settings.seed, settings.seed + settings.seeds))
    tokens = run.loaded.encoder.tokenize([prompt for prompt in prompts for _ in seeds])
    condition = run.loaded.encoder.encode(tokens).to(device)
    noise = seeded_noise(seeds * len(prompts), run.loaded.latent_shape).to(device)

    def draw(variant: Variant) -> tuple[Tensor, Trace]:
        velocity = partial(variant.ensemble.velocity, condition=condition, guidance_scale=scale)
        with variant.ensemble.tracing() as trace:
            images = run.loaded.codec.decode(sample(velocity, noise, steps, method)).cpu()
        return images.unflatten(0, (len(prompts), len(seeds))), trace

    shown = [v for v in variants if v.name in (*groups["ensemble"], *groups["monolith"])]
    with side_by_side(worker_count(settings, device)) as side:
        drawn = dict(zip((v.name for v in shown), side(draw, shown), strict=True))
    made_by = f"Drawn with {steps} {method} steps and guidance {scale:g}."
    grid = Grid(prompts, seeds, tuple((n, images) for n, (images, _) in drawn.items()), _real(run, prompts), made_by)
    traced = [name for name in ("top-1", "full") if name in drawn]
    return grid, tuple(_usage(name, drawn[name][1], len(seeds)) for name in traced)


def _usage(routing: str, trace: Trace, seeds: int) -> Usage:
    """The first seed's rows of a trace."""
    weights = torch.stack(trace.weights, dim=1)[::seeds]  # [P, T, E]
    return Usage(routing, tuple(float(t[0]) for t in trace.times), weights)


def _real(run: Opened, prompts: Sequence[str]) -> tuple[Tensor | None, ...]:
    """For each prompt the data's picture with this very caption, if there is one."""
    rows = {caption: row for row, caption in enumerate(run.encoded.captions)}
    return tuple(run.reference.images(torch.tensor([rows[prompt]])) if prompt in rows else None for prompt in prompts)


def describe_expert(expert: Expert) -> ExpertInfo:
    calibration = expert.calibration
    t, slope = (), ()
    if calibration is not None:
        t = tuple(Linear().time_at(calibration.log_snr.double()).tolist())
        slope = tuple(calibration.slope.double().tolist())
    return ExpertInfo(expert.name, say_objective(expert.objective), expert.clusters, t, slope)


def describe_clusters(run: Opened, seed: int) -> list[ClusterInfo]:
    """Pictures at random and telling words of each cluster."""
    total = sum(len(cluster) for cluster in run.clusters)
    overall: Counter[str] = Counter()
    for cluster in run.clusters:
        overall += count_words(cluster.captions)
    described = []
    for cluster in run.clusters:
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(cluster), generator=generator)[:PICTURES_PER_CLUSTER]
        images = run.loaded.codec.decode(cluster.read("latent", rows).float())
        words = telling_words(count_words(cluster.captions), len(cluster), overall, total)
        number = int(cluster.path.name.removeprefix("cluster-"))
        described.append(ClusterInfo(number, len(cluster), len(cluster) / total, images, words))
    return described


def say_objective(objective: Objective) -> str:
    """eps on cosine"""
    return f"{objective.prediction} on {objective.schedule.config()['name']}"


def hashes_of(run: Opened, results: Results) -> tuple[tuple[str, str], ...]:
    """(what, sha256) of all that the numbers came from."""
    found = [("encoded/index.json", run.encoded.sha256)]
    if run.clusters:
        found.append(("clusters/clusters.json", sha256_file(run.path / "clusters" / "clusters.json")))
    found.append(("ensemble/ensemble.json", sha256_file(run.path / "ensemble" / "ensemble.json")))
    parts = [*run.loaded.card["experts"], *([run.loaded.card["router"]] if run.loaded.card["router"] else [])]
    found += [(f"{Path(part['url']).name}/{CARD}", part["sha256"]) for part in parts]
    if run.monolith is not None:
        found.append((f"monolith/{CARD}", sha256_file(run.path / "monolith" / CARD)))
    return (*found, (f"basis of {results.frechet_name}", results.features_sha256))


def _clustered_by(clustering: dict[str, Any]) -> str:
    """Clustered by hog (bins 4, grid 8), balanced: the largest holds 1.05 times the mean."""
    if "feature" not in clustering:
        return ""
    feature = dict(clustering["feature"])
    name = feature.pop("name")
    details = ", ".join(f"{key} {value}" for key, value in feature.items())
    largest = f": the largest holds {clustering['largest_over_mean']:.2f} times the mean"
    return f"Clustered by {name}{f' ({details})' if details else ''}, {clustering['method']}{largest}."


def _machine(device: str | torch.device) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    model = ""
    if os.path.exists("/proc/cpuinfo"):
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        model = found.group(1) if found else ""
    return f"{os.cpu_count()} cores, {model or platform.processor() or platform.machine()}"
