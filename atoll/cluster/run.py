"""The stage: `atoll cluster`."""

import warnings
from pathlib import Path

from atoll.cluster.assign import Assignment, ClusterMethod
from atoll.cluster.describe import describe
from atoll.cluster.fit import ROWS_PER_CENTROID, ClusterProgress, Survey, survey, two_stages
from atoll.cluster.nearest import Workers
from atoll.cluster.report import imbalance, to_html
from atoll.cluster.write import ClustersWriter
from atoll.errors import AtollError
from atoll.manifest import Manifest
from atoll.storage.artifact import load_card, load_clusters, whole_directory, write_bytes, write_card
from atoll.storage.cards import ClusteringCard, ClustersCard, ClusterShardsCard, DrawnClustersCard, EncodedCard
from atoll.storage.layout import CLUSTERS_CARD, REPORT, RunLayout
from atoll.storage.shards import Shards, refuse_foreign

_FINE = 1024  # centroids, where the data bears them


def cluster_run(
    run: Path,
    manifest: Manifest,
    force: bool = False,
    router_fraction: float | None = None,
    progress: ClusterProgress | None = None,
) -> str:
    """Clusters `run`/encoded into `run`/clusters as the manifest asks, and says in a line what was done.

    router_fraction: instead of the manifest's.

    Raises:
        AtollError: as `cluster`.
    """
    asked, layout = manifest.clusters, RunLayout(run)
    out = layout.clusters
    fraction = asked.router_fraction if router_fraction is None else router_fraction
    written = cluster(layout.encoded, out, asked.k, asked.method, asked.fine, manifest.seed, force, fraction, progress)
    return f"{out} {'written' if written else 'is there already'}: {say_counts(load_clusters(out / CLUSTERS_CARD))}"


def cluster(
    encoded: Path,
    out: Path,
    k: int,
    method: ClusterMethod = "balanced",
    fine: int | None = None,
    seed: int = 0,
    force: bool = False,
    router_fraction: float | None = None,
    progress: ClusterProgress | None = None,
) -> bool:
    """Clusters the features of `encoded` and writes `out`; held-out images are assigned too, but have no say.

    The same input gives the same bytes on one kind of processor, with any number of threads. Clusters are numbered by
    the first training image of each. A zero vector (a blank image's) is left as it is: all of them go to one cluster.

    Args:
        method: "balanced": no cluster above 1.25 times the mean (or an even share, rounded up), and none far below 0.75
            times. "free": plain k-means.
            "random": parts that mean nothing, equal in expectation, by a hash of (seed, key); the baseline.
        fine: fine centroids; None for 1024, or half the training images if they are few, but at least 16 k.
        force: replace an earlier clustering.
        router_fraction: the share of all rows in router/; None: the router learns from all of `encoded`.

    Returns:
        Whether something was written; not if this very clustering is there.

    Raises:
        AtollError: k < 1, k above the number of training images or of fine centroids, features that are not finite, an
            empty cluster, no balance possible, or `out` holds another clustering or anything else.
    """
    if router_fraction is not None and not 0 < router_fraction <= 1:
        raise AtollError(f"the router's fraction is {router_fraction}; expected more than 0 and at most 1")
    shards, tell = open_encoded(encoded), progress or (lambda done, rows, note: None)
    tell(0, len(shards), "drawing the sample")
    found = survey(shards, seed, ROWS_PER_CENTROID * (fine or max(16 * k, _FINE)))
    fine = _check(encoded, found, k, fine)
    described = shards.card(EncodedCard)
    asked = {
        "k": k,
        "method": method,
        "fine": fine if method != "random" else None,
        "seed": seed,
        "router_fraction": router_fraction,
        "feature": described.feature,
    }
    if not force and _is_there(out, {"encoded": [shards.sha256], **asked}):
        return False
    refuse_foreign(out, CLUSTERS_CARD)
    with whole_directory(out) as directory, Workers() as workers:
        if method == "random":
            assignment = Assignment(method, k, seed)
        else:
            assignment = two_stages(
                shards, found, k=k, method=method, fine=fine, seed=seed, workers=workers, progress=tell
            )
        card = ClusteringCard(
            **asked,
            codec=described.codec,
            assignment=assignment.sha256(described.feature),
            encoded=[shards.sha256],
        )
        with ClustersWriter(directory, shards, island_card(card, shards), seed, router_fraction) as output:
            for assigned in workers.map(lambda part: assignment(part, encoded), shards.parts()):
                output.add(assigned)
                tell(assigned.part.start + len(assigned.part), len(shards), "writing")
        finish(directory, card, assignment, output, workers, tell)
    return True


def open_encoded(path: Path) -> Shards:
    """Shards with features. Raises AtollError for others."""
    shards = Shards(path)
    if "feature" not in shards.columns:
        raise AtollError(f"{path} has no column 'feature'; name the directory that `atoll encode` wrote")
    return shards


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
    )


def finish(
    directory: Path,
    clustering: ClusteringCard,
    assignment: Assignment,
    output: ClustersWriter,
    workers: Workers,
    tell: ClusterProgress,
) -> ClustersCard:
    """Write what needs all rows: centroids, the card with its counts and quality, the page. Returns the card."""
    assignment.save(directory)
    train = [count["train"] for count in output.counts]
    measured = {
        "counts": output.counts,
        "blank": output.blank,
        "largest_over_mean": round(max(train) * len(train) / sum(train), 4),
        "quality": describe(output.kept.sample.rows(), clustering.k),
    }
    card = ClustersCard(**clustering.plain(), **measured)
    rows = sum(map(sum, (count.values() for count in output.counts)))
    write_bytes(directory / REPORT, to_html(card, output.kept, workers, lambda note: tell(rows, rows, note)).encode())
    write_card(directory / CLUSTERS_CARD, card)
    if warning := imbalance(card):
        warnings.warn(warning, stacklevel=3)
    return card


def say_counts(card: ClustersCard | DrawnClustersCard) -> str:
    """4 clusters of 570, 571, 560, 587 images"""
    counts = ", ".join(f"{count.train + count.val:,}" for count in card.counts)
    return f"{card.k} clusters of {counts} images"


def _check(encoded: Path, found: Survey, k: int, fine: int | None) -> int:
    """The number of fine centroids. Raises AtollError for impossible numbers."""
    if not 1 <= k <= found.train:
        raise AtollError(
            f"k is {k}, and {encoded} holds {found.train} training images; choose k from 1 to {found.train}"
        )
    if fine is None:
        fine = min(found.train, max(16 * k, min(_FINE, found.train // 2)))
    if not k <= fine <= found.train:
        raise AtollError(
            f"{fine} fine centroids; expected at least k = {k} and at most the {found.train} training images"
        )
    return fine


def _is_there(out: Path, wanted: dict[str, object]) -> bool:
    """Whether `out` is this very clustering (data may have been added to it). Raises AtollError if it is another."""
    if not (out / CLUSTERS_CARD).is_file():
        return False
    card = load_card(out / CLUSTERS_CARD, ClustersCard)
    there = {**card.plain(), "encoded": [card.encoded[0]]}
    for key, value in wanted.items():
        if there.get(key) != value:
            raise AtollError(
                f"{out}: was made with {key} {there.get(key)}, asked for is {value}; "
                "replace it with --force, or name another run"
            )
    return True
