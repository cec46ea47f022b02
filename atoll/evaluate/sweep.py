"""Sweeps: every combination of routing, guidance, steps, alignment, ... of one ensemble, as variants to measure."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from atoll.calibration import Calibration
from atoll.ensemble import Ensemble, Expert
from atoll.errors import AtollError
from atoll.evaluate.types import Variant
from atoll.manifest import EVEN, SweepSettings
from atoll.storage.layout import GENERALIST, MONOLITH, STUDENT

# How an expert's prediction is converted to the sampling path, and corrected. Text for the report.
ALIGNMENTS = {
    "snr": "evaluated at matched log-SNR, calibrated if its card has a calibration",
    "native": "HDDM's formulas",
    "snr-clamp": "evaluated at matched log-SNR, |x0| clamped to 20 instead of calibrated",
    "snr-alone": "evaluated at matched log-SNR, without correction",
}


def aligned(ensemble: Ensemble, alignment: str) -> Ensemble:
    """The ensemble under one of ALIGNMENTS.

    Without calibrations, replicas have equal weights: a stacking's weights would act as a calibration.

    Raises:
        AtollError: an unknown alignment.
    """
    match alignment:
        case "snr" | "native":
            return replace(ensemble, alignment=alignment)
        case "snr-clamp":
            # Without a calibration, the x0 of eps-experts is clamped.
            experts = [replace(expert, calibration=None) for expert in ensemble.experts]
        case "snr-alone":
            # A calibration that changes nothing also switches the clamp off.
            experts = [replace(expert, calibration=_identity(expert)) for expert in ensemble.experts]
        case _:
            raise AtollError(f"alignment {alignment!r}; expected one of {', '.join(ALIGNMENTS)}")
    return replace(ensemble, experts=experts, alignment="snr", replicas="equal")


def _identity(expert: Expert) -> Calibration:
    """A calibration that changes nothing."""
    # The mean keeps its shape, although the identity does not use it.
    mean = torch.zeros(()) if expert.calibration is None else torch.zeros_like(expert.calibration.mean)
    return Calibration.identity(mean)


def choose_experts(ensemble: Ensemble, chosen: dict[int | str, str | tuple[str, ...]], name: str) -> Ensemble:
    """The ensemble with only the chosen experts of each cluster: {"all": "flow", 0: "eps-cosine"}.

    Args:
        ensemble: all experts, named as in atoll.yaml: "flow" of cluster 3 is 3-flow.
        chosen: one or several names per cluster, or for "all" other clusters.
        name: of the choice, for error messages.

    Raises:
        AtollError: there is no such expert or cluster, or the choice is empty.
    """
    # Experts by name, and all clusters.
    known = {expert.name: expert for expert in ensemble.experts}
    clusters = sorted({cluster for expert in ensemble.experts for cluster in expert.clusters})
    # Clusters of the choice must exist.
    if unknown := [str(cluster) for cluster in chosen if cluster != "all" and cluster not in clusters]:
        raise AtollError(f"sweep, experts {name}: no cluster {', '.join(unknown)}; expected {clusters[0]} to "
                         f"{clusters[-1]}, or all")  # fmt: skip
    # Collect the experts, cluster by cluster.
    chosen_experts = []
    for cluster in clusters:
        # A cluster's own choice replaces that for all.
        names = chosen.get(cluster, chosen.get("all", ()))
        for choice in (names,) if isinstance(names, str) else names:
            if f"{cluster}-{choice}" not in known:
                raise AtollError(
                    f"sweep, experts {name}: no expert {cluster}-{choice}; expected one of {', '.join(known)}"
                )
            chosen_experts.append(known[f"{cluster}-{choice}"])
    if not chosen_experts:
        raise AtollError(f"sweep, experts {name}: no expert chosen; name one for all, or for some cluster")
    # The generalist is of no cluster: it is part of every choice.
    chosen_experts += [known[GENERALIST]] if GENERALIST in known else []
    return replace(ensemble, experts=chosen_experts)


def variants_of_sweep(sweep: SweepSettings, ensemble: Ensemble, dense: Mapping[str, Ensemble]) -> Iterator[Variant]:
    """Yield one variant per combination of the sweep's axes; their names contain the values on these axes.

    Args:
        sweep: the axes.
        ensemble: sampled for every combination, unless the sweep names only dense models.
        dense: "monolith" and "student", if the run has them.

    Raises:
        AtollError: an expert, a monolith or a student that the run does not have; an unknown routing.
    """
    # The dense models of the sweep must exist.
    dense_names = [name for name, wanted in (("monolith", sweep.monolith), ("student", sweep.student)) if wanted]
    for name in dense_names:
        if name not in dense:
            raise AtollError(
                f"sweep: {name}, but the run has none; train it with `atoll train {name}`, or leave it out"
            )
    # Dense models vary in their sampling only, ensembles also in their own options.
    axes = {axis: values for axis in ("steps", "method", "grid", "guidance_scale") if (values := getattr(sweep, axis))}
    # One group of variants per combination of sampling values.
    for sampling in _combinations(axes):
        for name in dense_names:
            yield _variant(name, dense[name], {}, sampling)
        if sweep.experts or sweep.routing or not dense_names:
            yield from _of_ensemble(sweep, ensemble, sampling)


def _of_ensemble(sweep: SweepSettings, ensemble: Ensemble, sampling: dict[str, Any]) -> Iterator[Variant]:
    """Every choice of experts with every routing, alignment and treatment of replicas."""
    # Axes that the sweep leaves out keep the ensemble's values.
    axes = {axis: values for axis in ("routing", "alignment", "replicas") if (values := getattr(sweep, axis))}
    for name, chosen in (sweep.experts or {"": {}}).items():
        experts = choose_experts(ensemble, chosen, name) if chosen else ensemble
        for options in _combinations(axes):
            # An alignment may also replace calibrations, so it is applied last.
            other = {key: value for key, value in options.items() if key != "alignment"}
            changed = replace(experts, **other)
            if "alignment" in options:
                changed = aligned(changed, options["alignment"])
            yield _variant(name, changed, options, sampling)


def _combinations(axes: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every combination of one value per axis; one empty combination without axes."""
    for values in product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def _variant(name: str, ensemble: Ensemble, options: dict[str, Any], sampling: dict[str, Any]) -> Variant:
    """A variant named after its values; "even" is the default grid."""
    # The name lists the values, in the order of the axes.
    words = [name] if name else []
    words += [str(value) for value in options.values()]
    words += [_AXIS_TEXT[axis].format(value) for axis, value in sampling.items()]
    axes = {**({"experts": name} if name else {}), **options, **sampling}
    # The default grid is stored as None, so both share the cache.
    drawn = {**sampling, "grid": None if sampling.get("grid") == EVEN else sampling.get("grid")}
    return Variant(", ".join(words) or ensemble.routing, ensemble, axes=axes, **drawn)


