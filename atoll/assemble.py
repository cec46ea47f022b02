"""Assemble experts and a router to ensemble/ensemble.json, which names the parts and their hashes: `atoll assemble`."""

import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from atoll.calibration import resized
from atoll.encoders.codec.statistics import refuse_other_statistics
from atoll.encoders.text import build_encoder
from atoll.encoders.trust import STRANGER, Trust
from atoll.encoders.weights import same
from atoll.ensemble.expert import Expert
from atoll.ensemble.loading import load_expert
from atoll.ensemble.lora import LoraChoice, choose_loras, read_lora
from atoll.ensemble.owners import Owners, check_levels
from atoll.ensemble.replicas import Stacking, measure_stacking
from atoll.errors import AtollError
from atoll.manifest import Manifest
from atoll.objective import Objective
from atoll.randomness import cpu_generator, random_rows
from atoll.runtime.device import best_device
from atoll.storage.artifact import CARD, read_card, sha256_file, write_bytes, write_card
from atoll.storage.cards import (
    ClusterShardsCard,
    EnsembleCard,
    ExpertCard,
    ExpertEntry,
    Lineage,
    LoraEntry,
    RouterCard,
    RouterEntry,
    SamplingDefaults,
    StackingsEntry,
    parse_record,
)
from atoll.storage.layout import ENSEMBLE_CARD, STACKINGS, RunLayout, cluster_path
from atoll.storage.shards import LATENTS, Shards, is_held_out, listed_keys

_ROWS, _SAMPLES = 1024, 512  # measuring replicas: the most held-out latents, and the noisy latents at each level

# What all parts of one ensemble must share to be sampled as one model.
_SHARED = ("assignment", "latent_shape", "codec")


def assemble(
    experts: list[Path],
    router: Path | None,
    out: Path,
    sampling: dict[str, Any] | None = None,
    stackings: Sequence[Stacking] = (),
    loras: Mapping[Path, LoraChoice] | None = None,
) -> Path:
    """Write `out`/ensemble.json. The parts are not moved; the card names them by paths relative to `out`.

    Args:
        experts: directories of expert artifacts, at least one.
        router: the router's directory; None for a single expert.
        out: the ensemble's directory.
        sampling: defaults for the pipeline: steps, guidance_scale, method, routing, replicas.
        stackings: the weights of replicas, from `stack_replicas`.
        loras: low-rank updates of some of the experts, by the expert's directory.

    Returns:
        `out`.

    Raises:
        AtollError: a part is missing or of another kind, or two parts were trained on different data.
    """
    if not experts:
        raise AtollError("no experts to assemble; train one with `atoll train expert 0`")
    # Read all cards; the weights are not needed.
    cards = {path: read_card(path, ExpertCard) for path in experts}
    routing = None if router is None else read_card(router, RouterCard)
    first = experts[0]
    _refuse_mixed(cards, router, routing)
    _refuse_holes(cards, routing)
    # Write the card. Hashes of the parts' cards pin their weights, too.
    out.mkdir(parents=True, exist_ok=True)
    shared = cards[first]
    ensemble = EnsembleCard(
        # Each expert by name, current clusters and place, with the hash of its card.
        experts=[
            ExpertEntry(
                name=card.name,
                clusters=_clusters_now(card, routing),
                **_place(path, out),
                **_lora_entry((loras or {}).get(path), card, path, out),
            )
            for path, card in cards.items()
        ],
        router=None if router is None else RouterEntry(**_place(router, out)),
        clusters=shared.k if routing is None else routing.clusters,
        assignment=shared.assignment if routing is None else routing.assignment,
        **({"lineage": routing.lineage} if routing is not None and routing.lineage else {}),
        latent_shape=shared.latent_shape,
        codec=shared.codec,
        **({"stackings": _write_stackings(out, stackings)} if stackings else {}),
        sampling=parse_record(SamplingDefaults, sampling or {}, "sampling"),
    )
    write_card(out / ENSEMBLE_CARD, ensemble)
    return out


