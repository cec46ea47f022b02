"""The layout is the architecture: imports go down only, no file imports in a circle, and experts share nothing."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import atoll

ROOT = Path(atoll.__file__).parents[1]
PACKAGE = ROOT / "atoll"
TESTS = ROOT / "tests"

# From the ground up. A part imports parts of lower levels only; the parts of one level do not import each other.
LEVELS = [
    ["errors", "shapes", "choices", "interpolation", "randomness"],
    ["runtime", "storage", "schedule", "report", "image_size"],
    ["time_shift", "unipc"],
    ["objective", "calibration", "condition", "solver", "image_settings"],
    ["alignment", "nn", "testing"],
    ["encoders"],
    ["ensemble"],
    ["manifest"],
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
        "collective",
    ],
    ["study", "sample"],
    ["serve"],
    ["cli"],
    ["__main__"],
]
LEVEL = {part: number for number, parts in enumerate(LEVELS) for part in parts}
STAGES = next(parts for parts in LEVELS if "train" in parts)


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def part_of(module: str) -> str:
    """The part of the package that a module belongs to: "atoll.train.loop" -> "train"."""
    return module.split(".")[1]


def imports_of(module: str) -> Iterator[str]:
    """The modules of atoll that a module's file imports, anywhere in it: inside functions and for typing too."""
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES and alias.name != "atoll")
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "atoll":
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                if (name if name in FILES else node.module) != "atoll":  # `from atoll import __version__`
                    yield name if name in FILES else node.module


INSIDE = [module for module in FILES if module != "atoll"]  # atoll itself loads its public names on first use
IMPORTS = {module: set(imports_of(module)) - {module} for module in INSIDE}


@pytest.mark.parametrize("module", INSIDE)
def test_imports_go_down_only(module) -> None:
    part = part_of(module)
    assert part in LEVEL, f"give {part} its level in this test"
    for other in IMPORTS[module]:
        if part_of(other) != part:
            assert LEVEL[part_of(other)] < LEVEL[part], f"{module} must not import {other}"


def test_no_file_imports_in_a_circle() -> None:
    try:
        list(TopologicalSorter(IMPORTS).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_stage_imports_another() -> None:
    for module in INSIDE:
        if part_of(module) in STAGES:
            others = {part_of(other) for other in IMPORTS[module]} & set(STAGES) - {part_of(module)}
            assert not others, f"{module} imports the stage {others}"


def test_files_are_short() -> None:
    long = {module: n for module in INSIDE if (n := len(FILES[module].read_text().splitlines())) > 400}
    assert not long


def test_tests_mirror_the_package() -> None:
    packages = {file.parent.relative_to(PACKAGE) for file in PACKAGE.rglob("__init__.py")} - {Path(".")}
    untested = [str(package) for package in packages if not list((TESTS / package).rglob("test_*.py"))]
    assert sorted(untested) == []


def test_help_is_light() -> None:
    heavy = ("torch", "diffusers", "transformers", "numpy")
    code = f"import sys, atoll.cli; print(*[m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_public_names() -> None:
    assert atoll.Pipeline.__module__ == "atoll.pipeline"
    assert atoll.Ensemble is atoll.ensemble.Ensemble
    assert callable(atoll.solver.sample)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = atoll.nothing
