"""The stage `atoll synthesize`."""

import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from atoll.choices import Method
from atoll.encoders.codec.statistics import refuse_other_statistics
from atoll.encoders.text import build_encoder
from atoll.encoders.trust import Trust
from atoll.encoders.weights import same
from atoll.ensemble.loading import load_expert
from atoll.errors import AtollError
from atoll.manifest import Manifest
from atoll.runtime.device import best_device
from atoll.storage.artifact import CARD, read_card, sha256_file, write_bytes
from atoll.storage.cards import DrawingExpert, DrawnCaptions, DrawnCard, DrawnSource, ExpertCard
from atoll.storage.layout import MANIFEST, RunLayout
from atoll.storage.shards import listed_keys, refuse_foreign
from atoll.synthesize.captions import CaptionOrder, load_captions
from atoll.synthesize.draw import ClusterModel, Sampling
from atoll.synthesize.rows import Keys
from atoll.synthesize.write import PartialSynthesis, SynthesisPlan, is_there, link_expert

SynthesizeProgress = Callable[[int, int, str], None]  # (latents done, latents in total, a note)

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
    """Write a run into `out` whose data are drawn by the experts of `run`.

    Only atoll.yaml and experts/ of `run` are read, and clusters/ if no captions are given. `out` receives atoll.yaml,
    experts/, encoded/ and clusters/. The hash of the assignment is the experts' own, so what is trained there fits
    them. The narrowest experts of a cluster draw its rows, replicas together with equal weights (see `ClusterModel`).
    Captions of images that `train.skip` leaves out are not drawn.
    A row depends on the seed, its number, its caption and the experts: the same call gives the same bytes on one kind
    of machine, also after an interruption, which loses one shard at most. Memory holds the experts of one cluster and
    one shard.

    Args:
        run: the run's directory.
        manifest: its atoll.yaml.
        out: a new directory, or `run` itself if it has no data.
        images: per cluster.
        captions: see `load_captions`; None for those of the clusters' shards.
        steps: None for the manifest's `sampling`.
        guidance: default 1, not the manifest's, to draw from the experts' own distribution.
        method: None for the manifest's `sampling`.
        seed: None for the manifest's.
        resume: continue interrupted draws.
        force: replace other draws and discard interrupted ones, never data.
        shard_rows: per shard, at most; fewer if latents are large.
        progress: called after each batch.

    Returns:
        A line that says what was done.

    Raises:
        AtollError: a cluster without an expert; experts of different data; captions as in `load_captions`; an expert
            that returns NaN; `out` holds something else; as `load_expert`.
    """
    # What is drawn.
    experts, shared = _experts(run, manifest)
    # What some training left out, no caption shows either.
    skip = listed_keys(run / name for name in _skip_lists(manifest)) if captions is None else frozenset[str]()
    lists, origin = load_captions(captions, RunLayout(run).clusters, manifest.clusters.k, shared.assignment, skip)
    seed = manifest.seed if seed is None else seed
    default = manifest.sampling
    sampling = Sampling(default.steps if steps is None else steps, method or default.method, guidance, seed)
    plan = _plan(manifest, shared, experts, origin, sampling, images=images, shard_rows=shard_rows)
    keys = [Keys(seed, cluster, images, manifest.data.validation) for cluster in range(plan.clusters)]
    # Draw what is missing.
    with PartialSynthesis(out, plan) as partial:
        if is_there(out, plan, force):
            partial.discard()  # left by a run that was killed at its very end
            return f"{out} is there already: {_summary(plan)}"
        # `out` becomes a run of its own, with the experts that drew it.
        _claim(run, out, partial, _skip_lists(manifest))
        # From here on the directory is locked.
        partial.prepare(resume, force)
        for path in dict.fromkeys(path for paths in experts for path in paths):
            link_expert(path, RunLayout(out).expert(path.name), force)
        # The order of captions follows from the seed, so a resumed run continues it.
        orders = [CaptionOrder(one, seed, cluster) for cluster, one in enumerate(lists)]
        trust = manifest.trust_in_cards(run)
        for cluster, paths in enumerate(experts):
            _draw(cluster, paths, orders[cluster], sampling, partial, trust=trust, progress=progress)
        # All shards are drawn: turn them into the directories that the later stages read.
        partial.seal(keys, orders)
    return f"{out} written: {_summary(plan)}"


