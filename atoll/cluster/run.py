"""The stage `atoll cluster`."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from atoll.cluster.assign import Assignment, ClusterMethod
from atoll.cluster.describe import describe
from atoll.cluster.fit import ROWS_PER_CENTROID, ClusterProgress, Survey, survey, two_stages
from atoll.cluster.nearest import Workers
from atoll.cluster.report import imbalance, to_html
from atoll.cluster.write import ClustersWriter, WrittenClusters
from atoll.encoders.codec.statistics import other_statistics, statistics_note, uses_measured, with_codec, with_measured
from atoll.encoders.trust import STRANGER, Trust
from atoll.errors import AtollError
from atoll.manifest import Manifest
from atoll.storage.artifact import load_card, load_clusters, whole_directory, write_bytes, write_card
from atoll.storage.cards import (
    ClusteringCard,
    ClustersCard,
    ClusterShardsCard,
    CutRecord,
    DrawnClustersCard,
    EncodedCard,
)
from atoll.storage.layout import CLUSTERS_CARD, REPORT, RunLayout
from atoll.storage.shards import Shards, refuse_foreign

_FINE = 1024  # fine centroids, if there are enough images


def cluster_run(
    run: Path,
    manifest: Manifest,
    *,
    force: bool = False,
    router_fraction: float | None = None,
    progress: ClusterProgress | None = None,
) -> str:
    """Cluster `run`/encoded into `run`/clusters with the manifest's settings.

    Args:
        run: the run's directory.
        manifest: its atoll.yaml.
        force: replace an earlier clustering.
        router_fraction: instead of the manifest's.
        progress: called after each shard.

    Returns:
        A line that says what was done.

    Raises:
        AtollError: as `cluster`.
    """
    # Options of the call take precedence over the manifest.
    settings, layout, measured = manifest.clusters, RunLayout(run), uses_measured(manifest.codec)
    out = layout.clusters
    written = cluster(
        layout.encoded,
        out,
        settings.k,
        settings.method,
        fine=settings.fine,
        seed=manifest.seed,
        force=force,
        router_fraction=settings.router_fraction if router_fraction is None else router_fraction,
        measured=measured,
        progress=progress,
        trust=manifest.trust_in_cards(run),
    )
    return f"{out} {'written' if written else 'is there already'}: {say_counts(load_clusters(out / CLUSTERS_CARD))}"


def cluster(
    encoded: Path,
    out: Path,
    k: int,
    method: ClusterMethod = "balanced",
    *,
    fine: int | None = None,
    seed: int = 0,
    force: bool = False,
    router_fraction: float | None = None,
    measured: bool = False,
    progress: ClusterProgress | None = None,
    trust: Trust = STRANGER,
) -> bool:
    """Cluster the features of `encoded` and write `out`; held-out images are assigned too, but not fitted to.

    The same input gives the same bytes on one kind of processor, with any number of threads. Clusters are numbered in
    the order of their first training images. A zero vector (of a blank image) stays zero: all of them are in one
    cluster.

    Args:
        encoded: shards with features.
        out: the clusters/ directory.
        k: number of clusters.
        method: "balanced": no cluster above 1.25 times the mean (or an even share, rounded up), and none far below 0.75
            times. "free": plain k-means. "random": meaningless parts of equal expected
            size, by a hash of (seed, key); the baseline.
        fine: number of fine centroids; None for 1024, or half the training images if they are few, but at least 16 k.
        seed: of sample and k-means.
        force: replace an earlier clustering.
        router_fraction: of all rows that is copied to router/; None to train the router on all of `encoded`.
        measured: normalise the latents by the statistics that `atoll encode` measured, instead of the codec's own.
        progress: called after each shard.
        trust: what the codec in the card of `encoded` may reach, to show images.

    Returns:
        Whether anything was written; False if this clustering exists already.

    Raises:
        AtollError: k < 1, k above the number of training images or of fine centroids, features that are not finite, an
            empty cluster, no balance possible, or `out` holds another clustering or other files; as `with_measured`.
    """
    # The request, and whether it is fulfilled already.
    if router_fraction is not None and not 0 < router_fraction <= 1:
        raise AtollError(f"the router's fraction is {router_fraction}; expected a number above 0, at most 1")
    shards, tell = open_encoded(encoded), progress or (lambda done, rows, note: None)
    shards = with_measured(shards) if measured else shards
    tell(0, len(shards), "drawing the sample")
    # The sample of the fine stage, and the number of training images that bounds k.
    surveyed = survey(shards, seed, ROWS_PER_CENTROID * (fine or max(16 * k, _FINE)))
    fine = _check(encoded, surveyed, k, fine)
    described = shards.card(EncodedCard)
    # Everything that distinguishes this clustering from another one of the same data.
    request = {
        "k": k,
        "method": method,
        "fine": fine if method != "random" else None,
        "seed": seed,
        "router_fraction": router_fraction,
        "feature": described.feature,
        "codec": described.codec,
    }
    if not force and _is_there(out, {"encoded": [shards.sha256], **request}):
        return False
    refuse_foreign(out, CLUSTERS_CARD)
    # Fit, assign and write.
    # The directory appears under its name only when it is complete.
    with whole_directory(out) as directory, Workers() as workers:
        if method == "random":
            assignment = Assignment(method, k, seed)
        else:
            assignment = two_stages(
                shards, surveyed, k=k, method=method, fine=fine, seed=seed, workers=workers, progress=tell
            )
        card = ClusteringCard(
            **request,
            assignment=assignment.sha256(described.feature),
            encoded=[shards.sha256],
        )
        with ClustersWriter(directory, shards, island_card(card, shards), seed, router_fraction) as output:
            for assigned in workers.map(lambda part: assignment(part, encoded), shards.parts()):
                # Shards arrive in order, so the output does not depend on the threads.
                output.add(assigned)
                tell(assigned.part.start + len(assigned.part), len(shards), "writing")
        finish(directory, card, assignment, output, workers=workers, tell=tell, trust=trust, cut=cut_of(shards))
    return True


def open_encoded(path: Path, clusters: Path | None = None) -> Shards:
    """Open shards with features.

    Args:
        path: of the shards.
        clusters: the directory of existing clusters, by whose statistics the latents are normalised; None for the
            latents as they were encoded.

    Raises:
        AtollError: they have no features, or are of another codec than the clusters.
    """
    shards = Shards(path)
    if "feature" not in shards.columns:
        raise AtollError(f"{path} has no column 'feature'; name the directory that `atoll encode` wrote")
    if clusters is None:
        return shards
    return with_codec(shards, load_card(clusters / CLUSTERS_CARD, ClustersCard).codec, clusters)


def statistics_line(encoded: Path, codec: Mapping[str, Any]) -> str:
    """Return a new line that says how the statistics of new images differ from the clusters'; "" if they are alike."""
    note = statistics_note(Shards(encoded), codec)
    return f"\n{note}" if note else ""


