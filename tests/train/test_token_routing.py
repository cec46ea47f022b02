"""Routed tokens in training: what is drawn, its end, equality without it, resuming, and what is refused."""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from atoll.encoders.text import HashEncoder
from atoll.errors import AtollError
from atoll.manifest import Manifest, TokenRouteSettings, TrainSettings
from atoll.nn import build_network
from atoll.objective import Objective
from atoll.storage.shards import Shards
from atoll.train import plans
from atoll.train.batches import CaptionedLatents, Rows
from atoll.train.denoising import Denoising
from atoll.train.expert import train_expert
from atoll.train.island import Island
from atoll.train.loop import prepared, train
from atoll.train.plans import TrainingMarks, fingerprint, is_exact, training_mark
from atoll.train.state import Counters
from atoll.train.token_routing import TokenRouting
from tests.conftest import RUN, write_run
from tests.train.killed import Stop, kill_at

SHAPE, TOKENS = (1, 6, 12), 72  # with a patch of 1
NETWORK = {"name": "mmdit", "patch": 1, "width": 16, "depth": 4, "heads": 2}
NAME = "1-flow-linear"


def manifest_of(**train: object) -> Manifest:
    return Manifest(**{**RUN, "network": NETWORK, "train": {**RUN["train"], "log_every": 1, **train}})


def write(path: Path, **train: object) -> tuple[Path, Manifest]:
    run, manifest = write_run(path, shape=SHAPE), manifest_of(**train)
    (run / "atoll.yaml").write_text(yaml.safe_dump(manifest.model_dump(mode="json", exclude_defaults=True)))
    return run, manifest


def routing(keep: float = 0.5, end: int = 4) -> TokenRouting:
    return TokenRouting(TokenRouteSettings(keep=keep), first=1, last=3, end=end, tokens=TOKENS)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> CaptionedLatents:
    run = write_run(tmp_path_factory.mktemp("data") / "run", shape=SHAPE)
    shards = [Shards(run / "clusters" / "cluster-001")]
    return CaptionedLatents(Rows.of(shards, "train"), HashEncoder(dim=8, length=4))


def task_on(data: CaptionedLatents, route: TokenRouting | None, **settings: object) -> Denoising:
    torch.manual_seed(0)
    network = build_network({**NETWORK, "size": list(SHAPE[1:]), "channels": 1, "states_dim": 8})
    for p in network.parameters():  # no block is the identity
        torch.nn.init.normal_(p, std=0.2)
    chosen = TrainSettings(**{"steps": 8, "batch": 6, **settings})
    objective = Objective(prediction="flow", schedule="linear")
    task = Denoising(prepared(network, chosen), objective, data, data, settings=chosen, seed=3, codec={})
    task.routing = route
    return task


def losses(task: Denoising, index: int = 0) -> torch.Tensor:
    return task.losses(task.module, task.batch(index, slice(0, 6)))


def test_kept_tokens_are_distinct_and_depend_on_seed_and_step_only() -> None:
    kept = routing().draw(3, 1, 6, TOKENS)
    assert kept.shape == (6, 36)
    assert kept.dtype == torch.int64
    assert all(len(set(row.tolist())) == 36 and row.min() >= 0 and row.max() < TOKENS for row in kept)
    assert not torch.equal(kept[0], kept[1])
    torch.manual_seed(5)
    assert torch.equal(routing().draw(3, 1, 6, TOKENS), kept)
    assert not torch.equal(routing().draw(3, 2, 6, TOKENS), kept)
    assert not torch.equal(routing().draw(4, 1, 6, TOKENS), kept)
    # Every token is as likely.
    counts = routing().draw(0, 0, 4000, TOKENS).flatten().bincount(minlength=TOKENS) / 4000
    assert 0.45 < counts.min() < counts.max() < 0.55
    assert routing(keep=0.001).draw(0, 0, 2, TOKENS).shape == (2, 1)


def test_a_batch_has_its_rows_of_them_and_is_otherwise_the_plain_one(data) -> None:
    task, plain = task_on(data, routing(end=2)), task_on(data, None)
    whole, part = task.batch(1, slice(0, 6)), task.batch(1, slice(2, 4))
    assert torch.equal(part["kept"], whole["kept"][2:4])
    assert torch.equal(whole.pop("kept"), routing().draw(3, 1, 6, TOKENS))
    other = plain.batch(1, slice(0, 6))
    assert whole.keys() == other.keys()
    assert all(torch.equal(whole[name], other[name]) for name in whole)
    # After the end a step is the plain one.
    assert "kept" not in task.batch(2, slice(0, 6))
    assert torch.equal(losses(task, 2), losses(plain, 2))
    assert not torch.allclose(losses(task, 1), losses(plain, 1))


