"""From the disk to running objects: expert, router and ensemble artifacts, their hashes checked."""

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from atoll.calibration import Calibration
from atoll.condition import move_to
from atoll.encoders.codec import Codec, build_codec
from atoll.encoders.text import PromptEncoder, build_encoder
from atoll.encoders.weights import also_found_in, identity, same
from atoll.ensemble import Alignment, Ensemble, Expert
from atoll.ensemble.offload import (
    ExpertCache,
    WeightDtype,
    bytes_of,
    cast_weights,
    check_weights,
    parse_budget,
    read_weights,
)
from atoll.ensemble.replicas import Stacking
from atoll.errors import AtollError
from atoll.nn import build_network
from atoll.objective import Objective
from atoll.storage.artifact import CARD, WEIGHTS, load_card, read_card, read_tensors, sha256_file
from atoll.storage.cards import EnsembleCard, ExpertCard, RouterCard, SamplingDefaults
from atoll.storage.layout import ENSEMBLE_CARD

FROZEN = "frozen"  # beside ensemble.json: text encoders and codec, where somebody has put them there


@dataclass(frozen=True)
class LoadedExpert:
    expert: Expert
    card: ExpertCard


@dataclass(frozen=True)
class LoadedEnsemble:
    """An ensemble ready to sample, with the frozen networks it needs around it."""

    ensemble: Ensemble
    encoder: PromptEncoder
    codec: Codec
    latent_shape: tuple[int, ...]  # (C, H, W)
    card: EnsembleCard | ExpertCard  # of an expert that is an ensemble of its own

    @property
    def sampling(self) -> SamplingDefaults:
        """How it is sampled where the caller does not say."""
        return self.card.sampling if isinstance(self.card, EnsembleCard) else SamplingDefaults()


def load_expert(
    path: str | Path,
    device: str | torch.device = "cpu",
    weights: WeightDtype | None = None,
    store: ExpertCache | None = None,
) -> LoadedExpert:
    """The expert artifact at `path`.

    Args:
        weights: what its weights are rounded to; None: as they are stored.
        store: what brings its weights when it is asked; None: they are there for good.

    Raises:
        AtollError: missing, altered, of another format, weights that do not fit the card's network, or unknown weights.
    """
    path = Path(path)
    card = read_card(path, ExpertCard)
    tensors = read_tensors(path, card)
    with _sound(path / CARD):
        network = _network(path, card, tensors, "meta" if store or weights else device)  # after the weights' check
        calibration = None
        if card.calibration is not None:
            mean = _mean(tensors["calibration.mean"], card.latent_shape).to(device, copy=True)
            calibration = Calibration.load(card.calibration.model_dump(), mean)
        expert = Expert(network, Objective(**card.objective), card.clusters, calibration, card.name)
    if store or weights:
        fetch = partial(_fetched, path, card, weights, _state(path / WEIGHTS))
        size = bytes_of(cast_weights(network, weights))
        expert = replace(expert, network=store.add(expert.name, size, fetch) if store else fetch().to(device))
    return LoadedExpert(expert, card)


