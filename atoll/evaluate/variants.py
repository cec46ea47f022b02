"""The variants of a run: every routing, every expert alone, the monolith, the alignments; or those of a sweep."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

from atoll.ensemble import Ensemble, Expert
from atoll.errors import AtollError
from atoll.evaluate.sweep import ALIGNMENTS, aligned, variants_of_sweep
from atoll.evaluate.types import Variant
from atoll.manifest import SweepSettings
from atoll.objective import Objective

Groups = dict[str, tuple[str, ...]]  # names of variants
Alignments = tuple[tuple[str, str], ...]  # (label, name of the variant)


def variants_of(ensemble: Ensemble, dense: Mapping[str, Ensemble]) -> tuple[list[Variant], Groups, Alignments]:
    """All variants that are measured without a sweep.

    Args:
        ensemble: of the run.
        dense: "monolith" and "student", if the run has them.

    Returns:
        The variants; their names by group; (label, name) of those that compare the alignments.
    """
    # The ensemble with every routing.
    many = f"{len(ensemble.experts)} experts and their router"
    # The usual routings, and the default if it is another.
    routings = ["top-1", "top-2", "full"] if len(ensemble.experts) > 1 else ["full"]
    routings += [ensemble.routing] if ensemble.routing not in routings else []
    routed = [Variant(r, replace(ensemble, routing=r, alignment="snr"), f"{many}, {r}") for r in routings]
    # Each expert alone, for all clusters; one of some levels only cannot sample alone.
    experts = [
        Variant(expert.name, alone(expert, ensemble), f"{objective_text(expert.objective)}, for all clusters")
        for expert in ensemble.experts
        if expert.objective.levels is None
    ]
    # The dense models.
    one = {"monolith": "one network trained on all data", "student": "one network distilled from the ensemble"}
    dense_variants = [
        Variant(name, model, f"{one[name]}, {objective_text(model.experts[0].objective)}")
        for name, model in dense.items()
    ]
    # The ensemble with every other alignment.
    others = {"native": "native", "snr + x0 clamp": "snr-clamp", "snr alone": "snr-alone"}
    aligned_variants = [
        Variant(label, aligned(ensemble, alignment), f"{ensemble.routing}, {ALIGNMENTS[alignment]}")
        for label, alignment in others.items()
    ]
    # Their names, by the report's sections.
    groups = {
        "ensemble": tuple(v.name for v in routed),
        "expert": tuple(v.name for v in experts),
        "monolith": tuple(v.name for v in dense_variants),
    }
    # The default routing is itself the row with snr and calibration.
    labels = ("native", "snr + calibration", "snr + x0 clamp", "snr alone")
    names = ("native", ensemble.routing, "snr + x0 clamp", "snr alone")
    return [*routed, *experts, *dense_variants, *aligned_variants], groups, tuple(zip(labels, names, strict=True))


def variants_of_sweeps(
    sweeps: Sequence[SweepSettings], ensemble: Ensemble, dense: Mapping[str, Ensemble]
) -> tuple[list[Variant], Groups, Alignments]:
    """Like `variants_of`, for sweeps; a variant of two sweeps is measured once."""
    unique: dict[str, Variant] = {}
    for sweep in sweeps:
        for variant in variants_of_sweep(sweep, ensemble, dense):
            # Equal names mean equal values on all axes, so the first one counts.
            unique.setdefault(variant.name, variant)
    # Dense models form their own group in the report.
    dense_names = tuple(name for name, variant in unique.items() if _source_of(variant, dense) != "ensemble")
    groups = {"sweep": tuple(n for n in unique if n not in dense_names), "monolith": dense_names}
    return list(unique.values()), groups, ()


def with_identities(
    variants: Sequence[Variant], dense: Mapping[str, Ensemble], parts: Mapping[str, str]
) -> list[Variant]:
    """The variants with identities.

    Args:
        variants: of one run.
        dense: "monolith" and "student", if the run has them.
        parts: hashes of all weights of the "ensemble", the "monolith" and the "student".
    """
    return [replace(v, identity=_hash_of(v.ensemble, parts[_source_of(v, dense)])) for v in variants]


def _source_of(variant: Variant, dense: Mapping[str, Ensemble]) -> str:
    """The model that a variant samples: "monolith", "student" or "ensemble"."""
    return next((name for name, model in dense.items() if variant.ensemble is model), "ensemble")


def _hash_of(ensemble: Ensemble, parts: str) -> str:
    """Hash of the weights, the chosen experts with their calibrations, and the options; "" with a weak ensemble."""
    # The hashes of its parts are not among `parts`.
    if ensemble.weak is not None:
        return ""
    # An alignment may replace calibrations, so they are part of the identity.
    experts = [[expert.name, list(expert.clusters), _slopes(expert)] for expert in ensemble.experts]
    # The sampling is not part of the identity: caches add it.
    options = [ensemble.routing, ensemble.alignment, ensemble.replicas, ensemble.router is not None]
    return hashlib.sha256(json.dumps([parts, experts, options]).encode()).hexdigest()


def _slopes(expert: Expert) -> list[float] | None:
    return None if expert.calibration is None else expert.calibration.slope.tolist()


def alone(expert: Expert, ensemble: Ensemble) -> Ensemble:
    """One expert as an ensemble that covers all clusters.

    Raises:
        AtollError: the expert is not in the ensemble.
    """
    # Compare by identity: experts with equal values may be different networks.
    if all(expert is not other for other in ensemble.experts):
        raise AtollError(f"{expert.name} is not an expert of this ensemble")
    # Cluster 0 stands for all: there is no router.
    return Ensemble([replace(expert, clusters=(0,))], None, "full", null=ensemble.null)


def objective_text(objective: Objective) -> str:
    """The objective as text: "eps on cosine", or "eps on cosine at the levels 0.2 to 1"."""
    levels = "" if objective.levels is None else " at the levels {:g} to {:g}".format(*objective.levels)
    return f"{objective.prediction} on {objective.schedule.config()['name']}{levels}"