def _experts(run: Path, manifest: Manifest) -> tuple[list[list[Path]], "_Shared"]:
    """The experts that draw each cluster, and what they share: codec, latent_shape, assignment, condition.

    Only experts that the manifest names are used, and for each cluster the narrowest that cover it, as in an ensemble.
    If the experts have different text encoders, the condition is the manifest's.
    """
    # An expert that the manifest does not name is ignored, though its directory exists.
    named = {RunLayout(run).expert(expert.full_name): expert for expert in manifest.experts}
    cards = {path: read_card(path, ExpertCard) for path in named if (path / CARD).is_file()}
    if some := [path.name for path, card in cards.items() if card.objective.get("levels") is not None]:
        raise AtollError(f"{', '.join(some)}: of some levels only; expected experts that draw an image alone")
    # The narrowest experts of each cluster.
    k, experts = manifest.clusters.k, list[list[Path]]()
    for cluster in range(k):
        breadth = {path: len(card.clusters) for path, card in cards.items() if cluster in card.clusters}
        if not breadth:
            expected = [str(path) for path, expert in named.items() if expert.cluster == cluster]
            fix = f"put it at {' or '.join(expected)}" if expected else f"name one in {MANIFEST}"
            raise AtollError(f"cluster {cluster} has no expert that could draw it; {fix}")
        experts.append([path for path in breadth if breadth[path] == min(breadth.values())])
    # Clusters that are covered can be drawn even if other experts are missing.
    if missing := [path.name for path in named if path not in cards]:
        warnings.warn(f"not trained yet, left out: {', '.join(missing)}", stacklevel=3)
    # They must belong to one run.
    first, *others = cards
    for path in others:
        for key in ("assignment", "latent_shape", "codec", "k"):
            own, other = cards[path].plain().get(key), cards[first].plain().get(key)
            refuse_other_statistics(path, own, first, other)
            if not same(own, other):
                raise AtollError(f"{path}: its {key} is {own}, that of {first} is {other}; expected experts of one run")
    # They must also fit the manifest, and name an assignment that later stages can compare.
    card = cards[first]
    if card.k != k:
        raise AtollError(f"{first}: is of {card.k} clusters, {MANIFEST} says clusters.k {k}; correct it")
    if card.assignment is None:
        raise AtollError(f"{first}: its card names no assignment, so its draws fit no clusters; convert it again")
    # With different encoders there is no common condition, so the manifest's decides.
    same_encoder = all(same(other.condition, card.condition) for other in cards.values())
    condition = card.condition if same_encoder else build_encoder(manifest.condition).config()
    return experts, _Shared(card.codec, card.latent_shape, card.assignment, condition)


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
    *,
    images: int,
    shard_rows: int,
) -> SynthesisPlan:
    # The plan names every expert by the hash of its card.
    drawing = [
        DrawingExpert(
            name=path.name,
            draws=[cluster for cluster, paths in enumerate(experts) if path in paths],
            sha256=sha256_file(path / CARD),
        )
        for path in dict.fromkeys(path for paths in experts for path in paths)
    ]
    # Large latents: fewer rows, so that a shard stays below `_SHARD_BYTES`.
    rows = max(1, min(shard_rows, _SHARD_BYTES // (2 * math.prod(shared.latent_shape))))
    # The source lists everything that a drawn row depends on, so a resumed run can compare it.
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


def _skip_lists(manifest: Manifest) -> list[str]:
    """The lists of the experts' trainings, as the manifest names them."""
    return sorted({name for expert in manifest.experts if (name := manifest.train_of(expert).skip) is not None})


def _claim(run: Path, out: Path, partial: PartialSynthesis, skip_lists: list[str]) -> None:
    """Copy the run's atoll.yaml into `out`, and the lists beside it that the trainings there read.

    Raises:
        AtollError: `out` belongs to something else.
    """
    # Drawn in place: atoll.yaml is there.
    if out.resolve() == run.resolve():
        return
    content, target = RunLayout(run).manifest.read_bytes(), RunLayout(out).manifest
    if partial.exists or RunLayout(out).encoded.exists():  # drawn here before; atoll.yaml may have been edited
        return
    # A first draw: `out` must be empty, or a run with this very manifest.
    refuse_foreign(out, MANIFEST)
    if target.is_file() and target.read_bytes() != content:
        raise AtollError(f"{out}: is a run with another {MANIFEST} than {run}; name an empty or new directory")
    out.mkdir(parents=True, exist_ok=True)
    write_bytes(target, content)
    for name in skip_lists:
        # Only below the run: `out` alone may be written to.
        inside = not Path(name).is_absolute() and ".." not in Path(name).parts
        if inside and (run / name).is_file():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            write_bytes(out / name, (run / name).read_bytes())


def _draw(
    cluster: int,
    paths: list[Path],
    captions: CaptionOrder,
    sampling: Sampling,
    partial: PartialSynthesis,
    *,
    trust: Trust,
    progress: SynthesizeProgress | None,
) -> None:
    """Draw the missing shards of a cluster."""
    plan = partial.plan
    todo = [(number, rows) for number, rows in plan.shards(cluster) if not partial.is_done(cluster, number)]
    # Experts of a finished cluster are not loaded.
    if not todo:
        return
    device = best_device()
    # The experts of one cluster at a time are in memory.
    model = ClusterModel(cluster, [load_expert(path, device, trust=trust) for path in paths], device, trust)
    for number, rows in todo:
        # Progress counts the rows of all clusters.
        before = cluster * plan.images + rows.start

        def tell(done: int, before: int = before) -> None:
            if progress is not None:
                progress(before + done, plan.clusters * plan.images, f"cluster {cluster}")

        partial.write(cluster, number, model.draw(captions(rows), rows, sampling, tell=tell))


def _summary(plan: SynthesisPlan) -> str:
    """For example "3 clusters of 4,096 latents each, drawn by 4 experts; captions: ..."."""
    experts = len(plan.card.source.experts)
    # Replicas count, since each of them draws.
    by = f"{experts} expert{'s' if experts > 1 else ''}"
    origin = plan.card.source.captions.origin
    return f"{plan.clusters} clusters of {plan.images:,} latents each, drawn by {by}; captions: {origin}"
