"""Extends a router to clusters that grew, without training it anew: `atoll train router --extend`.

All weights of the old router are frozen. Each step of growth adds one logit (`atoll.nn.router.grow`), fitted to noisy
latents of the clusters that the step concerns: both parts of a split cluster, or a new cluster against all older ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any, cast

import torch
from torch import Tensor, nn

from atoll.encoders.codec.statistics import refuse_other_statistics
from atoll.encoders.text import TextEncoder, build_encoder
from atoll.ensemble.loading import load_router
from atoll.errors import AtollError
from atoll.manifest import Manifest, TrainSettings
from atoll.nn import Router, build_network
from atoll.randomness import ShuffledPasses, Stream, cpu_generator, hashed_seed, seeded
from atoll.runtime.device import best_device
from atoll.schedule import PATH
from atoll.storage.artifact import load_card, read_card, save_artifact
from atoll.storage.cards import ClustersCard, ClusterShardsCard, InitRecord, Lineage, RouterCard, TrainingRecord
from atoll.storage.layout import ROUTER, RunLayout, cluster_directories, cluster_path, router_seed
from atoll.storage.shards import INDEX, SPLITS, Shards, Split
from atoll.train.batches import CaptionedLatents, Rows, drop_condition
from atoll.train.grown_logit import LogitSamples, fit_logit
from atoll.train.plans import training_mark
from atoll.train.router import RouterTask
from atoll.train.skipped import without_skipped
from atoll.train.track import TrainProgress

SAMPLES = 32_768  # noisy latents per step, half of them of the new cluster; a quarter as many held-out ones
_BATCH = 256  # noisy latents per call of the network


@dataclass(frozen=True, eq=False)
class ClusterRows:
    """Rows of some clusters.

    Attributes:
        shards: their directory.
        numbers: which of its rows [n] int64; None for all.
        clusters: the clusters that they belong to, in the current numbering; more than one if the rows are older than
            a split.
    """

    shards: Shards
    numbers: Tensor | None
    clusters: frozenset[int]

    def of(self, split: Split) -> Tensor:
        """Return the row numbers of a split, [n] int64."""
        rows = self.shards.rows(split)
        return rows if self.numbers is None else rows[torch.isin(rows, self.numbers)]


def extend_router(
    run: Path, manifest: Manifest, *, rows: Path | None = None, progress: TrainProgress | None = None
) -> Path:
    """Extend the run's router to its clusters, which grew since the router was trained.

    Args:
        run: the run's directory.
        manifest: its atoll.yaml.
        rows: a directory like clusters/ (such as one that `atoll synthesize` drew before the growth), for clusters
            whose latents the run does not have.
        progress: called after each step of growth.

    Returns:
        The directory of the router, which is replaced.

    Raises:
        AtollError: no router, one of clusters that these did not grow from, or of a foreign network; latents of a
            cluster are missing; nothing to extend.
    """
    layout, started = RunLayout(run), monotonic()
    card, lineage = _refuse_unrelated(layout)
    parents = lineage.parents_since(card.assignment)
    trust, settings = manifest.trust_in_cards(run), manifest.train_of(manifest.router)
    sources = _sources(layout, rows, lineage)
    for source in sources:
        codec = source.shards.card(ClusterShardsCard).codec
        refuse_other_statistics(source.shards.path, codec, layout.router, card.codec)
    parts, left_out = without_skipped(run, settings, [source.shards for source in sources])
    sources = [replace(source, shards=part) for source, part in zip(sources, parts, strict=True)]
    counts = [count.train for count in load_card(layout.clusters_card, ClustersCard).counts]
    encoder, device = build_encoder(card.condition, trust), best_device()
    router = _with_new_logits(load_router(layout.router, device, trust=trust), card, lineage)
    # The logits are fitted one after the other; none of them reads another.
    seed, losses = router_seed(manifest.seed), dict[str, float]()
    for step, parent in enumerate(parents):
        number = card.clusters + step
        sides = [_side(sources, clusters, counts) for clusters in _concerned(lineage, card, step, parent)]
        training, held_out = (
            _samples(router, sides, encoder, settings, split=split, seed=seed, step=number, device=device)
            for split in SPLITS
        )
        if training is None:
            raise AtollError(f"no training latents on one side of cluster {number}; name others by --rows")
        fitted = fit_logit(training, held_out)
        logit = router.grown[len(router.grown) - len(parents) + step]
        logit.load_state_dict(fitted.logit.state_dict())
        losses[f"cluster {number}"] = fitted.loss if fitted.held_out_loss is None else fitted.held_out_loss
        if progress is not None:
            progress({"step": step + 1, "steps": len(parents), "loss": fitted.loss, "images_per_s": 0.0})
    # Write the router, which replaces the old one.
    extended = _card(
        card,
        lineage,
        router.config.model_dump(mode="json"),
        settings,
        left_out=left_out,
        losses=losses,
        accuracy=_accuracy(router, layout, lineage.k, encoder, settings, seed),
        seed=seed,
        seconds=monotonic() - started,
    )
    save_artifact(layout.router, extended, {f"network.{name}": value for name, value in router.state_dict().items()})
    return layout.router


def _with_new_logits(old: nn.Module, card: RouterCard, lineage: Lineage) -> Router:
    """The old network, frozen, with an untrained logit for each step of growth."""
    grown = [*card.network.get("grown", ()), *lineage.parents_since(card.assignment)]
    router = build_network({**card.network, "clusters": lineage.k, "grown": grown})
    router.load_state_dict({**router.state_dict(), **old.state_dict()})
    device = next(old.parameters()).device
    return cast(Router, router.to(device).eval().requires_grad_(False))


def _card(
    old: RouterCard,
    lineage: Lineage,
    network: dict[str, Any],
    settings: TrainSettings,
    *,
    left_out: dict[str, Any],
    losses: dict[str, float],
    accuracy: dict[str, float],
    seed: int,
    seconds: float,
) -> RouterCard:
    """The extended router's card: the old one, what was added, and where the old weights came from."""
    network = {key: value for key, value in network.items() if key in old.network or key in ("clusters", "grown")}
    identity = {"network": network, "assignment": lineage.assignment, "seed": seed, "init": old.weights_sha256}
    identity |= left_out
    return RouterCard(
        network=network,
        clusters=lineage.k,
        latent_shape=old.latent_shape,
        codec=old.codec,
        condition=old.condition,
        assignment=lineage.assignment,
        lineage=lineage.ancestors,
        accuracy_at_t=accuracy,
        training=TrainingRecord(
            mark=training_mark(identity, settings),
            steps=0 if old.training is None else old.training.steps,
            validation=losses,
            seconds=round(seconds, 1),
            init=InitRecord(name=ROUTER, sha256=old.weights_sha256),
            **left_out,
            seed=seed,
            torch=torch.__version__,
        ),
    )


