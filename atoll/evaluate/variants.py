"""What is measured of a run: every routing, every expert alone, the monolith, the alignments; or a sweep."""

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace

from atoll.ensemble import Ensemble, Expert
from atoll.errors import AtollError
from atoll.evaluate.sweep import ALIGNMENTS, aligned, variants_of_sweep
from atoll.evaluate.types import Variant
from atoll.manifest import SweepSettings
from atoll.objective import Objective

Groups = dict[str, tuple[str, ...]]


def variants_of(
    ensemble: Ensemble, dense: Mapping[str, Ensemble]
) -> tuple[list[Variant], Groups, tuple[tuple[str, str], ...]]:
    """All that is measured; the names by group; (label, name) of those that compare the alignments.

    dense: "monolith" and "student", as far as they are there.
    """
    many = f"{len(ensemble.experts)} experts and their router"
    routings = ["top-1", "top-2", "full"] if len(ensemble.experts) > 1 else ["full"]
    routings += [ensemble.routing] if ensemble.routing not in routings else []
    routed = [Variant(r, ensemble.with_options(routing=r, alignment="snr"), f"{many}, {r}") for r in routings]
    alone_ = [
        Variant(expert.name, alone(expert, ensemble), f"{say_objective(expert.objective)}, asked for everything")
        for expert in ensemble.experts
    ]
    one = {"monolith": "one network trained on everything", "student": "one network that learnt from the ensemble"}
    whole = [
        Variant(name, model, f"{one[name]}, {say_objective(model.experts[0].objective)}")
        for name, model in dense.items()
    ]
    others = {"native": "native", "snr + x0 clamp": "snr-clamp", "snr alone": "snr-alone"}
    compared = [
        Variant(label, aligned(ensemble, how), f"{ensemble.routing}, {ALIGNMENTS[how]}")
        for label, how in others.items()
    ]
    groups = {
        "ensemble": tuple(v.name for v in routed),
        "expert": tuple(v.name for v in alone_),
        "monolith": tuple(v.name for v in whole),
    }
    labels = ("native", "snr + calibration", "snr + x0 clamp", "snr alone")
    names = ("native", ensemble.routing, "snr + x0 clamp", "snr alone")
    return [*routed, *alone_, *whole, *compared], groups, tuple(zip(labels, names, strict=True))


def swept(
    sweeps: Sequence[SweepSettings], ensemble: Ensemble, dense: Mapping[str, Ensemble]
) -> tuple[list[Variant], Groups, tuple[tuple[str, str], ...]]:
    """As `variants_of`, of what the sweeps name; what two of them name is measured once."""
    found: dict[str, Variant] = {}
    for sweep in sweeps:
        for variant in variants_of_sweep(sweep, ensemble, dense):
            found.setdefault(variant.name, variant)
    whole = tuple(name for name, variant in found.items() if _which(variant, dense) != "ensemble")
    return list(found.values()), {"sweep": tuple(n for n in found if n not in whole), "monolith": whole}, ()


def identified(variants: Sequence[Variant], dense: Mapping[str, Ensemble], parts: Mapping[str, str]) -> list[Variant]:
    """The variants with identities. parts: hashes of all that "ensemble", "monolith" and "student" consist of."""
    return [replace(v, identity=_identity(v.ensemble, parts[_which(v, dense)])) for v in variants]


def _which(variant: Variant, dense: Mapping[str, Ensemble]) -> str:
    return next((name for name, model in dense.items() if variant.ensemble is model), "ensemble")


def _identity(ensemble: Ensemble, parts: str) -> str:
    experts = [[expert.name, list(expert.clusters), _calibration(expert)] for expert in ensemble.experts]
    options = [ensemble.routing, ensemble.alignment, ensemble.replicas, ensemble.router is not None]
    return hashlib.sha256(json.dumps([parts, experts, options]).encode()).hexdigest()


def _calibration(expert: Expert) -> list[float] | None:
    return None if expert.calibration is None else expert.calibration.slope.tolist()


def alone(expert: Expert, ensemble: Ensemble) -> Ensemble:
    """The expert as if it were all there is.

    Raises:
        AtollError: it is none of the ensemble's.
    """
    if all(expert is not other for other in ensemble.experts):
        raise AtollError(f"{expert.name} is no expert of this ensemble")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said when the ensemble was loaded
        return Ensemble([replace(expert, clusters=(0,))], None, "full", null=ensemble.null)


def say_objective(objective: Objective) -> str:
    """eps on cosine"""
    return f"{objective.prediction} on {objective.schedule.config()['name']}"
