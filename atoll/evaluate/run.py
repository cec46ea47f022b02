"""Evaluates a run: reads its directories, measures every way to sample it, writes report.html and report.json."""

import os
import platform
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import atoll
from atoll.encoders.weights import same
from atoll.ensemble import Expert
from atoll.ensemble.loading import LoadedEnsemble, load_ensemble
from atoll.errors import AtollError
from atoll.evaluate.diagnostics.run import diagnose_run
from atoll.evaluate.diagnostics.trajectory import Diagnostics
from atoll.evaluate.measure import EvaluateSettings, evaluate, resolved, side_by_side, worker_count
from atoll.evaluate.pages.report import ClusterInfo, ExpertInfo, Grid, Report, Usage, to_html, to_json
from atoll.evaluate.reference import FORMAT, ReferenceData
from atoll.evaluate.store import ResultCache, TensorDict
from atoll.evaluate.types import EvaluateProgress, Reference, Results, Variant
from atoll.evaluate.variants import identified, say_objective, swept, variants_of
from atoll.randomness import cpu_generator, random_rows, seeded_noise
from atoll.report.words import count_words, distinctive_words
from atoll.schedule import PATH
from atoll.solver import sample
from atoll.storage.artifact import CARD, read_json, sha256_file, write_bytes, write_json
from atoll.storage.shards import Shards

IMAGES_PER_CLUSTER = 24
ROWS_OF_GRID = 12  # variants at most that the grid shows
STORE = "evaluation"
DENSE = ("monolith", "student")


@dataclass(frozen=True)
class Opened:
    """What stands in a run's directory. Clusters may be missing; dense: monolith and student, if they are there."""

    path: Path
    encoded: Shards
    loaded: LoadedEnsemble
    dense: dict[str, LoadedEnsemble]
    clusters: tuple[Shards, ...]
    clustering: dict[str, Any]

    @property
    def reference(self) -> Reference:
        return Reference(self.encoded, self.loaded.encoder, self.loaded.codec)


def evaluate_run(
    run_dir: str | Path,
    settings: EvaluateSettings | None = None,
    progress: EvaluateProgress | None = None,
    device: str | torch.device = "cpu",
    store: Path | None = None,
) -> Path:
    """Writes `run_dir`/report.html and report.json, each as a whole or not at all; returns the page's path.

    Reads encoded/ and ensemble/ (with the parts it names); monolith/ and clusters/ where they are. What is measured is
    kept in `store` (None: `run_dir`/evaluation) batch by batch, so that an interrupted evaluation goes on there.

    Raises:
        AtollError: a directory is missing or broken, or ensemble, monolith and data do not fit each other.
    """
    settings, start = resolved(settings or EvaluateSettings(), device), time.perf_counter()
    run = open_run(Path(run_dir), device)
    dense = {name: model.ensemble for name, model in run.dense.items()}
    if settings.sweep:
        found, groups, alignment = swept(settings.sweep, run.loaded.ensemble, dense)
    else:
        found, groups, alignment = variants_of(run.loaded.ensemble, dense)
    variants = identified(found, dense, _parts(run))
    store = store or run.path / STORE
    results = evaluate(variants, run.reference, settings, progress, device, store)
    grid, usages = draw_grid(run, groups, variants, settings, store, device)
    diagnostic_samples = _diagnosed(run, settings, store, progress, device) if settings.diagnostic_samples else None
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
        store=os.path.relpath(store, run.path),
        routing=run.loaded.ensemble.routing,
        diagnostics=diagnostic_samples,
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
    there = [name for name in DENSE if (path / name / CARD).is_file()]
    dense = {name: load_ensemble(path / name, device=device) for name in there}
    for name, model in dense.items():
        if not same(model.encoder.config(), loaded.encoder.config()):
            raise AtollError(
                f"{path}: the {name} reads prompts with {model.encoder.config()}, the ensemble with "
                f"{loaded.encoder.config()}; train both with one condition encoder"
            )
    directories = sorted((path / "clusters").glob("cluster-*"))
    clustering = read_json(path / "clusters" / "clusters.json") if directories else {}
    return Opened(path, encoded, loaded, dense, tuple(map(Shards, directories)), clustering)


def _diagnosed(
    run: Opened, settings: EvaluateSettings, store: Path, progress: EvaluateProgress | None, device: str | torch.device
) -> Diagnostics:
    """Of the ensemble as it is routed, in the first space of a network, or in that of the pixels."""
    if progress is not None:
        progress(0, 1, "alignment diagnostics")
    space = ReferenceData(run.reference, settings, store).spaces[min(1, len(settings.spaces))]
    loaded = run.loaded
    return diagnose_run(loaded.ensemble, run.clusters, loaded.encoder, loaded.codec, space, settings, device)