def island_card(card: ClusteringCard, shards: Shards) -> ClusterShardsCard:
    """The card of every directory of shards, without a cluster's number."""
    described = shards.card(EncodedCard)
    return ClusterShardsCard(
        clusters=card.k,
        assignment=card.assignment,
        latent_shape=shards.shape("latent"),
        codec=described.codec,
        condition=described.condition,
        source=described.source,
        **({"targets": described.targets} if described.targets else {}),
    )


def finish(
    directory: Path,
    clustering: ClusteringCard,
    assignment: Assignment,
    output: WrittenClusters,
    *,
    workers: Workers,
    tell: ClusterProgress,
    cut: CutRecord | None,
    trust: Trust,
) -> ClustersCard:
    """Write what needs all rows: centroids, the card with its counts and quality, the page. Returns the card."""
    # What makes the assignment a function: the centroids.
    assignment.save(directory)
    train = [count["train"] for count in output.counts]
    # Balance is judged by the training images, as in the fit.
    measured = {
        "counts": output.counts,
        "blank": output.blank,
        "largest_over_mean": round(max(train) * len(train) / sum(train), 4),
        "quality": describe(output.report_rows.sample.rows(), clustering.k),
        "cut": cut,
    }
    card = ClustersCard(**clustering.plain(), **measured)
    # The page last: it decodes images.
    rows = sum(map(sum, (count.values() for count in output.counts)))
    page = to_html(card, output.report_rows, workers, lambda note: tell(rows, rows, note), trust)
    write_bytes(directory / REPORT, page.encode())
    write_card(directory / CLUSTERS_CARD, card)
    if warning := imbalance(card):
        warnings.warn(warning, stacklevel=3)
    return card


def cut_of(shards: Shards) -> CutRecord | None:
    """The captions of encoded data that are longer than their text encoder reads; None if there are none."""
    counts = shards.card(EncodedCard).counts
    return counts.cut if counts is not None else None


def say_counts(card: ClustersCard | DrawnClustersCard) -> str:
    """Return for example "4 clusters of 570, 571, 560, 587 images"."""
    counts = ", ".join(f"{count.train + count.val:,}" for count in card.counts)
    return f"{card.k} clusters of {counts} images"


def _check(encoded: Path, surveyed: Survey, k: int, fine: int | None) -> int:
    """The number of fine centroids. Raises AtollError if k or fine is impossible."""
    if not 1 <= k <= surveyed.train:
        raise AtollError(
            f"k is {k}, and {encoded} holds {surveyed.train} training images; choose k from 1 to {surveyed.train}"
        )
    # _FINE, or half the training images if they are few, but at least 16 per cluster.
    if fine is None:
        fine = min(surveyed.train, max(16 * k, min(_FINE, surveyed.train // 2)))
    if not k <= fine <= surveyed.train:
        raise AtollError(
            f"{fine} fine centroids; expected at least k = {k} and at most the {surveyed.train} training images"
        )
    return fine


def _is_there(out: Path, requested: dict[str, object]) -> bool:
    """Whether `out` is the requested clustering, possibly with data added. Raises AtollError if it is another."""
    if not (out / CLUSTERS_CARD).is_file():
        return False
    card = load_card(out / CLUSTERS_CARD, ClustersCard)
    # Data added later do not make it another clustering.
    existing = {**card.plain(), "encoded": [card.encoded[0]]}
    # Neither does growth: k may be the founding one or the current one, and fine centroids have been added.
    if card.lineage and requested["k"] in (card.k, len(card.lineage[0].clusters)):
        existing |= {"k": requested["k"], "fine": requested["fine"]}
    # Name the first setting that differs.
    for key, value in requested.items():
        if constants := other_statistics(existing.get(key), value):
            raise AtollError(
                f"{out}: was made with latents of other statistics, {key} {constants[0]}, requested is {constants[1]} "
                "(codec.statistics in atoll.yaml); replace it with --force, and train all experts again"
            )
        if existing.get(key) != value:
            raise AtollError(
                f"{out}: was made with {key} {existing.get(key)}, requested is {value}; "
                "replace it with --force, or name another run"
            )
    return True
