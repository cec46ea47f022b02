"""Training on images of several sizes: batches of one, their order, what is measured, and resuming."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import atoll
from atoll.assemble import assemble_run
from atoll.calibration import mean_like
from atoll.encoders.text import HashEncoder
from atoll.manifest import load_manifest
from atoll.objective import Objective
from atoll.storage.artifact import read_card
from atoll.storage.cards import ExpertCard
from atoll.storage.shards import Shards
from atoll.train.batches import CaptionedLatents, Rows, SeededSampler
from atoll.train.calibrate import measure_calibration, measure_shapes
from atoll.train.denoising import Denoising
from atoll.train.expert import train_expert, train_monolith
from atoll.train.router import train_router
from tests.train.sized import MAIN, TALL, WIDE, shape_of, write_sized_run


def groups_of(sizes):
    """Interleaved row numbers of groups of these sizes."""
    order = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(1))
    return list(order.split(sizes))


sampled = given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(1, 16), st.integers(0, 3))


@sampled
@settings(max_examples=30)
def test_every_row_comes_equally_often(sizes, batch, seed) -> None:
    groups = groups_of(sizes)
    sampler, rows = SeededSampler(sum(sizes), batch, seed, groups), sum(sizes)
    owner = torch.empty(rows, dtype=torch.int64)
    for number, group in enumerate(groups):
        owner[group] = number
    seen, steps = torch.zeros(rows), 6 * rows // batch + 20
    for step in range(steps):
        chosen = sampler.at(step)
        # A batch is full, and of one group; a row repeats only where the group is smaller than the batch.
        assert len(chosen) == batch
        own = owner[chosen].unique()
        assert len(own) == 1
        assert chosen.bincount().max() <= -(-batch // sizes[own]) + 1
        seen += chosen.bincount(minlength=rows)
    for group in groups:
        # Within a group to within one; between groups to within a batch, at either end of what was drawn.
        assert seen[group].max() - seen[group].min() <= 1
        expected = steps * batch * len(group) / rows
        assert abs(float(seen[group].sum()) - expected) <= batch * (len(sizes) + 1)


@sampled
@settings(max_examples=30)
def test_the_rows_of_a_step_depend_on_seed_and_step_alone(sizes, batch, seed) -> None:
    groups = groups_of(sizes)
    steps = 4 * sum(sizes) // batch + 10
    sampler = SeededSampler(sum(sizes), batch, seed, groups)
    in_order = [sampler.at(step) for step in range(steps)]
    again = SeededSampler(sum(sizes), batch, seed, groups)
    for step in torch.randperm(steps).tolist():
        assert torch.equal(again.at(step), in_order[step])
    if len(sizes) == 1:
        plain = SeededSampler(sizes[0], batch, seed)
        assert all(torch.equal(groups[0][plain.at(step)], groups[0][at]) for step, at in enumerate(in_order))


def test_groups_alternate_at_random_and_other_seeds_otherwise() -> None:
    groups = groups_of([400, 400])
    kinds = [
        [int(torch.isin(SeededSampler(800, 10, seed, groups).at(step)[0], groups[1])) for step in range(80)]
        for seed in (1, 2)
    ]
    assert [sum(order) for order in kinds] == [40, 40]
    assert kinds[0] != kinds[1]
    changes = sum(a != b for a, b in zip(kinds[0], kinds[0][1:], strict=False))
    assert 25 < changes < 55


def test_a_small_group_has_its_share_of_a_short_training_too() -> None:
    groups = groups_of([2, 62])
    batches = [
        sum(int(torch.isin(SeededSampler(64, 8, seed, groups).at(step)[0], groups[0])) for step in range(16))
        for seed in range(200)
    ]
    # Two epochs hold half a batch of it: one in every second training, not none in all.
    assert 70 < sum(batches) < 130


@pytest.fixture(scope="module")
def sized_run(tmp_path_factory) -> Path:
    path = write_sized_run(tmp_path_factory.mktemp("sized") / "run")
    manifest = load_manifest(path)
    for k in range(3):
        train_expert(path, manifest, str(k))
    return path


@pytest.fixture
def data(sized_run) -> CaptionedLatents:
    parts = [Shards(sized_run / "clusters" / f"cluster-{k:03d}") for k in range(3)]
    return CaptionedLatents(Rows.of(parts, "train"), HashEncoder(dim=8, length=4))


def test_rows_know_their_shapes(data) -> None:
    rows = data.rows
    assert rows.shapes == [MAIN, WIDE, TALL]
    keys = [key for part in rows.shards for key in part.keys]
    for shape, group in zip(rows.shapes, rows.groups, strict=True):
        assert rows.shape_of(group) == shape
        assert rows.latents(group).shape == (len(group), *shape)
        assert {shape_of(int(keys[rows.numbers[row]][-3:])) for row in group} == {shape}
    few = rows.select(rows.groups[2][:5])
    assert few.shapes == [TALL]
    assert [group.tolist() for group in few.groups] == [[0, 1, 2, 3, 4]]
    mixed = torch.cat([rows.groups[1][:2], rows.groups[0][:3]]).flip(0)
    assert [part.tolist() for part in rows.alike(mixed)] == [mixed[:3].tolist(), mixed[3:].tolist()]


def test_the_mean_of_several_shapes_is_weighed_by_rows(data) -> None:
    rows, expected = data.rows, torch.zeros(MAIN, dtype=torch.float64)
    for row in range(len(rows)):
        latent = rows.latents(torch.tensor([row]))[0].double()
        expected += mean_like(latent, torch.zeros(1, *MAIN, dtype=torch.float64)) / len(rows)
    torch.testing.assert_close(rows.mean(), expected.float())
    main = rows.select(rows.groups[0])
    torch.testing.assert_close(main.mean(), main.latents(torch.arange(len(main))).float().mean(0))


def test_the_parts_of_all_processes_are_the_batch_of_one(data) -> None:
    manifest = load_manifest(data.rows.shards[0].path.parents[1])
    network = torch.nn.Identity()
    objective = Objective(prediction="flow", schedule="linear")
    task = Denoising(
        network, objective, data, data, settings=manifest.train, seed=3, codec={"name": "pixels", "channels": 1}
    )
    shapes = set()
    for index in range(12):
        whole = task.batch(index, slice(0, 6))
        parts = [task.batch(index, slice(start, start + 2)) for start in (0, 2, 4)]
        assert whole["x0"].shape == whole["eps"].shape
        for name, value in whole.items():
            assert torch.equal(torch.cat([part[name] for part in parts]), value)
        shapes.add(tuple(whole["x0"].shape[1:]))
    assert shapes == {MAIN, TALL, WIDE}


def test_experts_router_and_monolith_train_on_all_shapes(sized_run, tmp_path) -> None:
    manifest = load_manifest(sized_run)
    card = read_card(sized_run / "experts" / "1-flow-linear", ExpertCard)
    assert card.latent_shape == MAIN
    assert card.shapes == (MAIN, WIDE, TALL)
    assert card.training is not None
    assert card.training.validation is not None
    router, monolith = train_router(sized_run, manifest), train_monolith(sized_run, manifest)
    assert read_card(monolith, ExpertCard).shapes == (MAIN, WIDE, TALL)
    assert (router / "card.json").is_file()
    pipe = atoll.Pipeline.from_pretrained(assemble_run(sized_run, manifest))
    assert pipe("moss", num_inference_steps=2, seeds=[0]).latents.shape == (1, *MAIN)


def test_resume_is_bit_exact(sized_run, tmp_path) -> None:
    class Stop(Exception):
        pass

    def stop(line: dict) -> None:
        if line["step"] >= 4:
            raise Stop

    path = write_sized_run(tmp_path / "run")
    manifest = load_manifest(path)
    with pytest.raises(Stop):
        train_expert(path, manifest, "0", progress=stop)
    own = train_expert(path, manifest, "0", resume=True)
    whole = sized_run / "experts" / own.name
    assert (own / "weights.safetensors").read_bytes() == (whole / "weights.safetensors").read_bytes()


@pytest.mark.filterwarnings("default")
def test_a_bucket_smaller_than_a_batch_is_named(tmp_path) -> None:
    path = write_sized_run(
        tmp_path / "run", rows=36, train={"steps": 2, "batch": 4, "precision": "fp32", "track": "none"}
    )
    said = r"1-flow-linear: 2 rows of the shape \[1, 2, 12\], in batches of 4 of that shape: they repeat"
    with pytest.warns(UserWarning, match=said):
        train_expert(path, load_manifest(path), "1")


def test_a_calibration_weighs_shapes_by_their_rows() -> None:
    g = torch.Generator().manual_seed(0)
    parts = [torch.randn(n, 1, *size, generator=g) for n, size in ((48, (4, 4)), (16, (2, 6)))]
    objective, mean = Objective(prediction="x0", schedule="linear"), torch.zeros(1, 4, 4)

    def network(x, time, condition):
        # Half of the truth for the first shape's level, nothing for the other.
        return x * (0.5 if x.shape[2] == 4 else 0.1)

    both = measure_shapes(network, objective, [(part, None) for part in parts], mean=mean, samples=64)
    alone = [
        measure_calibration(network, objective, part, None, mean=mean_like(mean, part), samples=samples)
        for part, samples in zip(parts, (48, 16), strict=True)
    ]
    expected = 0.75 * alone[0].x0_mse_raw + 0.25 * alone[1].x0_mse_raw
    torch.testing.assert_close(both.x0_mse_raw, expected)
    assert both.mean.shape == (1, 4, 4)
    corrected, _ = both.correct(*[torch.ones(2, 1, 2, 6)] * 2, torch.tensor([0.9, 0.9]))
    assert corrected.shape == (2, 1, 2, 6)
