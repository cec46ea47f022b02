"""Images of several aspects through `atoll encode`: buckets, their shards, resuming, and what is refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from atoll.data import block
from atoll.data.crop import Framing
from atoll.data.encode import encode_run
from atoll.data.image import frames
from atoll.errors import AtollError
from atoll.image_size import ImageSize
from atoll.manifest import parse_manifest
from atoll.storage.shards import Shards

MANIFEST = """
name: aspects
data: {{source: folder, path: {path}, size: 16, min_side: 4, validation: 0.2, block: 5, {data}}}
codec: {{name: pixels, channels: 3}}
condition: {{name: hash, dim: 6}}
feature: {{name: hog, bins: 3, grid: 2}}
network: {{patch: 2}}
router: {{network: {{patch: 4}}}}
experts: [{{cluster: 0, objective: {{prediction: flow, schedule: linear}}}}]
"""
SIZES = ((16, 16), (20, 12), (33, 20), (12, 20), (18, 17), (9, 16), (60, 36), (24, 23), (21, 37), (16, 30), (40, 8))
BUCKETS = "buckets: {max_aspect: 2}"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Twenty-two images of noise, two of each size; the last two are 5:1."""
    folder, g = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number, (width, height) in enumerate(SIZES * 2):
        pixels = g.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"image {number}")
    return folder


def manifest(images, data=BUCKETS):
    return parse_manifest(MANIFEST.format(path=images, data=f"max_skipped: 0.2, {data}"), "here")


def content(path):
    return {
        file.name: file.read_bytes()
        for file in path.iterdir()
        if file.suffix != ".parquet" or "source" not in file.name
    }


@pytest.fixture(scope="module")
def encoded(images, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    return run, encode_run(run, manifest(images), workers=0)


def test_every_image_is_in_the_bucket_of_its_aspect(encoded, images) -> None:
    run, said = encoded
    shards = Shards(run / "encoded", verify=True)
    assert shards.shape("latent") == (3, 16, 16)
    assert shards.shapes("latent") == ((3, 16, 16), (3, 12, 20), (3, 20, 12))
    framing = Framing(16, 3, 4, tuple(map(ImageSize.parse, ("16x16", "20x12", "12x20"))))
    rows = {key: row for row, key in enumerate(shards.keys)}
    assert len(rows) == 20
    for number, (width, height) in enumerate(SIZES * 2):
        if (width, height) == (40, 8):
            continue
        row = torch.tensor([rows[f"{number:02d}.png"]])
        pixels, square = frames((images / f"{number:02d}.png").read_bytes(), framing)
        expected = 2 * torch.from_numpy(pixels).float() / 255 - 1
        torch.testing.assert_close(shards.read("latent", row)[0].float(), expected, rtol=0, atol=1e-3)
        assert shards.captions_of(row) == [f"image {number}"]
        assert square.shape == (3, 16, 16)
    assert "buckets: 6 of 16x16, 6 of 20x12, 8 of 12x20" in said
    card = json.loads((run / "encoded" / "index.json").read_text())["card"]
    assert card["images"]["sizes"] == ["16x16", "20x12", "12x20"]
    assert card["counts"]["sizes"] == {"12x20": 8, "16x16": 6, "20x12": 6}


def test_a_shard_holds_one_shape(encoded) -> None:
    shards = Shards(encoded[0] / "encoded")
    assert [len({*map(tuple, [part.columns["latent"].shape[1:]])}) for part in shards.parts()] == [1, 1, 1]
    assert sum(len(part) for part in shards.parts()) == 20


def test_an_extreme_aspect_is_named_and_counted(encoded, images, tmp_path) -> None:
    lines = (encoded[0] / "encoded" / "skipped.jsonl").read_text().splitlines()
    reasons = {entry["key"]: entry["reason"] for entry in map(json.loads, lines)}
    assert reasons.keys() == {"10.png", "21.png"}
    assert reasons["10.png"].startswith(
        "extreme aspect: 40 x 8 pixels lose 67% in the nearest bucket, 20x12; at most 50%"
    )
    assert "skipped: 2 extreme aspect" in encoded[1]
    everything = encode_run(tmp_path, manifest(images, "buckets: {max_aspect: 2, max_cut: 1}"), workers=0)
    assert "22 images" in everything


def test_features_are_those_of_squares(encoded, images, tmp_path) -> None:
    encode_run(tmp_path, manifest(images, "flips: true"), workers=0)
    plain, sized = Shards(tmp_path / "encoded"), Shards(encoded[0] / "encoded")
    features = dict(zip(plain.keys, plain.read("feature", slice(None)), strict=True))
    for key, feature in zip(sized.keys, sized.read("feature", slice(None)), strict=True):
        assert torch.equal(features[key], feature)


def test_a_bucket_that_no_image_fills_is_named(images, tmp_path) -> None:
    said = encode_run(tmp_path, manifest(images, "buckets: {sizes: [20x20, 400x4, 16x24], max_cut: 1}"), workers=0)
    assert "no image fills 400x4" in said
    assert Shards(tmp_path / "encoded").shape("latent") == (3, 20, 20)


@pytest.mark.parametrize("workers", [0, 2])
def test_interrupted_it_resumes_to_the_same_bytes(images, encoded, tmp_path, monkeypatch, workers) -> None:
    whole = block.Frozen.__call__
    calls = []

    def stops(self, *pixels):
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("the plug was pulled")
        return whole(self, *pixels)

    monkeypatch.setattr(block.Frozen, "__call__", stops)
    with pytest.raises(RuntimeError, match="plug"):
        encode_run(tmp_path, manifest(images), workers=workers)
    assert list((tmp_path / "encoded.partial").glob("*.safetensors"))
    encode_run(tmp_path, manifest(images), workers=workers, resume=True)
    assert content(tmp_path / "encoded") == content(encoded[0] / "encoded")


def test_mirrored_latents_have_their_bucket_too(images, tmp_path) -> None:
    encode_run(tmp_path, manifest(images, f"{BUCKETS}, flips: true"), workers=0)
    for part in Shards(tmp_path / "encoded").parts():
        assert torch.equal(part.columns["latent_flip"], part.columns["latent"].flip(-1))


def test_copies_are_dropped_within_and_across_buckets(images, tmp_path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name, size in (("a", (20, 12)), ("b", (12, 20)), ("c", (20, 12)), ("d", (16, 16))):
        Image.new("RGB", size, "white").save(folder / f"{name}.png")
    said = encode_run(tmp_path, manifest(folder, f"{BUCKETS}, max_skipped: 0.5"), workers=0)
    # White pages of two shapes are different images.
    assert "3 images" in said
    assert "skipped: 1 duplicate" in said


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("buckets: {sizes: [18x16]}", "data.buckets.sizes: 18x16, expected .* multiples of 4; the nearest is"),
        ("source: glyphs, buckets: {}", "data.buckets: the built-in glyphs are squares"),
    ],
)
def test_buckets_that_cannot_be_are_refused(images, tmp_path, data, said) -> None:
    with pytest.raises(AtollError, match=said):
        encode_run(tmp_path, manifest(images, data), workers=0)
    assert not (tmp_path / "encoded").exists()


def test_other_buckets_are_another_encoding(images, encoded) -> None:
    with pytest.raises(AtollError, match=r"was encoded with images .*--force"):
        encode_run(encoded[0], manifest(images, "buckets: {max_aspect: 1}"), workers=0)
    assert "is there already" in encode_run(encoded[0], manifest(images), workers=0)
