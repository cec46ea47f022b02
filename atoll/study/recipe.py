"""The recipe of a study: one base manifest, the runs that differ from it, and the seeds.

The study's directory holds:
    encoded/<hash>/            one run per encoding that some run of the study needs
    evaluation/                results that later evaluations reuse
    seed-<n>/<run>/            an ordinary run: atoll.yaml, clusters/, experts/, router/, ..., report.html
    results.json, results.md   every variant of every run: mean and spread over the seeds
"""

import copy
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, PositiveInt, ValidationError, field_validator, model_validator

from atoll.errors import AtollError
from atoll.manifest import RECIPES, Manifest, ObjectiveSettings, Section, parse_manifest
from atoll.storage.layout import COMMON, GENERALIST, MONOLITH

STUDIES = RECIPES / "studies"


def run_path(out: Path, seed: int, name: str) -> Path:
    """Return the directory of one run of a study, below the study's directory `out`."""
    return out / f"seed-{seed}" / name


class StudyRun(Section):
    """One run of a study, repeated for every seed.

    experts: names of the study's objectives; every cluster gets one expert per name (several are replicas). Or by
    cluster: {all: flow, 0: [flow, eps-cosine]}.
    like: another run, whose clusters and experts this run reuses; `experts` then selects those to assemble.
    drawn: latents per cluster that the experts draw, and that router and student train on instead of the real data
    (DDM: private data); the evaluation still uses the real data. Only with `like`.
    changes: overrides of the study's manifest, key by key.
    common, generalist, monolith: the name of its objective; None: no such model. Experts start from the common model
    if their settings say so: `changes: {train: {init: common}}`; a run that is `like` another has that one's.
    student: the `student` section of atoll.yaml, with the name of an objective; None: no student.
    """

    experts: tuple[str, ...] | dict[int | str, str | tuple[str, ...]] = ("flow",)
    like: str | None = None
    drawn: PositiveInt | None = None
    changes: dict[str, Any] = Field(default_factory=dict)
    common: str | None = None
    generalist: str | None = None
    monolith: str | None = None
    student: dict[str, Any] | None = None
    evaluate: dict[str, Any] = Field(default_factory=dict)  # overrides of the manifest's `evaluate`, key by key

    @field_validator("experts")
    @classmethod
    def _clusters(cls, experts: Any) -> Any:
        if isinstance(experts, dict):
            for cluster in experts:
                if not isinstance(cluster, int) and cluster != "all":
                    raise ValueError(f"{cluster!r}; expected a cluster's number, or all")
        elif not experts:
            raise ValueError("an empty list; expected at least one objective's name")
        return experts

    def objectives(self, k: int) -> list[tuple[int, str]]:
        """List (cluster, name of the objective) for every expert of a run with k clusters."""
        if not isinstance(self.experts, dict):
            return [(cluster, name) for name in self.experts for cluster in range(k)]
        # A cluster without an entry gets the experts of "all".
        default = self.experts.get("all", ())
        names_of = {cluster: _as_tuple(self.experts.get(cluster, default)) for cluster in range(k)}
        # By objective first, then by cluster, in the order in which the objectives appear.
        names = dict.fromkeys(name for cluster_names in names_of.values() for name in cluster_names)
        return [(cluster, name) for name in names for cluster in range(k) if name in names_of[cluster]]

    @property
    def objective_names(self) -> list[str]:
        """The names in `experts`."""
        if not isinstance(self.experts, dict):
            return list(self.experts)
        return [name for names in self.experts.values() for name in _as_tuple(names)]


