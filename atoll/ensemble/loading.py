"""Expert, router and ensemble artifacts, loaded from disk with their hashes checked."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from atoll.calibration import Calibration
from atoll.condition import move_to
from atoll.encoders.codec import build_codec
from atoll.encoders.text import PromptEncoder, build_encoder
from atoll.encoders.trust import STRANGER, Trust
from atoll.encoders.weights import also_found_in
from atoll.ensemble import Alignment, Ensemble, Expert
from atoll.ensemble.deferred import UNLIMITED, deferred_expert
from atoll.ensemble.loaded import LoadedEnsemble as LoadedEnsemble
from atoll.ensemble.loaded import LoadedExpert as LoadedExpert
from atoll.ensemble.lora import LoraChoice, LoraUpdate, chosen_lora, merged_tensors, read_lora, warn_if_uncalibrated
from atoll.ensemble.offload import (
    ExpertCache,
    WeightDtype,
    bytes_of,
    cast_weights,
    check_weights,
    parse_budget,
    read_weights,
)
from atoll.ensemble.parts import (
    checked_mean,
    encoder_index,
    encoder_kinds,
    read_stackings,
    require_contained,
    require_hash,
    require_part,
    sound,
)
from atoll.errors import AtollError, escaped
from atoll.nn import build_network
from atoll.objective import Objective
from atoll.storage.artifact import CARD, WEIGHTS, load_card, read_card, read_tensors
from atoll.storage.cards import EnsembleCard, ExpertCard, RouterCard
from atoll.storage.claims import require_fit
from atoll.storage.containment import owning_directory, require_inside
from atoll.storage.layout import ENSEMBLE_CARD
from atoll.storage.memory import refuse_out_of_memory

Fetch = Callable[[Path], None]  # of an expert's directory
FROZEN = "frozen"  # beside ensemble.json: the weights of text encoders and codec, if they were saved with it


def load_expert(
    path: str | Path,
    device: str | torch.device = "cpu",
    weights: WeightDtype | None = None,
    cache: ExpertCache | None = None,
    *,
    root: Path | None = None,
    trust: Trust = STRANGER,
    fetch: Fetch | None = None,
    lora: LoraChoice | None = None,
) -> LoadedExpert:
    """Load an expert artifact.

    Args:
        path: its directory.
        device: where it is evaluated.
        weights: the dtype that its weights are rounded to; None: as stored.
        cache: loads its weights on demand; None: they are loaded now and stay.
        root: the directory that its files must not lead out of; None: `path`.
        trust: whether its files may be links to elsewhere.
        fetch: as in `load_ensemble`; needs a cache.
        lora: a low-rank update to add to its weights, with the calibration that belongs to it; None for none.

    Raises:
        AtollError: missing, altered, of another format, weights that do not fit the card's network, an update of
            another expert, or an unknown dtype.
    """
    # The card, and the weights with their hash checked.
    path = Path(path)
    require_contained(path, root or path, path, trust)
    card = read_card(path, ExpertCard)
    update = None
    if lora is not None:
        require_contained(lora.path, root or lora.path, path, trust)
        update = read_lora(lora.path, card, path)
        warn_if_uncalibrated(update, lora.scale)
        card = card.model_copy(update={"calibration": update.calibration_at(lora.scale, card)})
    if fetch is not None and cache is not None and not (path / WEIGHTS).exists():
        load = partial(_fetch_and_load, path, fetch, weights, root or path, trust, lora)
        with sound(path / CARD):
            return LoadedExpert(deferred_expert(card, cache, weights, load, device), card)
    tensors = read_tensors(path, card)
    if update is not None and lora is not None:
        tensors = merged_tensors(tensors, update, lora.scale)

    # Network and calibration; a network whose weights are read later is built without memory.
    with sound(path / CARD):
        network = _network(path, card, tensors, "meta" if cache or weights else device)
        # Without a calibration, HDDM's clamp takes its place.
        calibration = None
        if card.calibration is not None:
            # A copy, since the file stays memory-mapped otherwise.
            mean = checked_mean(tensors["calibration.mean"], card.latent_shape).to(device, copy=True)
            calibration = Calibration.load(card.calibration.model_dump(), mean)
        expert = Expert(network, Objective(**card.objective), card.clusters, calibration, card.name)
    # Rounded weights, and those that load on demand, are read again: one tensor at a time, or memory-mapped.
    if cache or weights:
        scale = 0.0 if lora is None else lora.scale
        reload = partial(_reload, path, card, weights, _state(path / WEIGHTS), update, scale)
        size = bytes_of(cast_weights(network, weights))
        expert = replace(expert, network=cache.add(expert.name, size, reload) if cache else reload().to(device))
    return LoadedExpert(expert, card)


def load_router(
    path: str | Path, device: str | torch.device = "cpu", *, root: Path | None = None, trust: Trust = STRANGER
) -> nn.Module:
    """Load a router artifact. Arguments and errors as in `load_expert`."""
    path = Path(path)
    require_contained(path, root or path, path, trust)
    # The router is small and stays as stored.
    card = read_card(path, RouterCard)
    return _network(path, card, read_tensors(path, card), device)


def load_ensemble(
    path: str | Path,
    routing: str | None = None,
    alignment: Alignment = "snr",
    strict: bool = False,
    device: str | torch.device = "cpu",
    *,
    replicas: str | None = None,
    memory_budget: str | int | ExpertCache | None = None,
    weights: WeightDtype | None = None,
    allow_hub: bool = False,
    trust_paths: bool = False,
    trust: Trust | None = None,
    fetch: Fetch | None = None,
) -> LoadedEnsemble:
    """Load an ensemble, or a single expert as an ensemble. Warns about eps-experts without calibration.

    Args:
        path: a directory with ensemble.json, or an expert's directory.
        routing: in place of the ensemble's default.
        alignment: "snr" (exact) or "native" (HDDM's formulas).
        strict: whether a missing expert is an error; otherwise it is a warning, and its weight goes to the others.
        device: where experts and router are evaluated.
        replicas: how replicas are combined, in place of the ensemble's default.
        memory_budget: "16GB", or bytes, for the weights of the experts and the router on the device (text encoder,
            codec and activations are not counted); experts that do not fit load on demand. Or the expert cache of
            another ensemble, whose budget both share.
        weights: the dtype that the experts' weights are rounded to (fp32, bf16, fp16, int8); None: as stored.
        allow_hub: whether text encoders and codec may be fetched from the hub, at the revision and with the hash that
            the cards state.
        trust_paths: whether cards may name paths outside the ensemble's directory, or its run's if it is RUN/ensemble.
        trust: in place of these two.
        fetch: called with an expert's directory that has no weights yet, before its first evaluation; it puts them
            there. Experts that are never evaluated are never fetched.

    Raises:
        AtollError: nothing to load, a path out of the ensemble, an altered part, no expert left, no router, a missing
            expert with `strict`, or a budget too small for one expert and the router.
    """
    # Options that cannot work fail before anything is read.
    path = Path(path)
    check_weights(weights)
    if memory_budget is None or isinstance(memory_budget, ExpertCache):
        cache = memory_budget
    else:
        cache = ExpertCache(parse_budget(memory_budget), device)
    if fetch is not None and cache is None:
        # Prefetching would download experts that are only likely.
        cache = ExpertCache(UNLIMITED, device, prefetch=False)
    trust = Trust(hub=allow_hub, paths=trust_paths) if trust is None else trust

    # The directory of an ensemble, or of one expert. Frozen weights that were saved with it are found there.
    with also_found_in(path / FROZEN):
        if (path / ENSEMBLE_CARD).is_file():
            require_inside(path / ENSEMBLE_CARD, path, path, trust.paths)
            card = load_card(path / ENSEMBLE_CARD, EnsembleCard)
            experts = _load_experts(
                path, card, strict=strict, device=device, weights=weights, cache=cache, trust=trust, fetch=fetch
            )
            loaded = _assembled(
                path, card, experts, routing, alignment, replicas=replicas, device=device, cache=cache, trust=trust
            )
        elif (path / CARD).is_file():
            loaded = _alone(load_expert(path, device, weights, cache, trust=trust), alignment, device, cache, trust)
        else:
            raise AtollError(
                f"{path}: no {ENSEMBLE_CARD} and no {CARD} in it; expected an ensemble's or an expert's directory"
            )
    warn_uncalibrated(loaded.ensemble)
    return loaded


def warn_uncalibrated(ensemble: Ensemble) -> None:
    """Warn about every eps-expert that neither a calibration nor a stacking corrects."""
    # One warning per expert, with its remedy.
    for expert in ensemble.clamped:
        warnings.warn(
            f"{expert.name}: an eps-expert without calibration; its x0 is clamped to +-20 as in HDDM "
            "(`atoll calibrate` measures one)",
            stacklevel=3,
        )


def _load_experts(
    path: Path,
    card: EnsembleCard,
    *,
    strict: bool,
    device: str | torch.device,
    weights: WeightDtype | None,
    cache: ExpertCache | None,
    trust: Trust,
    fetch: Fetch | None,
) -> list[LoadedExpert]:
    """Load the experts of the ensemble at `path` that are there."""
    experts, root, seen = list[LoadedExpert](), trust.run or owning_directory(path), set[Path]()
    for entry in card.experts:
        # Nothing outside is touched, not even to see whether it is there.
        part = path / entry.url
        require_contained(part, root, path / ENSEMBLE_CARD, trust)
        # A card of thousands of entries would load one expert as often.
        if part.resolve() in seen:
            raise AtollError(f"{path / ENSEMBLE_CARD}: names {part} twice; {card.remedy}")
        seen.add(part.resolve())
        # A missing expert is left out; its weight goes to the others.
        if not (part / CARD).is_file():
            if strict:
                raise AtollError(f"{part}: the expert {entry.name} is missing, and --strict requires all of them")
            warnings.warn(escaped(f"the expert {entry.name} is missing ({part}); sampling without it"), stacklevel=3)
            continue
        # The card names the weights' hash, so checking the card checks both.
        require_hash(part / CARD, entry.sha256)
        lora = None if entry.lora is None else chosen_lora(path, entry.lora, root, trust)
        loaded = load_expert(part, device, weights, cache, root=root, trust=trust, fetch=fetch, lora=lora)
        # Clusters may have grown since its training.
        clusters = require_part(card, loaded.card, part / CARD)
        experts.append(replace(loaded, expert=replace(loaded.expert, clusters=clusters)))
    if not experts:
        raise AtollError(f"{path}: none of its {len(card.experts)} experts is there; fetch at least one")
    return experts


def _assembled(
    path: Path,
    card: EnsembleCard,
    experts: Sequence[LoadedExpert],
    routing: str | None,
    alignment: Alignment,
    *,
    replicas: str | None,
    device: str | torch.device,
    cache: ExpertCache | None,
    trust: Trust,
) -> LoadedEnsemble:
    """Return the ensemble of these experts that the card at `path` describes."""
    # The router always stays on the device.
    router, router_card = _router_of(path, card, device, trust)
    if cache is not None:
        cache.reserve(bytes_of(router))

    # Text encoders, each loaded once.
    kinds, encoder_indices = encoder_kinds([one.card.condition for one in experts])
    encoder = PromptEncoder([build_encoder(config, trust) for config in kinds])

    ensemble = Ensemble(
        # Each expert learns which text encoder it reads.
        [replace(one.expert, encoder=index) for one, index in zip(experts, encoder_indices, strict=True)],
        router,
        routing or card.sampling.routing or "top-2",
        alignment,
        null=move_to(encoder.null(1), device),
        stackings=read_stackings(path, card, device, trust),
        replicas=replicas or card.sampling.replicas or "stacked",
        router_encoder=encoder_index(router_card, kinds),
    )
    cards = tuple(one.card for one in experts)
    codec = build_codec(card.codec, trust)
    return LoadedEnsemble(ensemble, encoder, codec, card.latent_shape, card, cards, router_card)


def _router_of(
    path: Path, card: EnsembleCard, device: str | torch.device, trust: Trust
) -> tuple[nn.Module | None, RouterCard | None]:
    """Load the router of the ensemble at `path`, and its card; None if it has none."""
    if card.router is None:
        return None, None
    # The router's hash is checked as an expert's is.
    part, root = path / card.router.url, trust.run or owning_directory(path)
    require_contained(part, root, path / ENSEMBLE_CARD, trust)
    require_hash(part / CARD, card.router.sha256)
    router_card = read_card(part, RouterCard)
    require_part(card, router_card, part / CARD)
    return load_router(part, device, root=root, trust=trust), router_card


def _alone(
    loaded: LoadedExpert,
    alignment: Alignment,
    device: str | torch.device,
    cache: ExpertCache | None,
    trust: Trust,
) -> LoadedEnsemble:
    """Return a single expert, such as a monolith, as an ensemble."""
    # No router to reserve memory for, but the expert itself must fit.
    if cache is not None:
        cache.reserve(0)
    # A single expert reads its own text encoder.
    encoder = PromptEncoder([build_encoder(loaded.card.condition, trust)])
    ensemble = Ensemble([loaded.expert], None, "full", alignment, null=move_to(encoder.null(1), device))
    card = loaded.card
    return LoadedEnsemble(ensemble, encoder, build_codec(card.codec, trust), card.latent_shape, card, (card,))


def _network(
    path: Path, card: ExpertCard | RouterCard, tensors: dict[str, Tensor], device: str | torch.device
) -> nn.Module:
    """Return the card's network with the artifact's weights, in evaluation mode and without gradients."""
    # The artifact also holds the calibration's tensors.
    weights = {name.removeprefix("network."): value for name, value in tensors.items() if name.startswith("network.")}
    require_fit(card.network, len(weights), sum(value.numel() for value in weights.values()), str(path / CARD))
    # Built without memory: the weights are assigned, not copied.
    with torch.device("meta"):
        network = build_network(card.network)
    try:
        network.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        refuse_out_of_memory(error, path / WEIGHTS)
        raise AtollError(
            f"{path}: the weights do not fit the card's network ({' '.join(str(error).split())[:200]})"
        ) from None
    # Evaluation mode turns off dropout; without gradients, no activations are stored.
    return network.to(device).eval().requires_grad_(False)


def _fetch_and_load(
    path: Path, fetch: Fetch, weights: WeightDtype | None, root: Path, trust: Trust, lora: LoraChoice | None
) -> Expert:
    """Return the expert of an artifact whose weights are fetched first, in host memory."""
    fetch(path)
    return load_expert(path, "cpu", weights, root=root, trust=trust, lora=lora).expert


def _state(file: Path) -> tuple[int, int, int]:
    """Return what identifies a file whose hash was checked, without reading it again."""
    # A replaced or rewritten file differs in one of these.
    stat = file.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _reload(
    path: Path,
    card: ExpertCard,
    weights: WeightDtype | None,
    checked: tuple[int, int, int],
    update: LoraUpdate | None,
    scale: float,
) -> nn.Module:
    """Load the network of an artifact whose hash was checked when its file was in the state `checked`."""
    # A changed file has a hash that nobody checked.
    if not (path / WEIGHTS).is_file() or _state(path / WEIGHTS) != checked:
        raise AtollError(f"{path / WEIGHTS}: changed while it was in use; load the ensemble again")
    if update is None:
        return cast_weights(_network(path, card, read_weights(path / WEIGHTS, weights), "cpu"), weights)
    # Added before the weights are rounded.
    tensors = merged_tensors(read_weights(path / WEIGHTS), update, scale)
    return cast_weights(_network(path, card, tensors, "cpu"), weights)
