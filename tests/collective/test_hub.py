"""A Hugging Face repository as a store: a commit on top of the head that was seen is the lock."""

import types
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError

from atoll.collective.charter import read_collective
from atoll.collective.hub import HubClient
from atoll.collective.keys import Key
from atoll.collective.leases import claim, end, new_nonce, renew
from atoll.collective.store import Store, StoreError, StoreRefusedError
from atoll.errors import AtollError
from tests.collective.founding import found

ADA, BEN = Key.generate(), Key.generate()


def failure(kind: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    # The hub's HTTP library has changed before, so its own classes are not used here.
    return kind(f"{status} error", response=types.SimpleNamespace(status_code=status, headers={}, request=None))


class Repository:
    """The part of `HfApi` that is used, over a dictionary. Its clock moves by a second with each commit."""

    def __init__(self) -> None:
        self.files: dict[str, tuple[bytes, datetime]] = {}
        self.head = 0
        self.time = datetime(2026, 1, 1, tzinfo=UTC)
        self.before_commit: Callable[[], None] = lambda: None
        self.after_commit: Callable[[], None] = lambda: None

    def repo_info(self, repo: str, repo_type: str) -> Any:
        assert (repo, repo_type) == ("me/reef", "model")
        return types.SimpleNamespace(sha=str(self.head))

    def get_paths_info(self, repo: str, paths: list[str], **_: Any) -> list[Any]:
        return [self._info(path) for path in paths if path in self.files]

    def list_repo_tree(self, repo: str, prefix: str | None, **_: Any) -> Any:
        paths = [path for path in self.files if prefix is None or path.startswith(f"{prefix}/")]
        if not paths:
            raise EntryNotFoundError(prefix)
        yield types.SimpleNamespace(path=prefix, tree_id="0")  # a folder
        yield from map(self._info, paths)

    def create_commit(self, repo: str, operations: list[Any], *, parent_commit: str | None = None, **_: Any) -> None:
        self.before_commit()
        if parent_commit not in (None, str(self.head)):
            raise failure(HfHubHTTPError, 412)
        for operation in operations:
            content = operation.path_or_fileobj
            data = Path(content).read_bytes() if isinstance(content, str) else content
            self.time += timedelta(seconds=1)
            self.files[operation.path_in_repo] = (data, self.time)
        self.head += 1
        self.after_commit()

    def hf_hub_download(self, repo: str, path: str, *, local_dir: str, **_: Any) -> str:
        file = Path(local_dir, path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(self.files[path][0])
        return str(file)

    def _info(self, path: str) -> Any:
        data, time = self.files[path]
        return types.SimpleNamespace(path=path, size=len(data), last_commit=types.SimpleNamespace(date=time))


@pytest.fixture
def repository() -> Repository:
    return Repository()


@pytest.fixture
def hub(repository) -> Store:
    return Store(HubClient("hf://me/reef", repository), pause=0)


def test_objects_are_created_once_and_listed(hub, tmp_path) -> None:
    assert hub.create("work/3/000001.json", b"mine")
    assert not hub.create("work/3/000001.json", b"your")
    assert hub.read("work/3/000001.json", 4) == b"mine"
    assert hub.read("work/3/000002.json", 4) is None
    assert [entry.path for entry in hub.list("work/3")] == ["work/3/000001.json"]
    assert hub.list("nothing") == []
    with pytest.raises(AtollError, match="expected at most 3"):
        hub.read("work/3/000001.json", 3)
    (tmp_path / "file").write_bytes(b"weights")
    hub.upload("a/b", tmp_path / "file", 7)
    assert hub.read("a/b", 100) == b"weights"


def test_a_commit_of_another_in_between_is_no_failure(hub, repository) -> None:
    others = iter(range(3))

    def another() -> None:
        # Three commits of others come first; none of them takes the path.
        if next(others, None) is not None:
            repository.files[f"other/{repository.head}"] = (b"", repository.time)
            repository.head += 1

    repository.before_commit = another
    assert hub.create("work/3/000001.json", b"mine")


def test_of_two_that_saw_the_path_absent_one_wins(hub, repository) -> None:
    def rival() -> None:
        if "work/3/000001.json" not in repository.files:
            repository.files["work/3/000001.json"] = (b"your", repository.time)
            repository.head += 1

    repository.before_commit = rival
    assert not hub.create("work/3/000001.json", b"mine")
    assert hub.read("work/3/000001.json", 10) == b"your"


def test_a_lost_answer_is_read_back(hub, repository) -> None:
    def lost() -> None:
        raise TimeoutError("the answer was lost")

    repository.after_commit = lost
    assert hub.create("work/3/000001.json", b"mine")
    assert repository.head == 1


def test_lack_of_memory_here_is_no_failure_of_the_store(hub, repository) -> None:
    def full() -> None:
        raise MemoryError

    repository.before_commit = full
    with pytest.raises(AtollError, match=r"hf://me/reef/a: out of memory") as raised:
        hub.create("a", b"mine")
    assert not isinstance(raised.value, StoreError)


def test_leases_work_in_a_repository(hub) -> None:
    collective = found(hub, ADA)
    lease = claim(hub, collective, ADA, "3", new_nonce())
    with pytest.raises(AtollError, match="is held by"):
        claim(hub, collective, BEN, "3", new_nonce())
    assert renew(hub, collective, lease, ADA)
    end(hub, collective, lease, ADA, "released")
    assert claim(hub, collective, BEN, "3", new_nonce()).epoch == 2
    assert read_collective(hub).identity == collective.identity


@pytest.mark.parametrize(
    ("error", "kind", "line"),
    [
        (failure(HfHubHTTPError, 403), StoreRefusedError, "check your token's rights"),
        (failure(RepositoryNotFoundError, 404), StoreRefusedError, "no such repository"),
        (failure(HfHubHTTPError, 500), StoreError, "the store failed"),
        (ConnectionError("no network"), StoreError, "ConnectionError: no network"),
    ],
)
def test_a_failure_is_one_line(error, kind, line, hub, repository) -> None:
    def fail() -> None:
        raise error

    repository.before_commit = fail
    with pytest.raises(kind, match=line) as raised:
        hub.write("a", b"x")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("url", ["hf://reef", "hf://a/b/c", "hf://a/b/c/d", "hf:///b"])
def test_a_wrong_address_is_one_line(url) -> None:
    with pytest.raises(AtollError, match="expected hf://OWNER/NAME"):
        HubClient(url, object())
