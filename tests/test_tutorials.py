"""The tutorials run as they stand: their commands print what they show, their Python passes its own assertions."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TUTORIALS = ROOT / "docs" / "tutorials"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (TUTORIALS / page).read_text(), re.DOTALL | re.MULTILINE)


def test_first_model_prints_what_it_shows(tmp_path) -> None:
    (tmp_path / "first.yaml").write_text(blocks("first-model.md", "yaml")[0])
    console = "".join(blocks("first-model.md", "console")).splitlines()
    commands = [line.removeprefix("$ ") for line in console if line.startswith("$ ")]
    program = tmp_path / "bin" / "atoll"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m atoll "$@"\n')
    program.chmod(0o755)
    environment = os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    script = "\n".join(["set -e", *(f"echo '$ {command}'\n{command}" for command in commands)])
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == console
    assert (tmp_path / "ada" / "out.png").stat().st_size > 0
    assert not (tmp_path / "ben" / "encoded").exists()


def test_own_network_passes_its_own_assertions() -> None:
    code = "\n".join(blocks("own-network.md", "python"))
    assert code.count("assert ") == 2
    names: dict[str, object] = {}
    exec(compile(code, "own-network.md", "exec"), names)
    errors = names["errors"]
    assert isinstance(errors, list)
    # The page states these two.
    assert [round(error, 1) for error in errors] == pytest.approx([0.2, 0.2])
