"""What the parts of an ensemble share: whether they fit each other, their text encoders, the stackings of replicas."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from atoll.encoders.codec.statistics import refuse_other_statistics
from atoll.encoders.trust import Trust
from atoll.encoders.weights import identity, same
from atoll.ensemble.replicas import Stacking
from atoll.errors import AtollError
from atoll.storage.artifact import sha256_file
from atoll.storage.cards import EnsembleCard, ExpertCard, RouterCard
from atoll.storage.containment import require_inside
from atoll.storage.layout import CARD, ENSEMBLE_CARD, WEIGHTS


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
    # Otherwise latents of two scales would be mixed.
    refuse_other_statistics(where, part.codec, "the ensemble", ensemble.codec)
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


def require_contained(part: Path, root: Path, named_by: Path, trust: Trust) -> None:
    """Raise AtollError if an artifact, or one of its two files, leads out of `root` and the user does not allow it."""
    for path in (part, part / CARD, part / WEIGHTS):
        require_inside(path, root, named_by, trust.paths, links=trust.run is not None)


def encoder_kinds(configs: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[int]]:
    """Return the text encoders' configs without repetition, and for each given config its index among them."""
    # Configs that differ only in the place of their weights are the same encoder.
    kinds = list({json.dumps(identity(config), sort_keys=True): config for config in configs}.values())
    return kinds, [next(i for i, kind in enumerate(kinds) if same(kind, config)) for config in configs]


def encoder_index(router: RouterCard | None, kinds: list[dict[str, Any]]) -> int:
    """Return the index of the text encoder that the router was trained with; 0 if it is not there."""
    return next((i for i, kind in enumerate(kinds) if router is not None and same(kind, router.condition)), 0)


@contextmanager
def sound(card: Path) -> Iterator[None]:
    """Turn any error that a card's content causes into one line: cards come from strangers."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, SafetensorError) as error:
        raise AtollError(f"{card}: cannot be read ({type(error).__name__}: {error}); get a fresh copy of it") from None


def checked_mean(mean: Tensor, latent_shape: tuple[int, ...]) -> Tensor:
    """Return a mean latent. Raises ValueError if its shape is not (C, H, W)."""
    # A broadcast of another shape would pass unnoticed.
    if tuple(mean.shape) != latent_shape:
        raise ValueError(f"a mean latent of shape {list(mean.shape)}, expected {list(latent_shape)}")
    return mean


def read_stackings(path: Path, card: EnsembleCard, device: str | torch.device, trust: Trust) -> list[Stacking]:
    """Load the stackings of the ensemble at `path`."""
    if card.stackings is None:
        return []
    from safetensors.torch import load

    # Weights are in the card, mean latents in a file beside it.
    file = path / card.stackings.file
    require_inside(file, path, path / ENSEMBLE_CARD, trust.paths)
    require_hash(file, card.stackings.sha256)
    with sound(file):
        means = load(file.read_bytes())
        return [
            Stacking.load(stacking.model_dump(), checked_mean(means[f"mean.{number}"], card.latent_shape).to(device))
            for number, stacking in enumerate(card.stackings.weights)
        ]