def draw_grid(
    run: Opened,
    groups: dict[str, tuple[str, ...]],
    variants: Sequence[Variant],
    settings: EvaluateSettings,
    store: Path,
    device: str | torch.device = "cpu",
) -> tuple[Grid, tuple[Usage, ...]]:
    """Each prompt with each seed by each routing and the monolith, as `atoll sample` draws; traces top-1 and full."""
    defaults = {"steps": 50, "method": "euler", "guidance_scale": 1.0, **run.loaded.card["sampling"]}
    prompts = settings.prompts or _spread(run.reference.captions(run.reference.held_out(settings)))
    seeds = tuple(range(settings.seed, settings.seed + settings.seeds))
    tokens = run.loaded.encoder.tokenize([prompt for prompt in prompts for _ in seeds])
    condition = run.loaded.encoder.encode(tokens).to(device)
    noise = seeded_noise(seeds * len(prompts), run.loaded.latent_shape).to(device)
    shared = {"format": FORMAT, "prompts": prompts, "seeds": seeds, "codec": run.loaded.codec.config()}

    def draw(variant: Variant, how: dict[str, Any]) -> TensorDict:
        ensemble = variant.ensemble.with_options()  # of its own: another thread may trace the same one
        velocity = partial(ensemble.velocity, condition=condition, guidance_scale=how["guidance_scale"])
        with ensemble.tracing() as trace:
            x0 = sample(velocity, noise, how["steps"], how["method"], times=variant.times(how["steps"]))
            images = run.loaded.codec.decode(x0).cpu()
        weights = torch.stack(trace.weights, dim=1)[:: len(seeds)]  # [P,T,E]: the first seed's
        return {"images": images, "times": torch.stack([t[0] for t in trace.times]), "weights": weights}

    def kept(variant: Variant) -> tuple[str, TensorDict]:
        how = {key: defaults[key] for key in ("steps", "method", "guidance_scale")}
        how |= {key: value for key, value in variant.axes.items() if key in how}
        times = {} if variant.grid is None else {"times": variant.grid}
        kept_in = ResultCache(store, {"grid": variant.identity, **how, **times, **shared})
        return kept_in.key, kept_in.part("grid", lambda: draw(variant, how))

    names = [name for group in ("ensemble", "sweep", "monolith") for name in groups.get(group, ())]
    shown = [variant for variant in variants if variant.name in names][:ROWS_OF_GRID]
    with side_by_side(worker_count(settings, device)) as side:
        drawn = dict(zip((v.name for v in shown), side(kept, shown), strict=True))
    sizes = (len(prompts), len(seeds))
    rows = tuple((name, part["images"].unflatten(0, sizes)) for name, (_, part) in drawn.items())
    how = f"{defaults['steps']} {defaults['method']} steps and guidance {defaults['guidance_scale']:g}"
    made_by = f"Drawn with {how}, where a row does not say otherwise."
    if len(names) > len(shown):
        made_by += f" The first {len(shown)} of {len(names)} rows."
    grid = Grid(prompts, seeds, rows, _real(run, prompts), made_by, tuple(key for key, _ in drawn.values()))
    traced = [name for name in ("top-1", "full") if name in drawn]
    return grid, tuple(
        Usage(name, tuple(drawn[name][1]["times"].tolist()), drawn[name][1]["weights"]) for name in traced
    )


def _spread(captions: Sequence[str], count: int = 8) -> tuple[str, ...]:
    """So many different captions, evenly over their order: what was encoded one source after the other is all shown."""
    found = tuple(dict.fromkeys(captions))
    count = min(count, len(found))
    return tuple(found[i * len(found) // count] for i in range(count))


def _real(run: Opened, prompts: Sequence[str]) -> tuple[Tensor | None, ...]:
    """For each prompt the data's image with this very caption, if there is one."""
    rows = {caption: row for row, caption in enumerate(run.encoded.captions)}
    return tuple(run.reference.images(torch.tensor([rows[prompt]])) if prompt in rows else None for prompt in prompts)


def describe_expert(expert: Expert) -> ExpertInfo:
    calibration = expert.calibration
    t, slope = (), ()
    if calibration is not None:
        t = tuple(PATH.time_at(calibration.log_snr.double()).tolist())
        slope = tuple(calibration.slope.double().tolist())
    return ExpertInfo(expert.name, say_objective(expert.objective), expert.clusters, t, slope)


def describe_clusters(run: Opened, seed: int) -> list[ClusterInfo]:
    """Images at random and telling words of each cluster."""
    total = sum(len(cluster) for cluster in run.clusters)
    overall: Counter[str] = Counter()
    for cluster in run.clusters:
        overall += count_words(cluster.captions)
    described = []
    for cluster in run.clusters:
        rows = random_rows(len(cluster), IMAGES_PER_CLUSTER, cpu_generator(seed))
        images = run.loaded.codec.decode(cluster.read("latent", rows).float())
        words = distinctive_words(count_words(cluster.captions), len(cluster), overall, total)
        number = int(cluster.path.name.removeprefix("cluster-"))
        described.append(ClusterInfo(number, len(cluster), len(cluster) / total, images, words))
    return described


def _parts(run: Opened) -> dict[str, str]:
    """Of ensemble, monolith and student the hash of what names all hashes of their parts."""
    parts = {"ensemble": sha256_file(run.path / "ensemble" / "ensemble.json")}
    return parts | {name: sha256_file(run.path / name / CARD) for name in run.dense}


def hashes_of(run: Opened, results: Results) -> tuple[tuple[str, str], ...]:
    """(what, sha256) of all that the numbers came from."""
    found = [("encoded/index.json", run.encoded.sha256)]
    if run.clusters:
        found.append(("clusters/clusters.json", sha256_file(run.path / "clusters" / "clusters.json")))
    found.append(("ensemble/ensemble.json", sha256_file(run.path / "ensemble" / "ensemble.json")))
    parts = [*run.loaded.card["experts"], *([run.loaded.card["router"]] if run.loaded.card["router"] else [])]
    found += [(f"{Path(part['url']).name}/{CARD}", part["sha256"]) for part in parts]
    found += [(f"{name}/{CARD}", sha256_file(run.path / name / CARD)) for name in run.dense]
    return (*found, *((f"feature space {space.name}", space.sha256) for space in results.spaces))


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
