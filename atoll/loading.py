"""From the disk to running objects: expert, router and ensemble artifacts, their hashes checked."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from atoll.artifact import CARD, check_card, read_card, read_json, read_tensors, sha256_file
from atoll.calibration import Calibration
from atoll.codec import Codec, build_codec
from atoll.condition import Encoder, build_encoder
from atoll.ensemble import Alignment, Ensemble, Expert
from atoll.errors import AtollError
from atoll.nn import build_network
from atoll.objective import Objective


@dataclass(frozen=True)
class LoadedExpert:
    expert: Expert
    card: dict[str, Any]


@dataclass(frozen=True)
class LoadedEnsemble:
    """An ensemble ready to sample, with the frozen networks it needs around it."""

    ensemble: Ensemble
    encoder: Encoder
    codec: Codec
    latent_shape: tuple[int, ...]  # (C, H, W)
    card: dict[str, Any]


def load_expert(path: str | Path, device: str | torch.device = "cpu") -> LoadedExpert:
    """The expert artifact at `path`.

    Raises:
        AtollError: missing, altered, of another format, or weights that do not fit the card's network.
    """
    path = Path(path)
    card = read_card(path, "expert")
    _require(card, ("name", "network", "objective", "clusters", "codec", "condition", "latent_shape"), path / CARD)
    tensors = read_tensors(path, card)
    with _sound(path / CARD):
        network = _network(path, card, tensors, device)
        calibration = None
        if card.get("calibration"):
            curves = {key: card["calibration"][key] for key in ("log_snr", "slope", "x0_mse", "x0_mse_raw")}
            calibration = Calibration.load(curves, tensors["calibration.mean"].to(device))
        expert = Expert(network, Objective(**card["objective"]), tuple(card["clusters"]), calibration, card["name"])
    return LoadedExpert(expert, card)


def load_router(path: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """The router artifact at `path`. Raises AtollError as `load_expert` does."""
    path = Path(path)
    card = read_card(path, "router")
    _require(card, ("network",), path / CARD)
    return _network(path, card, read_tensors(path, card), device)


def load_ensemble(
    path: str | Path,
    routing: str | None = None,
    alignment: Alignment = "snr",
    strict: bool = False,
    device: str | torch.device = "cpu",
) -> LoadedEnsemble:
    """The ensemble that `path` (a directory with ensemble.json, or an expert's own directory) describes.

    Args:
        routing: instead of the ensemble's own default.
        strict: an expert that is missing is an error; otherwise a warning, and its weight goes to the others.

    Raises:
        AtollError: nothing there, a part altered, no expert left, no router, or (strict) an expert missing.
    """
    path = Path(path)
    if not (path / "ensemble.json").is_file():
        if (path / CARD).is_file():
            return _alone(path, alignment, device)
        raise AtollError(
            f"{path}: no ensemble.json and no {CARD} in it; expected an ensemble's or an expert's directory"
        )
    card = check_card(read_json(path / "ensemble.json"), "ensemble", path / "ensemble.json")
    _require(card, ("experts", "router", "codec", "latent_shape", "sampling"), path / "ensemble.json")
    loaded = []
    for entry in card["experts"]:
        part = path / entry["url"]
        if not (part / CARD).is_file():
            if strict:
                raise AtollError(f"{part}: the expert {entry['name']} is missing, and --strict asks for all of them")
            warnings.warn(f"the expert {entry['name']} is missing ({part}); sampling without it", stacklevel=2)
            continue
        _check_hash(part / CARD, entry["sha256"])
        loaded.append(load_expert(part, device))
    if not loaded:
        raise AtollError(f"{path}: none of its {len(card['experts'])} experts is there; fetch at least one")
    router = None
    if card["router"] is not None:
        _check_hash(path / card["router"]["url"] / CARD, card["router"]["sha256"])
        router = load_router(path / card["router"]["url"], device)
    encoder = build_encoder(loaded[0].card["condition"])
    ensemble = Ensemble(
        [one.expert for one in loaded],
        router,
        routing or card["sampling"].get("routing", "top-2"),
        alignment,
        null=encoder.null(1).to(device),
    )
    return LoadedEnsemble(ensemble, encoder, build_codec(card["codec"]), tuple(card["latent_shape"]), card)


def _alone(path: Path, alignment: Alignment, device: str | torch.device) -> LoadedEnsemble:
    """One expert (a monolith, say) as an ensemble of its own."""
    loaded = load_expert(path, device)
    encoder = build_encoder(loaded.card["condition"])
    ensemble = Ensemble([loaded.expert], None, "full", alignment, null=encoder.null(1).to(device))
    card = {**loaded.card, "sampling": {}}
    return LoadedEnsemble(ensemble, encoder, build_codec(card["codec"]), tuple(card["latent_shape"]), card)


@contextmanager
def _sound(card: Path) -> Iterator[None]:
    """Cards come from strangers: whatever in one cannot be read is a mistake of the card, told in one line."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise AtollError(f"{card}: cannot be read ({type(error).__name__}: {error}); get a fresh copy of it") from None


def _require(card: dict[str, Any], keys: tuple[str, ...], where: Path) -> None:
    if missing := [key for key in keys if key not in card]:
        raise AtollError(f"{where}: lacks {', '.join(missing)}; get a fresh copy of it")


def _check_hash(card: Path, wanted: str) -> None:
    if not card.is_file():
        raise AtollError(f"{card}: not found; fetch the part again")
    if sha256_file(card) != wanted:
        raise AtollError(
            f"{card}: is not the one that was assembled (its sha256 differs); restore it, or run `atoll assemble` again"
        )


def _network(path: Path, card: dict[str, Any], tensors: dict[str, Tensor], device: str | torch.device) -> nn.Module:
    """The card's network with the artifact's weights, in inference mode."""
    with torch.device("meta"):
        network = build_network(card["network"])
    weights = {name.removeprefix("network."): value for name, value in tensors.items() if name.startswith("network.")}
    try:
        network.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        raise AtollError(
            f"{path}: the weights do not fit the card's network ({' '.join(str(error).split())[:200]})"
        ) from None
    return network.to(device).eval().requires_grad_(False)
