"""Splits by names and columns: what is held out by its name is held out here."""

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.data.sources import build_source
from atoll.data.splits import keyword_in, named_splits
from atoll.data.types import Raw
from atoll.manifest import DataSettings


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("test", "test"),
        ("TEST", "test"),
        ("birds-test_2", "test"),
        ("train2017", "train"),
        ("my validation set", "validation"),
        ("val", "val"),
        ("dev.0", "dev"),
        ("contest", None),
        ("testament", None),
        ("evaluation", "evaluation"),
        ("trainval", None),
        ("train_test", "test"),
        ("valid", "valid"),
        ("", None),
    ],
)
def test_a_keyword_stands_between_separators(name, word) -> None:
    assert keyword_in(name) == word


def splits(*names: str, **options) -> dict[str, str]:
    return named_splits(names, "images", **options).splits


def test_folders_tell_splits() -> None:
    names = ["train/cat/1.jpg", "Test/cat/2.jpg", "validation/3.jpg", "loose.jpg", "data_test_1/4.jpg"]
    assert splits(*names) == {names[0]: "train", names[1]: "val", names[2]: "val", names[4]: "val"}
    # A whole name counts before a part of one: a class called "test tube" does not hold its training images out.
    assert splits("train/test tube/1.jpg", "val/test tube/2.jpg") == {
        "train/test tube/1.jpg": "train",
        "val/test tube/2.jpg": "val",
    }


def test_notes_say_what_is_held_out_and_how_not() -> None:
    (note,) = named_splits(["train/1.jpg", "test/2.jpg", "test/3.jpg"], "images").notes
    assert note == "held out by name: 2 in test/ (images); data.splits: hash ignores such names"


def test_nothing_is_held_out_where_nothing_would_train() -> None:
    recognised = named_splits(["test/1.jpg", "test/2.jpg"], "images")
    assert recognised.splits == {}
    assert recognised.notes == ("all images lie in what is called 2 in test/: they train, as nothing else is there",)
    assert named_splits(["train/1.jpg", "2.jpg"], "images") == ({}, ())


def test_shards_of_the_hub_tell_splits() -> None:
    names = [f"data/{split}-0000{i}-of-00002.parquet" for split in ("train", "test") for i in range(2)]
    names.append("data/extra-00000-of-00001-abc.parquet")
    assert list(splits(*names).values()) == ["train", "train", "val", "val", "val"]
    assert splits("a-00000-of-00002.parquet", "b-00000-of-00002.parquet") == {}  # no train: names say nothing
    assert splits("imagenet-train-000.tar", "imagenet-val-000.tar", "other.tar") == {
        "imagenet-train-000.tar": "train",
        "imagenet-val-000.tar": "val",
    }


def test_names_of_images_count_only_where_all_have_a_keyword() -> None:
    assert splits("test.jpg", "holiday.jpg", all_files=True) == {}
    assert splits("train_1.jpg", "test_1.jpg", all_files=True) == {"train_1.jpg": "train", "test_1.jpg": "val"}


@given(st.lists(st.text(st.sampled_from("tesrainvl-_/. 05"), max_size=20), max_size=8, unique=True))
def test_any_names_leave_something_to_train_on(names) -> None:
    found = splits(*names)
    assert found.keys() <= set(names)
    assert not found or len([split for split in found.values() if split == "val"]) < len(names)


def read(path, source, **options) -> tuple[dict[str, str], list[str]]:
    built = build_source(DataSettings(source=source, path=str(path), validation=0.0, **options))
    found = [sample for block in built.blocks() for sample in built.read(block)]
    return {raw.key: raw.split for raw in found if isinstance(raw, Raw)}, list(built.notes())


def test_an_imagefolder_holds_its_test_folders_out(tmp_path) -> None:
    for name in ("train/a.jpg", "test/b.jpg", "validation/deep/c.jpg"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"x")
    held_out = {"train/a.jpg": "train", "test/b.jpg": "val", "validation/deep/c.jpg": "val"}
    found, notes = read(tmp_path, "folder")
    assert found == held_out
    assert "held out by name: 1 in test/, 1 in validation/ (images)" in notes[0]
    assert set(read(tmp_path, "folder", splits="hash")[0].values()) == {"train"}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_column_called_split_holds_out(tmp_path, kind) -> None:
    rows = [{"file_name": f"{i}.jpg", "text": "x", "split": "test" if i == 1 else "train"} for i in range(3)]
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(b"x")
    if kind == "jsonl":
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "metadata.parquet")
    found, notes = read(tmp_path, "folder")
    assert found == {"0.jpg": "train", "1.jpg": "val", "2.jpg": "train"}
    assert notes[0].startswith("held out: 1 by the column split of the metadata")


def test_a_column_called_split_without_splits_is_none(tmp_path) -> None:
    for i in range(2):
        (tmp_path / f"{i}.jpg").write_bytes(b"x")
    rows = [{"file_name": f"{i}.jpg", "text": "x", "split": ["left", "test"][i]} for i in range(2)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read(tmp_path, "folder") == ({"0.jpg": "train", "1.jpg": "train"}, [])


def test_parquet_by_file_names_and_by_column(tmp_path) -> None:
    table = {"image": [b"x", b"y"], "text": ["a", "b"]}
    for split in ("train", "test"):
        pq.write_table(pa.table(table), tmp_path / f"{split}-00000-of-00001.parquet")
    found, notes = read(tmp_path, "parquet")
    assert [found[key] for key in sorted(found)] == ["val", "val", "train", "train"]
    assert "1 in test-* (files)" in notes[0]
    for file in tmp_path.iterdir():
        file.unlink()
    pq.write_table(pa.table({**table, "split": ["train", "validation"]}), tmp_path / "train-00000-of-00001.parquet")
    found, notes = read(tmp_path, "parquet")
    assert list(found.values()) == ["train", "val"]
    assert "held out by the column 'split'" in notes[0]
    pq.write_table(pa.table({**table, "split": ["a", "test"]}), tmp_path / "train-00000-of-00001.parquet")
    assert list(read(tmp_path, "parquet")[0].values()) == ["train", "train"]


def test_tars_by_names_and_by_the_json(tmp_path) -> None:
    def tar(name: str, members: dict[str, bytes]) -> None:
        with tarfile.open(tmp_path / name, "w") as archive:
            for member, data in members.items():
                info = tarfile.TarInfo(member)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))

    tar("train-0.tar", {"1.jpg": b"x"})
    tar("val-0.tar", {"2.jpg": b"x"})
    assert read(tmp_path, "webdataset")[0] == {"train-0/1": "train", "val-0/2": "val"}
    (tmp_path / "val-0.tar").unlink()
    tar("train-0.tar", {"1.jpg": b"x", "1.json": b'{"split": "train"}', "2.jpg": b"x", "2.json": b'{"split": "Test"}',
                        "3.jpg": b"x", "3.txt": b"t", "3.json": b"{"})  # fmt: skip
    assert read(tmp_path, "webdataset")[0] == {"train-0/1": "train", "train-0/2": "val", "train-0/3": "train"}
