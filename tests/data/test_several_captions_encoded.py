"""Several captions of an image on their way: source -> blocks -> encoded/ -> clusters/, through interruptions."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from atoll.cluster import assign_only, cluster_run
from atoll.data import encode as stage
from atoll.data.encode import encode_run
from atoll.errors import AtollError
from atoll.manifest import Manifest, parse_manifest
from atoll.storage.cards import EncodedCard
from atoll.storage.layout import RunLayout
from atoll.storage.shards import MANIFEST, Shards, unpack

COUNT = 12
RUN = """
name: several
data: {{source: folder, path: "{path}", size: 8, validation: 0, block: 5}}
codec: {{name: pixels, channels: 3}}
feature: {{name: hog, bins: 2, grid: 2}}
condition: {{name: hash, dim: 8, length: 4}}
clusters: {{k: 2, router_fraction: 0.9}}
experts: [{{cluster: 0, objective: {{prediction: flow, schedule: linear}}}}]
"""


def captions_of(number: int) -> str | list[str | dict[str, object]]:
    """One caption, or three with weights; one of those of images 3, 6 and 9 is longer than the encoder reads."""
    words = ["moss", "sand", "rain", "rust", "reed"]
    text = " ".join(words[: 5 if number % 3 == 0 else 2])
    return ["moss", {"text": text, "weight": 2}, f"{number}"] if number >= 3 else f"only {number}"


def folder(root: Path, numbers: range, **changes: object) -> Path:
    root.mkdir()
    records = []
    for number in numbers:
        pixels = np.random.default_rng(number).integers(0, 256, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{number:02d}.png")
        records.append({"file_name": f"{number:02d}.png", "text": changes.get(str(number), captions_of(number))})
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, records)))
    return root


def manifest(data: Path) -> Manifest:
    return parse_manifest(RUN.format(path=data), "here")


def every_caption(shards: Shards) -> dict[str, list[tuple[str, float]]]:
    return {key: unpack(other) for part in shards.parts() for key, other in zip(part.keys, part.others, strict=True)}


def encode(run: Path, data: Path) -> str:
    run.mkdir(exist_ok=True)
    return encode_run(run, manifest(data), workers=0)


def test_captions_reach_the_clusters_and_the_routers_sample(tmp_path) -> None:
    data, run = folder(tmp_path / "data", range(COUNT)), tmp_path / "run"
    said = encode(run, data)
    assert "9 images have several captions, 27 in all: each step of training draws one" in said
    # By captions: images 3, 6 and 9 have one each that is cut.
    assert "3 captions are longer than the text encoder reads" in said
    encoded = Shards(RunLayout(run).encoded, verify=True)
    counts = encoded.card(EncodedCard).counts
    assert (counts.good, counts.several, counts.others, counts.cut.captions) == (COUNT, 9, 18, 3)
    assert encoded.captions[:4] == ["only 0", "only 1", "only 2", "moss"]
    expected = every_caption(encoded)
    assert expected["04.png"] == [("moss sand", 2.0), ("4", 1.0)]
    assert expected["00.png"] == []
    cluster_run(run, manifest(data))
    clusters = [Shards(path) for path in RunLayout(run).existing_clusters()]
    assert {key: value for part in clusters for key, value in every_caption(part).items()} == expected
    sample = every_caption(Shards(RunLayout(run).router_sample))
    assert len(sample) > COUNT / 2
    assert sample == {key: expected[key] for key in sample}


def test_images_added_to_clusters_bring_their_captions(tmp_path) -> None:
    """Also to clusters whose images had one caption each; the first caption decides whether an image is known."""
    one = {str(number): f"only {number}" for number in range(COUNT)}
    encode(tmp_path / "old", folder(tmp_path / "a", range(COUNT), **one))
    cluster_run(tmp_path / "old", manifest(tmp_path / "a"))
    clusters = RunLayout(tmp_path / "old").clusters
    assert not any(Shards(path).has_several_captions for path in RunLayout(tmp_path / "old").existing_clusters())
    more = folder(tmp_path / "b", range(10, 16), **{"10": ["only 10", "another"], "11": "only 11"})
    encode(tmp_path / "new", more)
    said = assign_only(clusters, RunLayout(tmp_path / "new").encoded)
    assert "4 images added, 2 were there already" in said
    found = {
        k: v for path in RunLayout(tmp_path / "old").existing_clusters() for k, v in every_caption(Shards(path)).items()
    }
    assert found["12.png"] == unpack('[["moss sand rain rust reed",2.0],["12",1.0]]')
    assert found["10.png"] == found["00.png"] == []


@pytest.mark.parametrize("at", [0, 1, 2])
def test_an_interrupted_encoding_of_several_captions_goes_on(tmp_path, monkeypatch, at) -> None:
    data = folder(tmp_path / "data", range(COUNT))
    encode(tmp_path / "whole", data)
    original = stage.encode_block

    def stop(number: int, *rest: object) -> None:
        if number == at:
            raise KeyboardInterrupt
        original(number, *rest)

    monkeypatch.setattr(stage, "encode_block", stop)
    with pytest.raises(KeyboardInterrupt):
        encode(tmp_path / "cut", data)
    monkeypatch.setattr(stage, "encode_block", original)
    encode_run(tmp_path / "cut", manifest(data), workers=0, resume=True)
    for file in RunLayout(tmp_path / "whole").encoded.iterdir():
        assert file.read_bytes() == (RunLayout(tmp_path / "cut").encoded / file.name).read_bytes(), file.name


def test_a_duplicate_takes_its_captions_with_it(tmp_path) -> None:
    data = folder(tmp_path / "data", range(COUNT))
    shutil.copy(data / "03.png", data / "05.png")
    said = encode(tmp_path / "run", data)
    assert "skipped: 1 duplicate" in said
    assert "8 images have several captions, 24 in all" in said
    captions = every_caption(Shards(RunLayout(tmp_path / "run").encoded))
    assert "05.png" not in captions
    assert captions["06.png"][0] == ("moss sand rain rust reed", 2.0)


def test_data_with_one_caption_each_are_encoded_as_before(tmp_path) -> None:
    """A list of one caption is one caption: the same bytes, and no column."""
    lists = {str(number): [f"only {number}"] for number in range(COUNT)}
    texts = {str(number): f"only {number}" for number in range(COUNT)}
    encode(tmp_path / "lists", folder(tmp_path / "a", range(COUNT), **lists))
    encode(tmp_path / "texts", folder(tmp_path / "b", range(COUNT), **texts))
    one, other = (RunLayout(tmp_path / name).encoded / MANIFEST for name in ("lists", "texts"))
    assert one.read_bytes() == other.read_bytes()
    assert not Shards(one.parent).has_several_captions


def test_wrong_lists_are_in_the_list_of_skipped_images(tmp_path) -> None:
    data = folder(tmp_path / "data", range(COUNT), **{"4": [["a"]], "5": []})
    with pytest.raises(
        AtollError, match=r"2 of 12 images cannot be used .*: 2 caption; the first .*item 1 of its list"
    ):
        encode(tmp_path / "run", data)
    lines = (RunLayout(tmp_path / "run").encoded_partial / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["reason"].rpartition("(")[2] for line in lines] == [
        "metadata.jsonl:5)",
        "metadata.jsonl:6)",
    ]
