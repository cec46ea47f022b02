"""Several captions of one image, from every layout that can carry them, to the shards; and what is refused."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.data.caption_lists import captions_of, combined, first_and_others
from atoll.data.lengths import CutCaptions
from atoll.data.sources import build_source
from atoll.data.types import Raw, Skipped, Unfit
from atoll.encoders.text import HashEncoder
from atoll.errors import AtollError
from atoll.manifest import DataSettings
from atoll.storage.parquet_pages import pages
from atoll.storage.shards import unpack

ONE, TWO = {"text": "a dog", "weight": 2}, {"caption": "asleep", "weight": 1.0}


def read(root: Path, source: str = "folder", **options: object) -> list[Raw | Skipped]:
    built = build_source(DataSettings(source=source, path=str(root), **options))
    return [sample for block in built.blocks() for sample in built.read(block)]


def captions(sample: Raw | Skipped) -> list[tuple[str, float]] | str:
    """All captions with their weights over the first one's, or the reason why there is none."""
    if isinstance(sample, Skipped):
        return sample.reason
    return [(sample.caption, 1.0), *unpack(sample.others)] if sample.caption else []


def folder(root: Path, cells: list[object], kind: str = ".jsonl") -> Path:
    """A folder of images with these cells in the field `caption` of a metadata file."""
    for number in range(len(cells)):
        (root / f"{number}.jpg").write_bytes(b"image")
    records = [{"file_name": f"{number}.jpg", "caption": cell} for number, cell in enumerate(cells)]
    if kind == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), root / "metadata.parquet")
    else:
        (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, records)))
    return root


def parquet(root: Path, columns: dict[str, object], **options: object) -> list[Raw | Skipped]:
    rows = len(next(iter(columns.values())))
    pq.write_table(pa.table({"image": [b"image"] * rows, **columns}), root / "a.parquet")
    return read(root, "parquet", **options)


READ = [
    ("a dog", [("a dog", 1.0)]),
    (["a dog"], [("a dog", 1.0)]),
    (["a dog", "asleep"], [("a dog", 1.0), ("asleep", 1.0)]),
    ([ONE, TWO], [("a dog", 1.0), ("asleep", 0.5)]),
    (["a dog", {"text": "asleep", "weight": 3}], [("a dog", 1.0), ("asleep", 3.0)]),
    ([{"text": "a dog"}, "asleep"], [("a dog", 1.0), ("asleep", 1.0)]),
    ([{"text": "a dog", "weight": 0}, "asleep", "b"], [("asleep", 1.0), ("b", 1.0)]),
    (["", "  ", "asleep"], [("asleep", 1.0)]),
    ([{"text": "", "weight": 0}], []),
    (["a\ndog", "b"], [("a dog", 1.0), ("b", 1.0)]),
    (None, []),
    ("", []),
]


@pytest.mark.parametrize(("cell", "expected"), READ)
def test_a_field_of_json_holds_one_or_several_captions(tmp_path, cell, expected) -> None:
    assert captions(read(folder(tmp_path, [cell]))[0]) == expected
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "0.json").write_text(json.dumps({"caption": cell}))
    assert captions(read(tmp_path)[0]) == expected


WRONG = [
    ([["a"]], "item 1 of its list is a list, expected text or {text, weight}"),
    (["a", ["b"]], "item 2 of its list is a list"),
    ([], "an empty list, expected at least one caption; null is no caption"),
    ([3], "item 1 of its list is a int"),
    (["a", None], "item 2 of its list is null"),
    (3, "is int, expected text, or a list of texts"),
    ({"text": "a"}, "is dict, expected text, or a list of texts"),
    ([{"weight": 1}], "the text of item 1 of its list is missing, expected text"),
    ([{"text": 3}], "the text of item 1 of its list is a int"),
    ([{"text": "a", "caption": "b"}], "the text of item 1"),
    ([{"text": "a", "heft": 1}], "item 1 of its list has 'heft', expected text and weight"),
    ([{"text": "a", "weight": -1}], "the weight of item 1 of its list is -1, expected a finite number of at least 0"),
    ([{"text": "a", "weight": "2"}], "the weight of item 1 of its list is '2'"),
    ([{"text": "a", "weight": True}], "the weight of item 1 of its list is True"),
    ([{"text": "a", "weight": None}], "the weight of item 1 of its list is None"),
    ([{"text": "a", "weight": float("nan")}], "the weight of item 1 of its list is nan"),
    ([{"text": "a", "weight": float("inf")}], "the weight of item 1 of its list is inf"),
    ([{"text": "a", "weight": 0}, {"text": "b", "weight": 0}], "the weights of its list are all 0"),
    ([{"text": "a", "weight": 1e-9}, {"text": "b", "weight": 1e9}], "weights that differ by more than 1e+12 times"),
    (["a", *["b" * 40_000] * 2], "80,019 bytes of captions after the first one, expected at most 65,536"),
    (["a" * 70_000], "70,000 bytes, expected at most 65,536"),
]


