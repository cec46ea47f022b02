"""Assigns secret images to clusters that exist, into a directory of their own: the probe of a collective's admitter."""

from pathlib import Path

import torch

from atoll.cluster.assign import load_assignment
from atoll.cluster.dedupe import already_there
from atoll.cluster.nearest import Workers
from atoll.cluster.run import island_card, open_encoded
from atoll.cluster.write import latent_shapes
from atoll.encoders.weights import same
from atoll.errors import AtollError
from atoll.storage.artifact import load_card, whole_directory
from atoll.storage.cards import ClusteringCard, ClustersCard, ClusterShardsCard, EncodedCard
from atoll.storage.layout import ASSIGNMENT, CLUSTERS_CARD, cluster_path
from atoll.storage.shards import LATENTS, Shards, ShardWriter


def write_probe(clusters: Path, encoded: Path, out: Path) -> list[int]:
    """Assign the images of `encoded` to the clusters at `clusters`, which do not change.

    Args:
        clusters: clusters.json and the centroids suffice. Images that its assignment.parquet lists are left out.
        encoded: output of `atoll encode` with the same codec and feature; all its rows, of whatever split, are used.
        out: the new directory, laid out as clusters/ is. Clusters without an image have no directory.

    Returns:
        The number of images of each cluster.

    Raises:
        AtollError: `encoded` has another codec or feature, all images are known, or `out` exists.
    """
    if out.exists():
        raise AtollError(f"{out}: exists; write the probe to a new directory")
    card = load_card(clusters / CLUSTERS_CARD, ClustersCard)
    assignment, shards = load_assignment(clusters, card), open_encoded(encoded, clusters)
    described = shards.card(EncodedCard)
    if not same(described.feature, card.feature):
        raise AtollError(
            f"{encoded}: its feature is {described.feature}, the clusters' {card.feature}; encode with the run's "
            "atoll.yaml"
        )
    # What the clusters hold is no secret. A contributor has no list of it, and no shards but its own.
    known = torch.zeros(len(shards), dtype=torch.bool)
    if (clusters / ASSIGNMENT).is_file() and all(cluster_path(clusters, k).is_dir() for k in range(card.k)):
        known = torch.from_numpy(already_there(shards, clusters, card.k))
    if known.all():
        raise AtollError(f"{encoded}: all {len(shards):,} images are in {clusters} already; a probe needs others")
    # The clusters of the others.
    values = {key: value for key, value in card.plain().items() if key in ClusteringCard.model_fields}
    island, counts = island_card(ClusteringCard(**values), shards), [0] * card.k
    numbers: list[list[int]] = [[] for _ in counts]
    with Workers() as workers:
        for assigned in workers.map(lambda part: assignment(part, encoded), shards.parts()):
            for row, number in enumerate(assigned.clusters.tolist(), assigned.part.start):
                if not known[row]:
                    numbers[number].append(row)
    columns = [name for name in shards.columns if name != "feature"]
    with whole_directory(out) as directory:
        for number, rows in enumerate(numbers):
            counts[number] = len(rows)
            if rows:
                own = island.model_copy(update={"cluster": number})
                _write(shards, rows, columns, cluster_path(directory, number), own)
    return counts


def _write(shards: Shards, rows: list[int], columns: list[str], out: Path, card: ClusterShardsCard) -> None:
    """Write some rows of shards, all as val: no training reads them, should they ever get there."""
    with ShardWriter(out, card, shapes=latent_shapes(shards)) as writer:
        for group in torch.tensor(rows).split(4096):
            for part in shards.alike(LATENTS[0], group):
                keys = [shards.keys[row] for row in part.tolist()]
                captions = shards.captions_of(part)
                writer.append(keys, captions, ["val"] * len(part), {name: shards.read(name, part) for name in columns})