def test_all_tokens_kept_are_the_plain_training(data) -> None:
    every, plain = task_on(data, routing(keep=1.0)), task_on(data, None)
    torch.testing.assert_close(losses(every), losses(plain))
    for task in (every, plain):
        losses(task).mean().backward()
    for one, other in zip(every.module.parameters(), plain.module.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_checkpointed_blocks_have_the_same_gradients(data, checkpointing) -> None:
    tasks = task_on(data, routing()), task_on(data, routing(), checkpointing=checkpointing)
    for task in tasks:
        losses(task).mean().backward()
    for one, other in zip(*(task.module.parameters() for task in tasks), strict=True):
        assert torch.equal(one.grad, other.grad)


def trained(task: Denoising, directory: Path, stop: int | None = None, resume: bool = False) -> dict[str, torch.Tensor]:
    """The tensors of the last checkpoint."""
    marks, island = TrainingMarks({}, task.settings), Island(0, 1, torch.device("cpu"))
    progress = None if stop is None else kill_at(stop)
    train(task, task.settings, directory, marks, island, resume=resume, progress=progress)
    return load_file(directory / "checkpoint.safetensors")


def test_resume_is_exact_over_the_end_of_the_route(data, tmp_path) -> None:
    options = {**RUN["train"], "steps": 4, "checkpoint_every": 1, "log_every": 1, "validate_every": 0}
    whole = trained(task_on(data, routing(end=2), **options), tmp_path / "whole")
    with pytest.raises(Stop):
        trained(task_on(data, routing(end=2), **options), tmp_path / "part", stop=2)
    part = trained(task_on(data, routing(end=2), **options), tmp_path / "part", resume=True)
    assert part.keys() == whole.keys()
    assert all(torch.equal(part[name], whole[name]) for name in part)
    plain = trained(task_on(data, None, **options), tmp_path / "plain")
    assert any(not torch.equal(part[name], plain[name]) for name in part)


def test_an_expert_is_trained_with_the_route_and_warned_of_few_tokens(tmp_path, monkeypatch) -> None:
    def stop(task: Denoising, *_: object, **__: object) -> None:
        tasks.append(task)
        raise Stop

    tasks: list[Denoising] = []
    monkeypatch.setattr("atoll.train.denoiser.train", stop)
    run, manifest = write(tmp_path / "run", token_route={"first": 1})
    warned = rf"{NAME}: train.token_route: .* about 1,024 .* this image has 72"
    with pytest.warns(UserWarning, match=warned), pytest.raises(Stop):
        train_expert(run, manifest, "1")
    assert tasks[0].routing == TokenRouting(TokenRouteSettings(first=1), 1, 3, 6, TOKENS)


def test_it_is_part_of_the_mark_only_if_set() -> None:
    plain = TrainSettings(steps=8)
    # The mark of before there were routes.
    left_out = plans._MAY_CHANGE | plans._ADDED | plans._TARGETS | {"token_route"}
    assert training_mark({}, plain) == fingerprint({"train": plain.model_dump(exclude=left_out)})
    marks = {training_mark({}, plain.model_copy(update={"token_route": route})) for route in (
        None, TokenRouteSettings(), TokenRouteSettings(keep=0.4), TokenRouteSettings(until=1.0))}  # fmt: skip
    assert len(marks) == 4


def test_a_plan_whose_route_ends_at_another_batch_is_not_exact() -> None:
    settings = TrainSettings(steps=20, token_route=TokenRouteSettings(until=0.5))
    assert is_exact(Counters(step=5, planned=10), settings)
    assert not is_exact(Counters(step=6, planned=10), settings)
    assert not is_exact(Counters(step=5, skipped=1, planned=10), settings)
    assert is_exact(Counters(step=6, planned=10), settings.model_copy(update={"token_route": None}))


def test_router_and_low_rank_updates_route_nothing_unasked() -> None:
    manifest = manifest_of(token_route={})
    assert manifest.train_of(manifest.experts[0]).token_route == TokenRouteSettings()
    assert manifest.train_of(manifest.router).token_route is None
    assert manifest.train_lora_of(manifest.experts[0]).token_route is None
    lora = manifest.lora.model_copy(update={"train": {"token_route": {"keep": 0.25}}})
    update = manifest.model_copy(update={"lora": lora}).train_lora_of(manifest.experts[0])
    assert update.token_route == TokenRouteSettings(keep=0.25)


def routing_of(tap: int | None = None, shape: tuple[int, ...] = (1, 20, 20), network=NETWORK, **route) -> TokenRouting:
    settings = TrainSettings(steps=10, token_route=TokenRouteSettings(**route))
    routing = TokenRouting.of(settings, network, [(1, 32, 40), shape], tap)
    assert routing is not None
    return routing


def test_defaults_leave_out_the_first_two_blocks_and_the_last() -> None:
    routing = routing_of()
    assert (routing.first, routing.last, routing.end, routing.tokens) == (2, 3, 8, 400)
    assert routing_of(tap=2).first == 2
    assert routing_of(tap=4).last == 3
    assert TokenRouting.of(TrainSettings(), NETWORK, [SHAPE], None) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": {**NETWORK, "name": "dit"}}, "network 'dit' routes no tokens; expected mmdit"),
        ({"network": {**NETWORK, "depth": 3}}, r"blocks 2 to 2, expected first < last <= 3.*change first and last"),
        ({"last": 5}, r"blocks 2 to 5, expected first < last <= 4"),
        ({"shape": (1, 8, 8)}, r"an image has 64 tokens, expected more than 64, better 1,024: .*leave it out"),
        ({"tap": 3}, r"targets are read after 3 blocks.*targets_block to at most 2 or above 3"),
    ],
)
def test_what_does_not_fit_is_refused(options, message) -> None:
    with pytest.raises(AtollError, match=message) as error:
        routing_of(**options)
    assert "\n" not in str(error.value)


def test_few_tokens_are_refused_before_training(tmp_path) -> None:
    with pytest.raises(ValueError, match="last 2, first 2: expected last above first"):
        TokenRouteSettings(last=2)
    assert routing_of(shape=(1, 16, 17)).warning() is None
    assert "1,024" in str(routing_of(shape=(1, 16, 16)).warning())
    run = write_run(tmp_path / "small")
    with pytest.raises(AtollError, match="an image has 32 tokens"):
        train_expert(run, manifest_of(token_route={}), "1")
    assert not (run / "experts").exists()
