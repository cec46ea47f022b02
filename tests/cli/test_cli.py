"""The command line as a user meets it: real processes, exit codes, one line per mistake."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from atoll import __version__
from atoll.cli import app
from atoll.storage.memory import refuse_out_of_memory
from tests.waiting import run_to_end


def atoll(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "atoll", *map(str, arguments)]
    return run_to_end(command, cwd=cwd)


def assert_one_line(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("atoll: ")
    for word in words:
        assert word in lines[0]


def test_help_is_a_map_of_the_stages() -> None:
    text = atoll("--help").stdout
    verbs = ["init", "encode", "cluster", "train", "launch", "assemble", "sample", "evaluate", "demo"]
    positions = [text.index(f" {verb} ", text.index("Stages ")) for verb in verbs[:-1]]
    assert positions == sorted(positions)
    assert "demo" in text
    assert atoll("--version").stdout.strip() == f"atoll {__version__}"


def test_train_assemble_sample(run) -> None:
    for part in (["expert", "0"], ["expert", "1-flow-linear"], ["expert", "2"], ["router"]):
        assert atoll("train", *part, cwd=run).returncode == 0
    assert atoll("assemble", cwd=run).returncode == 0
    done = atoll("sample", run / "ensemble", "moss sand", "rain", "-o", run / "out.png", "--steps", 2)
    assert done.returncode == 0, done.stderr
    assert Image.open(run / "out.png").size == (264, 64)


def test_launch_trains_everything_and_goes_on_where_it_stopped(run) -> None:
    done = atoll("launch", "--run", run, "--jobs", 2)
    assert done.returncode == 0, done.stderr
    parts = ["experts/0-eps-cosine", "experts/1-flow-linear", "experts/2-x0-linear-beta", "router", "monolith"]
    assert all((run / part / "card.json").is_file() for part in parts)
    shutil.rmtree(run / "router")
    before = {part: (run / part / "card.json").stat().st_mtime_ns for part in parts if part != "router"}
    assert atoll("launch", "--run", run).returncode == 0
    assert (run / "router" / "card.json").is_file()
    assert before == {part: (run / part / "card.json").stat().st_mtime_ns for part in before}


def test_one_failed_training_does_not_stop_the_others(run) -> None:
    shutil.rmtree(run / "clusters" / "cluster-001")
    done = atoll("launch", "--run", run)
    assert done.returncode == 2
    assert "1-flow-linear failed: atoll: " in done.stderr
    assert (run / "experts" / "0-eps-cosine" / "card.json").is_file()
    assert (run / "router" / "card.json").is_file()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), None])
def test_a_training_without_memory_has_an_exit_code_that_a_launch_retries(run, monkeypatch, error) -> None:
    def full(*_: object, **__: object) -> None:
        if error is not None:
            raise error
        refuse_out_of_memory(MemoryError(), "weights.safetensors", 9)

    monkeypatch.setattr("atoll.train.expert.train_expert", full)
    done = CliRunner().invoke(app, ["train", "expert", "0", "--run", str(run), "--quiet"])
    assert done.exit_code == 4
    assert done.stderr.startswith(
        "atoll: out of memory (CUDA" if error else "atoll: weights.safetensors (9 bytes): out"
    )
    assert len(done.stderr.splitlines()) == 1


def test_mistakes_are_one_line_and_exit_code_2(run, tmp_path) -> None:
    assert_one_line(atoll("train", "expert", "9", cwd=run), "no expert '9'", "0-eps-cosine")
    assert_one_line(atoll("train", "expert", "0", cwd=tmp_path), "atoll.yaml", "atoll init")
    assert_one_line(atoll("sample", tmp_path, "moss"), "ensemble.json")
    assert_one_line(atoll("init", tmp_path / "x", "--recipe", "nothing"), "no recipe 'nothing'", "demo")
    text = (run / "atoll.yaml").read_text()
    (run / "atoll.yaml").write_text(text + "colour: red\n")
    assert_one_line(atoll("cluster", cwd=run), "unknown key colour")
    assert not (tmp_path / "x").exists()


def test_an_unfinished_run_is_assembled_with_a_warning(trained_run, tmp_path) -> None:
    run = shutil.copytree(trained_run, tmp_path / "run")
    shutil.rmtree(run / "experts" / "1-flow-linear")
    done = atoll("assemble", "--run", run)
    assert done.returncode == 0
    assert "atoll: warning: not trained yet, left out: 1-flow-linear" in done.stderr
    assert len(json.loads((run / "ensemble" / "ensemble.json").read_text())["experts"]) == 2


def test_a_missing_expert_warns_and_strict_refuses(trained_run, tmp_path) -> None:
    run = shutil.copytree(trained_run, tmp_path / "run")
    shutil.rmtree(run / "experts" / "1-flow-linear")
    done = atoll("sample", run / "ensemble", "moss", "-o", tmp_path / "a.png")
    assert done.returncode == 0
    assert "atoll: warning: the expert 1-flow-linear is missing" in done.stderr
    assert_one_line(atoll("sample", run / "ensemble", "moss", "-o", tmp_path / "b.png", "--strict"), "1-flow-linear")
    assert not (tmp_path / "b.png").exists()


def test_init_does_not_overwrite(tmp_path) -> None:
    assert atoll("init", tmp_path / "mine").returncode == 0
    (tmp_path / "mine" / "atoll.yaml").write_text("name: edited\n")
    assert_one_line(atoll("init", tmp_path / "mine"), "exists")
    assert (tmp_path / "mine" / "atoll.yaml").read_text() == "name: edited\n"


def test_a_path_that_is_a_file_is_named(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    assert_one_line(atoll("init", tmp_path / "file"), "file", "File exists")


@pytest.mark.parametrize("arguments", [["sample", "x"], ["frobnicate"], ["train", "expert"], ["launch", "--jobs", "0"]])
def test_wrong_usage_exits_with_2(arguments) -> None:
    assert atoll(*arguments).returncode == 2