@pytest.mark.parametrize(("cell", "reason"), WRONG)
def test_a_wrong_list_is_named_with_file_and_row(tmp_path, cell, reason) -> None:
    # `Infinity` and `NaN` are what Python's json writes.
    good, bad = (captions(sample) for sample in read(folder(tmp_path, ["fine", cell])))
    assert good == [("fine", 1.0)]
    assert bad.startswith("caption: ")
    assert reason in bad
    # What is wrong with all captions together is found when the image is read.
    if "after the first" not in reason and "differ" not in reason:
        assert bad.endswith("(metadata.jsonl:2)")


LISTS = pa.list_(pa.string())
WEIGHTED = pa.list_(pa.struct([("text", pa.string()), ("weight", pa.float32())]))


@pytest.mark.parametrize(
    ("kind", "cells", "expected"),
    [
        (LISTS, [["a", "b"], None, ["c"]], [[("a", 1.0), ("b", 1.0)], [], [("c", 1.0)]]),
        (pa.large_list(pa.large_string()), [["a", "b"], ["c"]], [[("a", 1.0), ("b", 1.0)], [("c", 1.0)]]),
        (pa.list_(pa.binary()), [[b"a"], [b"\xe9", b"a"]], [[("a", 1.0)], "not utf-8 (byte 0xe9 at 0)"]),
        (pa.list_(pa.string(), 2), [["a", "b"], None, ["a", "a"]], [[("a", 1), ("b", 1)], [], [("a", 1), ("a", 1)]]),
        (LISTS, [["a"], [], ["b", None]], [[("a", 1.0)], "an empty list", "item 2 of its list is null"]),
        (WEIGHTED, [[ONE, {"text": "b", "weight": None}], None], [[("a dog", 1.0), ("b", 0.5)], []]),
        (
            WEIGHTED,
            [[None], [{"text": None, "weight": 1}]],
            ["item 1 of its list is null", "text of item 1 of its list is"],
        ),
        (pa.list_(pa.struct([("weight", pa.int8()), ("caption", pa.string())])), [[TWO, TWO]], [[("asleep", 1)] * 2]),
        (LISTS, [["a" * 60_000] * 3], ["180,024 bytes, expected at most 65,536"]),
    ],
    ids=["lists", "large", "bytes", "fixed", "wrong", "weights", "nulls", "caption", "long"],
)
@pytest.mark.parametrize("source", ["parquet", "folder"])
def test_lists_in_parquet_are_read(tmp_path, source, kind, cells, expected) -> None:
    """As a data set of its own, and as the table of a folder."""
    column = pa.array(cells, kind)
    if source == "parquet":
        found = parquet(tmp_path, {"captions": column})
    else:
        names = [f"{number}.jpg" for number in range(len(cells))]
        for name in names:
            (tmp_path / name).write_bytes(b"image")
        pq.write_table(pa.table({"file_name": names, "captions": column}), tmp_path / "metadata.parquet")
        found = read(tmp_path)
    for sample, wanted in zip(found, expected, strict=True):
        assert captions(sample) == wanted or (isinstance(wanted, str) and wanted in captions(sample))


