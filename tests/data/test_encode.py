import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from atoll.data import encode as stage
from atoll.data import watch
from atoll.data.block import Frozen
from atoll.data.encode import encode_run
from atoll.data.types import Block, Raw, Skipped, Source
from atoll.encoders.codec import PixelCodec
from atoll.encoders.feature import Hog
from atoll.errors import AtollError
from atoll.manifest import parse_manifest
from atoll.storage.cards import EncodedCard
from atoll.storage.shards import Shards

SIZES = (7, 0, 9, 3)  # samples of the blocks
COUNT, SIZE = sum(SIZES), 8
MANIFEST = """
name: noise
data: {{source: folder, size: 8, {data}}}
codec: {{name: pixels, channels: 1, scale: {scale}}}
condition: {{name: hash, dim: 6}}
feature: {{name: hog, bins: 3, grid: 2}}
experts: [{{cluster: 0, objective: {{prediction: flow, schedule: linear}}}}]
"""


def manifest(data="flips: false", scale=2.0):
    return parse_manifest(MANIFEST.format(data=data, scale=scale), "here")


def noise_images(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (COUNT, 1, SIZE, SIZE), dtype=np.uint8)


class Noise(Source):
    """Noise images in four blocks, the second of them empty. `changed`: samples that stand for others, by number."""

    name = "noise"

    def __init__(self, seed=0, breaks_at=None, changed=None):
        self.seed, self.breaks_at, self.changed, self.read_blocks = seed, breaks_at, changed or {}, []

    def blocks(self) -> Sequence[Block]:
        starts = np.cumsum((0, *SIZES)).tolist()
        return [Block(f"block {i}", size, starts[i]) for i, size in enumerate(SIZES)]

    def read(self, block: Block) -> Iterator[Raw | Skipped]:
        self.read_blocks.append(block.name)
        for n in range(block.content, block.content + block.samples):
            if n == self.breaks_at:
                raise RuntimeError("the plug was pulled")
            split = "val" if n % 4 == 1 else "train"
            yield self.changed.get(n, Raw(f"k{n}", noise_images(self.seed)[n], f"image {n}", split))

    def config(self) -> dict[str, Any]:
        return {"name": "noise"}

    def fingerprint(self) -> str:
        return str(self.seed)


@pytest.fixture
def encode(tmp_path, monkeypatch):
    """Encodes a source as the run `name`, without worker processes unless asked."""

    def work(source=None, name="run", settings=None, **options):
        monkeypatch.setattr(stage, "build_source", lambda data: source or Noise())
        return encode_run(tmp_path / name, settings or manifest(), **{"workers": 0, **options})

    return work


def content(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def skipped(path):
    return {e["key"]: e["reason"] for e in map(json.loads, (path / "skipped.jsonl").read_text().splitlines())}


def test_what_is_written(tmp_path, encode) -> None:
    told = []
    assert f"{COUNT} images" in encode(progress=lambda *news: told.append(news))
    shards = Shards(tmp_path / "run" / "encoded", verify=True)
    assert shards.keys == [f"k{n}" for n in range(COUNT)]
    assert shards.captions == [f"image {n}" for n in range(COUNT)]
    assert shards.rows("val").tolist() == [n for n in range(COUNT) if n % 4 == 1]
    latent, feature = (shards.read(name, slice(None)) for name in ("latent", "feature"))
    images = torch.from_numpy(noise_images()).float() / 255
    assert (latent.dtype, feature.dtype) == (torch.float16, torch.float32)
    torch.testing.assert_close(PixelCodec(1, 0.0, 2.0).decode(latent.float()), images, rtol=0, atol=1e-3)
    torch.testing.assert_close(feature, Hog(3, 2)(images))
    assert [len(part) for part in shards.parts()] == [7, 9, 3]
    card = shards.card(EncodedCard).plain()
    assert card["source"] == {"name": "noise", "sha256": "0"}
    assert card["feature"] == {"name": "hog", "bins": 3, "grid": 2}
    assert card["counts"] == {"good": COUNT, "uncaptioned": 0, "skipped": {}}
    assert told[-1][:2] == (COUNT, COUNT)
    assert "images/s, 0 skipped" in told[-1][2]
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["encoded"]


@pytest.mark.parametrize("asked", [{}, {"resume": True}, {"force": True}])
def test_a_second_one_in_the_same_run_is_refused(encode, asked) -> None:
    tries = []

    def second(*_: object) -> None:
        with pytest.raises(AtollError, match="another process is encoding here; wait for it, or stop it"):
            encode(**asked)
        tries.append(1)

    assert f"{COUNT} images" in encode(progress=second)
    assert tries
    assert "there already" in encode()  # and nothing is held any more


def test_twice_gives_the_same_bytes_whoever_decodes(tmp_path, encode) -> None:
    encode(name="a")
    encode(name="b", workers=2)
    assert content(tmp_path / "a" / "encoded") == content(tmp_path / "b" / "encoded")


def test_the_same_encoding_is_not_made_again(encode) -> None:
    encode()
    again = Noise()
    assert "there already" in encode(again)
    assert again.read_blocks == []
    encode(again, force=True)
    assert len(again.read_blocks) == len(SIZES)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"settings": manifest(scale=3.0)}, "with codec"),
        ({"source": Noise(seed=1)}, "with source"),
        ({"settings": manifest("flips: true")}, "with images"),
    ],
)
def test_another_encoding_is_not_replaced_unasked(tmp_path, encode, other, said) -> None:
    encode()
    before = content(tmp_path / "run" / "encoded")
    with pytest.raises(AtollError, match=rf"{said}.*--force"):
        encode(**other)
    assert content(tmp_path / "run" / "encoded") == before
    encode(**other, force=True)
    assert content(tmp_path / "run" / "encoded") != before


