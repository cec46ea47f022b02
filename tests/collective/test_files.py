"""Files in a store: listed with hashes, fetched whole, and never outside of their directory."""

import hashlib
from pathlib import Path

import pytest
import yaml

from atoll.collective import files as files_module
from atoll.collective.connect import open_store
from atoll.collective.files import (
    FILE_LIST,
    digests_of,
    fetch_files,
    files_prefix,
    list_of,
    parse_published,
    read_list,
    upload_files,
    write_list,
)
from atoll.collective.join import join_collective
from atoll.collective.keys import Key, canonical
from atoll.collective.statements import FileDigest
from atoll.errors import AtollError
from tests.collective.founding import NOBODY, found
from tests.conftest import RUN


@pytest.fixture
def source(tmp_path) -> Path:
    (tmp_path / "source" / "clusters").mkdir(parents=True)
    (tmp_path / "source" / "atoll.yaml").write_text("name: reef")
    (tmp_path / "source" / "clusters" / "shard.safetensors").write_bytes(bytes(range(256)) * 100)
    return tmp_path / "source"


NAMES = ["atoll.yaml", "clusters/shard.safetensors"]


def test_files_come_back_as_they_were(store, source, tmp_path) -> None:
    digests = digests_of(source, NAMES)
    listed, data = list_of(digests)
    prefix = files_prefix(listed)
    upload_files(store, prefix, source, digests)
    write_list(store, listed, data)
    assert read_list(store, listed) == digests
    seen = []
    fetch_files(store, prefix, read_list(store, listed), tmp_path / "out", lambda *step: seen.append(step))
    for name in NAMES:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert seen == [(0, 2, NAMES[0]), (1, 2, NAMES[1])]


def test_what_is_there_is_not_fetched_again_and_what_differs_is(local, source, tmp_path) -> None:
    digests = digests_of(source, NAMES)
    upload_files(local, "run", source, digests)
    out = tmp_path / "out"
    fetch_files(local, "run", digests, out)
    untouched = (out / "atoll.yaml").stat().st_mtime_ns
    (out / NAMES[1]).write_bytes(b"damaged")
    fetch_files(local, "run", digests, out)
    assert (out / "atoll.yaml").stat().st_mtime_ns == untouched
    assert (out / NAMES[1]).read_bytes() == (source / NAMES[1]).read_bytes()


@pytest.mark.parametrize("name", ["../escaped", "/tmp/escaped", "a/../../escaped", ".hidden", "a\\..\\escaped"])
def test_a_list_cannot_name_a_file_outside_of_the_directory(name, local, tmp_path) -> None:
    local.write("run/x", b"x")
    (tmp_path / "out").mkdir()
    before = sorted(path for path in tmp_path.rglob("*") if "bucket" not in path.parts)
    with pytest.raises(AtollError, match="do not trust this list"):
        fetch_files(local, "run", {name: FileDigest(sha256=NOBODY, size=1)}, tmp_path / "out")
    assert sorted(path for path in tmp_path.rglob("*") if "bucket" not in path.parts) == before


def test_a_size_is_checked_before_anything_is_read(local, tmp_path) -> None:
    local.write("run/x", b"x")
    with pytest.raises(AtollError, match="expected at most"):
        fetch_files(local, "run", {"x": FileDigest(sha256=NOBODY, size=2**50)}, tmp_path)
    with pytest.raises(AtollError, match="has 1 bytes, expected 2"):
        fetch_files(local, "run", {"x": FileDigest(sha256=NOBODY, size=2)}, tmp_path)


def test_a_file_that_does_not_fit_on_the_disk_is_not_begun(local, tmp_path, monkeypatch) -> None:
    local.write("run/x", b"x" * 100)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 99})())
    with pytest.raises(AtollError, match="99 bytes are free"):
        fetch_files(local, "run", {"x": FileDigest(sha256=NOBODY, size=100)}, tmp_path)


