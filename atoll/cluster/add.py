"""New data for clusters that are there: `atoll cluster --assign-only`."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch

from atoll.cluster.assign import load_assignment
from atoll.cluster.balance import most_images
from atoll.cluster.dedupe import already_there
from atoll.cluster.fit import ClusterProgress
from atoll.cluster.nearest import Workers
from atoll.cluster.report import FAIR
from atoll.cluster.run import finish, open_encoded, say_counts
from atoll.cluster.write import ClustersWriter
from atoll.encoders.weights import identity
from atoll.errors import AtollError
from atoll.storage.artifact import load_card, whole_directory
from atoll.storage.cards import ClusteringCard, ClustersCard, ClusterShardsCard, EncodedCard
from atoll.storage.layout import CLUSTERS_CARD, cluster_path
from atoll.storage.shards import Shards


def assign_only(out: Path, encoded: Path, progress: ClusterProgress | None = None) -> str:
    """Puts the images of `encoded` into the clusters that are at `out`, and says in a line what was done.

    The assignment stays what it is, so that experts and router trained on it remain of one kind with those to come.
    Images that are there already are passed over. `out` changes as a whole or not at all; its old shards are linked.
    If the clusters have a router/, the new images enter it at its fraction; else the router learns from the first
    encoded/ alone.

    Raises:
        AtollError: `encoded` comes from another feature network or codec, has latents of another shape or other
            columns; an image is there already with another content; no clusters at `out`, or damaged ones.
    """
    card = load_card(out / CLUSTERS_CARD, ClustersCard)
    assignment, shards = load_assignment(out, card), open_encoded(encoded)
    tell = progress or (lambda done, rows, note: None)
    first = Shards(cluster_path(out, 0))
    _refuse_other(shards, out, card, first)
    if shards.sha256 in card.encoded:
        return f"{out}: all images of {encoded} are there already: {say_counts(card)}"
    tell(0, len(shards), "looking for what is there")
    there = torch.from_numpy(already_there(shards, out, card.k))
    skipped = f", {int(there.sum()):,} were there already" if there.any() else ""
    if there.all():
        return f"{out}: no image added{skipped}: {say_counts(card)}"
    values = {key: value for key, value in card.plain().items() if key in ClusteringCard.model_fields}
    clustering = ClusteringCard(**{**values, "encoded": (*card.encoded, shards.sha256)})
    island = first.card(ClusterShardsCard)
    with whole_directory(out) as directory, Workers() as workers:
        with ClustersWriter(directory, shards, island, card.seed, card.router_fraction) as output:
            output.adopt(out, card)
            for assigned in workers.map(lambda part: assignment(part, encoded), shards.parts()):
                start, end = assigned.part.start, assigned.part.start + len(assigned.part)
                output.add(assigned, (~there[start:end]).nonzero().flatten())
                tell(end, len(shards), "adding")
        card = finish(directory, clustering, assignment, output, workers, tell)
    total = sum(count.train for count in card.counts)
    most = most_images(total, card.k) * card.k / total
    if card.method == "balanced" and most < card.largest_over_mean <= FAIR:  # above, it was said already
        warnings.warn(
            f"{out}: no longer balanced: its largest cluster holds {card.largest_over_mean:.2f} times the mean; "
            "`atoll cluster --force` makes new clusters (for which all experts are to be trained anew)",
            stacklevel=2,
        )
    return f"{out}: {int((~there).sum()):,} images added{skipped}: {say_counts(card)}"


def _refuse_other(shards: Shards, out: Path, card: ClustersCard, first: Shards) -> None:
    """Raises AtollError unless the new shards are of the clusters' kind."""
    columns = tuple(name for name in shards.columns if name != "feature")
    described = shards.card(EncodedCard)
    pairs: dict[str, tuple[Any, Any]] = {
        "feature": (identity(described.feature), identity(card.feature)),
        "codec": (identity(described.codec), identity(card.codec)),
        "latent shape": (list(shards.shape("latent")), list(first.shape("latent"))),
        "columns": (list(columns), list(first.columns)),
    }
    for what, (new, old) in pairs.items():
        if new != old:
            raise AtollError(
                f"{shards.path}: its {what} is {json.dumps(new)}, that of {out} is {json.dumps(old)}; encode the new "
                "images as the old ones were"
            )