def _refuse_unrelated(layout: RunLayout) -> tuple[RouterCard, Lineage]:
    """The router's card and the lineage of the run's clusters. Raises AtollError if there is nothing to extend."""
    lineage, card = load_card(layout.clusters_card, ClustersCard).descent, read_card(layout.router, RouterCard)
    anew = "train a router anew: `atoll train router --restart`"
    if not lineage.knows(card.assignment):
        raise AtollError(f"{layout.router}: the clusters of {layout.clusters} did not grow from its own; {anew}")
    if card.assignment == lineage.assignment:
        raise AtollError(f"{layout.router}: knows all {lineage.k} clusters of {layout.clusters}; nothing to extend")
    if card.network.get("name") != "router":
        raise AtollError(f"{layout.router}: its network is foreign ({card.network.get('name')}); {anew}")
    if card.path is not None:
        raise AtollError(f"{layout.router}: was trained on its experts' noise paths, which has no extension; {anew}")
    return card, lineage


def _concerned(
    lineage: Lineage, card: RouterCard, step: int, parent: int | None
) -> tuple[frozenset[int], frozenset[int]]:
    """The current clusters on either side of a step's logit: the rest of its parent or all older ones, the new one."""
    # The assignment after this step, and what its clusters are now.
    later = [one.assignment for one in lineage.ancestors] + [lineage.assignment]
    after, number = later[later.index(card.assignment) + step + 1], card.clusters + step
    rest = range(number) if parent is None else [parent]
    return (
        frozenset(now for old in rest for now in lineage.now(after, (old,))),
        frozenset(lineage.now(after, (number,))),
    )


def _sources(layout: RunLayout, rows: Path | None, lineage: Lineage) -> list[ClusterRows]:
    """The rows of each cluster: from its own shards, else from the router's sample, else from `rows`."""
    sources: list[ClusterRows] = []

    # Each cluster is taken from one place: two copies of a row would count twice.
    def offer(shards: Shards, number: int, selected: Tensor | None = None) -> None:
        assignment = shards.card(ClusterShardsCard).assignment
        if not lineage.knows(assignment):
            raise AtollError(f"{shards.path}: is of clusters that those of {layout.clusters} did not grow from")
        now = frozenset(lineage.now(assignment, (number,)))
        if not any(now & other.clusters for other in sources):
            sources.append(ClusterRows(shards, selected, now))

    for path in layout.existing_clusters():
        offer(shards := Shards(path), shards.card(ClusterShardsCard).cluster or 0)
    if (layout.router_sample / INDEX).is_file():
        sample = Shards(layout.router_sample)
        labels = sample.read("cluster", slice(None))
        for number in labels.unique().tolist():
            offer(sample, number, (labels == number).nonzero().flatten())
    for path in cluster_directories(rows) if rows is not None else []:
        offer(shards := Shards(path), shards.card(ClusterShardsCard).cluster or 0)
    return sources