def test_a_list_that_the_charter_does_not_name_is_refused(local, source) -> None:
    digests = digests_of(source, NAMES)
    listed, data = list_of(digests)
    with pytest.raises(AtollError, match="not found; the founder must publish it again"):
        read_list(local, listed)
    Path(local.url, files_prefix(listed)).mkdir(parents=True)
    Path(local.url, files_prefix(listed), FILE_LIST).write_bytes(data.replace(b"atoll", b"alien"))
    with pytest.raises(AtollError, match="is not the list that the charter names"):
        read_list(local, listed)
    with pytest.raises(AtollError, match="something else is at its place"):
        write_list(local, listed, data)


def test_a_list_of_anything_else_is_one_line(local) -> None:
    for content in ([], {"x": 1}, {"x": {"sha256": NOBODY, "size": -1}}):
        data = canonical(content)
        listed = FileDigest(sha256=hashlib.sha256(data).hexdigest(), size=len(data))
        local.write(f"{files_prefix(listed)}/{FILE_LIST}", data)
        with pytest.raises(AtollError):
            read_list(local, listed)


def test_too_many_files_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(files_module, "MAX_FILES", 1)
    with pytest.raises(AtollError, match="too many for one list"):
        list_of({name: FileDigest(sha256=NOBODY, size=1) for name in "ab"})


def test_a_name_that_others_cannot_take_is_refused(tmp_path) -> None:
    (tmp_path / "a b").write_bytes(b"")
    with pytest.raises(AtollError, match="rename the file"):
        digests_of(tmp_path, ["a b"])


def test_a_published_manifest_cannot_describe_more_than_it_holds() -> None:
    bomb = "a: &a [x, x]\n" + "".join(
        f"{name}: &{name} [*{before}, *{before}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
    )
    for text, problem in (
        (bomb.encode(), "aliases"),
        (b"\xff", "UTF-8"),
        (b"[" * 100_000, "levels"),
        (b"- 1", "holds"),
    ):
        with pytest.raises(AtollError, match=problem):
            parse_published(text, "s3://reef/atoll.yaml")


def test_a_list_that_names_a_file_as_a_directory_is_one_line(tmp_path) -> None:
    store = open_store(f"memory://{tmp_path}")
    digest = FileDigest(sha256=hashlib.sha256(b"x").hexdigest(), size=1)
    files = {"clusters/x": digest, "clusters/x/y": digest}
    for name in files:
        store.create(f"run/{name}", b"x")
    with pytest.raises(AtollError, match="cannot be made"):
        fetch_files(store, "run", files, tmp_path / "out")


@pytest.mark.parametrize("path", ["/models/mine", "../mine", "init/../../mine"])
@pytest.mark.parametrize("part", ["train", "experts", "router"])
def test_trainings_do_not_start_from_weights_outside_of_the_run(part, path) -> None:
    """What a training starts from would be in what a contributor publishes."""
    start = {"train": {"init": path}}
    changes = {
        "train": {**RUN, "train": {**RUN["train"], "init": path}},
        "experts": {**RUN, "experts": [RUN["experts"][0], {**RUN["experts"][1], **start}]},
        "router": {**RUN, "router": {**RUN.get("router", {}), **start}},
    }
    with pytest.raises(AtollError, match="leads out of the run; put that expert into the run"):
        parse_published(yaml.safe_dump(changes[part]).encode(), "s3://reef/atoll.yaml")
    inside = {**RUN, "train": {**RUN["train"], "init": "init/mine"}}
    assert parse_published(yaml.safe_dump(inside).encode(), "s3://reef/atoll.yaml").train.init == "init/mine"


def test_a_manifest_that_the_charter_does_not_name_is_not_joined(local, source, tmp_path) -> None:
    key = Key.generate()
    key.save(tmp_path / "me.key")
    digests = digests_of(source, NAMES)
    listed, data = list_of(digests)
    upload_files(local, files_prefix(listed), source, digests)
    write_list(local, listed, data)
    found(local, key, files=listed)  # its charter names the manifest NOBODY
    with pytest.raises(AtollError, match="lacks the manifest that the charter names"):
        join_collective(local.url, tmp_path / "mine", tmp_path / "me.key", name="me")
    assert not (tmp_path / "mine").exists()
