"""The captions that training reads: one of several, tags dropped, as a function of seed and step."""

import random
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from atoll.encoders.text import HashEncoder, LabelEncoder
from atoll.errors import AtollError
from atoll.manifest import TrainSettings, load_manifest, parse_manifest
from atoll.storage.artifact import WEIGHTS
from atoll.storage.layout import RunLayout
from atoll.storage.shards import Shards, ShardWriter, pack
from atoll.train.batches import CaptionedLatents, Rows
from atoll.train.drawn_captions import TagDropout, caption_draws, drawn_captions, tag_dropout
from atoll.train.expert import train_expert
from atoll.train.plans import training_mark
from atoll.train.router import RouterTask, train_router
from tests.conftest import RUN, SHAPE, write_run

TAGS = st.lists(st.text("abc ", min_size=1).map(str.strip).filter(bool), min_size=1, max_size=6)


def several(directory: Path) -> None:
    """Write a directory of shards again, with two more captions for each image."""
    old = Shards(directory)
    columns = {name: old.read(name, slice(None)) for name in old.columns}
    others = [pack([(f"{caption} rain", 1.0), ("rust, moss, sand", 2.0)]) for caption in old.captions]
    with ShardWriter(directory, old.data_card) as writer:
        writer.append(old.keys, old.captions, old.splits, columns, others)


@pytest.fixture
def captioned(tmp_path) -> CaptionedLatents:
    with ShardWriter(tmp_path / "data", {}) as writer:
        captions = [f"moss {i}" for i in range(40)]
        others = [pack([(f"sand {i}", 1.0)]) if i % 2 else "" for i in range(40)]
        writer.append(
            [f"k{i}" for i in range(40)], captions, ["train"] * 40, {"latent": torch.zeros(40, *SHAPE)}, others
        )
    return CaptionedLatents(Rows.of([Shards(tmp_path / "data")], "train"), HashEncoder(dim=8, length=4))


@given(TAGS, st.integers(0, 8), st.booleans(), st.integers(0, 2**62))
def test_kept_tags_stay_and_others_are_a_selection(tags, keep, shuffle, seed) -> None:
    out = TagDropout(0.5, keep, shuffle)(",".join(tags), random.Random(seed))
    left = out.split(", ") if out else []
    assert left[:keep] == tags[:keep]
    rest = list(tags[keep:])
    for tag in left[keep:]:
        rest.remove(tag)  # no tag comes from nowhere, none comes twice
    if not shuffle:
        places = iter(tags[keep:])
        assert all(tag in places for tag in left[keep:])


def test_each_tag_is_dropped_with_the_rate() -> None:
    drop = TagDropout(0.25, keep=1)
    left = [drop("a, b, c", random.Random(i)).split(", ") for i in range(4000)]
    assert all(tags[0] == "a" for tags in left)
    for tag in "bc":
        assert abs(sum(tag in tags for tags in left) / 4000 - 0.75) < 0.03
    # Independently: both are left in the product of the rates.
    assert abs(sum(len(tags) == 3 for tags in left) / 4000 - 0.5625) < 0.03


def test_shuffled_tags_come_in_every_order() -> None:
    shuffle = TagDropout(keep=1, shuffle=True)
    orders = [shuffle("a,b,c,d", random.Random(i)) for i in range(600)]
    assert len(set(orders)) == 6
    assert min(map(orders.count, set(orders))) > 60


def test_without_options_captions_stay_as_they_are(captioned) -> None:
    """The bytes between commas too: nothing is joined again."""
    draws = caption_draws(0, 0, 2)
    assert drawn_captions(["a,b ,, c", ""], [[], []], draws, TagDropout()) == ["a,b ,, c", ""]
    assert not TagDropout(keep=3)