def _side(
    sources: Sequence[ClusterRows], clusters: frozenset[int], counts: Sequence[int]
) -> list[tuple[ClusterRows, int]]:
    """The rows of some clusters, with the number of training images that they stand for."""
    side = [(rows, sum(counts[number] for number in rows.clusters)) for rows in sources if rows.clusters <= clusters]
    available = frozenset[int]().union(*(rows.clusters for rows, _ in side))
    # Without one of them, the logit would be wrong for its latents.
    if missing := sorted(clusters - available):
        raise AtollError(
            f"no latents of cluster {', '.join(map(str, missing))}; copy their shards to clusters/, or name a "
            "directory with latents that `atoll synthesize` drew by --rows"
        )
    return side


@torch.no_grad()
def _samples(
    router: Router,
    sides: Sequence[list[tuple[ClusterRows, int]]],
    encoder: TextEncoder,
    settings: TrainSettings,
    *,
    split: Split,
    seed: int,
    step: int,
    device: torch.device | str,
) -> LogitSamples | None:
    """Draw noisy latents of both sides, as many of each; None if a side has no row of the split."""
    count = SAMPLES if split == "train" else SAMPLES // 4
    parts: list[tuple[Tensor, Tensor, int, float]] = []  # features, t, label, weight of each
    total = sum(images for side in sides for _, images in side)
    for label, side in enumerate(sides):
        here, images_here = [(rows, n) for rows, n in side if len(rows.of(split))], sum(n for _, n in side)
        if not here:
            return None
        for place, (rows, images) in enumerate(here):
            # Each source by its share of the images, however many rows of it are here.
            own = max(1, round(count / 2 * images / sum(n for _, n in here)))
            source = hashed_seed(f"grow {split}", seed, step, label, place)
            data = CaptionedLatents(Rows([rows.shards], rows.of(split)), encoder)
            features, t = _noisy_features(router, data, own, settings.dropout, source, device)
            parts.append((features, t, label, images_here / total / (count / 2)))
    return LogitSamples(
        torch.cat([features for features, _, _, _ in parts]),
        torch.cat([t for _, t, _, _ in parts]),
        torch.cat([torch.full((len(t),), float(label)) for _, t, label, _ in parts]),
        torch.cat([torch.full((len(t),), weight) for _, t, _, weight in parts]),
    )


def _noisy_features(
    router: Router, data: CaptionedLatents, count: int, dropout: float, seed: int, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """The router's features [count, F] of noisy latents along the linear path, as in `RouterTask`, and t [count]."""
    g, passes = cpu_generator(seed), ShuffledPasses(len(data), lambda epoch: seeded(seed, epoch, Stream.ORDER))
    rows, null = passes.items(0, count), data.encoder.null(1)
    t, flips, dropped = (torch.rand(count, generator=g) for _ in range(3))
    features: Tensor | None = None
    for part in torch.arange(count).split(_BATCH):
        for chosen in _alike(data, rows, part):
            batch = data.batch(rows[chosen], flips[chosen] < 0.5)
            eps = torch.randn(batch["x0"].shape, generator=g)
            pooled = drop_condition(data.condition(batch), null, dropped[chosen] < dropout).pooled
            x = PATH.diffuse(batch["x0"].float(), eps, t[chosen]).to(device)
            own = router.features(x, t[chosen].to(device), None if pooled is None else pooled.to(device)).cpu()
            features = own.new_empty(count, own.shape[1]) if features is None else features
            features[chosen] = own
    assert features is not None
    return features, t


def _alike(data: CaptionedLatents, rows: Tensor, places: Tensor) -> list[Tensor]:
    """Divide places [n] int64 in `rows` by the shape of the latents there."""
    kinds = data.rows.kinds(rows[places])
    return [places[kinds == kind] for kind in kinds.unique(sorted=True)]


def _accuracy(
    router: Router, layout: RunLayout, k: int, encoder: TextEncoder, settings: TrainSettings, seed: int
) -> dict[str, float]:
    """The top-1 accuracy on held-out latents, as of a trained router; empty if a cluster's shards are not here."""
    places = [cluster_path(layout.clusters, number) for number in range(k)]
    if not all((place / INDEX).is_file() for place in places):
        return {}
    shards = [Shards(place) for place in places]
    held_out = CaptionedLatents(Rows.of(shards, "val"), encoder)
    if not len(held_out):
        return {}
    labels = torch.cat([torch.full((len(part),), number) for number, part in enumerate(shards)])
    return RouterTask(router, held_out, held_out, labels, settings=settings, seed=seed).accuracy(router)
