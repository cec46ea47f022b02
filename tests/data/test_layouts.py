"""The layouts of captions that other projects document: each is read, or named with the setting that reads it.

The list is that of docs/data.md: kohya's sd-scripts, OneTrainer, SimpleTuner, Hugging Face datasets, img2dataset,
open_clip.
"""

import io
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from atoll.data.captions import COLUMNS
from atoll.data.sources import build_source
from atoll.data.tables import FILE_COLUMNS
from atoll.data.types import Raw, Skipped
from atoll.errors import AtollError
from atoll.manifest import DataSettings
from atoll.storage.shards import unpack

DOCS = Path(__file__).parents[2] / "docs" / "data.md"


class Layout(NamedTuple):
    """A layout of three images.

    Attributes:
        where: the project, and what it calls the layout.
        files: relative name -> content; text, bytes, or a table to write as parquet.
        captions: of the images in the order of their keys, as they are read.
        options: settings that the layout needs.
        told: a pattern in what is said without these settings: in an error, or in notes.
        source: of the data.
        others: further captions of each image.
    """

    where: str
    files: dict[str, Any]
    captions: tuple[str, ...] = ("sheep 0", "sheep 1", "sheep 2")
    options: dict[str, Any] = {}  # noqa: RUF012
    told: str | None = None
    source: str = "folder"
    others: tuple[str, ...] = ()


def images(pattern: str = "{}.jpg") -> dict[str, bytes]:
    return {pattern.format(i): b"image %d" % i for i in range(3)}


def beside(pattern: str, text: Callable[[int], str] = lambda i: f"sheep {i}", image: str = "{}.jpg") -> dict[str, Any]:
    return {**images(image), **{pattern.format(i): text(i) for i in range(3)}}


def rows(**columns: str) -> list[dict[str, str]]:
    """Three rows; {} in a value is the number."""
    return [{name: value.format(i) for name, value in columns.items()} for i in range(3)]


def json_lines(records: list[dict[str, str]]) -> str:
    return "\n".join(map(json.dumps, records))


def csv(records: list[dict[str, str]], separator: str = ",") -> str:
    return "\n".join(separator.join(line) for line in (records[0].keys(), *(record.values() for record in records)))


def tar(*members: tuple[str, str | bytes]) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for name, content in members:
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return sink.getvalue()


def samples(**members: str) -> bytes:
    """A tar of three samples: extension (with _ for a dot) -> content, in which {} is the number."""
    named = [(i, kind.replace("_", "."), text) for i in range(3) for kind, text in members.items()]
    return tar(*((f"{i:09d}.{kind}", text.replace("{}", str(i))) for i, kind, text in named))


FIELD = '{"caption": "sheep {}", "url": "http://x"}'
KOHYA = {str(i): {"caption": f"sheep {i}", "tags": "wool, grass", "train_resolution": [512, 512]} for i in range(3)}
IMG2DATASET = {
    "key": ["000", "001", "002"],
    "url": ["http://x"] * 3,
    "caption": ["sheep 0", "sheep 1", "sheep 2"],
    "status": ["success"] * 3,
    "error_message": [None] * 3,
}

