"""Evaluate a run: read its directories, measure every way to sample it, write report.html and report.json."""

import os
import platform
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import atoll
from atoll.condition import Condition, move_to
from atoll.encoders.codec.statistics import refuse_other_statistics, with_codec
from atoll.encoders.trust import STRANGER, Trust
from atoll.ensemble import Sampler
from atoll.ensemble.loading import LoadedEnsemble, load_ensemble
from atoll.errors import AtollError
from atoll.evaluate.describe import describe_clusters, describe_expert
from atoll.evaluate.diagnostics.run import diagnose_run
from atoll.evaluate.diagnostics.trajectory import Diagnostics
from atoll.evaluate.measure import evaluate, resolve_precision, side_by_side, worker_count
from atoll.evaluate.pages.report import Grid, Report, Usage, to_html, to_json
from atoll.evaluate.reference import FORMAT, ReferenceData
from atoll.evaluate.store import ResultCache, TensorDict
from atoll.evaluate.types import EvaluateProgress, Reference, Results, Variant
from atoll.evaluate.variants import Alignments, Groups, variants_of, variants_of_sweeps, with_identities
from atoll.image_size import ImageSize
from atoll.manifest import EvaluateSettings
from atoll.randomness import seeded_noise
from atoll.solver import sample, shifted_times
from atoll.storage.artifact import CARD, load_clusters, sha256_file, write_bytes, write_json
from atoll.storage.cards import ClustersCard, DrawnClustersCard, EnsembleCard, ExpertEntry, LoraEntry, RouterEntry
from atoll.storage.layout import (
    CLUSTERS,
    CLUSTERS_CARD,
    ENCODED,
    ENSEMBLE,
    ENSEMBLE_CARD,
    MONOLITH,
    STUDENT,
    RunLayout,
)
from atoll.storage.shards import INDEX, Shards, SkipList

ROWS_OF_GRID = 12  # variants in the report's images, at most
DENSE = (MONOLITH, STUDENT)  # models of one network


@dataclass(frozen=True)
class OpenRun:
    """The content of a run's directory.

    Attributes:
        layout: paths of the run.
        encoded: the data.
        loaded: the ensemble.
        dense: "monolith" and "student", if there are any.
        clusters: shards of each cluster; may be empty.
        clustering: content of clusters.json; may be empty.
    """

    layout: RunLayout
    encoded: Shards
    loaded: LoadedEnsemble
    dense: dict[str, LoadedEnsemble]
    clusters: tuple[Shards, ...]
    clustering: ClustersCard | DrawnClustersCard | None

    @property
    def path(self) -> Path:
        return self.layout.root

    @property
    def reference(self) -> Reference:
        """The real images and held-out latents."""
        return Reference(self.encoded, self.loaded.encoder, self.loaded.codec)


def evaluate_run(
    run_dir: str | Path,
    settings: EvaluateSettings | None = None,
    *,
    progress: EvaluateProgress | None = None,
    device: str | torch.device = "cpu",
    store: Path | None = None,
    trust: Trust = STRANGER,
    skip: str | None = None,
) -> Path:
    """Evaluate a run, and write report.html and report.json, each atomically.

    Reads encoded/, ensemble/ (with its parts), and monolith/, student/ and clusters/ if they exist. If interrupted, run
    it again to resume: results are cached batch by batch.

    Args:
        run_dir: directory of the run.
        settings: the defaults if None.
        progress: called after each batch.
        device: of the networks.
        store: cache of results; None: `run_dir`/evaluation.
        trust: what the cards of its parts may reach beyond the run.
        skip: `train.skip` of the run: images that are neither measured nor shown.

    Returns:
        The path of report.html.

    Raises:
        AtollError: a directory is missing or damaged, or ensemble, monolith and data do not fit each other.
    """
    # The models and their variants.
    settings, start = resolve_precision(settings or EvaluateSettings(), device), time.perf_counter()
    run = open_run(Path(run_dir), device, trust, skip)
    variants, groups, alignment = _choose_variants(run, settings)
    # Numbers, images, and diagnostics.
    store = store or run.layout.evaluation
    results = evaluate(variants, run.reference, settings, progress=progress, device=device, store=store)
    grid, usages = draw_grid(run, groups=groups, variants=variants, settings=settings, store=store, device=device)
    diagnostics = _diagnose(run, settings, store, progress, device) if settings.diagnostic_samples else None
    # The report.
    report = Report(
        title=f"Atoll: {run.path.resolve().name}",
        provenance=_provenance(device, time.perf_counter() - start),
        settings=settings.model_dump(),
        hashes=hashes_of(run, results),
        results=results,
        groups=groups,
        alignment=alignment,
        experts=tuple(describe_expert(expert) for expert in run.loaded.ensemble.experts),
        grid=grid,
        usages=usages,
        clusters=tuple(describe_clusters(run.clusters, run.loaded.codec, settings.seed)),
        clustered_by=_clustered_by(run.clustering),
        store=os.path.relpath(store, run.path),
        routing=run.loaded.ensemble.routing,
        diagnostics=diagnostics,
    )
    # Write the numbers first, then the page.
    html = run.layout.report_html
    write_json(run.layout.report_json, to_json(report))
    write_bytes(html, to_html(report).encode())
    return html