def test_the_row_of_a_list_is_named_where_the_key_does_not_name_it(tmp_path) -> None:
    found = parquet(tmp_path, {"id": ["x", "y"], "caption": [["a"], []]}, key="id")
    assert (found[1].key, found[1].reason.partition("; ")[2]) == ("y", "null is no caption (row 1 of a.parquet)")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (pa.list_(pa.list_(pa.string())), "a list of lists, expected text, or a list of texts"),
        (pa.list_(pa.int64()), "no list of texts"),
        (pa.list_(pa.struct([("text", pa.string()), ("score", pa.float64())])), "more than text and weight"),
        (pa.list_(pa.struct([("weight", pa.float64())])), "structs without text"),
        (pa.struct([("text", pa.string())]), "struct<.*>, expected text"),
    ],
)
def test_a_column_that_holds_no_captions_is_named(tmp_path, kind, said) -> None:
    with pytest.raises(AtollError, match=rf"^a\.parquet: column 'caption' is .*{said}"):
        parquet(tmp_path, {"caption": pa.array([None], kind)})


def test_tags_are_one_caption_in_every_layout(tmp_path) -> None:
    assert captions(parquet(tmp_path, {"tags": [["wool", "grass"]]})[0]) == [("wool, grass", 1.0)]
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "a.jpg").write_bytes(b"image")
    pq.write_table(pa.table({"file_name": ["a.jpg"], "tags": [["wool", "grass"]]}), tmp_path / "f" / "metadata.parquet")
    for options in ({}, {"caption": "tags"}):
        assert captions(read(tmp_path / "f", **options)[0]) == [("wool, grass", 1.0)]


def test_columns_are_several_captions_with_their_weights(tmp_path) -> None:
    columns = {"short": ["a", None, "c"], "long": [["b", "c"], ["d"], None], "other": ["x"] * 3}
    found = parquet(tmp_path, columns, caption=["short", "long"], caption_weights=[1, 4])
    assert [captions(sample) for sample in found] == [[("a", 1.0), ("b", 2.0), ("c", 2.0)], [("d", 1.0)], [("c", 1.0)]]
    # A column of weight 0 is not even looked for.
    found = read(tmp_path, "parquet", caption=["missing", "long"], caption_weights=[0, 1])
    assert captions(found[0]) == [("b", 1.0), ("c", 1.0)]
    with pytest.raises(AtollError, match=r"no column 'missing', which data\.caption names"):
        read(tmp_path, "parquet", caption=["missing", "long"])


def test_files_columns_and_names_are_captions_of_one_image(tmp_path) -> None:
    (tmp_path / "red_fox").mkdir()
    root = folder(tmp_path / "red_fox", ["from a table", None])
    (root / "0.txt").write_text("from a file")
    (root / "0.caption").write_text("from another")
    found = read(tmp_path, caption=["caption", ".txt", ".caption", "@folder"], caption_weights=[4, 2, 1, 1])
    assert captions(found[0]) == [("from a table", 1), ("from a file", 0.5), ("from another", 0.25), ("red fox", 0.25)]
    assert captions(found[1]) == [("red fox", 1.0)]
    with pytest.raises(AtollError, match=r"no image has a caption by '\.cap', which data\.caption names"):
        read(tmp_path, caption=["caption", ".cap"])
    with pytest.raises(AtollError, match=r"no image has a caption by 'text'.*\(file_name, caption\)"):
        read(tmp_path, caption=["caption", "text"])


def test_members_and_fields_of_a_tar_are_captions_of_one_image(tmp_path) -> None:
    members = [
        ("1.jpg", b"image"),
        ("1.txt", b"alt"),
        ("1.json", json.dumps({"short": "a", "long": ["b", "c"]}).encode()),
    ]
    members += [("2.jpg", b"image"), ("2.json", b'{"short": [["a"]]}'), ("3.jpg", b"image"), ("3.txt", b"one\ntwo")]
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    several = read(tmp_path, "webdataset", caption=["short", "txt", "long"])
    assert captions(several[0]) == [("a", 1.0), ("alt", 1.0), ("b", 0.5), ("c", 0.5)]
    assert several[1].reason.startswith("caption: item 1 of its list is a list")
    assert captions(several[2]) == [("one two", 1.0)]
    lines = read(tmp_path, "webdataset", caption="txt", caption_lines="each")
    assert captions(lines[2]) == [("one", 1.0), ("two", 1.0)]
    assert lines[2].notes == ()


