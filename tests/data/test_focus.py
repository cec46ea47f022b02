"""`data.focus`: a box in a column of the metadata stays inside the crop, from every source that has metadata."""

import csv
import io
import json
import math
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from atoll.data.crop import Box
from atoll.data.encode import encode_run
from atoll.data.focus import box_of
from atoll.data.parquet_lists import number_lists
from atoll.data.sources import build_source
from atoll.data.types import Raw, Skipped, Unfit
from atoll.errors import AtollError
from atoll.manifest import DataSettings, parse_manifest
from atoll.storage.layout import RunLayout
from atoll.storage.shards import Shards

WIDE = (30, 10)  # pixels: a square shows a third of it
# Red at the right end, and a detector that knows.
RIGHT = [0.8, 0.2, 1, 0.8]
BOXES: dict[str, Any] = {"a": RIGHT, "b": None, "c": [0.5, 0.5, 0.5, 0.5], "d": [10, 2, 29, 8], "e": [0.1, 0.2, 0.3]}
READ = {"a": Box(0.8, 0.2, 1, 0.8), "b": None, "c": Box(0.5, 0.5, 0.5, 0.5)}
REASONS = {"d": "[10, 2, 29, 8] is not inside the image", "e": "focus: a list of 3 numbers, expected [x0, y0, x1, y1]"}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)
numbers = st.lists(st.integers(-2, 2) | st.floats(-1, 2) | st.just(math.nan), max_size=6)


@given(json_values | numbers | numbers.map(json.dumps) | numbers.map(lambda x: json.dumps(x).encode()))
def test_any_value_is_a_box_in_the_image_or_a_reason_of_one_line(value) -> None:
    try:
        box, said = box_of(value), ""
    except Unfit as error:
        box, said = None, str(error)
    assert box is None or (0 <= box.x0 <= box.x1 <= 1 and 0 <= box.y0 <= box.y1 <= 1)
    if said:
        assert said.startswith("focus: ")
        assert "expected [x0, y0, x1, y1] as fractions" in said
        assert said.isprintable()
        assert len(said) < 600


@given(st.lists(st.none() | numbers.map(lambda x: [float(y) for y in x]), min_size=1, max_size=4))
def test_parquet_yields_the_same_for_any_list_of_numbers(tmp_path, cells) -> None:
    table = {"image": pa.array([b"x"] * len(cells)), "face": pa.array(cells, pa.list_(pa.float32()))}
    pq.write_table(pa.table(table), tmp_path / "rows.parquet")
    for cell, sample in zip(cells, samples(tmp_path, "parquet").values(), strict=True):
        try:
            expected = box_of(None if cell is None else [float(np.float32(x)) for x in cell])
        except Unfit:
            assert isinstance(sample, Skipped)
        else:
            assert isinstance(sample, Raw)
            assert sample.focus == expected


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([[0, 0, 1, 1]], "a list with a list"),
        ([], "a list of 0 numbers"),
        ([0, 0, 1, 1, 0, 0, 1], "a list of 5 numbers or more"),
        ([0, 0, "1", 1], "a list with a str"),
        ([0, 0, None, 1], "a list with a NoneType"),
        ([0, 0, True, 1], "a list with a bool"),
        ({"x0": 0}, "is a dict"),
        (0.5, "is a float"),
        ("0.1 0.2 0.3 0.4", "'0.1 0.2 0.3 0.4' is no JSON"),
        ("[" * 900, "is no JSON"),
        ("[0, 0, 1, " + "1" * 2000 + "]", "a text of 2,011 characters"),
        (b"\xff", "is no JSON"),
        ([0, 0, math.nan, 1], "[0, 0, nan, 1] is not finite"),
        ("[0, 0, Infinity, 1]", "[0, 0, inf, 1] is not finite"),
        (
            [-0.1, 0, 1, 1],
            "is not inside the image, expected [x0, y0, x1, y1] as fractions of the width and the height",
        ),
        ([0, 0, 10**400, 1], "is not inside the image"),
        ([0.6, 0, 0.5, 1], "ends before it begins"),
        ([0, 0.6, 1, 0.5], "ends before it begins"),
    ],
)
def test_what_is_no_box_is_named(value, said) -> None:
    with pytest.raises(Unfit) as error:
        box_of(value)
    assert said in str(error.value)


def png(name: str) -> bytes:
    """A wide image, red at its right end; each name has its own grey, as duplicates are skipped."""
    pixels = np.full((WIDE[1], WIDE[0], 3), 20 * (ord(name) - 96), dtype=np.uint8)
    pixels[:, 24:] = (255, 0, 0)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def images(root: Path) -> None:
    root.mkdir(exist_ok=True)
    for name in BOXES:
        (root / f"{name}.png").write_bytes(png(name))


def jsonl(root: Path) -> None:
    images(root)
    # Not each line needs the field.
    records = [{"file_name": f"{name}.png", "face": box} for name, box in BOXES.items() if box is not None]
    records.append({"file_name": "b.png", "text": "no face"})
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, records)))


def table(root: Path) -> None:
    images(root)
    with (root / "metadata.csv").open("w") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "face"])
        for name, box in BOXES.items():
            writer.writerow([f"{name}.png", "" if box is None else json.dumps(box)])


def beside(root: Path) -> None:
    images(root)
    columns = {"file_name": [f"{name}.png" for name in BOXES], "face": pa.array(BOXES.values(), pa.list_(pa.float64()))}
    pq.write_table(pa.table(columns), root / "metadata.parquet")


def parquet(root: Path) -> None:
    root.mkdir()
    columns = {"image": list(map(png, BOXES)), "face": list(map(str, BOXES.values()))}
    columns["face"] = [json.dumps(box) for box in BOXES.values()]
    pq.write_table(pa.table({"key": list(BOXES), **columns}), root / "rows.parquet")


