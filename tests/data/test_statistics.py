"""Statistics of latents: those of torch over all training rows, however the rows are divided and encoded."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atoll.data.encode import encode_run
from atoll.data.statistics import ChannelSums
from atoll.errors import AtollError
from atoll.manifest import load_manifest
from atoll.storage.artifact import read_json
from atoll.storage.cards import EncodedCard
from atoll.storage.shards import Shards

FLIPS = {"flips": False, "channels": 3}
YAML = """
name: tones
data: {{source: folder, path: {path}, size: 8, validation: 0.3, duplicates: skip, flips: {flips}}}
codec: {{name: pixels, channels: {channels}, scale: 2.0}}
condition: {{name: hash, dim: 6}}
feature: {{name: hog, bins: 3, grid: 2}}
experts: [{{cluster: 0, objective: {{prediction: flow, schedule: linear}}}}]
"""


def latents(rows: int, *shape: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    offset = torch.arange(shape[0]).reshape(-1, 1, 1) - 1.0
    return (offset + (0.5 + offset.abs()) * torch.randn(rows, *shape, generator=g)).half()


def assert_statistics(statistics, columns: list[torch.Tensor]) -> None:
    x = torch.cat([column.double().transpose(0, 1).flatten(1) for column in columns], 1)  # [C, values]
    mean, std = torch.tensor(statistics.mean).double(), torch.tensor(statistics.std).double()
    torch.testing.assert_close(mean, x.mean(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(std, x.std(1, correction=0), rtol=1e-6, atol=1e-6)
    assert statistics.values == x.shape[1]


@given(st.lists(st.integers(0, 150), min_size=1, max_size=4), st.integers(0, 9))
def test_sums_of_parts_give_the_statistics_of_the_whole(sizes, seed) -> None:
    parts = [latents(rows, 3, 2, 5, seed=seed + i) for i, rows in enumerate(sizes)]
    whole, total = torch.cat(parts), ChannelSums()
    for part in parts:
        total += ChannelSums.from_json(ChannelSums.of({"latent": part}, ["train"] * len(part)).to_json())
    if not len(whole):
        assert total.statistics() is None
        return
    assert_statistics(total.statistics(), [whole])


def test_latents_of_several_shapes_count_by_their_values() -> None:
    wide, high = latents(5, 3, 2, 8), latents(7, 3, 6, 4, seed=1)
    sums = [ChannelSums.of({"latent": part}, ["train"] * len(part)) for part in (wide, high)]
    assert_statistics((sums[0] + sums[1]).statistics(), [wide, high])


def test_training_rows_count_and_their_mirror_images_too() -> None:
    columns = {"latent": latents(9, 2, 3, 4), "latent_flip": latents(9, 2, 3, 4, seed=1), "feature": torch.zeros(9, 5)}
    splits = ["val" if i % 3 == 0 else "train" for i in range(9)]
    rows = [i for i in range(9) if i % 3]
    statistics = ChannelSums.of(columns, splits).statistics()
    assert_statistics(statistics, [columns["latent"][rows], columns["latent_flip"][rows]])
    assert ChannelSums.of(columns, ["val"] * 9).statistics() is None


def test_the_number_of_threads_changes_no_bit() -> None:
    before, some = torch.get_num_threads(), latents(200, 4, 16, 16)
    try:
        results = set()
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.add(ChannelSums.of({"latent": some}, ["train"] * 200).to_json())
        assert len(results) == 1
    finally:
        torch.set_num_threads(before)


def test_a_constant_channel_has_no_deviation() -> None:
    constant = torch.full((30, 1, 4, 4), 0.1).half()
    statistics = ChannelSums.of({"latent": constant}, ["train"] * 30).statistics()
    assert statistics.mean == pytest.approx([0.1], abs=1e-4)
    assert statistics.std == pytest.approx([0.0], abs=1e-7)


@pytest.fixture
def run(tmp_path):
    """A folder of toned images, some of them twice, and a run that encodes it."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(40):
        tone = random.integers(0, 200, 3) + random.integers(0, 56, (8, 8, 3))
        for name in (f"{i:02d}", *([f"{i:02d}-again"] if i % 8 == 0 else [])):
            Image.fromarray(tone.astype(np.uint8)).save(tmp_path / "images" / f"{name}.png")
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.mark.parametrize("flips", ["false", "true"])
def test_the_card_has_the_statistics_of_the_rows_that_remain(run, flips) -> None:
    """Repeated images are dropped at the end; their blocks were summed up with them."""
    yaml = YAML.format(path=run.parent / "images", flips=flips, channels=3)
    (run / "atoll.yaml").write_text(yaml)
    said = encode_run(run, load_manifest(run), workers=0)
    shards = Shards(run / "encoded")
    assert len(shards) == 40
    rows = shards.rows("train")
    assert 0 < len(rows) < 40
    columns = [shards.read(name, rows) for name in shards.columns if name.startswith("latent")]
    assert len(columns) == (2 if flips == "true" else 1)
    assert_statistics(shards.card(EncodedCard).statistics, columns)
    # What is normalised is said; pixels are not, unless atoll.yaml asks for it.
    assert "normalises" not in said
    # A second call, and whoever reads the plan again, sees the same encoding.
    assert "is there already" in encode_run(run, load_manifest(run), workers=0)


def test_what_will_be_normalised_is_said(run) -> None:
    yaml = YAML.format(path=run.parent / "images", flips="false", channels=3).replace(
        "scale: 2.0", "statistics: measured"
    )
    (run / "atoll.yaml").write_text(yaml)
    said = encode_run(run, load_manifest(run), workers=0)
    statistics = Shards(run / "encoded").card(EncodedCard).statistics
    assert f"latents of 3 channels: means of {min(statistics.mean):.2f} to {max(statistics.mean):.2f}, dev" in said
    assert Shards(run / "encoded").card(EncodedCard).codec == {
        "name": "pixels",
        "channels": 3,
        "shift": 0.0,
        "scale": 1.0,
    }


def test_an_altered_block_with_nan_is_named(run, monkeypatch) -> None:
    yaml = YAML.format(path=run.parent / "images", flips="false", channels=3)
    (run / "atoll.yaml").write_text(yaml)
    whole = ChannelSums.of
    broken = lambda columns, splits: whole({"latent": columns["latent"] * float("nan")}, splits)  # noqa: E731
    monkeypatch.setattr(ChannelSums, "of", staticmethod(broken))
    with pytest.raises(AtollError, match=r"00000\.safetensors: a latent in it is NaN.*remove 00000\.parquet"):
        encode_run(run, load_manifest(run), workers=0)
    assert not (run / "encoded").exists()
    assert json.loads(json.dumps(read_json(run / "encoded.partial" / "plan.json")))["kind"] == "partial"