LAYOUTS = [
    # kohya's sd-scripts
    Layout("kohya: caption_extension .txt", beside("{}.txt")),
    Layout("kohya: make_captions.py, .caption", beside("{}.caption")),
    Layout(
        "kohya: both, tags in .txt",
        {**beside("{}.caption", lambda i: "tags"), **beside("{}.txt")},
        told=r"3 \.caption "
        r"files beside images are read only where \.txt is empty.*data\.caption: \.caption",
    ),
    Layout(
        "kohya: any caption_extension",
        beside("{}.cap2"),
        options={"caption": ".cap2"},
        told=r"3 \.cap2 files beside images are not read; data\.caption: \.cap2 reads them",
    ),
    Layout(
        "kohya: class tokens of the folder",
        images("20_sheep/{}.jpg"),
        ("sheep",) * 3,
        {"caption": "@folder"},
        told='no image has a caption; data.caption: "@folder" takes its folder\'s name',
    ),
    Layout(
        "kohya: metadata_file .json by stems",
        {**images(), "meta_cap.json": json.dumps(KOHYA)},
        options={"metadata": "meta_cap.json"},
        told=r"meta_cap\.json \(columns caption, tags.*data\.metadata: meta_cap\.json",
    ),
    Layout(
        "kohya: metadata_file .json in the folder's name",
        {**images(), "metadata.json": json.dumps(KOHYA)},
        told="metadata: caption comes first; tags not read",
    ),
    Layout(
        "kohya: metadata_file .json by paths (--full_path)",
        {**images("a/{}.jpg"), "m.json": json.dumps({f"ROOT/a/{i}.jpg": KOHYA[str(i)] for i in range(3)})},
        options={"metadata": "m.json"},
        told=r"data\.metadata: m\.json reads it",
    ),
    Layout(
        "kohya: metadata_file .jsonl",
        {**images(), "meta.jsonl": json_lines(rows(image_path="{}.jpg", caption="sheep {}"))},
        options={"metadata": "meta.jsonl"},
        told=r"meta\.jsonl \(columns image_path, caption\).*data\.metadata",
    ),
    Layout(
        "kohya: metadata_cache.json",
        {**images(), "metadata_cache.json": json.dumps({f"ROOT/{i}.jpg": KOHYA[str(i)] for i in range(3)})},
        options={"metadata": "metadata_cache.json"},
        told=r"data\.metadata: metadata_cache\.json reads it",
    ),
    Layout(
        "kohya: enable_wildcard, a line each",
        beside("{}.txt", lambda i: f"sheep {i}\n\na ram"),
        options={"caption_lines": "each"},
        told=r"captions of several lines, joined into one \(0\.txt\); data\.caption_lines: each keeps them apart",
        others=("a ram",),
    ),
    Layout("kohya: several lines without enable_wildcard", beside("{}.txt", lambda i: f"sheep\n\n{i}"), told="joined"),
    Layout(
        "kohya: conditioning_data_dir",
        {**beside("img/{}.txt", image="img/{}.jpg"), **images("mask/{}.png")},
        told=r"left out as companions of other images: 3 mask .*data\.companions: train keeps them",
    ),
    # OneTrainer
    Layout("OneTrainer: sample prompts", beside("{}.txt")),
    Layout(
        "OneTrainer: several lines",
        beside("{}.txt", lambda i: f"sheep {i}\na ram"),
        options={"caption_lines": "each"},
        told="captions of several lines, joined into one",
        others=("a ram",),
    ),
    Layout(
        "OneTrainer: masks and conditions",
        {**beside("{}.txt"), **images("{}-masklabel.png"), **images("{}-condlabel.png")},
        told="left out as companions of other images: 3 masklabel, 3 condlabel|3 condlabel, 3 masklabel",
    ),
    Layout("OneTrainer: filename", images("sheep_{}.jpg"), options={"caption": "@file"}, told='"@file" its own'),
    Layout(
        "OneTrainer: one prompt file for all",
        {**images(), "prompts.txt": "a sheep\na ram"},
        ("",) * 3,
        told=r"prompts\.txt is not read",
    ),
    # SimpleTuner
    Layout(
        "SimpleTuner: textfile",
        beside("{}.txt", lambda i: f"sheep {i}\na ram"),
        options={"caption_lines": "each"},
        told="captions of several lines, joined into one",
        others=("a ram",),
    ),
    Layout(
        "SimpleTuner: parquet, a list in the field",
        {
            **images(),
            "m.parquet": {
                "filename": [f"{i}.jpg" for i in range(3)],
                "caption": [[f"sheep {i}", "a ram"] for i in range(3)],
            },
        },
        options={"metadata": "m.parquet"},
        told=r"m\.parquet \(columns filename, caption\) is not read; data\.metadata: m\.parquet reads it",
        others=("a ram",),
    ),
    Layout(
        "SimpleTuner: JSON lines, a list in the field",
        {
            **images(),
            "metadata.jsonl": json_lines(
                [{"file_name": f"{i}.jpg", "captions": [f"sheep {i}", "a ram"]} for i in range(3)]
            ),
        },
        others=("a ram",),
    ),
    Layout("SimpleTuner: filename", images("sheep_{}.jpg"), options={"caption": "@file"}, told='"@file" its own'),
    Layout(
        "SimpleTuner: parquet, names without extension",
        {**images("{}.png"), "photos.parquet": {"id": [0, 1, 2], "cogvlm_caption": [f"sheep {i}" for i in range(3)]}},
        options={"metadata": "photos.parquet", "file_name": "id", "caption": "cogvlm_caption"},
        told=r"photos\.parquet \(columns id, cogvlm_caption\) is not read; data\.metadata: photos\.parquet reads it",
    ),
    Layout(
        "SimpleTuner: parquet, names with extension",
        {
            **images(),
            "train.parquet": {"filename": [f"{i}.jpg" for i in range(3)], "caption": [f"sheep {i}" for i in range(3)]},
        },
        options={"metadata": "train.parquet"},
        told=r"data\.metadata: train\.parquet reads it",
    ),
    Layout(
        "SimpleTuner: JSON lines",
        {**images(), "all.jsonl": json_lines(rows(filename="{}.jpg", caption="sheep {}"))},
        options={"metadata": "all.jsonl"},
        told=r"data\.metadata: all\.jsonl reads it",
    ),
    Layout(
        "SimpleTuner: webshart, captions in sidecars of tars",
        {"00000.tar": samples(jpg="x{}", txt="sheep {}")},
        source="webdataset",
    ),
    # Hugging Face datasets
    Layout("datasets: metadata.csv", {**images(), "metadata.csv": csv(rows(file_name="{}.jpg", text="sheep {}"))}),
    Layout(
        "datasets: metadata.jsonl",
        {**images(), "metadata.jsonl": json_lines(rows(file_name="{}.jpg", text="sheep {}"))},
    ),
    Layout(
        "datasets: metadata.parquet",
        {
            **images(),
            "metadata.parquet": {"file_name": [f"{i}.jpg" for i in range(3)], "text": [f"sheep {i}" for i in range(3)]},
        },
    ),
    Layout(
        "datasets: metadata in a folder of its own",
        {**images("train/{}.jpg"), "train/metadata.jsonl": json_lines(rows(file_name="{}.jpg", text="sheep {}"))},
    ),
    Layout(
        "datasets: another *_file_name",
        {**images(), "metadata.jsonl": json_lines(rows(image_file_name="{}.jpg", text="sheep {}"))},
    ),
    Layout(
        "datasets: several images a row",
        {
            **images(),
            **images("{}_out.jpg"),
            "metadata.jsonl": json_lines(
                rows(input_file_name="{}.jpg", output_file_name="{}_out.jpg", text="sheep {}")
            ),
        },
        ("sheep 0", "", "sheep 1", "", "sheep 2", ""),
        {"file_name": "input_file_name"},
        told=r"it names several images \(input_file_name, output_file_name\); data\.file_name chooses one",
    ),
    Layout(
        "datasets: lists of images",
        {**images(), "metadata.jsonl": json.dumps({"file_names": ["0.jpg", "1.jpg"], "text": "sheep"})},
        ("",) * 3,
        {"allow_uncaptioned": True},
        told=r"it names several images \(file_names\)",
    ),
    Layout(
        "datasets: class folders",
        {f"{name}/a.jpg": name.encode() for name in ("cow", "ewe", "ram")},
        ("cow", "ewe", "ram"),
        {"caption": "@folder"},
        told='"@folder" takes its folder\'s name',
    ),
    Layout(
        "datasets: zip archives", {**beside("{}.txt"), "more.zip": b"PK"}, told=r"archives are not unpacked: more\.zip"
    ),
    Layout(
        "datasets: a column of another name",
        {**images(), "metadata.csv": csv(rows(file_name="{}.jpg", prompt="sheep {}"))},
    ),
    Layout(
        "datasets: a column of a name of its own",
        {**images(), "metadata.csv": csv(rows(file_name="{}.jpg", blip_caption="sheep {}"))},
        options={"caption": "blip_caption"},
        told=r"metadata has blip_caption: data\.caption names one",
    ),
    Layout("datasets: webdataset, json", {"a.tar": samples(jpg="x{}", json=FIELD)}, source="webdataset"),
    Layout(
        "datasets: parquet",
        {
            "data/train-00000-of-00001.parquet": {
                "image": [{"bytes": b"x", "path": f"{i}.jpg"} for i in range(3)],
                "text": [f"sheep {i}" for i in range(3)],
            }
        },
        source="parquet",
    ),
    Layout(
        "datasets: parquet with two captions",
        {"a.parquet": {"image": [b"x"] * 3, "caption": [f"sheep {i}" for i in range(3)], "long_caption": ["y"] * 3}},
        told="captions are in the column caption; long_caption not read; data.caption chooses another",
        source="parquet",
    ),
    Layout(
        "datasets: parquet with two captions, both read",
        {"a.parquet": {"image": [b"x"] * 3, "short": [f"sheep {i}" for i in range(3)], "long": ["a ram"] * 3}},
        options={"caption": ["short", "long"], "caption_weights": [1, 3]},
        told="no column has a usual name of captions; short, long not read; data.caption names one",
        source="parquet",
        others=("a ram",),
    ),
    Layout(
        "datasets: parquet with lists of captions",
        {"a.parquet": {"image": [b"x"] * 3, "captions": [[f"sheep {i}", "a ram"] for i in range(3)]}},
        source="parquet",
        others=("a ram",),
    ),
    Layout(
        "datasets: parquet with captions of another name",
        {"a.parquet": {"image": [b"x"] * 3, "en_prompt": [f"sheep {i}" for i in range(3)]}},
        options={"caption": "en_prompt"},
        told="no column with a usual name of captions, but en_prompt; name one as data.caption",
        source="parquet",
    ),
    # img2dataset
    Layout(
        "img2dataset: files",
        {
            **beside("00000/{:09d}.txt", image="00000/{:09d}.jpg"),
            **{f"00000/{i:09d}.json": FIELD.replace("{}", str(i)) for i in range(3)},
            "00000.parquet": IMG2DATASET,
            "00000_stats.json": "{}",
        },
        told=r"3 \.json files beside images are read only where \.txt is empty",
    ),
    Layout(
        "img2dataset: files, captions in .json alone",
        beside("0/{}.json", lambda i: FIELD.replace("{}", str(i)), "0/{}.jpg"),
    ),
    Layout(
        "img2dataset: webdataset",
        {
            "00000.tar": samples(jpg="x{}", json=FIELD, txt="sheep {}"),
            "00000_stats.json": "{}",
            "00000.parquet": IMG2DATASET,
        },
        source="webdataset",
    ),
    Layout(
        "img2dataset: webdataset, captions in .json alone",
        {"00000.tar": samples(webp="x{}", json=FIELD)},
        source="webdataset",
    ),
    Layout(
        "img2dataset: parquet",
        {"00000.parquet": {**IMG2DATASET, "jpg": [b"x"] * 3, "txt": IMG2DATASET["caption"]}},
        told="captions are in the column caption; txt not read",
        source="parquet",
    ),
    Layout(
        "img2dataset: save_additional_columns",
        {"00000.tar": samples(jpg="x{}", json='{"caption": null, "alt_caption": "sheep {}"}')},
        options={"caption": "alt_caption"},
        told="samples have alt_caption; data.caption names one",
        source="webdataset",
    ),
    # open_clip
    Layout(
        "open_clip: csv, separated by tabs",
        {**images(), "train.csv": csv(rows(filepath="{}.jpg", title="sheep {}"), "\t")},
        options={"metadata": "train.csv"},
        told=r"train\.csv \(columns filepath, title\) is not read; data\.metadata: train\.csv",
    ),
    Layout(
        "open_clip: csv keys of its own",
        {**images(), "train.csv": csv(rows(where="{}.jpg", what="sheep {}"))},
        options={"metadata": "train.csv", "file_name": "where", "caption": "what"},
        told=r"train\.csv .*is not read",
    ),
    Layout("open_clip: webdataset", {"a.tar": samples(png="x{}", txt="sheep {}")}, source="webdataset"),
    Layout(
        "open_clip: --text-key txt;caption", {"a.tar": samples(jpeg="x{}", caption="sheep {}")}, source="webdataset"
    ),
    Layout(
        "open_clip: --json-text-key",
        {"a.tar": samples(jpg="x{}", json='{"caption_florence": "sheep {}"}')},
        options={"caption": "caption_florence"},
        told="samples have caption_florence; data.caption names one",
        source="webdataset",
    ),
]


