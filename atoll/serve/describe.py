"""What a client may know: of a model, for GET /v1/models; of an image, to sample it again."""

import hashlib
import json
import time
from collections.abc import Sequence
from typing import Any, Literal, get_args

from pydantic import BaseModel
from torch import Tensor

from atoll import __version__
from atoll.choices import Method
from atoll.ensemble.loading import LoadedEnsemble
from atoll.ensemble.routing import parse_routing
from atoll.image_settings import ImageSettings
from atoll.serve.types import ImageRequest
from atoll.storage.cards import EnsembleCard, ExpertCard, parse_record

# One line of explanation for each choice.
_WEIGHT_TIMES = 256  # evaluations whose weights are reported, evenly spaced if there were more
_ROUTINGS = {
    "top-1": "The most probable expert alone, at every step.",
    "top-2": "The two most probable clusters, renormalised.",
    "full": "Every cluster with its probability: the exact mixture.",
    "threshold-0.1": "Clusters of at least 10 % probability, renormalised.",
    "nucleus-0.9": "The fewest clusters that together hold 90 % of the probability.",
    "sample-1": "One cluster drawn by the probabilities, anew at every step.",
    "oracle": "The cluster that you name, whatever the router says.",
}
_ALIGNMENTS = {
    "snr": "Experts are evaluated at matched log-SNR: exact.",
    "native": "Experts are evaluated at the same time, as in HDDM's formulas; for comparison.",
}
_METHODS = {
    "euler": "First order, one evaluation per step.",
    "heun": "Second order, two evaluations per step.",
    "midpoint": "Second order, two evaluations per step.",
    "dpm++2m": "Second order with one evaluation per step, by the step before.",
    "unipc": "Third order with one evaluation per step, which also corrects the step before.",
}


class ChoiceCard(BaseModel):
    """One value of a parameter, with a line of explanation."""

    name: str
    description: str


class ServedExpert(BaseModel):
    """An expert of a model. routing: the routing under which it samples alone; None if there is none."""

    name: str
    clusters: list[int]
    prediction: str
    schedule: str
    sha256: str | None
    calibrated: bool
    routing: str | None


class ModelDefaults(BaseModel):
    """What holds if a request says nothing."""

    steps: int
    guidance_scale: float
    shift: float
    method: str
    routing: str
    alignment: str


