"""Low-rank updates of experts, read and added to their base's weights (`atoll.nn.lora` has the mathematics)."""

import warnings
from collections.abc import Mapping, Sequence
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


def parse_lora(text: str, run: Path) -> LoraChoice:
    """Read an update's directory, and its scale if there is one: "loras/3-moss=0.8".

    Args:
        text: the directory, from here or from the run's directory.
        run: the run's directory.

    Raises:
        AtollError: no such directory, or a scale that is no number.
    """
    # A path may contain the character as well.
    whole = Path(text).is_dir() or (run / text).is_dir() or "=" not in text
    name, _, number = (text, "", "1") if whole else text.rpartition("=")
    path = Path(name) if Path(name).is_dir() else run / name
    try:
        scale = float(number)
    except ValueError:
        raise AtollError(f"--lora {text}: {number!r} is no number; expected such as {name}=0.8") from None
    if not (path / CARD).is_file():
        raise AtollError(f"--lora {text}: no such update; `atoll train expert 3 --lora 16` writes one to loras/")
    return LoraChoice(path, scale)


def choose_loras(experts: Sequence[Path], chosen: Sequence[LoraChoice]) -> dict[Path, LoraChoice]:
    """Find the expert that each low-rank update belongs to, by the hash of its weights.

    Raises:
        AtollError: an update of none of the experts, or two of one.
    """
    updates: dict[Path, LoraChoice] = {}
    cards = {path: read_card(path, ExpertCard) for path in experts}
    for lora in chosen:
        base = read_card(lora.path, LoraCard).base
        path = next((path for path, card in cards.items() if card.weights_sha256 == base.sha256), None)
        if path is None:
            # Most likely the expert of its name, trained since then.
            other = next((card for card in cards.values() if card.name == base.name), next(iter(cards.values())))
            raise AtollError(
                f"{lora.path}: is an update of {base.name} with sha256 {base.sha256[:12]}..., {other.name} here has "
                f"{other.weights_sha256[:12]}...; take its base, or train an update of this expert"
            )
        if path in updates:
            raise AtollError(f"{lora.path}: is a second update of {path}; merge one of them first (`atoll merge`)")
        updates[path] = lora
    return updates