def test_other_things_are_not_replaced(tmp_path, encode) -> None:
    for name in ("encoded", "encoded.partial"):
        (tmp_path / name / name).mkdir(parents=True)
        (tmp_path / name / name / "thesis.tex").write_text("years of work")
        with pytest.raises(AtollError, match=r"no former result|no unfinished encoding"):
            encode(name=name, force=True)
        assert (tmp_path / name / name / "thesis.tex").exists()


@pytest.mark.parametrize("at", [0, 5, 7, 12, COUNT - 1])
def test_an_interrupted_encoding_goes_on(tmp_path, encode, at) -> None:
    encode(name="whole")
    with pytest.raises(RuntimeError, match="plug"):
        encode(Noise(breaks_at=at))
    assert not (tmp_path / "run" / "encoded").exists()
    with pytest.raises(AtollError, match=r"unfinished.*--resume.*--force"):
        encode()
    with pytest.raises(AtollError, match=r"begun with source .*--force"):
        encode(Noise(seed=1), resume=True)
    rest = Noise()
    encode(rest, resume=True)
    finished = sum(np.cumsum(SIZES) <= at)
    assert rest.read_blocks == [f"block {i}" for i in range(finished, len(SIZES))]
    assert content(tmp_path / "run" / "encoded") == content(tmp_path / "whole" / "encoded")


def test_an_interrupted_encoding_can_be_thrown_away(tmp_path, encode) -> None:
    encode(name="whole")
    with pytest.raises(RuntimeError, match="plug"):
        encode(Noise(seed=1, breaks_at=17))
    encode(force=True)
    assert content(tmp_path / "run" / "encoded") == content(tmp_path / "whole" / "encoded")


def test_one_process_at_a_time(encode) -> None:
    class Impatient(Noise):
        def read(self, block: Block) -> Iterator[Raw | Skipped]:
            with pytest.raises(AtollError, match="another process"):
                encode(resume=True)
            return super().read(block)

    encode(Impatient())


def test_what_cannot_be_used_is_listed_and_the_rest_kept(tmp_path, encode) -> None:
    same = noise_images()[3]
    changed = {
        2: Skipped("k2", "truncated: it ends after 12 bytes"),
        8: Raw("k8", same, "the same image", "train"),  # in another block than k3
        9: Raw("k1", noise_images(9)[0], "the same key", "train"),
        12: Raw("k12", noise_images(9)[0], "the pixels of what was dropped for its key", "train"),
        14: Raw("k14", noise_images(9)[1], "", "train"),
    }
    said = encode(Noise(changed=changed), max_skipped=0.1)
    out = tmp_path / "run" / "encoded"
    assert skipped(out) == {
        "k2": "truncated: it ends after 12 bytes",
        "k8": "duplicate: the same pixels as 'k3'",
        "k1": "repeated key: the key of 'k1'",
    }
    shards = Shards(out, verify=True)
    assert shards.keys == [f"k{n}" for n in range(COUNT) if n not in (2, 8, 9)]
    images = torch.from_numpy(np.stack([noise_images()[n] for n in (0, 10)])).float() / 255
    rows = torch.tensor([shards.keys.index("k0"), shards.keys.index("k10")])
    torch.testing.assert_close(shards.read("feature", rows), Hog(3, 2)(images))
    counts = {"good": COUNT - 3, "uncaptioned": 1, "skipped": {"duplicate": 1, "repeated key": 1, "truncated": 1}}
    assert shards.card(EncodedCard).plain()["counts"] == counts
    assert "16 images" in said
    assert "1 truncated" in said
    assert "1 images have no caption" in said


