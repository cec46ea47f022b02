"""The layout is the architecture: imports go down only, and experts share nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import atoll

PACKAGE = Path(atoll.__file__).parent

# From the ground up. A module may import its own level only where it is the same part.
LEVELS = [
    ["errors", "shapes", "words", "page", "device", "picture"],
    ["artifact", "schedule", "process", "lock"],
    ["weights"],
    ["shards", "objective", "calibration", "routing", "condition", "solver"],
    ["manifest", "alignment", "nn"],
    ["replicas", "memory", "prompts"],
    ["ensemble", "testing", "codec", "feature", "compiled"],
    ["loading"],
    # the stages
    [
        "data",
        "cluster",
        "train",
        "assemble",
        "synthesize",
        "evaluate",
        "launch",
        "pipeline",
        "diffusers",
        "plan",
        "convert",
    ],
    ["study"],
    ["cli"],
    ["__main__"],
]
LEVEL = {part: number for number, parts in enumerate(LEVELS) for part in parts}
STAGES = next(parts for parts in LEVELS if "train" in parts)


def part_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(file: Path) -> set[str]:
    """The parts of atoll that a file imports, anywhere in it (typing-only imports too)."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "atoll":
            names = [node.module.split(".")[1]] if "." in node.module else [alias.name for alias in node.names]
            found |= {name for name in names if name in LEVEL}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("atoll.")}
    return found


FILES = [file for file in sorted(PACKAGE.rglob("*.py")) if file != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_go_down_only(file) -> None:
    mine = part_of(file)
    assert mine in LEVEL, f"give {mine} its level in this test"
    for other in imports_of(file) - {mine}:
        assert LEVEL[other] < LEVEL[mine], f"{mine} must not import {other}"


def test_no_stage_imports_another() -> None:
    for file in FILES:
        if part_of(file) in STAGES:
            others = imports_of(file) & set(STAGES) - {part_of(file)}
            assert not others, f"{file.name} imports the stage {others}"


def test_files_are_short() -> None:
    long = {file.name: n for file in FILES if (n := len(file.read_text().splitlines())) > 400}
    assert not long


def test_help_is_light() -> None:
    heavy = ("torch", "diffusers", "transformers", "numpy")
    code = f"import sys, atoll.cli; print(*[m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_public_names() -> None:
    assert atoll.Pipeline.__module__ == "atoll.pipeline"
    assert callable(atoll.solver.sample)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = atoll.nothing
