"""The JSON of a saved pipeline, checked before diffusers reads it: it may be a stranger's."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from atoll.errors import AtollError
from atoll.storage import bounds
from atoll.storage.artifact import read_json
from atoll.storage.cards import CardRecord, parse_record
from atoll.storage.containment import require_inside
from atoll.storage.layout import ENSEMBLE

INDEX = "model_index.json"
_SCHEDULER, _SCHEDULER_CONFIG = "scheduler", "scheduler_config.json"
_REMEDY = "save the pipeline again"
_MAX_VALUES = 1000  # of a list in a scheduler's config: one per training step
_MAX_NUMBER = 1e6  # either sign. Training steps and sequence lengths are below 10,000
_DEPTH = 2  # a scheduler's config holds scalars and flat lists

# Schedulers of diffusers that can follow the linear path; `flow_sigmas` checks how they are set.
SchedulerName = Literal[
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "UniPCMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "SASolverScheduler",
]
_Option = Annotated[str, Field(strict=True, max_length=bounds.MAX_NAME)] | None


class PipelineIndex(CardRecord):
    """model_index.json: the pipeline's class, its two components and its options. No other class is ever loaded."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    class_name: Literal["AtollPipeline"] = Field(alias="_class_name")
    diffusers_version: _Option = Field(None, alias="_diffusers_version")
    name_or_path: _Option = Field(None, alias="_name_or_path")
    ensemble: tuple[Literal["atoll.diffusers"], Literal["AtollEnsemble"]]
    scheduler: tuple[Literal["diffusers"], SchedulerName]
    routing: _Option = None
    alignment: _Option = None
    replicas: _Option = None


def check_saved(path: Path, trust_paths: bool = False) -> None:
    """Raise AtollError unless the saved pipeline at `path` consists of Atoll's classes, within bounds.

    Args:
        path: its directory.
        trust_paths: whether its files may be links that lead out of it.

    Raises:
        AtollError: another class or library, an unknown key, a value out of bounds, or a link that leads out.
    """
    # diffusers would import the module that a component names.
    require_inside(path / INDEX, path, path, trust_paths)
    content = read_json(path / INDEX, bounds.CARD_BYTES)
    if (named := content.get("_class_name") if isinstance(content, dict) else None) != "AtollPipeline":
        raise AtollError(f"{path / INDEX}: names the pipeline {named!s:.60}; expected AtollPipeline")
    index = parse_record(PipelineIndex, content, f"{path / INDEX}: cannot be loaded", _REMEDY)
    require_inside(path / ENSEMBLE, path, path / INDEX, trust_paths)

    # The scheduler's numbers decide how much it computes.
    file = path / _SCHEDULER / _SCHEDULER_CONFIG
    require_inside(file, path, path / INDEX, trust_paths)
    config = read_json(file, bounds.CARD_BYTES)
    if not isinstance(config, dict):
        raise AtollError(f"{file}: holds {type(config).__name__}, expected a JSON object; {_REMEDY}")
    saved = config.get("_class_name", index.scheduler[1])
    if saved != index.scheduler[1]:
        raise AtollError(f"{file}: is of {saved!r:.60}, {INDEX} names {index.scheduler[1]}; {_REMEDY}")
    for key, value in config.items():
        _check_value(file, key, value)


def _check_value(file: Path, key: str, value: Any) -> None:
    """Raise AtollError for a value in a scheduler's config that no scheduler needs."""
    try:
        bounds.plain({key: value}, _DEPTH)
    except ValueError as error:
        raise AtollError(f"{file}: {key:.60}: {error}; {_REMEDY}") from None
    values = value if isinstance(value, list) else [value]
    if len(values) > _MAX_VALUES:
        raise AtollError(f"{file}: {key:.60}: {len(values):,} values, expected at most {_MAX_VALUES:,}; {_REMEDY}")
    for one in values:
        if isinstance(one, str) and len(one) > bounds.MAX_NAME:
            raise AtollError(f"{file}: {key:.60}: a string of {len(one):,} characters; {_REMEDY}")
        if isinstance(one, int | float) and abs(one) > _MAX_NUMBER:
            raise AtollError(f"{file}: {key:.60}: {one!r:.40}, expected at most {_MAX_NUMBER:,.0f}; {_REMEDY}")
    # A table with as many entries is computed.
    if key == "num_train_timesteps" and not (type(value) is int and 1 <= value <= bounds.MAX_STEPS):
        raise AtollError(f"{file}: {key}: {value!r:.40}, expected 1 to {bounds.MAX_STEPS:,}; {_REMEDY}")