def test_duplicates_may_be_kept(tmp_path, encode) -> None:
    changed = {8: Raw("k8", noise_images()[3], "the same image", "train")}
    encode(Noise(changed=changed), settings=manifest("duplicates: keep"))
    assert len(Shards(tmp_path / "run" / "encoded")) == COUNT


def test_too_many_failures_stop_and_nothing_is_lost(tmp_path, encode) -> None:
    changed = {n: Skipped(f"k{n}", "too small: 3 x 3 pixels") for n in (4, 12)}
    with pytest.raises(AtollError, match=r"2 of 19 .*10.5%; 5.0% may fail\): 2 too small.*--max-skipped 0.12"):
        encode(Noise(changed=changed))
    assert set(skipped(tmp_path / "run" / "encoded.partial")) == {"k4", "k12"}
    rest = Noise(changed=changed)
    encode(rest, resume=True, max_skipped=0.12)
    assert rest.read_blocks == []
    assert len(Shards(tmp_path / "run" / "encoded")) == COUNT - 2


def test_failures_stop_the_work_early_where_they_are_many(encode, monkeypatch) -> None:
    monkeypatch.setattr(watch, "ENOUGH", 5)
    source = Noise(changed={4: Skipped("k4", "too small: 3 x 3 pixels")})
    with pytest.raises(AtollError, match="1 of 7"):
        encode(source)
    assert source.read_blocks == ["block 0"]


def test_a_latent_that_is_not_finite_is_no_good_sample(tmp_path, encode) -> None:
    black = Raw("k6", np.zeros((1, SIZE, SIZE), np.uint8), "black", "train")
    white = np.full((1, SIZE, SIZE), 128, np.uint8)
    only = {n: Raw(f"k{n}", white + np.uint8(n % 2), "grey", "train") for n in range(COUNT)}
    settings = manifest("duplicates: keep", scale=2.0**17)  # 1 * 2^17 is infinite in half precision, 1/255 of it is not
    encode(Noise(changed={**only, 6: black}), settings=settings, max_skipped=0.1)
    assert list(skipped(tmp_path / "run" / "encoded")) == ["k6"]
    assert len(Shards(tmp_path / "run" / "encoded")) == COUNT - 1


def test_nothing_good_is_an_error(encode) -> None:
    with pytest.raises(AtollError, match="no images that can be used"):
        encode(Noise(changed={n: Skipped(f"k{n}", "x") for n in range(COUNT)}), max_skipped=1)


def test_mirrored_images_are_a_column(tmp_path, encode) -> None:
    encode(settings=manifest("flips: true"))
    shards = Shards(tmp_path / "run" / "encoded")
    assert torch.equal(shards.read("latent_flip", slice(None)), shards.read("latent", slice(None)).flip(-1))


def test_the_embedded_data_set_of_a_run(tmp_path, manifest) -> None:
    told = []
    assert "2,288" in encode_run(tmp_path, manifest, progress=lambda *news: told.append(news))
    shards = Shards(tmp_path / "encoded")
    assert shards.shape("latent") == (1, 16, 16)
    assert shards.card(EncodedCard).source["subset"] == "demo"
    assert told[-1][:2] == (2288, 2288)
    assert "there already" in encode_run(tmp_path, manifest)


@pytest.mark.parametrize(
    ("precision", "bears_it", "of_codec", "of_feature"),
    [
        ("auto", False, torch.bfloat16, torch.float32),
        ("auto", True, torch.bfloat16, torch.bfloat16),
        ("bf16", False, torch.bfloat16, torch.bfloat16),
        ("fp32", True, torch.float32, torch.float32),
    ],
)
def test_features_are_exact_unless_told_otherwise(monkeypatch, precision, bears_it, of_codec, of_feature) -> None:
    """MobileNetV2 in bf16 is a fifth off, and the clusters hang on it."""
    taken = {}

    def remember(network, device, dtype=None):
        taken[type(network)] = dtype
        return network

    monkeypatch.setattr(PixelCodec, "to", remember)
    monkeypatch.setattr(Hog, "to", remember)
    monkeypatch.setattr(Hog, "takes_bf16", bears_it)
    monkeypatch.setattr("atoll.data.block.has_bf16", lambda device: True)
    Frozen.build(manifest(f"precision: {precision}"))
    assert taken == {PixelCodec: of_codec, Hog: of_feature}