def test_a_caption_is_a_function_of_seed_step_and_place(captioned) -> None:
    rows = torch.arange(40)

    def captions(seed: int, index: int) -> list[str]:
        return captioned._captions(rows, caption_draws(seed, index, 40))

    first = captions(1, 5)
    assert captions(1, 5) == first
    assert captions(1, 6) != first
    assert captions(2, 5) != first
    # Images with one caption have always that one; of two, both come.
    assert first[::2] == [f"moss {i}" for i in range(0, 40, 2)]
    assert {text.split()[0] for text in first[1::2]} == {"moss", "sand"}
    # Measuring reads the first one.
    assert captioned._captions(rows, None) == [f"moss {i}" for i in range(40)]


def test_a_batch_of_several_captions_does_not_depend_on_the_number_of_processes(captioned) -> None:
    captioned.tags = TagDropout(0.3, 0, True)
    labels, settings = torch.arange(40) % 2, TrainSettings(batch=12)
    task = RouterTask(torch.nn.Identity(), captioned, captioned, labels, settings=settings, seed=0)
    whole, parts = task.batch(2, slice(0, 12)), [task.batch(2, slice(i, i + 4)) for i in (0, 4, 8)]
    # The numbers of the hash encoder's words depend on their first use, so words are compared by their vectors.
    states = [captioned.condition(part).states for part in (whole, *parts)]
    assert torch.equal(torch.cat(states[1:]), states[0])


@pytest.mark.parametrize("part", ["expert", "router"])
def test_training_with_several_captions_resumes_bit_exactly(tmp_path, part) -> None:
    run = write_run(tmp_path / "whole")
    settings = {**RUN, "train": {**RUN["train"], "tag_dropout": 0.4, "shuffle_tags": True, "keep_tags": 1}}
    settings["router"] = {"network": {**RUN["router"]["network"], "pooled": True}}
    (run / "atoll.yaml").write_text(yaml.safe_dump(settings))
    for directory in (RunLayout(run).encoded, *RunLayout(run).existing_clusters()):
        several(directory)
    shutil.copytree(run, tmp_path / "cut")
    manifest = load_manifest(run)

    def train(place: Path, **options: object) -> dict[str, torch.Tensor]:
        trained = train_router(place, manifest, **options) if part == "router" else None
        return load_file((trained or train_expert(place, manifest, "1", **options)) / WEIGHTS)

    class Stop(Exception):
        pass

    def stop(line: dict) -> None:
        if line["step"] >= 4:
            raise Stop

    whole = train(run)
    with pytest.raises(Stop):
        train(tmp_path / "cut", progress=stop)
    cut = train(tmp_path / "cut", resume=True)
    assert all(torch.equal(cut[name], value) for name, value in whole.items())
    # The captions matter: with all tags the weights are others.
    manifest = manifest.model_copy(update={"train": TrainSettings(**RUN["train"])})
    other = train(tmp_path / "cut", restart=True)
    assert not all(torch.equal(other[name], value) for name, value in whole.items())


def test_class_names_have_no_tags() -> None:
    encoder = LabelEncoder(["goldfish, Carassius auratus"])
    assert not tag_dropout(TrainSettings(), encoder)
    for settings in (TrainSettings(tag_dropout=0.1), TrainSettings(shuffle_tags=True)):
        with pytest.raises(AtollError, match="the label encoder reads whole class names"):
            tag_dropout(settings, encoder)


@pytest.mark.parametrize(
    ("key", "value"), [("tag_dropout", 1.0), ("tag_dropout", -0.1), ("keep_tags", -1), ("tag_dropout", "often")]
)
def test_a_setting_out_of_range_is_named(key, value) -> None:
    with pytest.raises(AtollError, match=rf"atoll\.yaml: train\.{key}: "):
        parse_manifest(yaml.safe_dump({**RUN, "train": {key: value}}), "atoll.yaml")


def test_tag_settings_belong_to_the_mark_once_they_are_used() -> None:
    marks = {training_mark({}, settings) for settings in (TrainSettings(), TrainSettings(tag_dropout=0.0))}
    assert len(marks) == 1
    changed = [TrainSettings(tag_dropout=0.1), TrainSettings(shuffle_tags=True), TrainSettings(keep_tags=2)]
    assert len(marks | {training_mark({}, settings) for settings in changed}) == 4