class ModelCard(BaseModel):
    """A model of this server, also an OpenAI model object."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "atoll"
    kind: Literal["ensemble", "expert"]
    default: bool
    width: int
    height: int
    sizes: list[str]
    size_step: int
    clusters: int
    experts: list[ServedExpert]
    router: str | None
    guidance: bool
    routings: list[ChoiceCard]
    alignments: list[ChoiceCard]
    methods: list[ChoiceCard]
    defaults: ModelDefaults
    licence: str | None
    sha256: str


def model_card(name: str, loaded: LoadedEnsemble, default: bool = False, licence: str | None = None) -> ModelCard:
    """Describe a model.

    Args:
        name: its name on this server.
        loaded: the model.
        default: whether requests that name no model mean it.
        licence: as the server's operator states it; cards have none.
    """
    card, sampling = loaded.card, loaded.sampling
    main = loaded.sizes.main
    defaults = ModelDefaults(
        steps=sampling.steps_or(50),
        guidance_scale=sampling.guidance_or(1.0),
        shift=loaded.shift(main),
        method=sampling.method or "euler",
        routing=loaded.ensemble.routing,
        alignment=loaded.ensemble.alignment,
    )
    assert _METHODS.keys() == set(get_args(Method))
    return ModelCard(
        id=name,
        created=int(time.time()),
        kind="ensemble" if isinstance(card, EnsembleCard) else "expert",
        default=default,
        width=main.width,
        height=main.height,
        sizes=list(map(str, loaded.sizes.trained)),
        size_step=loaded.sizes.step,
        clusters=card.clusters if isinstance(card, EnsembleCard) else card.k,
        experts=_experts(loaded),
        router=card.router.sha256 if isinstance(card, EnsembleCard) and card.router is not None else None,
        guidance=loaded.ensemble.null is not None,
        routings=_choices(_routings(loaded)),
        alignments=_choices(_ALIGNMENTS),
        methods=_choices(_METHODS),
        defaults=defaults,
        licence=licence,
        sha256=card_sha256(card),
    )


def _experts(loaded: LoadedEnsemble) -> list[ServedExpert]:
    """Describe the experts that are there, with the hashes that the card states."""
    card, experts = loaded.card, loaded.ensemble.experts
    # An entry's hash is of the expert's card, which holds the hash of its weights.
    hashes: dict[str, str] = {}
    if isinstance(card, EnsembleCard):
        hashes = {entry.name: entry.sha256 for entry in card.experts}
    elif isinstance(card, ExpertCard) and card.weights is not None:
        hashes = {card.name: card.weights_sha256}
    names = [expert.name for expert in experts]
    return [
        ServedExpert(
            name=expert.name,
            clusters=list(expert.clusters),
            prediction=expert.objective.prediction,
            schedule=type(expert.objective.schedule).__name__,
            sha256=hashes.get(expert.name),
            calibrated=expert.calibration is not None,
            routing=_alone(expert.name, names),
        )
        for expert in experts
    ]


def _alone(name: str, names: list[str]) -> str | None:
    """Return the routing that gives one expert all weight at all times."""
    # Above and below time 0 there is the same expert; a colon or a second expert of this name has no such routing.
    return None if ":" in name or names.count(name) > 1 else f"time-switch-0:{name}:{name}"


def _routings(loaded: LoadedEnsemble) -> dict[str, str]:
    """Return the routings that the model can have."""
    ensemble = loaded.ensemble
    routable = ensemble.router is not None or len(ensemble.experts) == 1
    lines = {name: line for name, line in _ROUTINGS.items() if routable or not parse_routing(name).needs_router}
    # The model's own default comes first, whether it is in the table or not.
    return {ensemble.routing: lines.get(ensemble.routing, "This model's default."), **lines}


def _choices(lines: dict[str, str]) -> list[ChoiceCard]:
    return [ChoiceCard(name=name, description=line) for name, line in lines.items()]


def image_settings(
    name: str,
    loaded: LoadedEnsemble,
    request: ImageRequest,
    *,
    weights: str | None = None,
    dropped: Sequence[str] = (),
) -> list[ImageSettings]:
    """Return what samples each image of a request again, completed by the model's defaults.

    Args:
        name: the model's name.
        loaded: the model.
        request: the request.
        weights: the dtype that the experts' weights were rounded to; None: as stored.
        dropped: experts that were dropped while sampling.
    """
    ensemble, card, sampling = loaded.ensemble, loaded.card, loaded.sampling
    # Experts that were missing when it was loaded make other images.
    names = {expert.name for expert in ensemble.experts}
    entries = card.experts if isinstance(card, EnsembleCard) else ()
    missing = [entry.name for entry in entries if entry.name not in names]
    # The record has no cluster: the routing names it.
    routing = request.routing or ensemble.routing
    if routing == "oracle" and request.cluster is not None:
        routing = f"oracle-{request.cluster}"
    scale = sampling.guidance_or(1.0) if request.guidance_scale is None else request.guidance_scale
    size = loaded.sizes.choose(*(request.size or ()))
    values = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt or "",
        "steps": sampling.steps_or(50) if request.steps is None else request.steps,
        "guidance_scale": float(scale),
        "guidance_range": tuple(map(float, request.guidance_range)),
        "method": request.method or sampling.method or "euler",
        "routing": routing,
        "alignment": request.alignment,
        "replicas": ensemble.replicas,
        "weights": weights,
        "shift": loaded.shift(size) if request.shift is None else request.shift,
        "size": (size.width, size.height),
        "ensemble": name,
        "ensemble_sha256": card_sha256(card),
        "missing_experts": tuple(missing),
        "dropped_experts": tuple(dropped),
        "version": __version__,
    }
    return [parse_record(ImageSettings, {**values, "seed": seed}, "sampling settings") for seed in request.seeds]


def card_sha256(card: EnsembleCard | ExpertCard) -> str:
    """Return the hash of a card's file: a card that is read and written again does not change."""
    return hashlib.sha256((json.dumps(card.plain(), indent=2) + "\n").encode()).hexdigest()


def expert_weights(times: Tensor, weights: Tensor) -> dict[str, Any]:
    """Return the experts' weights over time as JSON values.

    Args:
        times: of the evaluations [V].
        weights: each expert's weight at each evaluation [V, n, E].

    Returns:
        "times" [V'] and "weights" [n][V'][E], of V' evenly spaced evaluations, at most 256.
    """
    count = len(times)
    rows = list(range(count))
    if count > _WEIGHT_TIMES:
        rows = [round(i * (count - 1) / (_WEIGHT_TIMES - 1)) for i in range(_WEIGHT_TIMES)]
    # As float64, 0.1 stays 0.1.
    chosen = weights[rows].transpose(0, 1).double()  # [n, V', E]
    return {"times": times[rows].double().round(decimals=5).tolist(), "weights": chosen.round(decimals=4).tolist()}
