"""Edited data are found, by the names of what was edited, and data that were only copied or touched are not."""

import os
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from atoll.data.encode import encode_run
from atoll.data.fingerprint import (
    SOURCE_FILES,
    FileRecord,
    Listing,
    changes,
    read_records,
    record_files,
    sealed_records,
    write_records,
)
from atoll.data.folder import Folder
from atoll.errors import AtollError
from atoll.manifest import DataSettings, parse_manifest
from tests.data.test_tars import tar_bytes

MANIFEST = """
name: edited
data: {{source: {source}, path: "{path}", size: 8, validation: 0, block: 2, fingerprint: {fingerprint}}}
codec: {{name: pixels, channels: 3}}
feature: {{name: hog, bins: 2, grid: 2}}
condition: {{name: hash, dim: 8, length: 4}}
experts: [{{cluster: 0, objective: {{prediction: flow, schedule: linear}}}}]
"""


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    sink = pa.BufferOutputStream()
    Image.fromarray(pixels).save(sink, "BMP")
    return sink.getvalue().to_pybytes()


def folder(path: Path) -> None:
    path.mkdir()
    for i in range(5):
        (path / f"{i}.bmp").write_bytes(png(i))
        (path / f"{i}.txt").write_text("a cat asleep")


def encode(run: Path, data: Path, source: str = "folder", fingerprint: str = "stamps", **options) -> str:
    run.mkdir(exist_ok=True)
    settings = parse_manifest(MANIFEST.format(source=source, path=data, fingerprint=fingerprint), "here")
    return encode_run(run, settings, workers=0, **options)


def edit_in_place(file: Path, old: bytes, new: bytes, keep_time: bool = False) -> None:
    """Other bytes under the same size, at another time or at the same."""
    before = file.stat()
    content = file.read_bytes()
    assert len(old) == len(new)
    assert old in content
    file.write_bytes(content.replace(old, new))
    shift = 0 if keep_time else 10**9
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + shift))


def test_an_edit_of_equal_size_is_named(tmp_path) -> None:
    folder(tmp_path / "data")
    encode(tmp_path / "run", tmp_path / "data")
    assert "there already" in encode(tmp_path / "run", tmp_path / "data")
    edit_in_place(tmp_path / "data" / "3.txt", b"cat", b"dog")
    with pytest.raises(AtollError, match=r"the data changed since they were encoded \(edited: 3\.txt\).*--force"):
        encode(tmp_path / "run", tmp_path / "data")
    edit_in_place(tmp_path / "data" / "3.txt", b"dog", b"cat")
    assert "there already" in encode(tmp_path / "run", tmp_path / "data")


def test_copied_and_touched_files_have_not_changed(tmp_path, monkeypatch) -> None:
    folder(tmp_path / "data")
    encode(tmp_path / "run", tmp_path / "data")
    shutil.copytree(tmp_path / "data", tmp_path / "copy", copy_function=shutil.copyfile)  # without times
    shutil.rmtree(tmp_path / "data")
    os.rename(tmp_path / "copy", tmp_path / "data")
    assert "there already" in encode(tmp_path / "run", tmp_path / "data")
    monkeypatch.setattr("atoll.data.fingerprint._hash", None)  # their times are known now: nothing is read again
    assert "there already" in encode(tmp_path / "run", tmp_path / "data")


def test_new_removed_and_resized_files_are_named(tmp_path) -> None:
    folder(tmp_path / "data")
    encode(tmp_path / "run", tmp_path / "data")
    (tmp_path / "data" / "1.txt").write_text("a longer caption")
    (tmp_path / "data" / "9.bmp").write_bytes(png(9))
    (tmp_path / "data" / "0.bmp").unlink()
    with pytest.raises(AtollError, match=r"edited: 1\.txt; new: 9\.bmp; gone: 0\.bmp, 0\.txt"):
        encode(tmp_path / "run", tmp_path / "data")


def test_an_edit_that_keeps_size_and_time_is_seen(tmp_path) -> None:
    folder(tmp_path / "data")
    for kind in ("stamps", "content"):
        encode(tmp_path / kind, tmp_path / "data", fingerprint=kind)
    edit_in_place(tmp_path / "data" / "3.txt", b"cat", b"dog", keep_time=True)
    for kind in ("stamps", "content"):  # no tool sets the time of the entry back
        with pytest.raises(AtollError, match=r"the data changed since they were encoded \(edited: 3\.txt\)"):
            encode(tmp_path / kind, tmp_path / "data", fingerprint=kind)
        (tmp_path / kind / "encoded" / SOURCE_FILES).unlink()
    # Without the record only the card's hash is left: of names and sizes, or of contents.
    assert "there already" in encode(tmp_path / "stamps", tmp_path / "data")
    with pytest.raises(AtollError, match=r"was encoded with source .*'fingerprint': 'content'"):
        encode(tmp_path / "content", tmp_path / "data", fingerprint="content")


