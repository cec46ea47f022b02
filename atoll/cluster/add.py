"""Adds new data to existing clusters: `atoll cluster --assign-only`."""

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
from atoll.cluster.run import cut_of, finish, open_encoded, say_counts, statistics_line
from atoll.cluster.write import ClustersWriter
from atoll.encoders.trust import STRANGER, Trust
from atoll.encoders.weights import identity
from atoll.errors import AtollError
from atoll.storage.artifact import load_card, whole_directory
from atoll.storage.cards import ClusteringCard, ClustersCard, ClusterShardsCard, CutRecord, EncodedCard, TargetsRecord
from atoll.storage.layout import CLUSTERS_CARD, cluster_path
from atoll.storage.shards import Shards


def assign_only(out: Path, encoded: Path, progress: ClusterProgress | None = None, trust: Trust = STRANGER) -> str:
    """Add the images of `encoded` to the clusters at `out`.

    The assignment does not change, so experts and router trained before and after fit together. Images that are there
    already are skipped. `out` is replaced atomically; its old shards are linked. If the clusters have a router/, the
    new images are sampled into it at the same fraction; otherwise the router learns from the first encoded/ alone.

    Args:
        out: a finished clusters/ directory.
        encoded: shards with features.
        progress: called after each shard.
        trust: what the codec in the card may reach, to show images.

    Returns:
        A line that says what was done.

    Raises:
        AtollError: `encoded` has another feature network, codec, latent shape or other columns; an image is there
            already with another content; no clusters at `out`, or damaged ones.
    """
    # The clusters, and the images that are new to them.
    card = load_card(out / CLUSTERS_CARD, ClustersCard)
    assignment, shards = load_assignment(out, card), open_encoded(encoded, out)
    tell = progress or (lambda done, rows, note: None)
    first = Shards(cluster_path(out, 0))
    refuse_other(shards, out, card, first)
    # Adding the same data twice changes nothing.
    if shards.sha256 in card.encoded:
        return f"{out}: all images of {encoded} are there already: {say_counts(card)}"
    tell(0, len(shards), "looking for known images")
    # Rows that the clusters hold already are skipped; without new rows there is nothing to write.
    known = torch.from_numpy(already_there(shards, out, card.k))
    skipped = f", {int(known.sum()):,} were there already" if known.any() else ""
    note = statistics_line(encoded, card.codec)
    if known.all():
        return f"{out}: no image added{skipped}: {say_counts(card)}"
    # The new card describes the same clustering, with one more data set.
    values = {key: value for key, value in card.plain().items() if key in ClusteringCard.model_fields}
    clustering = ClusteringCard(**{**values, "encoded": (*card.encoded, shards.sha256)})
    # Write the old and the new images.
    island = first.card(ClusterShardsCard).model_copy(update={"clusters": card.k})
    with whole_directory(out) as directory, Workers() as workers:
        with ClustersWriter(directory, shards, island, card.seed, card.router_fraction) as output:
            # The old shards come first, so the numbers of their rows do not change.
            output.adopt(out, card)
            for assigned in workers.map(lambda part: assignment(part, encoded), shards.parts()):
                start, end = assigned.part.start, assigned.part.start + len(assigned.part)
                # Positions of the new rows within their shard.
                output.add(assigned, (~known[start:end]).nonzero().flatten())
                tell(end, len(shards), "adding")
        cut = both_cuts(card.cut, cut_of(shards))
        card = finish(directory, clustering, assignment, output, workers=workers, tell=tell, trust=trust, cut=cut)
    # New data may unbalance the clusters: warn, since only a new clustering can change that.
    total = sum(count.train for count in card.counts)
    most = most_images(total, card.k) * card.k / total
    if card.method == "balanced" and most < card.largest_over_mean <= FAIR:  # above FAIR, `finish` has warned
        warnings.warn(
            f"{out}: no longer balanced: its largest cluster holds {card.largest_over_mean:.2f} times the mean; "
            "`atoll cluster --force` makes new clusters, for which all experts must be trained again",
            stacklevel=2,
        )
    return f"{out}: {int((~known).sum()):,} images added{skipped}: {say_counts(card)}{note}"


def both_cuts(old: CutRecord | None, new: CutRecord | None) -> CutRecord | None:
    """The cut captions of old and new data together."""
    if old is None or new is None:
        return old or new
    total = old.captions + new.captions
    return CutRecord(captions=total, fraction=(old.captions * old.fraction + new.captions * new.fraction) / total)


def refuse_other(shards: Shards, out: Path, card: ClustersCard, first: Shards) -> None:
    """Raise AtollError unless the new shards fit the clusters."""
    # The clusters store no features, so their columns are compared without them.
    columns = tuple(name for name in shards.columns if name != "feature")
    described = shards.card(EncodedCard)
    pairs: dict[str, tuple[Any, Any]] = {
        "feature": (identity(described.feature), identity(card.feature)),
        "latent shape": (list(shards.shape("latent")), list(first.shape("latent"))),
        "targets": (_plain(described.targets), _plain(first.card(ClusterShardsCard).targets)),
        "columns": (list(columns), list(first.columns)),
    }
    for what, (new, old) in pairs.items():
        # The first difference is enough: the images must be encoded again anyway.
        if new != old:
            raise AtollError(
                f"{shards.path}: its {what} is {json.dumps(new)}, that of {out} is {json.dumps(old)}; encode the new "
                f"images like the old ones{' (targets.like in atoll.yaml)' if what == 'targets' else ''}"
            )


def _plain(record: TargetsRecord | None) -> dict[str, Any] | None:
    return None if record is None else record.plain()
