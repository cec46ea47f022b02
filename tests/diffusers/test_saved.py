"""A stranger's pipeline loads Atoll's classes only, with a scheduler within bounds."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from atoll.diffusers import AtollPipeline
from atoll.errors import AtollError
from atoll.storage.artifact import CARD


@pytest.fixture(scope="module")
def saved(trained_run, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    AtollPipeline.from_pretrained(trained_run / "ensemble").save_pretrained(path)
    return path


@pytest.fixture
def edit(saved):
    """Changes keys of a JSON file of the pipeline until the test ends."""
    before: dict[Path, bytes] = {}

    def change(name: str, **values: Any) -> None:
        file = saved / name
        before.setdefault(file, file.read_bytes())
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    yield change
    for file, content in before.items():
        file.write_bytes(content)


def test_a_saved_pipeline_passes(saved) -> None:
    AtollPipeline.from_pretrained(saved)


@pytest.mark.parametrize(
    "change",
    [
        {"scheduler": ["evil", "FlowMatchEulerDiscreteScheduler"]},
        {"scheduler": ["diffusers", "UNet2DConditionModel"]},
        {"scheduler": ["atoll.diffusers", "AtollEnsemble"]},
        {"ensemble": ["diffusers", "AutoencoderKL"]},
        {"ensemble": None},
        {"vae": ["diffusers", "AutoencoderKL"]},
        {"_class_name": ["pipeline", "AtollPipeline"]},
        {"routing": {"a": 1}},
        {"routing": "x" * 1000},
    ],
)
def test_other_classes_and_libraries_are_refused_before_they_are_imported(saved, edit, change, monkeypatch) -> None:
    (saved / "evil.py").write_text("raise SystemExit('executed')")
    (saved / "pipeline.py").write_text("raise SystemExit('executed')")
    monkeypatch.syspath_prepend(str(saved))
    edit("model_index.json", **change)
    with pytest.raises(AtollError, match=r"model_index\.json: ") as refused:
        AtollPipeline.from_pretrained(saved)
    assert str(refused.value).isprintable()
    assert "evil" not in sys.modules


@pytest.mark.parametrize(
    "change",
    [
        {"num_train_timesteps": 10**12},
        {"num_train_timesteps": "1000"},
        {"shift": 1e300},
        {"solver_order": 10**9},
        {"trained_betas": [0.1] * 5000},
        {"anything": {"a": {"b": {"c": 1}}}},
        {"_class_name": "DDPMScheduler"},
    ],
)
def test_a_scheduler_out_of_bounds_is_refused(saved, edit, change) -> None:
    edit("scheduler/scheduler_config.json", **change)
    with pytest.raises(AtollError, match=r"scheduler_config\.json: .*save the pipeline again"):
        AtollPipeline.from_pretrained(saved)


def test_lack_of_memory_is_not_told_as_damage(saved, monkeypatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")

    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", full)
    with pytest.raises(AtollError, match=r"saved\S*: out of memory while loading it; free some memory"):
        AtollPipeline.from_pretrained(saved)


def test_an_ensemble_that_is_a_link_to_elsewhere_is_refused(saved, tmp_path) -> None:
    (tmp_path / "pipe").mkdir()
    for name in ("model_index.json", "scheduler"):
        (saved / name).rename(tmp_path / "pipe" / name)
    (tmp_path / "pipe" / "ensemble").symlink_to(saved / "ensemble")
    try:
        with pytest.raises(AtollError, match="leads out of"):
            AtollPipeline.from_pretrained(tmp_path / "pipe")
        AtollPipeline.from_pretrained(tmp_path / "pipe", trust_paths=True)
    finally:
        for name in ("model_index.json", "scheduler"):
            (tmp_path / "pipe" / name).rename(saved / name)
    assert (saved / "ensemble" / "experts" / "000" / CARD).is_file()
