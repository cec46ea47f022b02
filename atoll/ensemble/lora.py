"""Low-rank updates of experts, read and added to their base's weights (`atoll.nn.lora` has the mathematics)."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from atoll.encoders.trust import Trust
from atoll.ensemble.parts import require_contained, require_hash
from atoll.errors import AtollError
from atoll.nn.lora import A, B, merge_lora
from atoll.storage.artifact import CARD, WEIGHTS, read_card, read_tensors
from atoll.storage.cards import CalibrationRecord, ExpertCard, LoraCard, LoraEntry
from atoll.storage.layout import ENSEMBLE_CARD

_NETWORK = "network."  # of the names of an artifact's tensors; others are the calibration's


@dataclass(frozen=True)
class LoraChoice:
    """An update to add to an expert when it is loaded: its directory, and what it is multiplied by."""

    path: Path
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class LoraUpdate:
    """A low-rank update that fits its base.

    Attributes:
        path: its directory.
        card: its card.
        tensors: of its file.
    """

    path: Path
    card: LoraCard
    tensors: Mapping[str, Tensor]

    def calibration_at(self, scale: float, base: ExpertCard) -> CalibrationRecord | None:
        """Return the calibration of the base with this update: measured at scale 1, the base's own at 0, else none."""
        return {1.0: self.card.calibration, 0.0: base.calibration}.get(scale)


def read_lora(path: Path, base: ExpertCard, where: Path) -> LoraUpdate:
    """Read a low-rank update of an expert.

    Args:
        path: the update's directory.
        base: the card of the expert.
        where: the expert's directory, for messages.

    Raises:
        AtollError: the update belongs to another expert, or is damaged.
    """
    card = read_card(path, LoraCard)
    if card.base.sha256 != base.weights_sha256:
        raise AtollError(
            f"{path}: is an update of {card.base.name} with sha256 {card.base.sha256[:12]}..., {where} has "
            f"{base.weights_sha256[:12]}...; take its base, or train an update of this expert"
        )
    return LoraUpdate(path, card, read_tensors(path, card))


def chosen_lora(path: Path, entry: LoraEntry, root: Path, trust: Trust) -> LoraChoice:
    """The low-rank update that an expert's entry in the ensemble at `path` names, with the hash of its card checked."""
    part = path / entry.url
    require_contained(part, root, path / ENSEMBLE_CARD, trust)
    require_hash(part / CARD, entry.sha256)
    return LoraChoice(part, entry.scale)


def merged_tensors(tensors: Mapping[str, Tensor], update: LoraUpdate, scale: float) -> dict[str, Tensor]:
    """Return the tensors of an expert's artifact with an update added to the network's weights.

    The calibration's tensors are those that belong to this scale, see `LoraUpdate.calibration_at`.

    Raises:
        AtollError: the update does not fit.
    """
    network = {name.removeprefix(_NETWORK): value for name, value in tensors.items() if name.startswith(_NETWORK)}
    lora = {name.removeprefix(_NETWORK): value for name, value in update.tensors.items() if name.endswith((A, B))}
    merged = merge_lora(network, lora, update.card.lora, scale, str(update.path / WEIGHTS))
    source = {1.0: update.tensors, 0.0: tensors}.get(scale, {})
    rest = {name: value for name, value in source.items() if not name.startswith(_NETWORK)}
    return {**{f"{_NETWORK}{name}": value for name, value in merged.items()}, **rest}


def warn_if_uncalibrated(update: LoraUpdate, scale: float) -> None:
    """Warn that a scale between those that were measured has no calibration."""
    if scale not in (0.0, 1.0):
        warnings.warn(
            f"{update.path}: at scale {scale:g} it has no calibration, which was measured at 1; `atoll merge` and "
            "`atoll calibrate` measure one",
            stacklevel=3,
        )