def test_json_beside_an_image_gives_several_fields(tmp_path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"image")
    (tmp_path / "a.json").write_text(json.dumps({"short": "a", "caption": "usual"}))
    (tmp_path / "b.jpg").write_bytes(b"image")
    (tmp_path / "b.json").write_text('["a", "b"]')
    assert captions(read(tmp_path, caption=["short", "long"])[0]) == [("a", 1.0)]
    assert captions(read(tmp_path)[1]) == [("a", 1.0), ("b", 1.0)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"caption": []}, "expected different names, at least one"),
        ({"caption": ["a", "a"]}, "expected different names"),
        ({"caption": "a", "caption_weights": [1]}, "1 for 0 names in the list `caption`"),
        ({"caption": ["a", "b"], "caption_weights": [1]}, "1 for 2 names"),
        ({"caption": ["a", "b"], "caption_weights": [1, -1]}, "at least 0, not all 0"),
        ({"caption": ["a", "b"], "caption_weights": [0, 0]}, "at least 0, not all 0"),
        ({"caption": ["a", "b"], "caption_weights": [1, float("inf")]}, "finite numbers"),
        ({"caption": ["a", "b"], "caption_weights": [1, float("nan")]}, "finite numbers"),
        ({"caption": [["a"]]}, "valid string"),
        ({"caption_lines": "some"}, "'join' or 'each'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, said) -> None:
    with pytest.raises(ValueError, match=said):
        DataSettings(**options)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda x: st.lists(x) | st.dictionaries(st.sampled_from(["text", "weight", "a"]), x),
    )
)
def test_any_json_is_captions_or_unfit(value) -> None:
    reason = "caption: "
    first = others = ""
    try:
        first, others = first_and_others(captions_of(value, DataSettings()))
    except Unfit as error:
        reason = str(error)
    assert reason.startswith("caption: ")
    assert first or not others
    assert all(caption == " ".join(caption.splitlines()).strip() for caption, _ in unpack(others))


@given(st.lists(st.tuples(st.lists(st.floats(1e-3, 1e3), max_size=3), st.floats(1e-3, 1e3)), min_size=2, max_size=4))
def test_columns_share_their_weight_among_their_captions(parts) -> None:
    lists = [([(str(weight), weight) for weight in weights], own) for weights, own in parts]
    total = sum(own for weights, own in parts if weights)
    assert abs(sum(weight for _, weight in combined(lists)) - total) <= 1e-9 * total


def test_a_list_of_millions_of_empty_items_is_not_unpacked(tmp_path) -> None:
    """Run-length coding needs a few bytes for them; Arrow takes some for each."""
    items = 10_000_000
    column = pa.ListArray.from_arrays([0, items], pa.nulls(items, pa.string()))
    (skipped,) = parquet(tmp_path, {"captions": column})
    assert (tmp_path / "a.parquet").stat().st_size < 50_000
    assert skipped.reason.startswith("parquet: column 'captions' unpacks ")
    with (tmp_path / "a.parquet").open("rb") as file:
        chunk = pq.ParquetFile(file).metadata.row_group(0).column(1)
        start = chunk.dictionary_page_offset or chunk.data_page_offset
        assert sum(page.values for page in pages(file, start, chunk.total_compressed_size)) == items


def test_a_long_text_that_a_list_repeats_is_in_memory_once(tmp_path) -> None:
    """The dictionary of a column holds it once; the row is refused by its size before it is unpacked."""
    items = pa.DictionaryArray.from_arrays(pa.array([0] * 100_000, pa.int32()), ["a" * 60_000])
    (skipped,) = parquet(tmp_path, {"captions": pa.ListArray.from_arrays([0, 100_000], items)})
    assert (tmp_path / "a.parquet").stat().st_size < 100_000
    assert skipped.reason == "caption: 6,000,800,000 bytes, expected at most 65,536"


def test_each_cut_caption_counts() -> None:
    """By captions, not by images; what is cut is the text beyond the encoder's length."""
    cut = CutCaptions(HashEncoder(dim=8, length=4), 5)
    cut.add(["a b c", "one two three four five six"])
    cut.add(["a", "x y z four"])
    cut.add(["b"])
    assert cut.counts() == {"captions": 2, "fraction": round((len("four five six") + len("four")) / 37, 4)}