def _refuse_mixed(cards: dict[Path, ExpertCard], router: Path | None, routing: RouterCard | None) -> None:
    """Raise AtollError unless experts and router come from the same clusters, with the same latents and codec."""
    first = next(iter(cards))
    parts: dict[Path, ExpertCard | RouterCard] = {**cards}
    if router is not None and routing is not None:
        parts[router] = routing
    # Compare every part with the first expert. Experts of clusters that grew may be older than the router.
    lineage = None if routing is None else routing.descent
    for path, part in parts.items():
        for key in _SHARED:
            if key == "assignment" and lineage is not None and lineage.ancestors:
                _refuse_foreign(path, part, router, lineage)
                continue
            mine, theirs = part.plain().get(key), cards[first].plain().get(key)
            refuse_other_statistics(path, mine, first, theirs)
            if not same(mine, theirs):
                raise AtollError(
                    f"{path}: its {key} is {mine}, that of {first} is {theirs}; "
                    "parts of one ensemble must come from the same clusters"
                )
    # The router has one output per cluster.
    for path, card in cards.items():
        known = None if lineage is None else lineage.clusters_of(card.assignment)
        if known is not None and card.k != known:
            raise AtollError(f"{router}: knows {known} clusters, {path} is of {card.k}; take the router trained on its")


def _refuse_holes(cards: dict[Path, ExpertCard], routing: RouterCard | None) -> None:
    """Raise AtollError if a cluster has experts at some noise levels only."""

    def no_network(*_: Any) -> Any:
        raise AssertionError("an expert without its weights was evaluated")

    parts = [
        Expert(no_network, Objective(**card.objective), _clusters_now(card, routing), name=card.name)
        for card in cards.values()
    ]
    check_levels(parts, Owners.of(parts))


def _refuse_foreign(path: Path, part: ExpertCard | RouterCard, router: Path | None, lineage: Lineage) -> None:
    """Raise AtollError unless a part's assignment is the router's or one of its ancestors."""
    if not lineage.knows(part.assignment):
        raise AtollError(
            f"{path}: its assignment is {part.assignment}, that of {router} is {lineage.assignment}, which did not "
            "grow from it; parts of one ensemble must come from the same clusters"
        )


def _clusters_now(card: ExpertCard, router: RouterCard | None) -> tuple[int, ...]:
    """The clusters of an expert in the numbering of the router, whose clusters may have grown."""
    return card.clusters if router is None else router.descent.now(card.assignment, card.clusters)


def assemble_run(
    run: Path,
    manifest: Manifest,
    *,
    rows: Path | None = None,
    loras: Sequence[LoraChoice] = (),
    allow_hub: bool = False,
    trust_paths: bool = False,
) -> Path:
    """Assemble the trained experts of a manifest with the run's router.

    Experts that are not trained yet are left out with a warning.

    Args:
        run: the run's directory.
        manifest: its manifest.
        rows: a directory like clusters/, on whose rows replicas are weighed; None for the run's clusters/.
        loras: low-rank updates to add to the experts that they were trained on.
        allow_hub: whether the experts' cards may fetch text encoders from the hub, to measure replicas.
        trust_paths: whether the experts' files may be links that lead out of the run.

    Returns:
        The ensemble's directory.

    Raises:
        AtollError: as `assemble`; an expert was trained for other levels than atoll.yaml says.
    """
    layout = RunLayout(run)
    named = [layout.expert(expert.full_name) for expert in manifest.experts]
    named += [layout.generalist] if manifest.generalist is not None else []
    trained = [path for path in named if (path / CARD).is_file()]
    if missing := [path.name for path in named if path not in trained]:
        warnings.warn(f"not trained yet, left out: {', '.join(missing)}", stacklevel=2)
    for part, path in zip(manifest.ensemble_parts, named, strict=True):
        if path in trained:
            _refuse_other_levels(path, part.objective.levels)
    alone = len(trained) == 1 and not (layout.router / CARD).is_file()
    trust = manifest.allowing(hub=allow_hub, paths=trust_paths).trust_in_cards(run)
    router = None if alone else layout.router
    # Without the router's card, `assemble` raises the error.
    routing = read_card(router, RouterCard) if router is not None and (router / CARD).is_file() else None
    updates = choose_loras(trained, loras)
    # Rows that some expert left out are no measure of any.
    skip = listed_keys(run / name for part in manifest.ensemble_parts if (name := manifest.train_of(part).skip))
    stackings = stack_replicas(
        trained, rows or layout.clusters, trust, routing, every=rows is not None, loras=updates, skip=skip
    )
    sampling = manifest.sampling.model_dump(exclude_none=True)
    return assemble(trained, router, layout.ensemble, sampling, stackings, updates)


