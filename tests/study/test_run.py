"""A small study, with the trainings in this process instead of launched ones."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from atoll.errors import AtollError
from atoll.manifest import Manifest, load_manifest
from atoll.storage.artifact import sha256_file
from atoll.study import load_study, run_study
from atoll.study import run as run_module
from atoll.study.run import train_one
from atoll.study.table import difference, mean_and_spread
from atoll.train.distil import distil_run
from atoll.train.expert import train_expert, train_monolith
from atoll.train.router import train_router

CONTENT = {
    "name": "small",
    "seeds": [0, 1],
    "baseline": "k2:monolith",
    "columns": ["FD", "denoising", "likeness"],
    "manifest": {
        "data": {"source": "glyphs", "size": 16},
        "condition": {"name": "hash", "dim": 8, "length": 4},
        "clusters": {"k": 2, "fine": 32},
        "network": {"patch": 8, "width": 8, "depth": 1, "heads": 2},
        "train": {"steps": 3, "batch": 8, "calibration_holdout": 0.05, "track": "none", "precision": "fp32"},
        "router": {"network": {"patch": 8, "width": 8, "depth": 1, "heads": 2}},
        "sampling": {"steps": 2, "guidance_scale": 1.0, "routing": "top-1"},
        "evaluate": {
            "images": 12, "reference": 40, "held_out": 6, "steps": 2, "components": 4, "seeds": 1, "levels": [0.5],
            "batch": 6, "workers": 1, "sweep": [{"monolith": True, "routing": ["top-1", "full"]}],
        },
    },
    "objectives": {
        "flow": {"prediction": "flow", "schedule": "linear"},
        "eps": {"prediction": "eps", "schedule": "cosine"},
    },
    "runs": {
        "k2": {"experts": ["flow", "eps"], "monolith": "flow"},
        "pooled": {
            "like": "k2", "experts": {"all": "flow", 0: "eps"}, "changes": {"router": {"network": {"pooled": True}}},
            "evaluate": {"sweep": [{"routing": ["top-1"]}]},
        },
        "private": {
            "like": "k2", "drawn": 20, "experts": ["eps"], "student": {"objective": "flow", "teacher": "owner"},
            "evaluate": {"sweep": [{"student": True, "routing": ["top-1"]}]},
        },
    },
}  # fmt: skip


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(CONTENT, sort_keys=False))
    return str(file)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, Sequence[str] | None]]:
    """Train in this process instead of launching; record the calls as (run, only)."""
    calls: list[tuple[str, Sequence[str] | None]] = []

    def launch(run: Path, jobs: int | None = None, only: Sequence[str] | None = None) -> bool:
        calls.append((str(run.relative_to(tmp_path / "out")), only))
        manifest = load_manifest(run)
        if only == ["student"]:
            distil_run(run, manifest, resume=True)
            return True
        if only is None:
            for expert in manifest.experts:
                train_expert(run, manifest, expert.full_name, resume=True)
        train_router(run, manifest, resume=True)
        if manifest.monolith and (only is None or "monolith" in only):
            train_monolith(run, manifest, resume=True)
        return True

    monkeypatch.setattr(run_module, "launch_run", launch)
    return calls


def test_study_from_images_to_its_table(recipe, launched, tmp_path) -> None:
    study, out, logged = load_study(recipe), tmp_path / "out", []
    table = run_study(study, out, log=logged.append).read_text()
    trained = [("k2", None), ("pooled", ["router"]), ("private/drawn", ["router"]), ("private/drawn", ["student"])]
    assert launched == [(f"seed-{seed}/{run}", only) for seed in (0, 1) for run, only in trained]
    assert logged[:2] == ["seed 0, k2: training", "seed 0, k2: evaluating"]
    assert len(list((out / "encoded").iterdir())) == 1  # once for all runs of all seeds
    assert not os.path.isabs(os.readlink(out / "seed-1" / "k2" / "encoded"))
    assert sorted(p.name for p in (out / "seed-0/pooled/experts").iterdir() if p.name[0] != ".") == [
        "0-eps", "0-flow", "1-eps", "1-flow"
    ]  # fmt: skip
    lines = table.splitlines()
    assert len(lines) == 2 + 3 + 1 + 2
    assert lines[0].startswith("| run | variant | FD-pca4 [")
    assert "likeness" in lines[0]
    assert [line.split(" | ")[:2] for line in lines[2:]] == [
        ["| k2", "monolith"], ["| k2", "top-1"], ["| k2", "full"], ["| pooled", "top-1"],
        ["| private", "student"], ["| private", "top-1"],
    ]  # fmt: skip
    assert all(line.count("±") >= 3 for line in lines[2:])
    private = out / "seed-1" / "private"
    assert os.readlink(private / "student") == "drawn/student"
    drawn = json.loads((private / "drawn" / "encoded" / "index.json").read_text())
    assert drawn["rows"] == 2 * 20
    assert json.loads((private / "report.json").read_text())["hashes"]["encoded/index.json"] == sha256_file(
        out / "seed-1" / "k2" / "encoded" / "index.json"
    )  # evaluated on the real images
    value = json.loads((out / "results.json").read_text())
    monolith = value["rows"][0]
    assert set(monolith["values"]["denoising error"]) == {"0", "1"}
    assert monolith["values"]["likeness"] == {"0": pytest.approx(1), "1": pytest.approx(1)}

    # Again: nothing is trained.
    launched.clear()
    assert run_study(study, out).read_text() == table
    assert launched == []
    run_study(study, out, seeds=[1])
    assert launched == []


def test_directory_in_place_of_a_link_is_not_replaced(recipe, launched, tmp_path) -> None:
    link = tmp_path / "out" / "seed-0" / "k2" / "encoded"
    link.mkdir(parents=True)
    with pytest.raises(AtollError, match=r"encoded: exists, and is not the study's link to .* remove it"):
        run_study(load_study(recipe), tmp_path / "out")
    assert launched == []


def test_stopped_launch_stops_the_study(recipe, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(run_module, "launch_run", lambda *_, **__: False)
    with pytest.raises(AtollError, match="k2: stopped; all progress is saved"):
        run_study(load_study(recipe), tmp_path / "out")


def test_mean_spread_and_paired_difference_over_seeds() -> None:
    assert mean_and_spread({0: 1.0, 1: 2.0, 2: 3.0}) == "2.00 ± 1.0"
    assert mean_and_spread({1: 0.25}) == "0.250"
    assert mean_and_spread({}) == ""
    # differences 1, 2, 3: mean 2, deviation 1, t of two degrees of freedom 4.303
    assert difference({0: 2.0, 1: 4.0, 2: 6.0}, {0: 1.0, 1: 2.0, 2: 3.0, 3: 9.0}) == "+2.00 ± 2.5"
    assert difference({0: 1.0}, {0: 1.5}) == "-0.500"
    assert difference({0: 1.0}, {1: 1.5}) == ""


def test_a_run_like_another_has_its_generalist(monkeypatch, tmp_path) -> None:
    def launch(run: Path, jobs: int | None = None, only: Sequence[str] | None = None) -> bool:
        parts = [f"experts/{e.full_name}" for e in load_manifest(run).experts] + ["generalist"]
        for part in parts if only is None else only:
            (run / part).mkdir(parents=True, exist_ok=True)
            (run / part / "card.json").touch()
        return True

    monkeypatch.setattr(run_module, "launch_run", launch)
    monkeypatch.setattr(run_module, "encode_once", lambda manifest, out: out / "encoded" / "one")
    for name in ("cluster_run", "assemble_run"):
        monkeypatch.setattr(run_module, name, lambda *_: None)
    start = {"generalist": "flow", "experts": ["flow"]}
    runs = {"first": start, "pooled": {"like": "first", **start}}
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump({**CONTENT, "baseline": None, "runs": runs}, sort_keys=False))
    study, out = load_study(str(file)), tmp_path / "out"
    first, like = (train_one(study, name, 0, out, None) for name in runs)
    assert os.readlink(like / "generalist") == "../first/generalist"
    shutil.rmtree(first / "generalist")
    (like / "generalist").unlink()
    with pytest.raises(AtollError, match="run first has no generalist, which run pooled names"):
        train_one(study, "pooled", 0, out, None)


def test_a_run_like_another_has_its_common_model(monkeypatch, tmp_path) -> None:
    """A student may start from it, also beside data that the experts draw. Nothing is trained here."""
    trained = []

    def launch(run: Path, jobs: int | None = None, only: Sequence[str] | None = None) -> bool:
        trained.append((run.name, only))
        manifest = load_manifest(run)
        parts = [f"experts/{e.full_name}" for e in manifest.experts] + (["common"] if manifest.common else [])
        for part in parts if only is None else only:
            (run / part).mkdir(parents=True, exist_ok=True)
            (run / part / "card.json").touch()
        return True

    def synthesize(run: Path, manifest: Manifest, out: Path, **options: object) -> None:
        out.mkdir()
        shutil.copy(run / "atoll.yaml", out / "atoll.yaml")

    for name, stub in (("launch_run", launch), ("synthesize_run", synthesize)):
        monkeypatch.setattr(run_module, name, stub)
    monkeypatch.setattr(run_module, "encode_once", lambda manifest, out: out / "encoded" / "one")
    for name in ("cluster_run", "assemble_run"):
        monkeypatch.setattr(run_module, name, lambda *_: None)
    start = {"common": "flow", "experts": ["flow"]}
    student = {"objective": "flow", "teacher": "owner", "train": {"init": "common"}}
    runs = {
        "first": {**start, "changes": {"train": {"init": "common"}}},
        "drawn": {"like": "first", **start, "drawn": 12, "student": student},
    }
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump({**CONTENT, "baseline": None, "runs": runs}, sort_keys=False))
    study, out = load_study(str(file)), tmp_path / "out"
    first, like = (train_one(study, name, 0, out, None) for name in runs)
    assert trained == [("first", None), ("drawn", ["router"]), ("drawn", ["student"])]
    assert os.readlink(like / "common") == "../first/common"
    assert (like / "drawn" / "common" / "card.json").samefile(first / "common" / "card.json")
    shutil.rmtree(first / "common")
    (like / "common").unlink()
    with pytest.raises(AtollError, match="run first has no common model, which run drawn names"):
        train_one(study, "drawn", 0, out, None)