@pytest.mark.parametrize("source", ["webdataset", "parquet"])
def test_an_edited_archive_is_named(tmp_path, source) -> None:
    (tmp_path / "data").mkdir()
    for name in ("a", "b"):
        if source == "webdataset":
            members = [(f"{i}.bmp", png(i)) for i in range(3)] + [("3.bmp", png(3)), ("3.txt", b"a cat asleep")]
            (tmp_path / "data" / f"{name}.tar").write_bytes(tar_bytes(*members))
        else:
            table = pa.table({"image": [png(i) for i in range(4)], "text": ["a cat asleep"] * 4})
            pq.write_table(table, tmp_path / "data" / f"{name}.parquet", compression="none")
    encode(tmp_path / "run", tmp_path / "data", source, max_skipped=1)
    (edited,) = (tmp_path / "data").glob("b.*")
    edit_in_place(edited, b"cat", b"dog")
    with pytest.raises(AtollError, match=rf"\(edited: {edited.name}\)"):
        encode(tmp_path / "run", tmp_path / "data", source)


def test_a_table_of_captions_counts_as_data(tmp_path) -> None:
    folder(tmp_path / "data")
    (tmp_path / "data" / "metadata.csv").write_text("file_name,text\n0.bmp,a cow\n")
    encode(tmp_path / "run", tmp_path / "data")
    edit_in_place(tmp_path / "data" / "metadata.csv", b"cow", b"ewe")
    with pytest.raises(AtollError, match=r"\(edited: metadata\.csv\)"):
        encode(tmp_path / "run", tmp_path / "data")


@pytest.mark.parametrize(("number", "refused"), [(0, True), (4, False)])
def test_an_interrupted_encoding_is_continued_with_unread_files_edited_only(
    tmp_path, monkeypatch, number, refused
) -> None:
    folder(tmp_path / "data")
    original = Folder.read

    def read(self, block):
        if block.name.startswith("000000004"):
            raise RuntimeError("the plug was pulled")
        return original(self, block)

    monkeypatch.setattr(Folder, "read", read)
    with pytest.raises(RuntimeError, match="plug"):
        encode(tmp_path / "run", tmp_path / "data")
    monkeypatch.setattr(Folder, "read", original)
    edit_in_place(tmp_path / "data" / f"{number}.txt", b"cat", b"dog")
    if refused:
        with pytest.raises(AtollError, match=rf"changed since it was begun \(edited: {number}\.txt\); use --force"):
            encode(tmp_path / "run", tmp_path / "data", resume=True)
    else:
        assert "5 images" in encode(tmp_path / "run", tmp_path / "data", resume=True)
        assert "there already" in encode(tmp_path / "run", tmp_path / "data")


def test_a_file_that_is_edited_while_it_is_encoded_counts_as_edited(tmp_path, monkeypatch) -> None:
    folder(tmp_path / "data")
    original = Folder.read

    def read(self, block):
        found = list(original(self, block))
        if block.name.startswith("000000000"):
            edit_in_place(tmp_path / "data" / "0.txt", b"cat", b"dog")
        return iter(found)

    monkeypatch.setattr(Folder, "read", read)
    encode(tmp_path / "run", tmp_path / "data")
    with pytest.raises(AtollError, match=r"\(edited: 0\.txt\)"):
        encode(tmp_path / "run", tmp_path / "data")


def test_remote_files_are_known_by_their_tags() -> None:
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    try:
        for i in range(2):
            fs.pipe(f"/data/{i}.jpg", b"image")
        settings = DataSettings(source="folder", path="memory://data")
        source = Folder(settings)
        assert source.record(source.blocks()[0]) == []  # nothing is read for it
        records = sealed_records(source.listing(), [])
        assert not changes(Folder(settings).listing(), records)
        fs.pipe("/data/1.jpg", b"other")
        assert changes(Folder(settings).listing(), records).edited == ["1.jpg"]
    finally:
        fs.store.clear()


NAMES = st.dictionaries(
    st.text("ab/\udce9", min_size=1, max_size=3), st.tuples(st.integers(0, 9), st.text("12", max_size=2))
)


@given(NAMES, NAMES)
def test_records_survive_the_disk_and_show_every_difference_of_names_and_sizes(tmp_path_factory, before, after) -> None:
    def listing(files):
        return Listing("/nowhere", {n: size for n, (size, _) in files.items()}, {n: s for n, (_, s) in files.items()})

    path = tmp_path_factory.mktemp("records") / SOURCE_FILES
    write_records(path, sealed_records(listing(before), []))
    records = read_records(path)
    assert records == [FileRecord(name, size, stamp, "") for name, (size, stamp) in before.items()]
    differences = changes(listing(after), records)
    assert set(differences.added) == after.keys() - before.keys()
    assert set(differences.removed) == before.keys() - after.keys()
    # without a hash, another stamp is an edit
    assert set(differences.edited) == {name for name in before.keys() & after.keys() if before[name] != after[name]}


def test_a_damaged_record_is_none(tmp_path) -> None:
    for content in (b"", b"PAR1", b"no parquet"):
        (tmp_path / SOURCE_FILES).write_bytes(content)
        assert read_records(tmp_path / SOURCE_FILES) is None
    assert read_records(tmp_path / "none") is None
    assert record_files(str(tmp_path), ["gone"]) == []
