"""Sweeps: every combination of routing, guidance, steps, alignment, ... of one ensemble, as variants to be measured."""

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

# How an expert's answer is brought to the sampling path, and what corrects it.
ALIGNMENTS = {
    "snr": "asked at equal log-SNR, calibrated where its card says how",
    "native": "HDDM's formulas",
    "snr-clamp": "asked at equal log-SNR, |x0| at most 20 instead of a calibration",
    "snr-alone": "asked at equal log-SNR, nothing corrected",
}


def aligned(ensemble: Ensemble, alignment: str) -> Ensemble:
    """The ensemble under one of ALIGNMENTS; without calibrations, replicas share alike (a stacking would take their
    place)."""
    match alignment:
        case "snr" | "native":
            return ensemble.with_options(alignment=alignment)
        case "snr-clamp":
            experts = [replace(expert, calibration=None) for expert in ensemble.experts]
        case "snr-alone":
            experts = [replace(expert, calibration=_identity(expert)) for expert in ensemble.experts]
        case _:
            raise AtollError(f"alignment {alignment!r}; expected one of {', '.join(ALIGNMENTS)}")
    return ensemble.with_experts(experts, alignment="snr", replicas="equal")


def _identity(expert: Expert) -> Calibration:
    mean = torch.zeros(()) if expert.calibration is None else torch.zeros_like(expert.calibration.mean)
    return Calibration.identity(mean)


def choose(ensemble: Ensemble, chosen: dict[int | str, str | tuple[str, ...]], name: str) -> Ensemble:
    """The ensemble with, of each cluster, the experts that `chosen` names: {"all": "flow", 0: "eps-cosine"}.

    Experts are named as in atoll.yaml: "flow" of cluster 3 is 3-flow.

    Raises:
        AtollError: there is no such expert; `name` says whose choice it was.
    """
    known = {expert.name: expert for expert in ensemble.experts}
    clusters = sorted({cluster for expert in ensemble.experts for cluster in expert.clusters})
    if unknown := [str(cluster) for cluster in chosen if cluster != "all" and cluster not in clusters]:
        raise AtollError(f"sweep, experts {name}: no cluster {', '.join(unknown)}; expected {clusters[0]} to "
                         f"{clusters[-1]}, or all")  # fmt: skip
    taken = []
    for cluster in clusters:
        wanted = chosen.get(cluster, chosen.get("all", ()))
        for one in (wanted,) if isinstance(wanted, str) else wanted:
            if f"{cluster}-{one}" not in known:
                raise AtollError(
                    f"sweep, experts {name}: no expert {cluster}-{one}; expected one of {', '.join(known)}"
                )
            taken.append(known[f"{cluster}-{one}"])
    if not taken:
        raise AtollError(f"sweep, experts {name}: chooses none; name an expert for all, or for some cluster")
    return ensemble.with_experts(taken)


def variants_of_sweep(sweep: SweepSettings, ensemble: Ensemble, dense: Mapping[str, Ensemble]) -> Iterator[Variant]:
    """One variant per combination of the axes that are named; their names tell the values of these axes.

    dense: by name, "monolith" and "student", as far as they are there.

    Raises:
        AtollError: an expert that is not there, a monolith or student where there is none, an unknown routing.
    """
    asked = [name for name, wanted in (("monolith", sweep.monolith), ("student", sweep.student)) if wanted]
    for name in asked:
        if name not in dense:
            raise AtollError(
                f"sweep: {name}, but the run has none; train it with `atoll train {name}`, or leave it out"
            )
    axes = {axis: values for axis in ("steps", "method", "grid", "guidance_scale") if (values := getattr(sweep, axis))}
    for how in _combinations(axes):
        for name in asked:
            yield _variant(name, dense[name], {}, how)
        if sweep.experts or sweep.routing or not asked:
            yield from _of_ensemble(sweep, ensemble, how)


def _of_ensemble(sweep: SweepSettings, ensemble: Ensemble, how: dict[str, Any]) -> Iterator[Variant]:
    axes = {axis: values for axis in ("routing", "alignment", "replicas") if (values := getattr(sweep, axis))}
    for name, chosen in (sweep.experts or {"": {}}).items():
        experts = choose(ensemble, chosen, name) if chosen else ensemble
        for options in _combinations(axes):
            other = {key: value for key, value in options.items() if key != "alignment"}
            made = experts.with_options(**other)
            if "alignment" in options:
                made = aligned(made, options["alignment"])
            yield _variant(name, made, options, how)


def _combinations(axes: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for values in product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def _variant(name: str, ensemble: Ensemble, options: dict[str, Any], how: dict[str, Any]) -> Variant:
    said = [name] if name else []
    said += [str(value) for value in options.values()]
    said += [_SAID[axis].format(value) for axis, value in how.items()]
    axes = {**({"experts": name} if name else {}), **options, **how}
    drawn = {**how, "grid": None if how.get("grid") == EVEN else how.get("grid")}
    return Variant(", ".join(said) or ensemble.routing, ensemble, axes=axes, **drawn)


_DENSE = ("monolith", "student")
_SAID = {"steps": "{} steps", "method": "{}", "grid": "{} grid", "guidance_scale": "guidance {:g}"}


def parse_sweep(text: list[str]) -> SweepSettings:
    """From the command line: ["routing=top-1,top-2", "guidance=1,2"].

    Raises:
        AtollError: an unknown axis, or a value that it does not take.
    """
    from pydantic import ValidationError

    content: dict[str, Any] = {}
    for part in text:
        axis, equals, values = part.partition("=")
        axis = {"guidance": "guidance_scale"}.get(axis, axis)
        if axis in _DENSE and not equals:
            content[axis] = True
        elif axis in ("experts", *_DENSE) or axis not in SweepSettings.model_fields or not values:
            known = ", ".join(name for name in SweepSettings.model_fields if name not in ("experts", *_DENSE))
            raise AtollError(f"--sweep {part}: expected an axis and its values, such as routing=top-1,top-2; axes: "
                             f"{known}, or monolith or student by itself")  # fmt: skip
        else:
            content[axis] = re.split(r"\s*,\s*", values.strip())
    try:
        return SweepSettings(**content)
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        raise AtollError(f"--sweep {'.'.join(map(str, first['loc']))}: {message}, got {first['input']}") from None


def read_prompts(file: Path) -> tuple[str, ...]:
    """One prompt per line.

    Raises:
        AtollError: the file cannot be read or is empty; a line is, or two are equal.
    """
    try:
        prompts = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise AtollError(f"{file}: cannot be read ({error}); name a text file, one prompt per line") from None
    if not prompts:
        raise AtollError(f"{file}: is empty; expected one prompt per line")
    for number, prompt in enumerate(prompts, start=1):
        if not prompt.strip():
            raise AtollError(f"{file}: line {number} is empty; remove it (the empty prompt is the null condition's)")
        if (first := prompts.index(prompt) + 1) != number:
            raise AtollError(f"{file}: lines {first} and {number} are equal; remove one of them")
    return tuple(prompts)
