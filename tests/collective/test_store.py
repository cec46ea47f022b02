"""Stores: creation is atomic and survives lost answers, reads are bounded, downloads are whole or not there."""

import hashlib
from pathlib import Path

import pytest

from atoll.collective import store as stores
from atoll.collective.bucket import store_error
from atoll.collective.connect import open_store
from atoll.collective.store import ObjectExistsError, Store, StoreError, StoreRefusedError
from atoll.errors import AtollError
from tests.collective.faults import FaultyClient


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_an_object_is_created_once_and_recognised_by_its_bytes(store) -> None:
    assert store.create("work/3/000001.json", b"mine")
    assert store.create("work/3/000001.json", b"mine")
    assert not store.create("work/3/000001.json", b"your")
    assert not store.create("work/3/000001.json", b"longer")
    assert store.read("work/3/000001.json", 100) == b"mine"
    assert store.read("work/3/000002.json", 100) is None
    assert not store.exists("work/3/000002.json")


def test_a_prefix_ends_at_a_slash(store) -> None:
    for path in ("work/3/000001.json", "work/30/000001.json", "work/3.1/000001.json"):
        store.create(path, b"x")
    assert [entry.path for entry in store.list("work/3")] == ["work/3/000001.json"]
    assert len(store.list("work")) == 3
    assert store.list("elsewhere") == []


def test_a_read_is_bounded(store) -> None:
    store.write("large", b"x" * 101)
    with pytest.raises(AtollError, match="has 101 bytes, expected at most 100"):
        store.read("large", 100)
    assert store.read("large", 101) == b"x" * 101


def test_now_is_the_time_of_the_store_and_never_goes_back(store) -> None:
    store.write("before", b"x")
    times = [store.now("me") for _ in range(3)]
    assert times == sorted(times)
    assert times[0] >= store.list("")[0].modified


def test_a_download_is_checked_and_whole(store, tmp_path) -> None:
    (tmp_path / "source").write_bytes(b"weights" * 1000)
    data = (tmp_path / "source").read_bytes()
    store.upload("a/weights", tmp_path / "source", len(data))
    target = tmp_path / "target"
    store.download("a/weights", target, sha(data), len(data))
    assert target.read_bytes() == data
    for digest, size, problem in (
        (sha(b"other"), len(data), "sha256 is"),
        (sha(data), len(data) - 1, "has 7,000 bytes, expected 6,999"),
    ):
        with pytest.raises(AtollError, match=problem):
            store.download("a/weights", tmp_path / "bad", digest, size)
    with pytest.raises(AtollError, match="not found, though it is listed"):
        store.download("a/none", tmp_path / "bad", sha(data), len(data))
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["source", "target"]


@pytest.mark.parametrize("seed", range(12))
def test_creation_survives_lost_requests_and_lost_answers(seed, tmp_path) -> None:
    client = open_store(f"memory://{tmp_path}").client
    faulty = Store(FaultyClient(client, seed, rate=0.3), pause=0)
    wins = 0
    for number in range(20):
        for name in (b"a", b"b"):
            try:
                won = faulty.create(f"{number}", name)
            except StoreError:
                won = client.get(f"{number}", 10) == name  # unknown to the caller; the store decides
            wins += won
            assert won == (client.get(f"{number}", 10) == name)
        assert client.get(f"{number}", 10) in (b"a", b"b")
    assert wins == 20


def test_a_client_that_meets_its_own_object_has_won(local) -> None:
    class Repeats(FaultyClient):
        def put_new(self, path: str, data: bytes) -> None:
            self.client.put_new(path, data)
            raise ObjectExistsError(path)

    assert Store(Repeats(local.client, 0)).create("a", b"mine")


def test_a_refusal_is_final_and_one_line(local) -> None:
    class Full(FaultyClient):
        def put_new(self, path: str, data: bytes) -> None:
            self.faults += 1
            raise store_error(self.url, "Generic: No space left on device (os error 28)")

    full = Full(local.client, 0)
    with pytest.raises(StoreRefusedError, match="is full"):
        Store(full).create("a", b"x")
    assert full.faults == 1


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("<Code>RequestTimeTooSkewed</Code>", "this machine's clock is off"),
        ("Server returned non-2xx status code: 403 Forbidden: AccessDenied", "refuses access"),
        ("NoSuchBucket", "no such bucket"),
        ("os error 28", "is full"),
        ('Encountered object with invalid path: Path "a//b" contained empty path segment', "holds a//b, a name"),
        ("something else\n\nDebug source: {lots}", r"the store failed \(something else\); try again"),
    ],
)
def test_a_failure_is_described_in_one_line(text, line) -> None:
    with pytest.raises(StoreError, match=line) as error:
        raise store_error("s3://reef/a", text)
    assert "\n" not in str(error.value)


def test_a_missing_bucket_is_one_line(store) -> None:
    if not store.url.startswith("s3://"):
        pytest.skip("only buckets are made elsewhere")
    with pytest.raises(StoreRefusedError, match="there is no such bucket"):
        open_store("s3://nothing/here").create("a", b"x")


def test_a_shared_directory_cannot_lead_out_of_itself(local, tmp_path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    bucket = Path(local.url)
    (bucket / "link").symlink_to(tmp_path / "secret")
    (bucket / "work").symlink_to(tmp_path)
    for act in (
        lambda: local.read("link", 100),
        lambda: local.read("work/secret", 100),
        lambda: local.create("work/000001.json", b"x"),
        lambda: local.write("work/secret", b"x"),
        lambda: local.download("link", tmp_path / "copy", sha(b"secret"), 6),
    ):
        with pytest.raises(AtollError, match="a link leads out of the directory"):
            act()
    for path in ("../secret", "a/../../secret"):
        with pytest.raises(AtollError):
            local.read(path, 100)
    assert (tmp_path / "secret").read_bytes() == b"secret"


def test_a_name_that_cannot_be_listed_is_one_line_with_the_remedy(local) -> None:
    place = Path(local.url, "submissions", "a\nb")
    place.mkdir(parents=True)
    (place / "submission.json").write_bytes(b"{}")
    with pytest.raises(StoreRefusedError, match=r"holds .*a.*b/submission.json, a name .* remove it") as error:
        local.list("submissions")
    assert "\n" not in str(error.value)


def test_a_pipe_in_a_shared_directory_is_refused(local) -> None:
    import os

    os.mkfifo(Path(local.url) / "endless")
    with pytest.raises(AtollError, match="no regular file"):
        local.read("endless", 100)


@pytest.mark.parametrize(
    ("url", "problem"),
    [("ftp://reef", "unknown kind of store"), ("nowhere", "no such directory"), ("hf://reef", "expected hf://OWNER")],
)
def test_a_wrong_address_is_one_line(url, problem) -> None:
    with pytest.raises(AtollError, match=problem):
        open_store(url)


def test_too_many_objects_are_refused(local, monkeypatch) -> None:
    monkeypatch.setattr(stores, "MAX_LISTED", 3)
    for number in range(4):
        local.write(f"junk/{number}", b"")
    with pytest.raises(AtollError, match="more than 3 objects"):
        local.list("junk")
