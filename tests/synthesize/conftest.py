"""Fixtures of a run without images: atoll.yaml, experts, and a list of captions."""

import shutil
from pathlib import Path

import pytest

from atoll.manifest import load_manifest
from atoll.synthesize import synthesize_run


def keep_private(run: Path, path: Path) -> Path:
    """Copy only a run's atoll.yaml and experts."""
    shutil.copytree(run / "experts", path / "experts", ignore=shutil.ignore_patterns(".*"))
    shutil.copy(run / "atoll.yaml", path)
    return path


@pytest.fixture
def private(trained_run, tmp_path) -> Path:
    return keep_private(trained_run, tmp_path / "private")


@pytest.fixture
def listed(tmp_path) -> Path:
    file = tmp_path / "captions.txt"
    file.write_text("moss sand\nrain\nrust\n")
    return file


class Stop(BaseException):
    """An interruption that no code catches."""


def synthesize(run, out, captions=None, **options) -> str:
    options = {"images": 22, "steps": 2, "shard_rows": 8, **options}
    return synthesize_run(run, load_manifest(run), out, captions=captions, **options)


def content(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.fixture
def drawn(private, listed, tmp_path) -> Path:
    synthesize(private, tmp_path / "drawn", listed)
    return tmp_path / "drawn"
