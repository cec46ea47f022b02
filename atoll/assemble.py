"""Experts + router -> ensemble/ensemble.json, which names its parts and their hashes: `atoll assemble`."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from atoll.encoders.text import build_encoder
from atoll.encoders.weights import same
from atoll.ensemble.loading import load_expert
from atoll.ensemble.replicas import Stacking, measure_stacking
from atoll.errors import AtollError
from atoll.manifest import Manifest
from atoll.randomness import cpu_generator, random_rows
from atoll.runtime.device import best_device
from atoll.storage.artifact import CARD, read_card, sha256_file, write_bytes, write_card
from atoll.storage.cards import (
    ClusterShardsCard,
    EnsembleCard,
    ExpertCard,
    ExpertEntry,
    RouterCard,
    RouterEntry,
    SamplingDefaults,
    StackingsEntry,
    parse_record,
)
from atoll.storage.layout import ENSEMBLE_CARD, STACKINGS, RunLayout, cluster_path
from atoll.storage.shards import Shards, is_held_out

_ROWS, _SAMPLES = 1024, 512  # held-out latents at most, and noisy ones at each level, that weigh replicas

# What all parts of one ensemble must share to be sampled as one model.
_SHARED = ("assignment", "latent_shape", "codec")


def assemble(
    experts: list[Path],
    router: Path | None,
    out: Path,
    sampling: dict[str, Any] | None = None,
    stackings: Sequence[Stacking] = (),
) -> Path:
    """Writes `out`/ensemble.json over the given artifacts (parts stay where they are, named relative to `out`).

    Args:
        experts: directories of expert artifacts, at least one.
        router: the router's directory; None where one expert is all there is.
        out: the ensemble's directory.
        sampling: defaults for the pipeline: steps, guidance_scale, method, routing, replicas.
        stackings: the weights of replicas; see `stack_replicas`.

    Raises:
        AtollError: a part is missing or of another kind, or two parts are of different data.
    """
    if not experts:
        raise AtollError("no experts to assemble; train one with `atoll train expert 0`")
    cards = {path: read_card(path, ExpertCard) for path in experts}
    routing = None if router is None else read_card(router, RouterCard)
    first = experts[0]
    parts: dict[Path, ExpertCard | RouterCard] = {**cards}
    if router is not None and routing is not None:
        parts[router] = routing
    for path, part in parts.items():
        for key in _SHARED:
            mine, theirs = part.plain().get(key), cards[first].plain().get(key)
            if not same(mine, theirs):
                raise AtollError(
                    f"{path}: its {key} is {mine}, that of {first} is {theirs}; "
                    "parts of one ensemble must come from the same clusters"
                )
    for path, card in cards.items():
        if routing is not None and card.k != routing.clusters:
            raise AtollError(
                f"{router}: knows {routing.clusters} clusters, {path} is of {card.k}; take the router trained on its"
            )
    out.mkdir(parents=True, exist_ok=True)
    shared = cards[first]
    ensemble = EnsembleCard(
        experts=[
            ExpertEntry(name=card.name, clusters=card.clusters, **_place(path, out)) for path, card in cards.items()
        ],
        router=None if router is None else RouterEntry(**_place(router, out)),
        clusters=shared.k,
        assignment=shared.assignment,
        latent_shape=shared.latent_shape,
        codec=shared.codec,
        **({"stackings": _write_stackings(out, stackings)} if stackings else {}),
        sampling=parse_record(SamplingDefaults, sampling or {}, "sampling"),
    )
    write_card(out / ENSEMBLE_CARD, ensemble)
    return out


def assemble_run(run: Path, manifest: Manifest) -> Path:
    """Assembles the experts that the manifest names and that are trained, with the run's router.

    Experts that are not there yet are told about in a warning, and the ensemble is made without them.
    """
    layout = RunLayout(run)
    named = [layout.expert(expert.full_name) for expert in manifest.experts]
    trained = [path for path in named if (path / CARD).is_file()]
    if missing := [path.name for path in named if path not in trained]:
        warnings.warn(f"not trained yet, left out: {', '.join(missing)}", stacklevel=2)
    alone = len(trained) == 1 and not (layout.router / CARD).is_file()
    stackings = stack_replicas(trained, layout.clusters)
    return assemble(
        trained, None if alone else layout.router, layout.ensemble, manifest.sampling.model_dump(), stackings
    )


def stack_replicas(experts: list[Path], clusters: Path) -> list[Stacking]:
    """The weights of those experts that are replicas of each other, measured on held-out latents of their clusters.

    clusters: the run's clusters/. Replicas whose latents are not at hand are told about in a warning: they will share
    their cluster's weight alike.

    Raises:
        AtollError: the latents are of another assignment than the experts.
    """
    groups: dict[tuple[int, ...], list[Path]] = {}
    for path in experts:
        groups.setdefault(read_card(path, ExpertCard).clusters, []).append(path)
    stackings = []
    for covered, replicas in groups.items():
        places = [cluster_path(clusters, cluster) for cluster in covered]
        if len(replicas) < 2:
            continue
        if not all(place.is_dir() for place in places):
            names = ", ".join(path.name for path in replicas)
            warnings.warn(
                f"{names} are replicas and {clusters} lacks their latents; they will share alike", stacklevel=3
            )
            continue
        stackings.append(_stacked(replicas, [Shards(place) for place in places]))
    return stackings


def _stacked(replicas: list[Path], shards: list[Shards]) -> Stacking:
    device = best_device()
    loaded = [load_expert(path, device) for path in replicas]
    for part in shards:
        for path, one in zip(replicas, loaded, strict=True):
            if part.card(ClusterShardsCard).assignment != one.card.assignment:
                raise AtollError(f"{path}: was trained on another assignment than {part.path} is of; train it again")
    # Rows that none of them was trained on: what all held back, or the val split.
    share = min(one.card.training.calibration_holdout if one.card.training else 0.0 for one in loaded)
    val = torch.cat([part.rows("val") + start for part, start in _starts(shards)])
    rows = is_held_out(shards, share).nonzero().flatten() if share > 0 else val
    if not len(rows):
        names = ", ".join(path.name for path in replicas)
        raise AtollError(
            f"{names}: no row of {shards[0].path} is held out; set train.calibration_holdout, and train them again"
        )
    rows = rows[random_rows(len(rows), _ROWS, cpu_generator(0))].sort().values
    latents, captions = _read(shards, rows)
    conditions = [build_encoder(one.card.condition)(captions) for one in loaded]
    means = [one.expert.calibration.mean.cpu() for one in loaded if one.expert.calibration is not None]
    mean = means[0] if means else latents.mean(0)
    experts = [one.expert for one in loaded]
    return measure_stacking(experts, latents, conditions, mean, samples=_SAMPLES, device=device)


def _starts(shards: list[Shards]) -> list[tuple[Shards, int]]:
    starts = [0, *torch.tensor([len(part) for part in shards]).cumsum(0).tolist()]
    return list(zip(shards, starts, strict=False))


def _read(shards: list[Shards], rows: torch.Tensor) -> tuple[torch.Tensor, list[str]]:
    """Latents [n, ...] float32 and captions of the rows [n], ascending, of directories one after the other."""
    latents, captions = [], list[str]()
    for part, start in _starts(shards):
        mine = rows[(rows >= start) & (rows < start + len(part))] - start
        latents.append(part.read("latent", mine).float())
        captions += part.captions_of(mine)
    return torch.cat(latents), captions


def _write_stackings(out: Path, stackings: Sequence[Stacking]) -> StackingsEntry:
    from safetensors.torch import save

    data = save({f"mean.{number}": stacking.mean.contiguous() for number, stacking in enumerate(stackings)})
    write_bytes(out / STACKINGS, data)
    weights = [stacking.config() for stacking in stackings]
    return StackingsEntry(file=STACKINGS, sha256=sha256_file(out / STACKINGS), weights=weights)


def _place(path: Path, out: Path) -> dict[str, str]:
    """Where a part is, and the hash of its card (which holds that of its weights)."""
    return {"url": Path(os.path.relpath(path, out)).as_posix(), "sha256": sha256_file(path / CARD)}