_DENSE = (MONOLITH, STUDENT)
_AXIS_TEXT = {"steps": "{} steps", "method": "{}", "grid": "{} grid", "guidance_scale": "guidance {:g}"}


def parse_sweep(text: list[str]) -> SweepSettings:
    """Parse the command line's axes: ["routing=top-1,top-2", "guidance=1,2"].

    Raises:
        AtollError: an unknown axis, or a bad value.
    """
    from pydantic import ValidationError

    # Split each axis into its values.
    content: dict[str, Any] = {}
    for part in text:
        axis, equals, values = part.partition("=")
        # The command line has a short word for the guidance scale.
        axis = {"guidance": "guidance_scale"}.get(axis, axis)
        # A dense model is chosen by its name alone.
        if axis in _DENSE and not equals:
            content[axis] = True
        elif axis in ("experts", *_DENSE) or axis not in SweepSettings.model_fields or not values:
            known = ", ".join(name for name in SweepSettings.model_fields if name not in ("experts", *_DENSE))
            raise AtollError(f"--sweep {part}: expected an axis with values, such as routing=top-1,top-2; axes: "
                             f"{known}, or monolith or student alone")  # fmt: skip
        else:
            # Spaces around commas do not matter.
            content[axis] = re.split(r"\s*,\s*", values.strip())
    # Validate; report the first problem in one line.
    try:
        return SweepSettings(**content)
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        raise AtollError(f"--sweep {'.'.join(map(str, first['loc']))}: {message}, got {first['input']}") from None


def read_prompts(file: Path) -> tuple[str, ...]:
    """Read a text file with one prompt per line.

    Raises:
        AtollError: the file cannot be read or is empty; a line is empty, or two lines are equal.
    """
    try:
        # A byte order mark is not part of the first prompt.
        prompts = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise AtollError(f"{file}: cannot be read ({error}); expected a text file, one prompt per line") from None
    if not prompts:
        raise AtollError(f"{file}: is empty; expected one prompt per line")
    # Empty and repeated lines are mistakes; name the line.
    for number, prompt in enumerate(prompts, start=1):
        if not prompt.strip():
            raise AtollError(f"{file}: line {number} is empty; remove it (the empty prompt means no condition)")
        if (first := prompts.index(prompt) + 1) != number:
            raise AtollError(f"{file}: lines {first} and {number} are equal; remove one of them")
    return tuple(prompts)
