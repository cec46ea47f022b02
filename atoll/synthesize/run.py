"""The stage: `atoll synthesize`."""

import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from atoll.choices import Method
from atoll.encoders.text import build_encoder
from atoll.encoders.weights import same
from atoll.ensemble.loading import load_expert
from atoll.errors import AtollError
from atoll.manifest import Manifest
from atoll.runtime.device import best_device
from atoll.storage.artifact import CARD, read_card, sha256_file, write_bytes
from atoll.storage.cards import DrawingExpert, DrawnCaptions, DrawnCard, DrawnSource, ExpertCard
from atoll.storage.layout import MANIFEST, RunLayout
from atoll.storage.shards import refuse_foreign
from atoll.synthesize.captions import CaptionOrder, load_captions
from atoll.synthesize.draw import ClusterModel, Sampling
from atoll.synthesize.rows import Keys
from atoll.synthesize.write import PartialSynthesis, SynthesisPlan, is_there, link_expert

SynthesizeProgress = Callable[[int, int, str], None]  # (latents done, latents in all, a note)

_SHARD_ROWS, _SHARD_BYTES = 1024, 1 << 28


def synthesize_run(
    run: Path,
    manifest: Manifest,
    out: Path,
    *,
    images: int = 4096,
    captions: Path | None = None,
    steps: int | None = None,
    guidance: float = 1.0,
    method: Method | None = None,
    seed: int | None = None,
    resume: bool = False,
    force: bool = False,
    shard_rows: int = _SHARD_ROWS,
    progress: SynthesizeProgress | None = None,
) -> str:
    """Writes into `out` a run whose data the experts of `run` draw, and says in a line what was done.

    Of `run` atoll.yaml and experts/ are read, nothing else if captions are given. `out` gets both, encoded/ and
    clusters/; the assignment's hash is the experts' own, so what is trained there fits them. Every cluster's narrowest
    experts draw its rows; replicas together, with equal shares (see `ClusterModel`). A row depends on the seed, its
    number, its caption and the experts, so twice gives equal bytes on one kind of machine, wherever it was interrupted;
    all that is lost then is one shard. In memory are one cluster's experts and one shard.

    Args:
        out: a new directory, or `run` itself where that has no data.
        images: of each cluster.
        captions: see `load_captions`; None: those of the clusters' shards.
        steps, method: None: of the manifest's `sampling`.
        guidance: not the manifest's: what is learned from are draws of the experts' own distribution.
        seed: None: the manifest's.
        resume: go on with draws that were interrupted.
        force: replace other draws, and throw away interrupted ones; never data.
        shard_rows: of a shard, at most; fewer where latents are large.

    Raises:
        AtollError: a cluster without an expert; experts of different data; captions as `load_captions`; an expert that
            answers with NaN; `out` holds something else; as `load_expert`.
    """
    experts, shared = _experts(run, manifest)
    found, told = load_captions(captions, RunLayout(run).clusters, manifest.clusters.k, shared.assignment)
    seed = manifest.seed if seed is None else seed
    default = manifest.sampling
    sampling = Sampling(default.steps if steps is None else steps, method or default.method, guidance, seed)
    plan = _plan(manifest, shared, experts, told, sampling, images, shard_rows)
    keys = [Keys(seed, cluster, images, manifest.data.validation) for cluster in range(plan.clusters)]
    with PartialSynthesis(out, plan) as partial:
        if is_there(out, plan, force):
            partial.discard()  # of one that was killed at its very end
            return f"{out} is there already: {_say(plan)}"
        _claim(run, out, partial)
        partial.prepare(resume, force)
        for path in dict.fromkeys(path for paths in experts for path in paths):
            link_expert(path, RunLayout(out).expert(path.name), force)
        orders = [CaptionOrder(one, seed, cluster) for cluster, one in enumerate(found)]
        for cluster, paths in enumerate(experts):
            _draw(cluster, paths, orders[cluster], sampling, partial, progress)
        partial.seal(keys, orders)
    return f"{out} written: {_say(plan)}"