class Study(Section):
    """A study's yaml file.

    manifest: what all runs share. Its train.batch is the batch of the whole model; an expert of K clusters gets 1/K of
    it, so that ensemble and monolith train on equally many images (DDM and HDDM: equal total FLOPs). The common model
    and the generalist get all of it.
    baseline: the variant that all others are compared with, as RUN:VARIANT.
    columns: the metrics in results.md, by the beginnings of their names; empty: all.
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
            raise ValueError(f"seeds: {list(self.seeds)}; expected at least one, without repetition")
        earlier: set[str] = set()
        for name, run in self.runs.items():
            # Dense models name an objective of the study, as experts do.
            if run.student is not None and "objective" not in run.student:
                raise ValueError(f"runs.{name}.student: has no objective; expected one of {', '.join(self.objectives)}")
            dense = [run.common, run.generalist, run.monolith, run.student["objective"] if run.student else None]
            for objective in (*run.objective_names, *(name for name in dense if name is not None)):
                if objective not in self.objectives:
                    known = ", ".join(self.objectives)
                    raise ValueError(f"runs.{name}: no objective {objective!r}; expected one of {known}")
            # Runs are made in order, so a run can only reuse an earlier one.
            if run.like is not None and run.like not in earlier:
                raise ValueError(f"runs.{name}.like: {run.like!r}; expected an earlier run of this file")
            if run.drawn is not None and run.like is None:
                raise ValueError(f"runs.{name}.drawn: {run.drawn} without `like`; name the run whose experts draw")
            earlier.add(name)
        if self.baseline is not None and self.baseline.partition(":")[0] not in self.runs:
            raise ValueError(f"baseline: {self.baseline!r}; expected RUN:VARIANT, of {', '.join(self.runs)}")
        return self

    def manifest_of(self, name: str, seed: int) -> Manifest:
        """Build the manifest of one run.

        Raises:
            AtollError: it is not valid, or k does not divide the batch.
        """
        return parse_manifest(yaml.safe_dump(self.content_of(name, seed)), f"study {self.name}, run {name}")

    def content_of(self, name: str, seed: int) -> dict[str, Any]:
        """Build the content of a run's atoll.yaml, as plain values; raises as `manifest_of`."""
        run = self.runs[name]
        # The base manifest with the run's overrides.
        content = merged(self.manifest, run.changes)
        content["evaluate"] = merged(content.get("evaluate", {}), run.evaluate)

        # An expert trains on 1/k of the batch; router and models of all clusters on all of it.
        k = content.setdefault("clusters", {}).setdefault("k", 4)
        train = content.setdefault("train", {})
        batch = train.setdefault("batch", 64)
        if batch % k:
            raise AtollError(f"study {self.name}, run {name}: batch {batch} is not a multiple of its {k} clusters")
        train["batch"] = batch // k
        router = content.setdefault("router", {})
        router["train"] = {"batch": batch, **router.get("train", {})}

        # Names of objectives become objectives.
        plain = {key: objective.model_dump(exclude_defaults=True) for key, objective in self.objectives.items()}
        content["experts"] = [
            {"cluster": cluster, "name": objective, "objective": plain[objective]}
            for cluster, objective in run.objectives(k)
        ]
        for part, wanted in ((COMMON, run.common), (GENERALIST, run.generalist), (MONOLITH, run.monolith)):
            if wanted is None:
                content.pop(part, None)
                continue
            settings = content.get(part, {})
            train = {"batch": batch, **settings.get("train", {})}
            content[part] = {**settings, "objective": plain[wanted], "train": train}
        if run.student is not None:
            content["student"] = {**run.student, "objective": plain[run.student["objective"]]}
        return copy.deepcopy({**content, "name": f"{self.name}-{name}", "seed": seed})  # copied: no aliases in the yaml


def _as_tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with the changes, merged mapping by mapping; neither argument is altered.

    A mapping with another `name` ({name: pixels} for {name: mobilenetv2, size: 128}) replaces the old one as a whole.
    """
    out = copy.deepcopy(base)
    for key, value in changes.items():
        # Only two mappings can be merged; any other value replaces the old one.
        mergeable = isinstance(value, dict) and isinstance(out.get(key), dict)
        mergeable = mergeable and value.get("name", out[key].get("name")) == out[key].get("name")
        out[key] = merged(out[key], value) if mergeable else copy.deepcopy(value)
    return out


def load_study(name: str) -> Study:
    """Load a built-in study by name ("eurosat"), or a yaml file by path.

    Raises:
        AtollError: there is no such file, or something in it is unknown or out of range.
    """
    # A built-in study takes precedence over a file of the same name.
    file = next((f for f in (STUDIES / f"{name}.yaml", Path(name)) if f.is_file()), None)
    if file is None:
        known = ", ".join(sorted(f.stem for f in STUDIES.glob("*.yaml")))
        raise AtollError(f"no study {name!r}; expected one of {known}, or a path to a yaml file")
    try:
        study = Study(**yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError) as error:
        raise AtollError(f"{file}: not a study ({' '.join(str(error).split())})") from None
    except ValidationError as error:
        # One line, the first problem: the rest often follows from it.
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the study"
        raise AtollError(f"{file}: {key}: {first['msg'].removeprefix('Value error, ')}") from None
    for run in study.runs:  # validate all of them before the first is trained
        study.manifest_of(run, study.seeds[0])
    return study
