"""The clusters of another run, for images of another size: `atoll cluster --like RUN`.

A stage at a higher resolution continues experts of a first run, so each must find the images of its cluster again.
"""

import json
from pathlib import Path

from atoll.cluster.assign import load_assignment
from atoll.cluster.fit import ClusterProgress
from atoll.cluster.nearest import Workers
from atoll.cluster.run import cut_of, finish, island_card, open_encoded, say_counts, statistics_line
from atoll.cluster.write import ClustersWriter
from atoll.encoders.weights import identity
from atoll.errors import AtollError
from atoll.manifest import Manifest
from atoll.storage.artifact import load_card, whole_directory
from atoll.storage.cards import ClusteringCard, ClustersCard, EncodedCard
from atoll.storage.layout import CLUSTERS_CARD, RunLayout
from atoll.storage.shards import refuse_foreign


def cluster_like(
    run: Path, manifest: Manifest, other: Path, *, force: bool = False, progress: ClusterProgress | None = None
) -> str:
    """Assign the images of `run`/encoded to the clusters of another run, and write `run`/clusters.

    Latents are normalised by the other run's statistics. Experts and router of both runs have one assignment.

    Args:
        run: the run's directory.
        manifest: its atoll.yaml.
        other: the other run's directory.
        force: replace an earlier clustering.
        progress: called after each shard.

    Returns:
        A line that says what was done.

    Raises:
        AtollError: no clusters in the other run, or damaged ones; another k, feature network or codec; `run`/clusters
            holds another clustering.
    """
    layout, theirs = RunLayout(run), RunLayout(other).clusters
    out, encoded, tell = layout.clusters, layout.encoded, progress or (lambda done, rows, note: None)
    card = load_card(theirs / CLUSTERS_CARD, ClustersCard)
    assignment, shards = load_assignment(theirs, card), open_encoded(encoded, theirs)
    described = shards.card(EncodedCard)
    # The first difference is enough.
    pairs = {"k": (manifest.clusters.k, card.k), "feature": (identity(described.feature), identity(card.feature))}
    for what, (mine, their) in pairs.items():
        if mine != their:
            raise AtollError(
                f"{run}: its {what} is {json.dumps(mine)}, that of {theirs} is {json.dumps(their)}; make atoll.yaml's "
                "equal"
            )
    values = {key: value for key, value in card.plain().items() if key in ClusteringCard.model_fields}
    clustering = ClusteringCard(**{**values, "encoded": (shards.sha256,)})
    if not force and (out / CLUSTERS_CARD).is_file():
        existing = load_card(out / CLUSTERS_CARD, ClustersCard)
        if (existing.assignment, existing.encoded) == (clustering.assignment, clustering.encoded):
            return f"{out} is there already: {say_counts(existing)}"
        raise AtollError(f"{out}: holds another clustering; replace it with --force")
    refuse_foreign(out, CLUSTERS_CARD)
    # The directory appears under its name only when it is complete.
    with whole_directory(out) as directory, Workers() as workers:
        island = island_card(clustering, shards)
        with ClustersWriter(directory, shards, island, card.seed, card.router_fraction) as output:
            for assigned in workers.map(lambda part: assignment(part, encoded), shards.parts()):
                output.add(assigned)
                tell(assigned.part.start + len(assigned.part), len(shards), "writing")
        trust, cut = manifest.trust_in_cards(run), cut_of(shards)
        written = finish(directory, clustering, assignment, output, workers=workers, tell=tell, trust=trust, cut=cut)
    return f"{out} written: {say_counts(written)}, as those of {theirs}{statistics_line(encoded, card.codec)}"
