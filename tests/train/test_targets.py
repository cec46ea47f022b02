"""Targets of representation in training: the term, its end, mirrored rows, resuming, and what is refused."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file

from atoll.encoders.text import HashEncoder
from atoll.errors import AtollError
from atoll.manifest import Manifest, TrainSettings, load_manifest
from atoll.nn import build_network
from atoll.objective import Objective
from atoll.storage.artifact import WEIGHTS, read_card
from atoll.storage.cards import ExpertCard
from atoll.storage.shards import Shards, ShardWriter
from atoll.train.batches import CaptionedLatents, Rows
from atoll.train.denoising import Denoising
from atoll.train.expert import train_expert, train_monolith
from atoll.train.plans import TrainingMarks, is_exact
from atoll.train.snapshots import reconstruct_expert
from atoll.train.state import Counters
from atoll.train.targets import TargetsTerm
from tests.cards import cluster_shards_card
from tests.conftest import RUN
from tests.train.killed import Stop, kill_at
from tests.train.targets import RECORD, targets_of, with_targets

NAME = "1-flow-linear"


def settings_of(run: Path, targets: dict | None = None, **train: object) -> Manifest:
    content = {**RUN, "train": {**RUN["train"], "targets_weight": 0.5, **train}}
    (run / "atoll.yaml").write_text(yaml.safe_dump(content | ({"targets": targets} if targets else {})))
    return load_manifest(run)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "experts" / NAME / WEIGHTS)


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def task_on(path: Path, name: str = "mmdit", shape: tuple[int, ...] = (1, 8, 4), **settings: object) -> Denoising:
    """A task with targets on 12 rows of noise."""
    latents = torch.randn(12, *shape, generator=torch.Generator().manual_seed(0)).half()
    card = cluster_shards_card(latent_shape=list(shape), targets=RECORD)
    with ShardWriter(path, card) as writer:
        keys = [f"k{i}" for i in range(12)]
        columns = {"latent": latents, "latent_flip": latents.flip(-1), "target": targets_of(latents)}
        writer.append(keys, ["moss"] * 12, ["train"] * 12, columns)
    data = CaptionedLatents(Rows.of([Shards(path)], "train"), HashEncoder(dim=8, length=4))
    config = {"name": name, "size": list(shape[1:]), "channels": 1, "patch": 2, "width": 16, "depth": 2, "heads": 2}
    torch.manual_seed(0)
    network = build_network({**config, "states_dim": 8})
    chosen = TrainSettings(**{"steps": 8, "batch": 6, "targets_weight": 0.5, **settings})
    objective = Objective(prediction="flow", schedule="linear")
    task = Denoising(network, objective, data, data, settings=chosen, seed=0, codec={})
    task.patch, task.targets = 2, TargetsTerm.of(chosen, Manifest(**RUN).targets, data.rows.shards, {**config})
    task.targets.attach(network, 0)
    return task


def term_of(task: Denoising, module: torch.nn.Module, index: int) -> torch.Tensor:
    """The term of a batch alone, [b]."""
    batch = task.batch(index, slice(0, 6))
    plain = {name: value for name, value in batch.items() if name != "target"}
    return task.losses(module, batch) - task.losses(module, plain)


def test_without_a_weight_targets_change_nothing(run, trained_run) -> None:
    train_expert(with_targets(run), settings_of(run, targets_weight=0.0, targets_block=1), "1")
    assert_equal(weights(run), weights(trained_run))
    card = read_card(run / "experts" / NAME, ExpertCard).plain()
    assert card["training"]["mark"] == read_card(trained_run / "experts" / NAME, ExpertCard).plain()["training"]["mark"]
    assert "targets" not in card["training"]


def test_without_a_batch_that_has_targets_the_bits_are_the_plain_ones(run, trained_run) -> None:
    train_expert(with_targets(run), settings_of(run, targets_until=0.1), "1")
    assert_equal(weights(run), weights(trained_run))


@pytest.mark.parametrize("killed_at", [2, 6])  # before and after the term ends
def test_resume_is_bit_exact_with_its_projector(run, tmp_path, killed_at) -> None:
    manifest, state = settings_of(with_targets(run), ema_profiles=[0.1], ema_snapshot_every=2), f"experts/.train-{NAME}"
    whole = Path(shutil.copytree(run, tmp_path / "whole"))
    train_expert(whole, manifest, "1")
    with pytest.raises(Stop):
        train_expert(run, manifest, "1", progress=kill_at(killed_at))
    train_expert(run, manifest, "1", resume=True)
    assert_equal(weights(run), weights(whole))
    one, other = (load_file(path / state / "checkpoint.safetensors") for path in (run, whole))
    assert_equal(one, other)
    assert "model.projector.0.weight" in one
    assert not any("projector" in name for name in weights(run))
    # The average of the projector is no part of an expert that is reconstructed.
    reconstruct_expert(run / "experts" / NAME, 0.15, tmp_path / "narrow")
    assert load_file(tmp_path / "narrow" / WEIGHTS).keys() >= {n for n in weights(run) if n.startswith("network.")}


def test_the_card_says_which_targets_and_they_change_the_weights(run, trained_run) -> None:
    train_expert(with_targets(run), settings_of(run), "1")
    one, plain = weights(run), weights(trained_run)
    assert one.keys() == plain.keys()
    assert any(not torch.equal(one[name], plain[name]) for name in one)
    training = read_card(run / "experts" / NAME, ExpertCard).plain()["training"]
    assert training["targets"] == RECORD
    # Other components are another training.
    with_targets(run, {**RECORD, "sha256": "2" * 64})
    with pytest.raises(AtollError, match=r"other settings or on other data.*--restart"):
        train_expert(run, load_manifest(run), "1", resume=True)


def test_the_monolith_learns_the_targets_of_all_clusters(run) -> None:
    path = train_monolith(with_targets(run), settings_of(run))
    assert read_card(path, ExpertCard).plain()["training"]["targets"] == RECORD


def test_mirrored_rows_have_mirrored_targets(tmp_path, monkeypatch) -> None:
    task = task_on(tmp_path / "data")
    batch = task.batch(0, slice(0, 6))
    rows, stored = task.order.at(0), task.data.rows.latents(torch.arange(12))
    mirrored = [not torch.equal(x0, stored[row]) for x0, row in zip(batch["x0"], rows, strict=True)]
    assert 0 < sum(mirrored) < 6
    torch.testing.assert_close(batch["target"], targets_of(batch["x0"]))
    # Where no mirrored latents are stored, no row is mirrored.
    targets = task.data.rows.targets(rows)
    monkeypatch.setattr(Rows, "has_flips", False)
    assert torch.equal(task.batch(0, slice(0, 6))["target"], targets)


def test_the_term_is_the_cosine_of_each_token_with_its_place() -> None:
    term = TargetsTerm(weight=0.5, block=1, end=1, record=None)  # type: ignore[arg-type]
    targets = torch.randn(4, 3, 2, 5)
    tokens = targets.flatten(2).transpose(1, 2)  # row by row
    torch.testing.assert_close(term.losses(7 * tokens, targets, (2, 5)), torch.zeros(4), rtol=0, atol=1e-6)
    torch.testing.assert_close(term.losses(-tokens, targets, (2, 5)), torch.ones(4))
    assert term.losses(targets.transpose(2, 3).flatten(2).transpose(1, 2), targets, (2, 5)).min() > 0.1
    # Half as many places per side: a token has the mean of its places, but for the filter's width at the edges.
    smooth = torch.linspace(1, 2, 8).expand(1, 1, 8, 8) * torch.tensor([1.0, -1.0])[None, :, None, None]
    assert term.losses(F.avg_pool2d(smooth, 2).flatten(2).transpose(1, 2), smooth, (4, 4)) < 1e-6


@pytest.mark.parametrize("name", ["dit", "mmdit"])
def test_the_network_learns_to_predict_the_targets(tmp_path, name) -> None:
    task = task_on(tmp_path / "data", name, targets_until=1.0, dropout=0.0)
    optimizer = torch.optim.AdamW(task.module.parameters(), lr=5e-3)
    before = term_of(task, task.module, 0).mean()
    for index in range(1, 41):
        optimizer.zero_grad()
        batch = task.batch(index % 8, slice(0, 6))
        task.losses(task.module, batch).mean().backward()
        optimizer.step()
    assert term_of(task, task.module, 0).mean() < 0.7 * before
    # The gradient reaches the blocks that the tokens went through, and those alone.
    task.module.zero_grad()
    term_of(task, task.module, 0).mean().backward()
    norms = [
        sum(float(p.grad.norm()) for p in block.parameters() if p.grad is not None) for block in task.module.blocks
    ]
    assert norms[0] > 1e3 * norms[1]


def test_after_the_end_a_batch_and_its_loss_are_the_plain_ones(tmp_path) -> None:
    task = task_on(tmp_path / "data", targets_until=0.5)
    assert [("target" in task.batch(index, slice(0, 6))) for index in (0, 3, 4, 7)] == [True, True, False, False]
    losses = task.losses(task.module, task.batch(4, slice(0, 6)))
    task.targets.detach(task.module)
    task.targets = None
    assert not hasattr(task.module, "projector")
    assert torch.equal(losses, task.losses(task.module, task.batch(4, slice(0, 6))))


def test_a_plan_that_drops_the_targets_at_another_batch_is_not_exact() -> None:
    settings = TrainSettings(steps=20, targets_weight=0.5, targets_until=0.5)
    assert is_exact(Counters(step=5, planned=10), settings)
    assert not is_exact(Counters(step=6, planned=10), settings)
    assert not is_exact(Counters(step=5, skipped=1, planned=10), settings)
    assert is_exact(Counters(step=10, planned=10), settings.model_copy(update={"targets_until": 1.0}))
    assert is_exact(Counters(step=10, planned=10), settings.model_copy(update={"targets_weight": 0.0}))
    assert TrainingMarks({}, settings).under(10) != TrainingMarks({}, TrainSettings(steps=20)).under(10)


def test_router_and_low_rank_updates_have_no_targets_unasked(run) -> None:
    manifest = settings_of(run)
    assert manifest.train_of(manifest.router).targets_weight == 0
    assert manifest.train_lora_of(manifest.experts[0]).targets_weight == 0
    lora = manifest.lora.model_copy(update={"train": {"targets_weight": 0.1}})
    assert manifest.model_copy(update={"lora": lora}).train_lora_of(manifest.experts[0]).targets_weight == 0.1


@pytest.mark.parametrize(
    ("targets", "train", "message"),
    [
        ({"feature": {"name": "squeezenet"}}, {}, "feature.name 'mobilenetv2', atoll.yaml names 'squeezenet'"),
        ({"feature": {"name": "mobilenetv2", "size": 96}}, {}, r"feature.size 64, atoll.yaml names 96.*--force"),
        ({"feature": {"name": "mobilenetv2"}, "grid": 4}, {}, "dims 3, atoll.yaml names 8"),
        ({"feature": {"name": "mobilenetv2"}, "grid": 4, "dims": 3}, {}, "grid 2, atoll.yaml names 4"),
        (None, {"targets_block": 2}, "targets_block: 2, and the network has 1 blocks"),
    ],
)
def test_settings_that_do_not_fit_are_refused(run, targets, train, message) -> None:
    with_targets(run)
    with pytest.raises(AtollError, match=message) as error:
        train_expert(run, settings_of(run, targets, **train), "1")
    assert "\n" not in str(error.value)
    assert not (run / "experts").exists()


def test_what_atoll_yaml_leaves_open_may_be_anything(run) -> None:
    # Neither the hash of the network nor the place of its weights is named; the network is not loaded.
    fits = {"feature": {"name": "mobilenetv2", "weights": "elsewhere"}, "dims": 3, "grid": 2}
    train_expert(with_targets(run), settings_of(run, fits, steps=1), "1")


def test_data_that_do_not_fit_are_refused(run) -> None:
    manifest = settings_of(run)
    with pytest.raises(AtollError, match=r"cluster-001: stores no targets.*targets.feature.*targets_weight: 0"):
        train_expert(run, manifest, "1")
    with_targets(run, {**RECORD, "dims": 4})
    with pytest.raises(AtollError, match=r"shape \[3, 2, 2\], its card says \[4, 2, 2\]"):
        train_expert(run, manifest, "1")
    with_targets(run)
    index = run / "clusters" / "cluster-002" / "index.json"
    index.write_text(index.read_text().replace("1" * 64, "2" * 64))
    with pytest.raises(AtollError, match=r"cluster-002: its targets are .*one set of components"):
        train_monolith(run, manifest)
    shards = [Shards(run / "clusters" / "cluster-001")]
    with pytest.raises(AtollError, match="network 'diffusers' returns no tokens"):
        TargetsTerm.of(manifest.train, manifest.targets, shards, {"name": "diffusers"})
