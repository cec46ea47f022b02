"""Latents normalised by measured statistics: the same codec with other constants."""

import pytest
import torch

from atoll.encoders.codec import build_codec
from atoll.encoders.codec.statistics import (
    other_statistics,
    refuse_other_statistics,
    standardised,
    statistics_note,
    uses_measured,
    with_codec,
    with_measured,
)
from atoll.encoders.codec.statistics import own_constants as own
from atoll.errors import AtollError
from atoll.storage.cards import EncodedCard, LatentStatistics
from atoll.storage.shards import Shards, ShardWriter
from tests.cards import encoded_card
from tests.encoders.codec.test_codec import SAVE, images_of


def statistics_of(latents: torch.Tensor) -> LatentStatistics:
    x = latents.double().transpose(0, 1).flatten(1)
    return LatentStatistics(mean=x.mean(1).tolist(), std=x.std(1, correction=0).tolist(), values=x.shape[1])


def write(path, latents, codec, statistics="own", **columns) -> Shards:
    card = encoded_card(codec=codec)
    if statistics == "own":
        statistics = statistics_of(latents)
    if statistics is not None:
        card["statistics"] = statistics.plain()
    rows = len(latents)
    with ShardWriter(path, card, 4) as writer:
        writer.append([f"k{i}" for i in range(rows)], [""] * rows, ["train"] * rows, {"latent": latents, **columns})
    return Shards(path)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"name": "kl"}, True),
        ({"name": "taef2", "shift": None}, True),
        ({"name": "taef2", "shift": 0.0}, False),
        ({"name": "tiny", "scale": [1.0, 2.0]}, False),
        ({"name": "tiny", "scale": 2.0, "statistics": "measured"}, True),
        ({"name": "kl", "statistics": "codec"}, False),
        ({"name": "pixels"}, False),
        ({"name": "pixels", "statistics": "measured"}, True),
    ],
)
def test_networks_use_measured_statistics_unless_constants_are_set(config, expected) -> None:
    assert uses_measured(config) is expected


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(AtollError, match=r"codec\.statistics is 'mean'; expected measured or codec"):
        uses_measured({"name": "kl", "statistics": "mean"})
    with pytest.raises(AtollError, match="statistics"):
        build_codec({"name": "pixels", "statistics": "mean"})


@pytest.mark.parametrize("name", ["pixels", *SAVE])
def test_a_normalised_latent_decodes_to_the_same_image(tmp_path, name) -> None:
    config = {"name": name, "channels": 3} if name == "pixels" else {"name": name, "weights": str(SAVE[name](tmp_path))}
    images = images_of(6, 3, 16, 24) ** 2
    codec = build_codec({**config, "shift": 0.3, "scale": 1.7})
    raw = codec.encode(images)
    config = standardised(codec.config(), statistics_of(raw), tmp_path)
    assert "statistics" not in config
    normal = build_codec(config)
    assert normal.config() == config
    latents = normal.encode(images)
    mean, std = raw.mean((0, 2, 3), keepdim=True), raw.std((0, 2, 3), correction=0, keepdim=True)
    torch.testing.assert_close(latents, (raw - mean) / std, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(codec.channels), rtol=0, atol=1e-4)
    torch.testing.assert_close(latents.std((0, 2, 3), correction=0), torch.ones(codec.channels), rtol=0, atol=1e-4)
    torch.testing.assert_close(normal.decode(latents), codec.decode(raw), rtol=0, atol=1e-5)


def some(rows=10, channels=3, seed=0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, channels + 1).reshape(-1, 1, 1)
    return (torch.randn(rows, channels, 4, 6, generator=g) * scale + scale - 2).half()


CODEC = {"name": "pixels", "channels": 3, "shift": 0.25, "scale": 2.0}


def test_shards_are_read_normalised_by_row_and_by_part(tmp_path) -> None:
    raw = some()
    stored = write(tmp_path / "encoded", raw, CODEC, latent_flip=raw.flip(-1), feature=raw.float().flatten(1))
    shards = with_measured(stored)
    x = raw.float()
    expected = (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), correction=0, keepdim=True)
    rows = torch.tensor([7, 0, 9])
    got = shards.read("latent", rows)
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.float(), expected[rows], rtol=2e-3, atol=2e-3)
    assert torch.equal(shards.read("latent", slice(2, 3)), shards.read("latent", slice(None))[2:3])
    assert torch.equal(shards.read("latent_flip", rows), got.flip(-1))
    assert torch.equal(shards.read("feature", rows), stored.read("feature", rows))
    for part in shards.parts():
        inside = slice(part.start, part.start + len(part))
        assert list(part.columns) == ["feature", "latent", "latent_flip"]
        for name, column in part.columns.items():
            assert torch.equal(column, shards.read(name, inside))
    # The shards that were opened first are as they were.
    assert torch.equal(stored.read("latent", slice(None)), raw)
    assert stored.card(EncodedCard).codec == CODEC
    assert build_codec(shards.card(EncodedCard).codec).config() == shards.data_card.codec


