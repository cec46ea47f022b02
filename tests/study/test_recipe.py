"""A study's yaml: the manifests of its runs, and the errors raised before anything is trained."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from atoll.errors import AtollError
from atoll.study import load_study
from atoll.study.recipe import STUDIES, Study, merged

FLOW = {"prediction": "flow", "schedule": "linear"}
EPS = {"prediction": "eps", "schedule": "cosine"}
CONTENT: dict[str, Any] = {
    "name": "small",
    "seeds": [3, 5],
    "manifest": {"data": {"source": "glyphs"}, "clusters": {"k": 4}, "train": {"steps": 7, "batch": 24}},
    "objectives": {"flow": FLOW, "eps": EPS},
    "runs": {
        "whole": {"experts": ["flow", "eps"], "monolith": "flow"},
        "two": {"changes": {"clusters": {"k": 2}}},
        "mixed": {"like": "whole", "experts": {"all": "flow", 2: "eps"}},
        "some": {"like": "whole", "experts": {1: "eps"}, "evaluate": {"images": 9}},
    },
}


def study(**changes: Any) -> Study:
    return Study(**merged(CONTENT, changes))


def test_expert_gets_its_fraction_of_the_batch_monolith_all() -> None:
    whole, two = study().manifest_of("whole", 5), study().manifest_of("two", 3)
    assert (whole.seed, whole.name) == (5, "small-whole")
    assert [whole.train_of(expert).batch for expert in whole.experts] == [6] * 8
    assert [two.train_of(expert).batch for expert in two.experts] == [12, 12]
    assert whole.monolith is not None
    assert whole.train_of(whole.monolith).batch == 24
    assert whole.train_of(whole.router).batch == 24
    assert two.monolith is None
    assert whole.train.steps == 7


def test_generalist_gets_the_whole_batch_and_its_objective() -> None:
    fine = {"prediction": "flow", "schedule": "linear", "levels": [0, 0.2]}
    changes = {"train": {"init": "common"}, "generalist": {"train": {"steps": 3}}}
    runs = {"whole": {"common": "eps", "generalist": "fine", "changes": changes}}
    whole = study(objectives={"fine": fine}, runs=runs).manifest_of("whole", 3)
    assert whole.generalist is not None
    assert whole.generalist.objective.levels == (0.0, 0.2)
    settings = whole.train_of(whole.generalist)
    assert (settings.batch, settings.steps, settings.init) == (24, 3, "common")
    assert study(manifest={"generalist": {"train": {"steps": 3}}}).manifest_of("two", 3).generalist is None


def test_common_model_gets_the_whole_batch_and_only_experts_start_from_it() -> None:
    changes = {"train": {"init": "common"}, "common": {"train": {"steps": 3}, "network": {"depth": 2}}}
    runs = {"whole": {"common": "eps", "changes": changes}}
    whole = study(runs=runs).manifest_of("whole", 3)
    assert whole.common is not None
    assert whole.common.objective.prediction == "eps"
    assert (whole.train_of(whole.common).batch, whole.train_of(whole.common).steps) == (24, 3)
    assert whole.network_of(whole.common).depth == 2
    assert {whole.train_of(expert).batch for expert in whole.experts} == {6}
    assert {whole.train_of(expert).init for expert in whole.experts} == {"common"}
    assert whole.monolith is not None
    assert [whole.train_of(part).init for part in (whole.common, whole.monolith, whole.router)] == [None] * 3
    # A run that names none has none, whatever the study's manifest says.
    base = {"common": {"train": {"steps": 3}}}
    assert study(manifest=base).manifest_of("two", 3).common is None


def test_experts_are_named_for_all_clusters_or_by_cluster() -> None:
    names = [expert.full_name for expert in study().manifest_of("whole", 3).experts]
    assert names == ["0-flow", "1-flow", "2-flow", "3-flow", "0-eps", "1-eps", "2-eps", "3-eps"]
    mixed = study().manifest_of("mixed", 3)
    assert [expert.full_name for expert in mixed.experts] == ["0-flow", "1-flow", "3-flow", "2-eps"]
    assert mixed.experts[3].objective.prediction == "eps"
    assert [expert.full_name for expert in study().manifest_of("some", 3).experts] == ["1-eps"]
    both = study(runs={"two": {"experts": {"all": "flow", 1: ["flow", "eps"]}}}).manifest_of("two", 3)
    assert [expert.full_name for expert in both.experts] == ["0-flow", "1-flow", "1-eps"]
    assert study().manifest_of("some", 3).evaluate.images == 9


def test_student_takes_an_objective_of_the_study() -> None:
    runs = {"two": {"student": {"objective": "eps", "teacher": "ensemble", "train": {"batch": 6}}}}
    student = study(runs=runs).manifest_of("two", 3).student
    assert student is not None
    assert (student.objective.prediction, student.teacher, student.train) == ("eps", "ensemble", {"batch": 6})


def test_changes_merge_by_key_unless_the_name_differs() -> None:
    base = {"a": {"b": 1, "c": {"d": 2}}, "feature": {"name": "mobilenetv2", "weights": "w"}}
    assert merged(base, {"a": {"c": {"e": 3}}})["a"] == {"b": 1, "c": {"d": 2, "e": 3}}
    assert merged(base, {"feature": {"size": 64}})["feature"] == {"name": "mobilenetv2", "weights": "w", "size": 64}
    assert merged(base, {"feature": {"name": "pixels"}})["feature"] == {"name": "pixels"}
    assert base == {"a": {"b": 1, "c": {"d": 2}}, "feature": {"name": "mobilenetv2", "weights": "w"}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [1, 1]}, "seeds: .*without repetition"),
        ({"seeds": []}, "seeds: .*at least one"),
        ({"name": "a/b"}, "name: "),
        ({"runs": {"whole": {"experts": ["x0"]}}}, "runs.whole: no objective 'x0'; expected one of flow, eps"),
        ({"runs": {"whole": {"monolith": "x0"}}}, "no objective 'x0'"),
        ({"runs": {"two": {"common": "x0"}}}, "runs.two: no objective 'x0'"),
        ({"runs": {"two": {"generalist": "x0"}}}, "runs.two: no objective 'x0'"),
        (
            {"runs": {"two": {"changes": {"train": {"init": "common"}}}}},
            "run two: .*train.init: common, but there is no `common:` section",
        ),
        ({"runs": {"whole": {"experts": []}}}, "runs.whole.experts.*at least one objective"),
        ({"runs": {"mixed": {"like": "later"}}}, "runs.mixed.like: 'later'; expected an earlier run of this file"),
        ({"runs": {"mixed": {"experts": {"every": "flow"}}}}, "'every'; expected a cluster's number, or all"),
        (
            {"runs": {"two": {"changes": {"clusters": {"k": 5}}}}},
            "run two: batch 24 is not a multiple of its 5 clusters",
        ),
        ({"runs": {"two": {"changes": {"train": {"step": 5}}}}}, "run two: unknown key train.step"),
        ({"baseline": "three:monolith"}, "baseline: 'three:monolith'; expected RUN:VARIANT, of whole, two"),
        ({"runs": {"two": {"twice": 1}}}, "runs.two.twice"),
        (
            {"runs": {"two": {"student": {"teacher": "owner"}}}},
            "runs.two.student: has no objective; expected one of flow",
        ),
        ({"runs": {"two": {"student": {"objective": "x0"}}}}, "runs.two: no objective 'x0'"),
        ({"runs": {"two": {"student": {"objective": "eps", "teach": 1}}}}, "run two: unknown key student.teach"),
        ({"runs": {"two": {"drawn": 5}}}, "runs.two.drawn: 5 without `like`"),
        ({"objectives": {"flow": {"prediction": "noise"}}}, "objectives.flow"),
    ],
)
def test_errors_are_raised_before_anything_is_trained(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(merged(CONTENT, changes), sort_keys=False))
    with pytest.raises(AtollError, match=message) as caught:
        load_study(str(file))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[1, 2]", "name: {", "7", ""])
def test_other_yaml_files_are_not_studies(tmp_path: Path, text: str) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(text)
    with pytest.raises(AtollError, match=r"study.yaml: not a study|study.yaml: .*[Ff]ield required") as caught:
        load_study(str(file))
    assert "\n" not in str(caught.value)


def test_unknown_name_lists_the_built_in_studies() -> None:
    with pytest.raises(AtollError, match=r"no study 'mars'; expected one of .*eurosat"):
        load_study("mars")


@pytest.mark.parametrize("name", [file.stem for file in sorted(STUDIES.glob("*.yaml"))])
def test_every_built_in_study_is_valid(name: str) -> None:
    found = load_study(name)
    assert found.name == name
    for run in found.runs:
        found.manifest_of(run, found.seeds[0])