def _choose_variants(run: OpenRun, settings: EvaluateSettings) -> tuple[list[Variant], Groups, Alignments]:
    """The variants of the sweep, or else all; their names by group; and those that compare alignments."""
    dense = {name: model.ensemble for name, model in run.dense.items()}
    if settings.sweep:
        variants, groups, alignment = variants_of_sweeps(settings.sweep, run.loaded.ensemble, dense)
    else:
        variants, groups, alignment = variants_of(run.loaded.ensemble, dense)
    return with_identities(variants, dense, _parts(run)), groups, alignment


def open_run(
    path: Path, device: str | torch.device = "cpu", trust: Trust = STRANGER, skip: str | None = None
) -> OpenRun:
    """Open a run's directories.

    Args:
        path: the run.
        device: of the networks.
        trust: what the cards of its parts may reach beyond the run.
        skip: a list of keys, relative to the run, whose rows are left out.

    Raises:
        AtollError: they are missing, or do not fit each other.
    """
    # Load the data and the ensemble.
    layout = RunLayout(path)
    left_out = SkipList(path / skip).keys if skip is not None else frozenset[str]()
    encoded = Shards(layout.encoded).without(left_out)
    trust = replace(trust, run=path)
    loaded = load_ensemble(layout.ensemble, device=device, trust=trust)
    # Numbers on other data would be meaningless.
    if encoded.shape("latent") != loaded.latent_shape:
        raise AtollError(
            f"{path}: the ensemble generates latents of shape {list(loaded.latent_shape)}, encoded/ holds "
            f"{list(encoded.shape('latent'))}; evaluate it on the data that it was trained on"
        )
    # Held-out latents are those of the ensemble: normalised by the statistics that it was trained with.
    encoded = with_codec(encoded, loaded.card.codec, layout.ensemble)
    # The dense models, with the same encoder.
    present = [name for name in DENSE if (layout.part(name) / CARD).is_file()]
    dense = {name: load_ensemble(layout.part(name), device=device, trust=trust) for name in present}
    for name, model in dense.items():
        refuse_other_statistics(layout.part(name), model.card.codec, layout.ensemble, loaded.card.codec)
        if not model.encoder.reads_like(loaded.encoder):
            raise AtollError(
                f"{path}: the {name} encodes prompts with {model.encoder.configs()}, the ensemble with "
                f"{loaded.encoder.configs()}; train both with one condition encoder"
            )
    # The clusters.
    directories = layout.existing_clusters()
    clustering = load_clusters(layout.clusters_card) if directories else None
    clusters = tuple(Shards(directory).without(left_out) for directory in directories)
    return OpenRun(layout, encoded, loaded, dense, clusters, clustering)


def _diagnose(
    run: OpenRun, settings: EvaluateSettings, store: Path, progress: EvaluateProgress | None, device: str | torch.device
) -> Diagnostics:
    """Diagnose the ensemble with its own routing, in the first space of a network, or in that of the pixels."""
    if progress is not None:
        progress(0, 1, "alignment diagnostics")
    # The features of the reference data are cached by now.
    space = ReferenceData(run.reference, settings, store).spaces[min(1, len(settings.spaces))]
    loaded = run.loaded
    return diagnose_run(
        loaded.ensemble,
        clusters=run.clusters,
        encoder=loaded.encoder,
        codec=loaded.codec,
        space=space,
        settings=settings,
        device=device,
    )


