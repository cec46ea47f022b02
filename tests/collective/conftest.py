"""Stores of every kind."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from atoll.collective.connect import open_store
from atoll.collective.store import Store
from tests.collective.founding import s3_bucket
from tests.collective.growing import GrowingReef, write_founded


@pytest.fixture(params=["memory", "directory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A store of each kind."""
    if request.param == "s3":
        with s3_bucket(monkeypatch) as url:
            yield open_store(url)
    else:
        yield open_store(f"memory://{tmp_path}" if request.param == "memory" else str(tmp_path / "bucket"), make=True)


@pytest.fixture
def local(tmp_path: Path) -> Store:
    """A directory as a store."""
    return open_store(str(tmp_path / "bucket"), make=True)


@pytest.fixture(scope="session")
def founded(tmp_path_factory) -> Path:
    """A founder's run with three real clusters and a router; not to be changed by a test."""
    return write_founded(tmp_path_factory.mktemp("founded"))


@pytest.fixture
def growing(founded, tmp_path, atoll) -> GrowingReef:
    """A copy of `founded` with an open bucket."""
    shutil.copytree(founded, tmp_path, dirs_exist_ok=True)
    reef = GrowingReef(tmp_path, atoll)
    reef.open()
    return reef
