"""Rows of several shapes in one directory: every shard holds one, and rows of one are read at a time."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.errors import AtollError
from atoll.storage.artifact import write_json
from atoll.storage.shards import INDEX, Shards, ShardWriter

MAIN, WIDE, TALL = (2, 4, 4), (2, 3, 5), (2, 6, 2)
SHAPES = (MAIN, WIDE, TALL)


def row(number, shape):
    """The latent of a row: its number everywhere."""
    return torch.full((1, *shape), float(number)).half()


def write(path, shapes, shard_rows=4, main=MAIN):
    """One row of each of these shapes, in this order."""
    with ShardWriter(path, {}, shard_rows, shapes={"latent": main}) as writer:
        for number, shape in enumerate(shapes):
            columns = {"latent": row(number, shape), "feature": torch.tensor([[float(number)]])}
            writer.append([f"k{number}"], [f"caption {number}"], ["val" if number % 3 == 1 else "train"], columns)
    return Shards(path, verify=True)


@given(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=20), st.integers(1, 5))
@settings(max_examples=40)
def test_each_row_comes_back_in_its_shape(tmp_path, shapes, shard_rows) -> None:
    shards = write(tmp_path / "data", shapes, shard_rows)
    kinds, numbers = shards.shapes("latent"), shards.shape_numbers("latent")
    assert set(kinds) == set(shapes)
    assert shards.shape("latent") == MAIN
    assert MAIN not in shapes or kinds[0] == MAIN
    for kind, shape in enumerate(kinds):
        rows = (numbers == kind).nonzero().flatten()
        latents = shards.read("latent", rows)
        own = [number for number, other in enumerate(shapes) if other == shape]
        # In the order of the calls, with key, caption and split beside them.
        assert latents.shape == (len(own), *shape)
        assert latents[:, 0, 0, 0].tolist() == own
        assert shards.captions_of(rows) == [f"caption {number}" for number in own]
        assert [shards.keys[r] for r in rows] == [f"k{number}" for number in own]
        assert [shards.splits[r] for r in rows] == ["val" if number % 3 == 1 else "train" for number in own]
        assert shards.read("feature", rows).flatten().tolist() == own
    for part in shards.parts():
        assert len(part) <= shard_rows
        assert part.columns["latent"].shape[1:] == kinds[numbers[part.start]]


def test_rows_of_two_shapes_are_not_read_together(tmp_path) -> None:
    shards = write(tmp_path / "data", [MAIN, WIDE])
    with pytest.raises(AtollError, match=r"rows of the shapes \(2, 3, 5\), \(2, 4, 4\) in 'latent'; read rows of one"):
        shards.read("latent", slice(None))
    assert shards.read("feature", slice(None)).shape == (2, 1)
    assert shards.read("latent", slice(0, 0)).shape == (0, *MAIN)


def test_one_shape_gives_todays_bytes(tmp_path) -> None:
    shards = write(tmp_path / "a", [MAIN] * 5)
    with ShardWriter(tmp_path / "b", {}, 4) as writer:
        for n in range(5):
            split = "val" if n % 3 == 1 else "train"
            columns = {"latent": row(n, MAIN), "feature": torch.tensor([[float(n)]])}
            writer.append([f"k{n}"], [f"caption {n}"], [split], columns)
    assert shards.sha256 == Shards(tmp_path / "b").sha256
    assert "shapes" not in (tmp_path / "a" / INDEX).read_text()


def test_another_shape_needs_permission(tmp_path) -> None:
    for columns in ({"latent": row(0, WIDE)[:, :, 0]}, {"latent": row(0, WIDE).float()}, {"other": row(0, MAIN)}):
        with ShardWriter(tmp_path / "data", {}, shapes={"latent": MAIN}) as writer:
            writer.append(["a"], [""], ["train"], {"latent": row(0, MAIN)})
            with pytest.raises(ValueError, match="the first ones were"):
                writer.append(["b"], [""], ["train"], columns)
    with ShardWriter(tmp_path / "plain", {}) as writer:
        writer.append(["a"], [""], ["train"], {"latent": row(0, MAIN)})
        with pytest.raises(ValueError, match="the first ones were"):
            writer.append(["b"], [""], ["train"], {"latent": row(1, WIDE)})


def test_finished_shards_are_adopted_in_order(tmp_path) -> None:
    old = write(tmp_path / "old", [WIDE, MAIN, WIDE])
    with ShardWriter(tmp_path / "new", {}, shapes={"latent": MAIN}) as writer:
        for number, shape in ((10, WIDE), (11, TALL)):
            columns = {"latent": row(number, shape), "feature": torch.tensor([[float(number)]])}
            writer.append([f"k{number}"], [""], ["train"], columns)
        for part in old.parts():
            writer.adopt(
                tmp_path / "old" / f"shard-{part.number:05d}.safetensors", part.keys, part.captions, part.splits
            )
    shards = Shards(tmp_path / "new", verify=True)
    wide = (shards.shape_numbers("latent") == shards.shapes("latent").index(WIDE)).nonzero().flatten()
    assert shards.read("latent", wide)[:, 0, 0, 0].tolist() == [10, 0, 2]
    assert sorted(shards.keys) == ["k0", "k1", "k10", "k11", "k2"]


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({"latent": [2, 5, 3]}, "its columns are feature float32 .1., latent float16 .2, 3, 5."),
        ({"pixels": [2, 3, 5]}, "a shard has a shape for 'pixels', which is no column"),
        ({"latent": [2, -3, 5]}, "latent"),
        (None, "shapes"),
    ],
)
def test_a_false_shape_in_the_index_is_found(tmp_path, shapes, said) -> None:
    write(tmp_path / "data", [WIDE] * 3)
    index = json.loads((tmp_path / "data" / INDEX).read_text())
    entry = index["shards"][0]
    entry["shapes"] = shapes
    if shapes is None:
        entry.pop("shapes")
        said = "its columns are feature float32 .1., latent float16 .2, 3, 5."
    write_json(tmp_path / "data" / INDEX, index)
    with pytest.raises(AtollError, match=said):
        Shards(tmp_path / "data").read("latent", slice(None))
