"""What `atoll encode` says of the data: reasons that help, dead links apart, captions that are cut or were not read."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from atoll.data.encode import encode_run
from atoll.data.lengths import CutCaptions, cut_line
from atoll.encoders.text.hashed import HashEncoder
from atoll.errors import AtollError
from atoll.manifest import parse_manifest
from atoll.storage.cards import EncodedCard
from atoll.storage.shards import Shards
from tests.data.test_tars import tar_bytes

MANIFEST = """
name: said
data: {{source: {source}, path: "{path}", size: 8, validation: 0{more}}}
codec: {{name: pixels, channels: 3}}
feature: {{name: hog, bins: 2, grid: 2}}
condition: {{name: hash, dim: 8, length: 4}}
experts: [{{cluster: 0, objective: {{prediction: flow, schedule: linear}}}}]
"""


def image(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    sink = pa.BufferOutputStream()
    Image.fromarray(pixels).save(sink, "BMP")
    return sink.getvalue().to_pybytes()


def encode(tmp_path, source, more="", **options) -> str:
    settings = parse_manifest(MANIFEST.format(source=source, path=tmp_path / "data", more=more), "here")
    (tmp_path / "run").mkdir(exist_ok=True)
    return encode_run(tmp_path / "run", settings, workers=0, **options)


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def test_dead_links_are_no_failures(tmp_path, data) -> None:
    status = ["success", "failed_to_download", "success", "failed_to_resize", "failed_to_download"]
    errors = [None, "HTTP Error 404: Not Found", None, "image too small", "HTTP Error 404: Not Found"]
    images = [image(i) if s == "success" else None for i, s in enumerate(status)]
    table = {"jpg": images, "caption": ["x"] * 5, "status": status, "error_message": errors}
    pq.write_table(pa.table(table, pa.schema([("jpg", pa.binary()), *((n, pa.string()) for n in list(table)[1:])])),
                   data / "0.parquet")  # fmt: skip
    said = encode(tmp_path, "parquet")
    assert "2 images" in said
    assert "not counted as failures: 3 dead link (2 of HTTP Error 404: Not Found, 1 of image too small)" in said
    assert "skipped:" not in said
    out = tmp_path / "run" / "encoded"
    assert Shards(out).card(EncodedCard).plain()["counts"] == {
        "good": 2,
        "uncaptioned": 0,
        "skipped": {},
        "apart": {"dead link": 3},
    }
    listed = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert listed[0] == {"key": "0.parquet:1", "reason": "dead link: HTTP Error 404: Not Found", "failed": False}


def test_a_null_of_a_success_is_a_failure(tmp_path, data) -> None:
    table = {"jpg": [image(0), None], "status": ["success", "success"]}
    pq.write_table(pa.table(table), data / "0.parquet")
    with pytest.raises(
        AtollError, match=r"1 of 2 images cannot be used .*1 image; the first of the commonest: image: null"
    ):
        encode(tmp_path, "parquet")


def test_nothing_but_dead_links(tmp_path, data) -> None:
    table = pa.table({"jpg": pa.array([None, None], pa.binary()), "status": ["failed_to_download"] * 2})
    pq.write_table(table, data / "0.parquet")
    said = r"no images that can be used: 2 dead link \(failed_to_download\); check data.path"
    with pytest.raises(AtollError, match=said):
        encode(tmp_path, "parquet")


def test_paths_without_bytes_say_how_to_embed_them(tmp_path, data) -> None:
    """What `Dataset.to_parquet` of an imagefolder writes."""
    column = pa.array([{"bytes": None, "path": f"/home/me/{i}.jpg"} for i in range(3)],
                      pa.struct({"bytes": pa.binary(), "path": pa.string()}))  # fmt: skip
    pq.write_table(pa.table({"image": column, "text": ["x"] * 3}), data / "0.parquet")
    with pytest.raises(AtollError) as error:
        encode(tmp_path, "parquet")
    said = str(error.value)
    assert "none of 3 images can be used, all for one reason: image: a path (/home/me/0.jpg), no bytes" in said
    assert "embed_table_storage" in said
    assert "--max-skipped" not in said


def test_no_advice_to_go_on_with_nothing(tmp_path, data) -> None:
    for i in range(3):
        (data / f"{i}.jpg").write_bytes(b"x" * i)
    with pytest.raises(AtollError, match=r"3 of 3 images cannot be used .*2 not a JPEG.*, 1 empty.*mend the source$"):
        encode(tmp_path, "folder")


def test_captions_that_lie_there_are_not_left_out_in_silence(tmp_path, data) -> None:
    members = [(f"{i}.{kind}", value) for i in range(3)
               for kind, value in (("bmp", image(i)), ("json", b'{"en_caption": "x"}'))]  # fmt: skip
    (data / "0.tar").write_bytes(tar_bytes(*members))
    with pytest.raises(AtollError, match=r"none of 3 images has a caption, and there are captions that were not read: "
                       r"samples have en_caption; data.caption names one.*--resume --allow-uncaptioned"):  # fmt: skip
        encode(tmp_path, "webdataset")
    said = encode(tmp_path, "webdataset", resume=True, allow_uncaptioned=True)
    assert "3 images have no caption" in said
    assert "3 images: captions that were not read" in said


def test_the_manifest_may_allow_images_without_captions(tmp_path, data) -> None:
    for i in range(3):
        (data / f"{i}.bmp").write_bytes(image(i))
    (data / "all.csv").write_text("file,prompt\n0.bmp,x\n")
    with pytest.raises(AtollError, match=r"captions lie there and none of them is read for 3 images: all\.csv"):
        encode(tmp_path, "folder")
    assert "all.csv (columns file, prompt) is not read" in encode(tmp_path, "folder", ", allow_uncaptioned: true")
    assert "3 images have no caption" not in encode(tmp_path, "folder", ", metadata: all.csv", force=True)


def test_lines_that_are_joined_are_counted(tmp_path, data) -> None:
    for i in range(3):
        (data / f"{i}.bmp").write_bytes(image(i))
        (data / f"{i}.txt").write_text("a\nb" if i else "a")
    said = encode(tmp_path, "folder")
    assert "2 images: captions of several lines, joined into one (1.txt)" in said
    assert Shards(tmp_path / "run" / "encoded").card(EncodedCard).plain()["counts"]["notes"] == {
        "captions of several lines, joined into one": 2
    }


def test_captions_that_are_cut_are_counted(tmp_path, data) -> None:
    captions = ["one two three", "one two three four five six", "", "one two three four"]  # three words are read
    for i, caption in enumerate(captions):
        (data / f"{i}.bmp").write_bytes(image(i))
        (data / f"{i}.txt").write_text(caption)
    said = encode(tmp_path, "folder")
    assert (
        "2 captions are longer than the text encoder reads: on average 38% of their text is cut; it reads 4 tokens"
        in said
    )
    cut = Shards(tmp_path / "run" / "encoded").card(EncodedCard).plain()["counts"]["cut"]
    assert cut == {"captions": 2, "fraction": round((len("four five six") + len("four")) / (27 + 18), 4)}


def test_many_captions_are_sampled_evenly(monkeypatch) -> None:
    monkeypatch.setattr("atoll.data.lengths._ALL", 10)
    cut = CutCaptions(HashEncoder(8, 4), 100)
    for start in range(0, 100, 7):
        cut.add(["one two three four" if i % 2 == 0 else "one" for i in range(start, min(start + 7, 100))])
    assert cut.counts()["captions"] == 100  # rows 0, 10, 20, ... are looked at: all of them even
    assert cut_line({"captions": 1200, "fraction": 0.5}, 77).startswith("1,200 captions are longer")
    assert CutCaptions(HashEncoder(8, 4), 3).counts() is None
