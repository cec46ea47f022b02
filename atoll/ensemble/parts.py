"""Whether the parts of an ensemble fit each other: their cards may come from different places."""

from pathlib import Path

from atoll.errors import AtollError
from atoll.storage.artifact import sha256_file
from atoll.storage.cards import EnsembleCard, ExpertCard, RouterCard


def require_part(ensemble: EnsembleCard, part: ExpertCard | RouterCard, where: Path) -> tuple[int, ...]:
    """Check that a part has the ensemble's latents and clusters, or those that the ensemble's clusters grew from.

    Args:
        ensemble: its card.
        part: the card of one of its parts.
        where: the part's file, for the message.

    Returns:
        The clusters of an expert in the ensemble's numbering; none for a router.

    Raises:
        AtollError: the part does not fit.
    """
    is_expert, lineage = isinstance(part, ExpertCard), ensemble.descent
    # An expert may be older than the clusters' last growth; a router covers all of them.
    related = is_expert and bool(lineage.ancestors) and lineage.knows(part.assignment)
    clusters = lineage.clusters_of(part.assignment) if related else ensemble.clusters
    # Numbers of an assignment outside the lineage mean nothing here.
    if lineage.ancestors and not lineage.knows(part.assignment):
        raise AtollError(
            f"{where}: its assignment is {part.assignment}, the ensemble's is {lineage.assignment}, which did not grow "
            "from it; run `atoll assemble` again"
        )
    # Otherwise noise of the ensemble's shape would be drawn for networks of another.
    for name, own, wanted in (
        ("latent_shape", list(part.latent_shape), list(ensemble.latent_shape)),
        ("number of clusters", part.k if isinstance(part, ExpertCard) else part.clusters, clusters),
    ):
        if own != wanted:
            raise AtollError(f"{where}: its {name} is {own}, the ensemble's is {wanted}; run `atoll assemble` again")
    if not isinstance(part, ExpertCard):
        return ()
    return lineage.now(part.assignment, part.clusters) if related else part.clusters


def require_hash(card: Path, expected: str) -> None:
    """Raise AtollError unless a part is the one that was assembled."""
    # A missing part and a changed one have different remedies.
    if not card.is_file():
        raise AtollError(f"{card}: not found; fetch the part again")
    if sha256_file(card) != expected:
        raise AtollError(
            f"{card}: is not the one that was assembled (its sha256 differs); restore it, or run `atoll assemble` again"
        )