def _refuse_other_levels(path: Path, levels: tuple[float, float] | None) -> None:
    """Raise AtollError if an expert is of other noise levels than its section in atoll.yaml."""
    trained = read_card(path, ExpertCard).objective.get("levels")
    if trained != (None if levels is None else list(levels)):
        got, expected = (
            "all levels" if own is None else f"the levels {own[0]:g} to {own[1]:g}" for own in (trained, levels)
        )
        raise AtollError(
            f"{path}: trained for {got}, and atoll.yaml says {expected}; change objective.levels, or train again with "
            "--restart"
        )


def stack_replicas(
    experts: list[Path],
    clusters: Path,
    trust: Trust = STRANGER,
    router: RouterCard | None = None,
    every: bool = False,
    loras: Mapping[Path, LoraChoice] | None = None,
    skip: Collection[str] = (),
) -> list[Stacking]:
    """Measure the weights of replicas on held-out latents of their clusters.

    Replicas without local latents cause a warning; they share their cluster's weight equally.

    Args:
        experts: directories of expert artifacts.
        clusters: the run's clusters/, or a directory like it.
        trust: what the experts' cards may reach.
        router: its card knows older assignments of clusters that grew; None if they did not.
        every: the rows were named for this purpose: if none of them is held out, all are used.
        loras: low-rank updates of some of the experts, by the expert's directory.
        skip: keys of rows that are left out.

    Returns:
        One `Stacking` per group of replicas.

    Raises:
        AtollError: the latents and the experts belong to different assignments.
    """
    # Replicas are experts that cover the same clusters at the same levels.
    groups: dict[tuple[tuple[int, ...], tuple[float, ...]], list[Path]] = {}
    for path in experts:
        levels = read_card(path, ExpertCard).objective.get("levels") or (0.0, 1.0)
        groups.setdefault((_covered(path, router), tuple(levels)), []).append(path)
    stackings = []
    for (covered, _), replicas in groups.items():
        places = [cluster_path(clusters, cluster) for cluster in covered]
        if len(replicas) < 2:
            continue
        if not all(place.is_dir() for place in places):
            names = ", ".join(path.name for path in replicas)
            warnings.warn(
                f"{names} are replicas and {clusters} lacks their latents; they will share alike", stacklevel=3
            )
            continue
        shards = [Shards(place).without(skip) for place in places]
        stackings.append(_stacked(replicas, shards, trust, router.descent if router else None, every, loras or {}))
    return stackings


def _covered(path: Path, router: RouterCard | None) -> tuple[int, ...]:
    """The current clusters of the expert at `path`; its own if the router does not know them."""
    card = read_card(path, ExpertCard)
    return _clusters_now(card, router) if router and router.descent.knows(card.assignment) else card.clusters


def _stacked(
    replicas: list[Path],
    shards: list[Shards],
    trust: Trust,
    lineage: Lineage | None,
    every: bool,
    loras: Mapping[Path, LoraChoice],
) -> Stacking:
    """Measure one group of replicas on held-out rows of their clusters."""
    # The replicas, and a check that these are the clusters that they were trained on.
    device = best_device()
    loaded = [load_expert(path, device, trust=trust, lora=loras.get(path)) for path in replicas]
    for part in shards:
        for path, one in zip(replicas, loaded, strict=True):
            assignments = part.card(ClusterShardsCard).assignment, one.card.assignment
            # Directories and experts of clusters that grew may be of different steps.
            related = lineage is not None and all(map(lineage.knows, assignments))
            refuse_other_statistics(part.path, part.card(ClusterShardsCard).codec, path, one.card.codec)
            if assignments[0] != assignments[1] and not related:
                raise AtollError(f"{path}: was trained on another assignment than {part.path} is of; train it again")
    # Rows that no replica was trained on: the rows that all of them held out, or the val split.
    share = min(one.card.training.calibration_holdout if one.card.training else 0.0 for one in loaded)
    val = torch.cat([part.rows("val") + start for part, start in _starts(shards)])
    rows = is_held_out(shards, share).nonzero().flatten() if share > 0 else val
    # Rows that nobody else has are held out by nature; their val split comes first.
    if every:
        training = [part.rows("train") + start for part, start in _starts(shards)]
        rows = val if len(val) else torch.cat(training)
    if not len(rows):
        names = ", ".join(path.name for path in replicas)
        raise AtollError(
            f"{names}: no row of {shards[0].path} is held out; set train.calibration_holdout, and train them again"
        )
    # Of images of several sizes, those of the commonest: the weights depend on the noise, hardly on the size.
    rows = _of_one_shape(shards, rows)
    # A fixed sample of them, ascending, so that each shard is read once.
    rows = rows[random_rows(len(rows), _ROWS, cpu_generator(0))].sort().values
    latents, captions = _read(shards, rows)
    # Each replica reads the captions by its own text encoder.
    conditions = [build_encoder(one.card.condition, trust)(captions) for one in loaded]
    # All replicas use one mean latent: that of a calibration if there is one.
    means = [one.expert.calibration.mean.cpu() for one in loaded if one.expert.calibration is not None]
    mean = means[0] if means else resized(latents.mean(0), shards[0].shape(LATENTS[0])[1:])
    experts = [one.expert for one in loaded]
    # The measurement treats all replicas alike, whatever their objectives.
    return measure_stacking(experts, latents, conditions, mean, samples=_SAMPLES, device=device)


