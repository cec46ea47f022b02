"""Whether the parts of an ensemble fit each other: their cards may come from different places."""

from pathlib import Path

from atoll.errors import AtollError
from atoll.storage.artifact import sha256_file
from atoll.storage.cards import EnsembleCard, ExpertCard, RouterCard


def require_part(ensemble: EnsembleCard, part: ExpertCard | RouterCard, where: Path) -> None:
    """Raise AtollError unless a part has the ensemble's latents and clusters.

    Args:
        ensemble: its card.
        part: the card of one of its parts.
        where: the part's file, for the message.
    """
    clusters = part.k if isinstance(part, ExpertCard) else part.clusters
    # Otherwise noise of the ensemble's shape would be drawn for networks of another.
    for name, own, wanted in (
        ("latent_shape", list(part.latent_shape), list(ensemble.latent_shape)),
        ("number of clusters", clusters, ensemble.clusters),
    ):
        if own != wanted:
            raise AtollError(f"{where}: its {name} is {own}, the ensemble's is {wanted}; run `atoll assemble` again")


def require_hash(card: Path, expected: str) -> None:
    """Raise AtollError unless a part is the one that was assembled."""
    # A missing part and a changed one have different remedies.
    if not card.is_file():
        raise AtollError(f"{card}: not found; fetch the part again")
    if sha256_file(card) != expected:
        raise AtollError(
            f"{card}: is not the one that was assembled (its sha256 differs); restore it, or run `atoll assemble` again"
        )