def test_latents_go_back_to_where_they_were(tmp_path) -> None:
    stored = write(tmp_path / "encoded", some(), CODEC)
    back = with_codec(with_measured(stored), CODEC, tmp_path)
    torch.testing.assert_close(back.read("latent", slice(None)), some(), rtol=2e-3, atol=2e-3)
    assert back.data_card.codec == CODEC
    assert with_codec(stored, CODEC, tmp_path) is stored


@pytest.mark.parametrize(("level", "spread"), [(0.7, 0.0), (0.0, 0.0), (8.0, 0.004)])
def test_a_channel_that_does_not_vary_is_refused(tmp_path, level, spread) -> None:
    raw = some()
    raw[:, 1] = (level + spread * some()[:, 1].float().sign()).half()
    with pytest.raises(AtollError, match=r"encoded: channel 1 of the latents does not vary .*codec\.statistics: codec"):
        with_measured(write(tmp_path / "encoded", raw, CODEC))


def test_latents_without_statistics_are_refused(tmp_path) -> None:
    with pytest.raises(AtollError, match=r"encoded: has no statistics.*encode again with --force, or set codec\.stat"):
        with_measured(write(tmp_path / "encoded", some(), CODEC, None))


@pytest.mark.parametrize(
    ("codec", "message"),
    [
        ({"name": "kl", "weights": "x", "sha256": "a", "shift": 0.0, "scale": 1.0}, r"its codec is .*pixels.*that of"),
        ({**CODEC, "channels": 1}, "its codec is"),
        ({**CODEC, "scale": [1.0, 2.0]}, r"scale \[1\.0, 2\.0\]; expected a number, or one for each of the 3 channels"),
        ({**CODEC, "shift": "a"}, "shift 'a'; expected a number"),
        ({**CODEC, "scale": [1.0, 2.0, -1.0]}, r"a scale of -1\.0; expected numbers above 0"),
    ],
)
def test_latents_of_another_codec_are_refused(tmp_path, codec, message) -> None:
    with pytest.raises(AtollError, match=message):
        with_codec(write(tmp_path / "encoded", some(), CODEC), codec, tmp_path / "clusters")


def test_images_of_other_statistics_are_said_to_be(tmp_path) -> None:
    run = with_measured(write(tmp_path / "run", some(), CODEC)).data_card.codec
    assert statistics_note(write(tmp_path / "run", some(), CODEC), run) == ""
    assert statistics_note(write(tmp_path / "alike", (some().float() * 1.05).half(), CODEC), run) == ""
    assert statistics_note(write(tmp_path / "old", some(), CODEC, None), run) == ""
    for name, other in (("mean", some().float() + 0.5), ("deviation", some().float() * 1.2 + 0.2)):
        assert "keeps its statistics" in statistics_note(write(tmp_path / name, other.half(), CODEC), run)
    note = statistics_note(write(tmp_path / "other", (some().float() * 2 + 1).half(), CODEC), run)
    assert "the run keeps its statistics" in note
    assert "deviations of 2.00 to 2.00" in note


MEASURED = {**CODEC, "shift": [0.1, 0.2, 0.3], "scale": [1.0, 2.0, 3.0]}


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (MEASURED, MEASURED, None),
        ({**MEASURED, "weights": "/here"}, {**MEASURED, "weights": "/there"}, None),
        (MEASURED, {**MEASURED, "channels": 1}, None),
        (MEASURED, {"name": "unknown"}, None),
        ([1, 2], [1, 3], None),
        (MEASURED, {**MEASURED, "scale": [1.0, 2.0, 3.5]}, ("scale[2] 3.0", "scale[2] 3.5")),
        (CODEC, {**CODEC, "scale": 3.0}, ("scale 2.0", "scale 3.0")),
        (MEASURED, CODEC, ("shift[0] 0.1, scale[0] 1.0", "shift 0.25, scale 2.0")),
        (MEASURED, {**MEASURED, "shift": 0.1}, ("shift[1] 0.2", "shift 0.1")),
        (MEASURED, {**MEASURED, "shift": [0.1, 0.2]}, ("shift[0] 0.1", "shift[0] 0.1")),
    ],
)
def test_configs_that_differ_in_constants_alone_name_them(one, other, expected) -> None:
    assert other_statistics(one, other) == expected
    assert other_statistics(other, one) == (None if expected is None else expected[::-1])


def test_parts_of_other_statistics_are_refused_by_name() -> None:
    refuse_other_statistics("a", MEASURED, "b", MEASURED)
    with pytest.raises(
        AtollError, match=r"a: its latents are normalised by scale 2\.0, those of b by scale 3\.0; parts"
    ):
        refuse_other_statistics("a", CODEC, "b", {**CODEC, "scale": 3.0})


def test_constants_of_each_channel_make_another_training() -> None:
    assert own(CODEC) == {}
    assert own(MEASURED) == {"constants": {"shift": [0.1, 0.2, 0.3], "scale": [1.0, 2.0, 3.0]}}
