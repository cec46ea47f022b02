"""What a study is: one base manifest, the runs that differ from it, and the seeds.

On the disk, below the study's directory:
    encoded/<hash>/          each data set as some run needs it, once
    seed-<n>/<run>/          a run like any other: atoll.yaml, clusters/, experts/, router/, ..., report.html
    results.json, results.md every variant of every run: mean and spread over the seeds
"""

import copy
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, PositiveInt, ValidationError, field_validator, model_validator

from atoll.errors import AtollError
from atoll.manifest import RECIPES, Manifest, ObjectiveSettings, Section, parse_manifest

STUDIES = RECIPES / "studies"


def run_path(out: Path, seed: int, name: str) -> Path:
    """The directory of one run of a study, below the study's directory `out`."""
    return out / f"seed-{seed}" / name


class StudyRun(Section):
    """One run of a study, made once per seed.

    experts: names of the study's objectives, of which every cluster gets one expert each (replicas, if there are
    several). Or by cluster: {all: flow, 0: [flow, eps-cosine]}.
    like: another run, whose clusters and experts are taken as they are; of `experts` those that are to be assembled.
    drawn: so many latents of each cluster, drawn by these experts, are what router and student train on (DDM: private
    data); what is measured is measured against the real data. With `like` only.
    changes: what differs from the study's manifest, key by key.
    monolith: its objective's name; None: none is trained.
    student: as the `student` section of atoll.yaml, but for its objective, which is a name; None: none is trained.
    """

    experts: tuple[str, ...] | dict[int | str, str | tuple[str, ...]] = ("flow",)
    like: str | None = None
    drawn: PositiveInt | None = None
    changes: dict[str, Any] = Field(default_factory=dict)
    monolith: str | None = None
    student: dict[str, Any] | None = None
    evaluate: dict[str, Any] = Field(default_factory=dict)  # instead of the study manifest's `evaluate`, key by key

    @field_validator("experts")
    @classmethod
    def _clusters(cls, experts: Any) -> Any:
        if isinstance(experts, dict):
            for cluster in experts:
                if not isinstance(cluster, int) and cluster != "all":
                    raise ValueError(f"{cluster!r}; expected the number of a cluster, or all")
        elif not experts:
            raise ValueError("an empty list; expected at least one objective's name")
        return experts

    def objectives(self, k: int) -> list[tuple[int, str]]:
        """(cluster, objective's name) of every expert, of k clusters."""
        if not isinstance(self.experts, dict):
            return [(cluster, name) for name in self.experts for cluster in range(k)]
        everywhere = self.experts.get("all", ())
        chosen = {cluster: _several(self.experts.get(cluster, everywhere)) for cluster in range(k)}
        names = dict.fromkeys(name for several in chosen.values() for name in several)
        return [(cluster, name) for name in names for cluster in range(k) if name in chosen[cluster]]

    @property
    def named(self) -> list[str]:
        """The objectives' names."""
        if not isinstance(self.experts, dict):
            return list(self.experts)
        return [name for several in self.experts.values() for name in _several(several)]


