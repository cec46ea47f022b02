"""Card and weights against the collective's run. Nothing is computed, and every later check relies on it."""

from collections.abc import Mapping
from pathlib import Path

import torch

from atoll.collective.gate.check import Check
from atoll.encoders.codec.statistics import refuse_other_statistics
from atoll.encoders.weights import same
from atoll.ensemble.loading import LoadedExpert, load_expert
from atoll.errors import AtollError
from atoll.storage.artifact import read_card, read_tensors
from atoll.storage.cards import ClusterShardsCard, ExpertCard, Lineage

_COMPARED = ("latent_shape", "codec", "condition")


def check_contents(
    path: Path,
    data: ClusterShardsCard,
    lineage: Lineage,
    *,
    name: str,
    clusters: tuple[int, ...],
    now: tuple[int, ...],
    known: Mapping[str, str],
    device: torch.device | str = "cpu",
) -> tuple[Check, LoadedExpert | None]:
    """Refuse an expert that is not what the collective trains, or whose parts do not fit each other.

    Args:
        path: its directory. Sizes and hashes of its files are compared with the signed ones when they are downloaded.
        data: the card of the collective's shards of one of these clusters.
        lineage: the collective's assignment, with the older ones that it grew from.
        name: its name in the submission.
        clusters: its clusters in the submission, by the assignment that it was trained on.
        now: what these clusters are now.
        known: names of experts that were admitted, with their state, by the hash of their weights.
        device: where it is loaded.

    Returns:
        The check, and the expert if it passed.
    """
    try:
        card = read_card(path, ExpertCard)
        _refuse_other_subject(card, lineage, name, clusters, now)
        _compare(card, data, known)
        _require_finite(path, card)
        loaded = load_expert(path, device)
    # The messages are about the stranger's files and end with a remedy for their owner.
    except AtollError as error:
        # A path of this machine is nobody else's business: the report is public.
        reason = str(error).replace(f"{path}/", "").replace(str(path), "the expert")
        return Check("contents", 1.0, 0.0, False, reason[:900]), None
    return Check("contents", 0.0, 0.0, True, "its card, weights and network fit each other and the run"), loaded


def _refuse_other_subject(
    card: ExpertCard, lineage: Lineage, name: str, clusters: tuple[int, ...], now: tuple[int, ...]
) -> None:
    """Raise AtollError unless the card is the submission's, and of clusters that are the collective's or became so."""
    if (card.name, tuple(card.clusters)) != (name, clusters):
        raise AtollError(
            f"card.json is of {card.name!r}, clusters {list(card.clusters)}; the submission names {name!r}, "
            f"{list(clusters)}"
        )
    known = lineage.knows(card.assignment)
    if card.k != (expected := lineage.clusters_of(card.assignment) if known else lineage.k):
        raise AtollError(f"is of {card.k} clusters, the collective has {expected}")
    if not known:
        raise AtollError(f"its assignment is {card.assignment!s:.200}, the collective's is {lineage.assignment!s:.200}")
    if (became := lineage.now(card.assignment, clusters)) != now:
        raise AtollError(f"its clusters {list(clusters)} are {list(became)} now, expected {list(now)}")


def _compare(card: ExpertCard, data: ClusterShardsCard, known: Mapping[str, str]) -> None:
    """Raise AtollError unless the card is of the collective's run."""
    expected, actual = data.plain(), card.plain()
    for key in _COMPARED:
        refuse_other_statistics("the expert", actual.get(key), "the collective", expected[key])
        if not same(actual.get(key), expected[key]):
            raise AtollError(f"its {key} is {actual.get(key)!s:.200}, the collective's is {expected[key]!s:.200}")
    # Without a calibration an eps-expert is clamped by hand-set constants, and its error is unknown.
    if card.calibration is None:
        raise AtollError("has no calibration; `atoll calibrate` measures one")
    # The checks evaluate an expert at all levels.
    if card.objective.get("levels") is not None:
        raise AtollError(f"is of the levels {card.objective['levels']!s:.40} only; train it without levels")
    if card.weights_sha256 in known:
        raise AtollError(f"has the weights of {known[card.weights_sha256]}")


def _require_finite(path: Path, card: ExpertCard) -> None:
    """Raise AtollError if a weight is infinite, undefined or complex."""
    for tensor, values in read_tensors(path, card).items():
        if values.is_complex():
            raise AtollError(f"the weights {tensor:.80} are complex; expected real numbers")
        # torch cannot test numbers of 8 bits.
        numbers = values.float() if values.itemsize == 1 else values
        if values.is_floating_point() and not bool(numbers.isfinite().all()):
            raise AtollError(f"the weights {tensor:.80} are not finite")