def load_router(path: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """The router artifact at `path`. Raises AtollError as `load_expert` does."""
    path = Path(path)
    card = read_card(path, RouterCard)
    return _network(path, card, read_tensors(path, card), device)


def load_ensemble(
    path: str | Path,
    routing: str | None = None,
    alignment: Alignment = "snr",
    strict: bool = False,
    device: str | torch.device = "cpu",
    replicas: str | None = None,
    memory_budget: str | int | None = None,
    weights: WeightDtype | None = None,
) -> LoadedEnsemble:
    """The ensemble that `path` (a directory with ensemble.json, or an expert's own directory) describes.

    Args:
        routing: instead of the ensemble's own default.
        strict: an expert that is missing is an error; otherwise a warning, and its weight goes to the others.
        replicas: how they are combined, instead of the ensemble's own default.
        memory_budget: "16GB", or bytes, for the weights of the experts and the router on the device (the text encoder,
            the codec and activations are not counted); the experts that do not fit are brought when they are asked.
        weights: what the experts' weights are rounded to (fp32, bf16, fp16, int8); None: as they are stored.

    Raises:
        AtollError: nothing there, a part altered, no expert left, no router, (strict) an expert missing, or a budget
            too small for one expert and the router.
    """
    path = Path(path)
    check_weights(weights)
    store = None if memory_budget is None else ExpertCache(parse_budget(memory_budget), device)
    with also_found_in(path / FROZEN):
        if (path / ENSEMBLE_CARD).is_file():
            loaded = _assembled(path, routing, alignment, strict, device, replicas, weights, store)
        elif (path / CARD).is_file():
            loaded = _alone(path, alignment, device, weights, store)
        else:
            raise AtollError(
                f"{path}: no {ENSEMBLE_CARD} and no {CARD} in it; expected an ensemble's or an expert's directory"
            )
    warn_uncalibrated(loaded.ensemble)
    return loaded


def warn_uncalibrated(ensemble: Ensemble) -> None:
    """Warn about every eps-expert that neither a calibration nor a stacking corrects."""
    for expert in ensemble.clamped:
        warnings.warn(
            f"{expert.name}: an eps-expert without calibration; its x0 is clamped to +-20 as in HDDM "
            "(`atoll calibrate` measures one)",
            stacklevel=3,
        )


def _assembled(
    path: Path,
    routing: str | None,
    alignment: Alignment,
    strict: bool,
    device: str | torch.device,
    replicas: str | None,
    weights: WeightDtype | None,
    store: ExpertCache | None,
) -> LoadedEnsemble:
    """What ensemble.json describes."""
    card = load_card(path / ENSEMBLE_CARD, EnsembleCard)
    loaded = []
    for entry in card.experts:
        part = path / entry.url
        if not (part / CARD).is_file():
            if strict:
                raise AtollError(f"{part}: the expert {entry.name} is missing, and --strict asks for all of them")
            warnings.warn(f"the expert {entry.name} is missing ({part}); sampling without it", stacklevel=3)
            continue
        _check_hash(part / CARD, entry.sha256)
        loaded.append(load_expert(part, device, weights, store))
    if not loaded:
        raise AtollError(f"{path}: none of its {len(card.experts)} experts is there; fetch at least one")
    router, router_card = _router_of(path, card, device)
    if store is not None:
        store.reserve(bytes_of(router))
    kinds, which = _kinds([one.card.condition for one in loaded])
    encoder = PromptEncoder([build_encoder(config) for config in kinds])
    ensemble = Ensemble(
        [replace(one.expert, encoder=number) for one, number in zip(loaded, which, strict=True)],
        router,
        routing or card.sampling.routing or "top-2",
        alignment,
        null=move_to(encoder.null(1), device),
        stackings=_stackings(path, card, device),
        replicas=replicas or card.sampling.replicas or "stacked",
        router_encoder=_encoder_of(router_card, kinds),
    )
    return LoadedEnsemble(ensemble, encoder, build_codec(card.codec), card.latent_shape, card)


def _router_of(
    path: Path, card: EnsembleCard, device: str | torch.device
) -> tuple[nn.Module | None, RouterCard | None]:
    """The router that the ensemble at `path` names, and its card; None if it has none."""
    if card.router is None:
        return None, None
    part = path / card.router.url
    _check_hash(part / CARD, card.router.sha256)
    return load_router(part, device), read_card(part, RouterCard)


def _kinds(configs: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[int]]:
    """The encoders' configs without repetition, and which of them each one is: an encoder is loaded once for all."""
    kinds = list({json.dumps(identity(config), sort_keys=True): config for config in configs}.values())
    return kinds, [next(i for i, kind in enumerate(kinds) if same(kind, config)) for config in configs]


def _stackings(path: Path, card: EnsembleCard, device: str | torch.device) -> list[Stacking]:
    """The weights of replicas that the ensemble at `path` was assembled with."""
    if card.stackings is None:
        return []
    from safetensors.torch import load

    file = path / card.stackings.file
    _check_hash(file, card.stackings.sha256)
    with _sound(file):
        means = load(file.read_bytes())
        return [
            Stacking.load(stacking.model_dump(), _mean(means[f"mean.{number}"], card.latent_shape).to(device))
            for number, stacking in enumerate(card.stackings.weights)
        ]


def _mean(mean: Tensor, latent_shape: tuple[int, ...]) -> Tensor:
    """A mean latent, after a check of its shape (C, H, W)."""
    if tuple(mean.shape) != latent_shape:
        raise ValueError(f"a mean latent of shape {list(mean.shape)}, expected {list(latent_shape)}")
    return mean


def _encoder_of(router: RouterCard | None, kinds: list[dict[str, Any]]) -> int:
    """The number of the encoder whose pooled vector the router was trained with; 0 if there is none."""
    return next((i for i, kind in enumerate(kinds) if router is not None and same(kind, router.condition)), 0)


def _alone(
    path: Path, alignment: Alignment, device: str | torch.device, weights: WeightDtype | None, store: ExpertCache | None
) -> LoadedEnsemble:
    """One expert (a monolith, say) as an ensemble of its own."""
    loaded = load_expert(path, device, weights, store)
    if store is not None:
        store.reserve(0)
    encoder = PromptEncoder([build_encoder(loaded.card.condition)])
    ensemble = Ensemble([loaded.expert], None, "full", alignment, null=move_to(encoder.null(1), device))
    card = loaded.card
    return LoadedEnsemble(ensemble, encoder, build_codec(card.codec), card.latent_shape, card)


@contextmanager
def _sound(card: Path) -> Iterator[None]:
    """Cards come from strangers: whatever in one cannot be read is a mistake of the card, told in one line."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, SafetensorError) as error:
        raise AtollError(f"{card}: cannot be read ({type(error).__name__}: {error}); get a fresh copy of it") from None


def _check_hash(card: Path, wanted: str) -> None:
    if not card.is_file():
        raise AtollError(f"{card}: not found; fetch the part again")
    if sha256_file(card) != wanted:
        raise AtollError(
            f"{card}: is not the one that was assembled (its sha256 differs); restore it, or run `atoll assemble` again"
        )


def _network(
    path: Path, card: ExpertCard | RouterCard, tensors: dict[str, Tensor], device: str | torch.device
) -> nn.Module:
    """The card's network with the artifact's weights, in inference mode."""
    with torch.device("meta"):
        network = build_network(card.network)
    weights = {name.removeprefix("network."): value for name, value in tensors.items() if name.startswith("network.")}
    try:
        network.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        raise AtollError(
            f"{path}: the weights do not fit the card's network ({' '.join(str(error).split())[:200]})"
        ) from None
    return network.to(device).eval().requires_grad_(False)


def _state(file: Path) -> tuple[int, int, int]:
    """What tells whether a file whose hash was checked is still the same one."""
    stat = file.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _fetched(path: Path, card: ExpertCard, weights: WeightDtype | None, checked: tuple[int, int, int]) -> nn.Module:
    """The network of an artifact whose hash was checked when it was in the state `checked`."""
    if not (path / WEIGHTS).is_file() or _state(path / WEIGHTS) != checked:
        raise AtollError(f"{path / WEIGHTS}: changed while it was in use; load the ensemble again")
    return cast_weights(_network(path, card, read_weights(path / WEIGHTS, weights), "cpu"), weights)