def write(root: Path, files: dict[str, Any]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, dict):
            pq.write_table(pa.table(content), path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.replace("ROOT", str(root)).encode())


def read(root: Path, source: str, **options: Any) -> tuple[list[Raw | Skipped], str]:
    """All samples, and everything that is said."""
    built = build_source(DataSettings(source=source, path=str(root), **options))
    found = [sample for block in built.blocks() for sample in built.read(block)]
    said = [*built.notes(), *(note for raw in found if isinstance(raw, Raw) for note in raw.notes)]
    return found, "; ".join(said + [skipped.reason for skipped in found if isinstance(skipped, Skipped)])


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.where)
def test_a_documented_layout_is_read_or_named(tmp_path, layout) -> None:
    write(tmp_path, layout.files)
    if layout.told is not None:  # what is said without the settings
        try:
            _, said = read(tmp_path, layout.source)
        except AtollError as error:
            said = str(error)
        assert re.search(layout.told, said), said
    found, said = read(tmp_path, layout.source, **layout.options)
    good = [sample for sample in found if isinstance(sample, Raw)]
    assert tuple(raw.caption for raw in good) == layout.captions, said
    assert {tuple(caption for caption, _ in unpack(raw.others)) for raw in good} == {layout.others}
    if layout.told is None and not layout.options:
        assert said == ""


def test_every_layout_stands_in_the_documentation() -> None:
    text = DOCS.read_text()
    table = text.partition("| layout |")[2].partition("\n\n")[0].splitlines()[2:]
    assert sorted(line.split("|")[1].strip() for line in table) == sorted(layout.where for layout in LAYOUTS)
    # The usual names of columns, in their order.
    words = " ".join(text.split())
    assert ", ".join(COLUMNS) in words
    assert f"{', '.join(FILE_COLUMNS[:-1])} or {FILE_COLUMNS[-1]}" in words


@pytest.mark.parametrize("name", ["train.tfrecord", "data-00000-of-00001.arrow", "urls.csv"])
def test_data_of_other_formats_are_named(tmp_path, name) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(AtollError, match=rf"no images found.*1 of {re.escape(Path(name).suffix)}"):
        read(tmp_path, "folder")