def tar(root: Path) -> None:
    root.mkdir()
    with tarfile.open(root / "0.tar", "w") as file:
        for name, box in BOXES.items():
            for kind, content in (("png", png(name)), ("json", json.dumps({"face": box}).encode())):
                member = tarfile.TarInfo(f"{name}.{kind}")
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))


def samples(root: Path, source: Any, **settings: Any) -> dict[str, Raw | Skipped]:
    data = DataSettings(source=source, path=str(root), focus="face", validation=0, size=10, **settings)
    built = build_source(data)
    assert built.config()["focus"] == "face"
    found = [sample for block in built.blocks() for sample in built.read(block)]
    return {sample.key: sample for sample in found}


@pytest.mark.parametrize(
    ("source", "write"),
    [("folder", jsonl), ("folder", table), ("folder", beside), ("parquet", parquet), ("webdataset", tar)],
)
def test_every_source_reads_boxes_and_skips_rows_with_wrong_ones(tmp_path, source, write) -> None:
    write(tmp_path / "data")
    more = {"key": "key"} if source == "parquet" else {}
    found = {Path(key).stem: sample for key, sample in samples(tmp_path / "data", source, **more).items()}
    read = {key: sample.focus for key, sample in found.items() if isinstance(sample, Raw)}
    assert read == READ
    for key, reason in REASONS.items():
        assert reason.removeprefix("[10, 2, 29, 8]") in found[key].reason


def run_of(tmp_path: Path, write: Callable[[Path], None], source: str, focus: str) -> Path:
    if not (tmp_path / "data").exists():
        write(tmp_path / "data")
    text = f"""
name: focused
data: {{source: {source}, path: "{tmp_path}/data", size: 10, validation: 0, max_skipped: 0.5{focus}}}
codec: {{name: pixels, channels: 3}}
feature: {{name: hog, bins: 2, grid: 2}}
condition: {{name: hash, dim: 8, length: 4}}
experts: [{{cluster: 0, objective: {{prediction: flow, schedule: linear}}}}]
"""
    (tmp_path / "run").mkdir(exist_ok=True)
    encode_run(tmp_path / "run", parse_manifest(text, "here"), workers=0)
    return tmp_path / "run"


def test_the_crop_shows_what_the_box_names(tmp_path) -> None:
    encoded = Shards(RunLayout(run_of(tmp_path, jsonl, "folder", ", focus: face")).encoded)
    latents = encoded.read("latent", slice(None))  # [3, 3, 10, 10] in [-1, 1]
    red = (latents[:, 0] - latents[:, 1]).mean((1, 2))
    # Six of the ten columns of a.png; the others are cropped at the centre.
    assert dict(zip(encoded.keys, (red > 0.5).tolist(), strict=True)) == {"a.png": True, "b.png": False, "c.png": False}
    skipped = RunLayout(tmp_path / "run").encoded / "skipped.jsonl"
    assert "metadata.jsonl:3" in skipped.read_text()


def test_another_focus_is_other_data(tmp_path) -> None:
    encoded = Shards(RunLayout(run_of(tmp_path, jsonl, "folder", "")).encoded)
    assert (encoded.read("latent", slice(None))[:, 0] <= 0).all()  # no red
    with pytest.raises(AtollError, match="focus"):
        run_of(tmp_path, jsonl, "folder", ", focus: face")


@pytest.mark.parametrize(
    ("source", "write", "said"),
    [
        ("folder", jsonl, "no column 'eyes', which data.focus names; its columns are"),
        ("folder", images, "no column 'eyes', which data.focus names; there is no metadata"),
        ("parquet", parquet, "no column 'eyes', which data.focus names; it has"),
    ],
)
def test_a_column_that_is_not_there_is_named(tmp_path, source, write, said) -> None:
    write(tmp_path / "data")
    with pytest.raises(AtollError, match=said):
        build_source(DataSettings(source=source, path=str(tmp_path / "data"), focus="eyes"))


def test_tars_whose_json_has_no_box_are_counted(tmp_path) -> None:
    tar(tmp_path / "data")
    source = build_source(DataSettings(source="webdataset", path=str(tmp_path / "data"), focus="eyes"))
    read = [sample for block in source.blocks() for sample in source.read(block)]
    assert {sample.notes[-1] for sample in read} == {
        "images without a box (no eyes, which data.focus names, in the json)"
    }


def test_a_column_of_another_kind_is_refused_at_once(tmp_path) -> None:
    boxes = pa.array([{"x0": 0.1}], pa.struct({"x0": pa.float64()}))
    pq.write_table(pa.table({"image": [b"x"], "face": boxes}), tmp_path / "rows.parquet")
    with pytest.raises(AtollError, match=r"column 'face' is struct<x0: double>, expected a list of four numbers"):
        samples(tmp_path, "parquet")
    with pytest.raises(AtollError, match=r"data\.focus: the built-in glyphs have no boxes"):
        build_source(DataSettings(source="glyphs", focus="face"))


def test_a_list_without_an_end_is_not_read_as_a_whole(tmp_path) -> None:
    """A billion zeros take a few bytes of parquet; the rows after them are read."""
    many = pa.ListArray.from_arrays(pa.array([0, 5_000_000, 5_000_004]), pa.array(np.zeros(5_000_004)))
    pq.write_table(pa.table({"image": [b"x", b"y"], "face": many}), tmp_path / "rows.parquet")
    first, second = samples(tmp_path, "parquet").values()
    assert "a list of 5 numbers or more" in first.reason
    assert list(map(len, number_lists(many))) == [5, 4]
    assert second.focus == Box(0, 0, 0, 0)