def draw_grid(
    run: OpenRun,
    *,
    groups: dict[str, tuple[str, ...]],
    variants: Sequence[Variant],
    settings: EvaluateSettings,
    store: Path,
    device: str | torch.device = "cpu",
) -> tuple[Grid, tuple[Usage, ...]]:
    """Draw each prompt with each seed for the report, with the sampling settings of the ensemble's card.

    Args:
        run: the open run.
        groups: names of variants; all but the single experts are drawn.
        variants: of the groups.
        settings: prompts and seeds.
        store: cache of the images.
        device: of the networks.

    Returns:
        The images of the first `ROWS_OF_GRID` variants, and the routing traces of top-1 and full.
    """
    # Prompts and noise: the same for all variants.
    own = run.loaded.sampling.model_dump(exclude_none=True)
    defaults = {"steps": 50, "method": "euler", "guidance_scale": 1.0, **own}
    prompts = settings.prompts or _spread_out(run.reference.captions(run.reference.held_out(settings)))
    seeds = tuple(range(settings.seed, settings.seed + settings.seeds))
    tokens = run.loaded.encoder.tokenize([prompt for prompt in prompts for _ in seeds])
    condition = move_to(run.loaded.encoder.encode(tokens), device)
    sizes = [run.loaded.sizes.choose(*ImageSize.parse(size)) for size in settings.sizes]
    shared = {"format": FORMAT, "prompts": prompts, "seeds": seeds, "codec": run.loaded.codec.config()}

    def load_or_draw(row: tuple[Variant, ImageSize | None]) -> tuple[str, TensorDict]:
        # A sweep's values override the card's.
        variant, size = row[0], row[1] or run.loaded.sizes.main
        sampling = {key: defaults[key] for key in ("steps", "method", "guidance_scale")}
        sampling |= {key: value for key, value in variant.axes.items() if key in sampling}
        shift = run.loaded.shift(size) if variant.grid is None else 1.0
        # Only what is not the default is part of the key.
        more: dict[str, Any] = {} if variant.grid is None else {"times": variant.grid}
        more |= ({"size": str(size)} if row[1] else {}) | ({"shift": shift} if shift != 1 else {})
        cache = ResultCache(store, {"grid": variant.identity, **sampling, **more, **shared})
        return cache.key, cache.part("grid", lambda: draw(variant, sampling, size, shift))

    # Images of one variant, and its routing trace for the first seed.
    def draw(variant: Variant, sampling: dict[str, Any], size: ImageSize, shift: float) -> TensorDict:
        latent = (run.loaded.latent_shape[0], *size.latent(run.loaded.codec.factor))
        noise = seeded_noise(seeds * len(prompts), latent).to(device)
        times = variant.times(sampling["steps"]) if shift == 1 else shifted_times(sampling["steps"], shift)
        part = _draw_and_trace(variant, sampling, times, condition, noise)
        images, weights = run.loaded.codec.decode(part["x0"]).cpu(), part["weights"][:: len(seeds)]
        return {"images": images, "times": part["times"], "weights": weights}

    # Draw all groups except single experts, several variants in parallel.
    names = [name for group in ("ensemble", "sweep", "monolith") for name in groups.get(group, ())]
    shown = [variant for variant in variants if variant.name in names][:ROWS_OF_GRID]
    todo = _rows_of_grid(shown, run.loaded.ensemble.routing, sizes)
    with side_by_side(worker_count(settings, device)) as parallel_map:
        drawn = dict(zip(todo, parallel_map(load_or_draw, todo.values()), strict=True))
    # Arrange the images by prompt and seed, and collect the traces.
    shape = (len(prompts), len(seeds))
    rows = tuple((name, part["images"].unflatten(0, shape)) for name, (_, part) in drawn.items())
    caption = _caption(defaults, len(shown), len(names))
    grid = Grid(prompts, seeds, rows, _real(run, prompts), caption, tuple(key for key, _ in drawn.values()))
    traces = {name: drawn[name][1] for name in ("top-1", "full") if name in drawn}
    return grid, tuple(Usage(name, tuple(t["times"].tolist()), t["weights"]) for name, t in traces.items())


def _rows_of_grid(
    shown: Sequence[Variant], routing: str, sizes: Sequence[ImageSize]
) -> dict[str, tuple[Variant, ImageSize | None]]:
    """The rows by their labels: all variants at the main size (None), and one of them at each of `sizes`."""
    rows: dict[str, tuple[Variant, ImageSize | None]] = {variant.name: (variant, None) for variant in shown}
    # The ensemble by its own routing, or the first variant of a sweep.
    own = [variant for variant in shown if variant.name == routing] or shown
    return rows | {f"{variant.name}, {size}": (variant, size) for variant in own[:1] for size in sizes}