class Study(Section):
    """The whole of a study's yaml file.

    manifest: what all runs share; its train.batch is the whole model's, of which an expert gets the K-th part, so that
    ensemble and monolith train on equally many images (DDM and HDDM: equal total FLOPs).
    baseline: the variant that all others are compared with, as RUN:VARIANT.
    columns: of results.md: how the names of the metrics begin that it shows; none: all.
    """

    name: str = Field(pattern=r"^[\w.-]+$")
    seeds: tuple[int, ...] = (0, 1, 2)
    manifest: dict[str, Any]
    objectives: dict[str, ObjectiveSettings]
    runs: dict[str, StudyRun]
    baseline: str | None = None
    columns: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> "Study":
        if len(set(self.seeds)) < len(self.seeds) or not self.seeds:
            raise ValueError(f"seeds: {list(self.seeds)}; expected at least one, and none twice")
        done: set[str] = set()
        for name, run in self.runs.items():
            if run.student is not None and "objective" not in run.student:
                raise ValueError(f"runs.{name}.student: has no objective; expected one of {', '.join(self.objectives)}")
            dense = [run.monolith, run.student["objective"] if run.student else None]
            for objective in (*run.named, *(one for one in dense if one is not None)):
                if objective not in self.objectives:
                    known = ", ".join(self.objectives)
                    raise ValueError(f"runs.{name}: no objective {objective!r}; expected one of {known}")
            if run.like is not None and run.like not in done:
                raise ValueError(f"runs.{name}.like: {run.like!r}; expected a run that stands before it")
            if run.drawn is not None and run.like is None:
                raise ValueError(f"runs.{name}.drawn: by which experts? name their run in `like`")
            done.add(name)
        if self.baseline is not None and self.baseline.partition(":")[0] not in self.runs:
            raise ValueError(f"baseline: {self.baseline!r}; expected RUN:VARIANT, of {', '.join(self.runs)}")
        return self

    def manifest_of(self, name: str, seed: int) -> Manifest:
        """The atoll.yaml of one run. Raises AtollError where it is not valid, or k does not divide the batch."""
        return parse_manifest(yaml.safe_dump(self.content_of(name, seed)), f"study {self.name}, run {name}")

    def content_of(self, name: str, seed: int) -> dict[str, Any]:
        """What `manifest_of` parses, as plain values."""
        run = self.runs[name]
        content = merged(self.manifest, run.changes)
        content["evaluate"] = merged(content.get("evaluate", {}), run.evaluate)
        k = content.setdefault("clusters", {}).setdefault("k", 4)
        train = content.setdefault("train", {})
        batch = train.setdefault("batch", 64)
        if batch % k:
            raise AtollError(f"study {self.name}, run {name}: batch {batch} is no multiple of its {k} clusters")
        train["batch"] = batch // k
        router = content.setdefault("router", {})
        router["train"] = {"batch": batch, **router.get("train", {})}
        plain = {key: objective.model_dump(exclude_defaults=True) for key, objective in self.objectives.items()}
        content["experts"] = [
            {"cluster": cluster, "name": objective, "objective": plain[objective]}
            for cluster, objective in run.objectives(k)
        ]
        if run.monolith is not None:
            monolith = content.get("monolith", {})
            train = {"batch": batch, **monolith.get("train", {})}
            content["monolith"] = {**monolith, "objective": plain[run.monolith], "train": train}
        else:
            content.pop("monolith", None)
        if run.student is not None:
            content["student"] = {**run.student, "objective": plain[run.student["objective"]]}
        return copy.deepcopy({**content, "name": f"{self.name}-{name}", "seed": seed})  # no aliases in the yaml


def _several(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with the changes, mapping by mapping; neither is altered.

    A mapping that names another thing ({name: pixels} for {name: mobilenetv2, size: 128}) takes its place as a whole.
    """
    out = copy.deepcopy(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        both = both and value.get("name", out[key].get("name")) == out[key].get("name")
        out[key] = merged(out[key], value) if both else copy.deepcopy(value)
    return out


def load_study(name: str) -> Study:
    """A built-in study by name ("eurosat"), or a path to one.

    Raises:
        AtollError: no such file, or anything in it that is unknown or out of range.
    """
    file = next((f for f in (STUDIES / f"{name}.yaml", Path(name)) if f.is_file()), None)
    if file is None:
        known = ", ".join(sorted(f.stem for f in STUDIES.glob("*.yaml")))
        raise AtollError(f"no study {name!r}; expected one of {known}, or a path to a yaml file")
    try:
        study = Study(**yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError) as error:
        raise AtollError(f"{file}: is no study ({' '.join(str(error).split())})") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the study"
        raise AtollError(f"{file}: {key}: {first['msg'].removeprefix('Value error, ')}") from None
    for run in study.runs:  # all of them, before the first is trained
        study.manifest_of(run, study.seeds[0])
    return study