def _of_one_shape(shards: list[Shards], rows: torch.Tensor) -> torch.Tensor:
    """The rows [n] int64 whose latents have the shape that most of them have; the main one where it ties."""
    every = sorted({shape for part in shards for shape in part.shapes(LATENTS[0])})
    kinds = [
        torch.tensor([every.index(shape) for shape in part.shapes(LATENTS[0])])[part.shape_numbers(LATENTS[0]).long()]
        for part in shards
    ]
    own = torch.cat(kinds)[rows]
    counts = {shape: int((own == kind).sum()) for kind, shape in enumerate(every)}
    commonest = max(every, key=lambda shape: (counts[shape], shape == shards[0].shape(LATENTS[0])))
    return rows[own == every.index(commonest)]


def _starts(shards: list[Shards]) -> list[tuple[Shards, int]]:
    """Pair each directory with the number of its first row in the concatenation."""
    starts = [0, *torch.tensor([len(part) for part in shards]).cumsum(0).tolist()]
    return list(zip(shards, starts, strict=False))


def _read(shards: list[Shards], rows: torch.Tensor) -> tuple[torch.Tensor, list[str]]:
    """Read rows of concatenated directories.

    Args:
        shards: the directories, in order.
        rows: row numbers [n] int64 in the concatenation, ascending.

    Returns:
        Latents [n, C, H, W] float32 and n captions.
    """
    latents, captions = [], list[str]()
    for part, start in _starts(shards):
        # The rows of this directory, by their numbers in it.
        mine = rows[(rows >= start) & (rows < start + len(part))] - start
        latents.append(part.read("latent", mine).float())
        captions += part.captions_of(mine)
    return torch.cat(latents), captions


def _write_stackings(out: Path, stackings: Sequence[Stacking]) -> StackingsEntry:
    """Write the mean latents of the stackings, and return the card's entry with their weights."""
    from safetensors.torch import save

    # A mean latent is too large for a card; weights are in the card itself.
    data = save({f"mean.{number}": stacking.mean.contiguous() for number, stacking in enumerate(stackings)})
    write_bytes(out / STACKINGS, data)
    weights = [stacking.config() for stacking in stackings]
    return StackingsEntry(file=STACKINGS, sha256=sha256_file(out / STACKINGS), weights=weights)


def _lora_entry(lora: LoraChoice | None, card: ExpertCard, path: Path, out: Path) -> dict[str, LoraEntry]:
    """The entry of an expert's update, if it has one; read once, so that one that does not fit is refused here."""
    if lora is None:
        return {}
    read_lora(lora.path, card, path)
    return {"lora": parse_record(LoraEntry, {**_place(lora.path, out), "scale": lora.scale}, str(lora.path))}


def _place(path: Path, out: Path) -> dict[str, str]:
    """Return a part's path relative to `out`, and the hash of its card, which holds the hash of its weights."""
    # Relative paths, so that a copied run still finds its parts.
    return {"url": Path(os.path.relpath(path, out)).as_posix(), "sha256": sha256_file(path / CARD)}