def _draw_and_trace(
    variant: Variant,
    sampling: dict[str, Any],
    times: Tensor | None,
    condition: tuple[Condition, ...],
    noise: Tensor,
) -> TensorDict:
    """Sample x0 [B, C, H, W] from noise; record the times [T] and the experts' weights [B, T, E]."""
    sampler = Sampler(variant.ensemble)
    velocity = partial(sampler.velocity, condition=condition, guidance_scale=sampling["guidance_scale"])
    with sampler.tracing() as trace:
        x0 = sample(velocity, noise, sampling["steps"], sampling["method"], times=times)
    weights = torch.stack(trace.weights, dim=1)
    return {"x0": x0, "times": torch.stack([t[0] for t in trace.times]), "weights": weights}


def _caption(sampling: Mapping[str, Any], shown: int, rows: int) -> str:
    """How the images were drawn, and how many rows are shown."""
    default = f"{sampling['steps']} {sampling['method']} steps and guidance {sampling['guidance_scale']:g}"
    text = f"Drawn with {default}, unless the row names other values."
    return text if shown == rows else f"{text} The first {shown} of {rows} rows."


def _spread_out(captions: Sequence[str], count: int = 8) -> tuple[str, ...]:
    """At most `count` distinct captions, evenly spread over their order, so that every source of the data appears."""
    distinct = tuple(dict.fromkeys(captions))
    count = min(count, len(distinct))
    return tuple(distinct[i * len(distinct) // count] for i in range(count))


def _real(run: OpenRun, prompts: Sequence[str]) -> tuple[Tensor | None, ...]:
    """For each prompt, the data's image with this caption, or None."""
    # If captions repeat, the last image with this caption.
    captions = run.encoded.captions
    rows = {captions[row]: row for row in run.encoded.rows().tolist()}
    return tuple(run.reference.images(torch.tensor([rows[prompt]])) if prompt in rows else None for prompt in prompts)


def _parts(run: OpenRun) -> dict[str, str]:
    """Hashes of the cards that contain all hashes of the ensemble, the monolith and the student."""
    parts = {"ensemble": sha256_file(run.layout.ensemble_card)}
    # Cards of dense models contain the hash of their weights.
    return parts | {name: sha256_file(run.layout.part(name) / CARD) for name in run.dense}


def hashes_of(run: OpenRun, results: Results) -> tuple[tuple[str, str], ...]:
    """(file or space, sha256) of everything that the numbers depend on."""
    # Data and clusters.
    hashes = [(f"{ENCODED}/{INDEX}", run.encoded.sha256)]
    if run.clusters:
        hashes.append((f"{CLUSTERS}/{CLUSTERS_CARD}", sha256_file(run.layout.clusters_card)))
    # The models with their parts.
    hashes.append((f"{ENSEMBLE}/{ENSEMBLE_CARD}", sha256_file(run.layout.ensemble_card)))
    card = run.loaded.card
    if isinstance(card, EnsembleCard):
        loras = [expert.lora for expert in card.experts if expert.lora]
        router = [card.router] if card.router else []
        parts: list[ExpertEntry | RouterEntry | LoraEntry] = [*card.experts, *loras, *router]
        hashes += [(f"{Path(part.url).name}/{CARD}", part.sha256) for part in parts]
    hashes += [(f"{name}/{CARD}", sha256_file(run.layout.part(name) / CARD)) for name in run.dense]
    return (*hashes, *((f"feature space {space.name}", space.sha256) for space in results.spaces))


def _clustered_by(clustering: ClustersCard | DrawnClustersCard | None) -> str:
    """The clustering as a sentence: "Clustered by hog (bins 4, grid 8), balanced: the largest holds 1.05 times ..."."""
    if not isinstance(clustering, ClustersCard):
        return ""
    # The feature's name and its options, as in atoll.yaml.
    feature = dict(clustering.feature)
    name = feature.pop("name")
    details = ", ".join(f"{key} {value}" for key, value in feature.items())
    largest = f": the largest holds {clustering.largest_over_mean:.2f} times the mean"
    return f"Clustered by {name}{f' ({details})' if details else ''}, {clustering.method}{largest}."


def _provenance(device: str | torch.device, seconds: float) -> dict[str, Any]:
    """Versions, machine, date and duration of the evaluation."""
    return {
        "atoll": atoll.__version__,
        "torch": torch.__version__,
        "machine": _machine(device),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
    }


def _machine(device: str | torch.device) -> str:
    """Name of the GPU, or cores and model of the CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    # Linux names the CPU here; elsewhere use the platform module.
    model = ""
    if os.path.exists("/proc/cpuinfo"):
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        model = match.group(1) if match else ""
    return f"{os.cpu_count()} cores, {model or platform.processor() or platform.machine()}"