def _experts(run: Path, manifest: Manifest) -> tuple[list[list[Path]], "_Shared"]:
    """The experts that draw each cluster, and what they share: codec, latent_shape, assignment, condition.

    Those that the manifest names; of a cluster the narrowest that cover it, as in an ensemble. Of experts that read
    captions differently, the condition is the manifest's.
    """
    named = {RunLayout(run).expert(expert.full_name): expert for expert in manifest.experts}
    cards = {path: read_card(path, ExpertCard) for path in named if (path / CARD).is_file()}
    k, found = manifest.clusters.k, list[list[Path]]()
    for cluster in range(k):
        breadth = {path: len(card.clusters) for path, card in cards.items() if cluster in card.clusters}
        if not breadth:
            wanted = [str(path) for path, expert in named.items() if expert.cluster == cluster]
            fix = f"put it at {' or '.join(wanted)}" if wanted else f"name one in {MANIFEST}"
            raise AtollError(f"cluster {cluster} has no expert that could draw it; {fix}")
        found.append([path for path in breadth if breadth[path] == min(breadth.values())])
    if missing := [path.name for path in named if path not in cards]:
        warnings.warn(f"not trained yet, left out: {', '.join(missing)}", stacklevel=3)
    first, *others = cards
    for path in others:
        for key in ("assignment", "latent_shape", "codec", "k"):
            if not same(mine := cards[path].plain().get(key), theirs := cards[first].plain().get(key)):
                raise AtollError(
                    f"{path}: its {key} is {mine}, that of {first} is {theirs}; expected experts of one run"
                )
    card = cards[first]
    if card.k != k:
        raise AtollError(f"{first}: is of {card.k} clusters, {MANIFEST} says clusters.k {k}; mend that")
    if card.assignment is None:
        raise AtollError(f"{first}: its card names no assignment, so what it draws fits no clusters; convert it again")
    alike = all(same(other.condition, card.condition) for other in cards.values())
    condition = card.condition if alike else build_encoder(manifest.condition).config()
    return found, _Shared(card.codec, card.latent_shape, card.assignment, condition)


@dataclass(frozen=True)
class _Shared:
    """What the cards of all drawn rows say."""

    codec: dict[str, Any]
    latent_shape: tuple[int, int, int]
    assignment: str
    condition: dict[str, Any]


def _plan(
    manifest: Manifest,
    shared: _Shared,
    experts: list[list[Path]],
    captions: DrawnCaptions,
    sampling: Sampling,
    images: int,
    shard_rows: int,
) -> SynthesisPlan:
    drawing = [
        DrawingExpert(
            name=path.name,
            draws=[k for k, those in enumerate(experts) if path in those],
            sha256=sha256_file(path / CARD),
        )
        for path in dict.fromkeys(path for paths in experts for path in paths)
    ]
    rows = max(1, min(shard_rows, _SHARD_BYTES // (2 * math.prod(shared.latent_shape))))
    source = DrawnSource(
        name="experts",
        experts=drawing,
        captions=captions,
        images=images,
        **sampling.config(),
        validation=manifest.data.validation,
        shard_rows=rows,
    )
    return SynthesisPlan(DrawnCard(**asdict(shared), clusters=manifest.clusters.k, source=source))


def _claim(run: Path, out: Path, partial: PartialSynthesis) -> None:
    """Puts the run's atoll.yaml into `out`. Raises AtollError if that is of something else."""
    if out.resolve() == run.resolve():
        return
    mine, there = RunLayout(run).manifest.read_bytes(), RunLayout(out).manifest
    if partial.begun or RunLayout(out).encoded.exists():  # drawn here before: what was added to its atoll.yaml stays
        return
    refuse_foreign(out, MANIFEST)
    if there.is_file() and there.read_bytes() != mine:
        raise AtollError(f"{out}: is a run with another {MANIFEST} than {run}; name an empty or new directory")
    out.mkdir(parents=True, exist_ok=True)
    write_bytes(there, mine)


def _draw(
    cluster: int,
    paths: list[Path],
    captions: CaptionOrder,
    sampling: Sampling,
    partial: PartialSynthesis,
    progress: SynthesizeProgress | None,
) -> None:
    """Those shards of a cluster that are not there yet."""
    plan = partial.plan
    todo = [(number, rows) for number, rows in plan.shards(cluster) if not partial.is_done(cluster, number)]
    if not todo:
        return
    device = best_device()
    model = ClusterModel(cluster, [load_expert(path, device) for path in paths], device)
    for number, rows in todo:
        before = cluster * plan.images + rows.start

        def tell(done: int, before: int = before) -> None:
            if progress is not None:
                progress(before + done, plan.clusters * plan.images, f"cluster {cluster}")

        partial.write(cluster, number, model.draw(captions(rows), rows, sampling, tell=tell))


def _say(plan: SynthesisPlan) -> str:
    """3 clusters of 4,096 latents each, drawn by 4 experts"""
    experts = len(plan.card.source.experts)
    by = f"{experts} expert{'s' if experts > 1 else ''}"
    told = plan.card.source.captions.origin
    return f"{plan.clusters} clusters of {plan.images:,} latents each, drawn by {by}; captions: {told}"
