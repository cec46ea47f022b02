"""Training of experts, router and monolith: results, resuming, rollbacks, and what is refused."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import atoll.train.loop
from atoll.encoders.text import HashEncoder
from atoll.errors import AtollError
from atoll.manifest import TrainSettings, load_manifest
from atoll.nn import build_network
from atoll.objective import Objective
from atoll.storage.artifact import WEIGHTS, read_card
from atoll.storage.cards import ExpertCard
from atoll.storage.shards import Shards, ShardWriter
from atoll.storage.tensor_hash import with_hash
from atoll.train.batches import CaptionedLatents, Rows, SeededSampler, drop_condition
from atoll.train.calibrate import measure_shapes
from atoll.train.checkpoint import Checkpoints
from atoll.train.denoising import Denoising
from atoll.train.expert import train_expert, train_monolith
from atoll.train.loop import Interrupted
from atoll.train.plans import training_mark
from atoll.train.router import RouterTask, train_router
from atoll.train.state import State
from atoll.train.track import read_metrics
from tests.conftest import write_run

NAME = "1-flow-linear"


def weights(run: Path, part: str = f"experts/{NAME}") -> dict[str, torch.Tensor]:
    return load_file(run / part / WEIGHTS)


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


class Stop(Exception):
    pass


def stop_at(step: int):
    """A progress callback that stops the training like kill -9: nothing is saved after it."""

    def progress(line):
        if line["step"] >= step:
            raise Stop

    return progress


def test_the_card_records_objective_calibration_and_validation(trained_run) -> None:
    card = read_card(trained_run / "experts" / NAME, ExpertCard).plain()
    assert card["objective"]["prediction"] == "flow"
    assert card["clusters"] == [1]
    assert card["assignment"] == json.loads((trained_run / "clusters" / "clusters.json").read_text())["assignment"]
    assert card["calibration"]["measured_on"] == "val"
    assert len(card["calibration"]["slope"]) == len(card["calibration"]["log_snr"])
    lines = read_metrics(trained_run / "experts" / f".train-{NAME}")
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6, 8]
    assert set(lines[-1]["val"]) == {"-6", "-4", "-2", "+0", "+2", "+4", "+6"}


def test_the_artifact_holds_the_ema_weights(trained_run) -> None:
    state = load_file(trained_run / "experts" / f".train-{NAME}" / "checkpoint.safetensors")
    saved = weights(trained_run)
    for name in ("final.weight", "embed.weight"):
        assert torch.equal(saved[f"network.{name}"], state[f"ema.{name}"])
        assert not torch.equal(state[f"ema.{name}"], state[f"model.{name}"])


def test_a_router_with_a_pooled_vector_learns_from_the_prompt(tmp_path) -> None:
    """Latents without information, captions with all of it: the router must learn the words, and be unsure without."""
    encoder = HashEncoder(dim=8, length=4)
    labels = torch.arange(40) % 2
    with ShardWriter(tmp_path / "data", {}) as writer:
        keys, captions = [f"k{i}" for i in range(40)], ["moss", "sand"] * 20
        writer.append(keys, captions, ["train"] * 40, {"latent": torch.zeros(40, 1, 4, 8).half()})
    data = CaptionedLatents(Rows.of([Shards(tmp_path / "data")], "train"), encoder)
    config = {"name": "router", "size": [4, 8], "channels": 1, "patch": 2, "width": 16, "depth": 1, "heads": 2}
    router = build_network({**config, "clusters": 2, "pooled_dim": 8})
    task = RouterTask(router, data, data, labels, settings=TrainSettings(batch=20), seed=0)
    optimizer = torch.optim.AdamW(router.parameters(), lr=1e-2)
    for index in range(60):
        optimizer.zero_grad()
        task.losses(router, task.batch(index, slice(0, 20))).mean().backward()
        optimizer.step()
    assert task.accuracy(router) == dict.fromkeys(("0.1", "0.3", "0.5", "0.7", "0.9"), 1.0)
    unsure = router(torch.randn(1, 1, 4, 8), torch.ones(1), encoder.null(1).pooled).exp()
    assert unsure.max() < 0.9


@pytest.mark.parametrize("killed_at", [2, 4, 6])
def test_resume_is_bit_exact_after_a_kill(run, trained_run, manifest, killed_at) -> None:
    with pytest.raises(Stop):
        train_expert(run, manifest, "1", progress=stop_at(killed_at))
    train_expert(run, manifest, "1", resume=True)
    assert_equal(weights(run), weights(trained_run))
    steps = [line["step"] for line in read_metrics(run / f"experts/.train-{NAME}") if "loss" in line]
    assert steps == sorted(set(steps))
    assert steps[-1] == 8


def test_router_and_monolith_resume_bit_exactly(run, trained_run, manifest) -> None:
    for train, part in ((train_router, "router"), (train_monolith, "monolith")):
        with pytest.raises(Stop):
            train(run, manifest, progress=stop_at(4))
        train(run, manifest, resume=True)
        assert_equal(weights(run, part), weights(trained_run, part))


def test_an_expert_reads_its_clusters_shards_alone(run, trained_run, manifest) -> None:
    shutil.rmtree(run / "encoded")
    shutil.rmtree(run / "clusters" / "cluster-000")
    shutil.rmtree(run / "clusters" / "cluster-002")
    (run / "clusters" / "clusters.json").unlink()
    (run / "clusters" / "assignment.parquet").unlink()
    train_expert(run, manifest, "1")
    assert_equal(weights(run), weights(trained_run))


def test_sigterm_saves_and_stops(run, manifest) -> None:
    def terminate(line):
        if line["step"] == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)  # not always the default: other libraries install handlers
    with pytest.raises(Interrupted, match="stopped at step 4 of 8"):
        train_expert(run, manifest, "1", progress=terminate)
    assert signal.getsignal(signal.SIGTERM) == before
    train_expert(run, manifest, "1", resume=True)


@pytest.mark.parametrize("moment", ["the last checkpoint", "calibration", "the router's accuracy"])
def test_sigterm_after_the_last_step_saves_and_stops(run, trained_run, manifest, monkeypatch, moment) -> None:
    def terminating(function, due=lambda *_: True):
        def call(*arguments, **options):
            if due(*arguments):
                os.kill(os.getpid(), signal.SIGTERM)
            return function(*arguments, **options)

        return call

    def is_last(_, __, numbers) -> bool:
        return json.loads(numbers["numbers"])["step"] == 8

    router = moment == "the router's accuracy"
    with monkeypatch.context() as patch:
        if router:
            patch.setattr(RouterTask, "accuracy", terminating(RouterTask.accuracy))
            patch.setattr(RouterTask, "validate", lambda *_: {})
        elif moment == "calibration":
            patch.setattr(atoll.train.calibrate, "measure_shapes", terminating(measure_shapes))
        else:
            patch.setattr(Checkpoints, "_write", terminating(Checkpoints._write, is_last))
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(Interrupted, match=r"stopped after the last step.*--resume"):
            train_router(run, manifest) if router else train_expert(run, manifest, "1")
        assert signal.getsignal(signal.SIGTERM) == before
    part = "router" if router else f"experts/{NAME}"
    assert not (run / part).exists()
    train_router(run, manifest, resume=True) if router else train_expert(run, manifest, "1", resume=True)
    if not router:
        assert_equal(weights(run), weights(trained_run))


def test_an_existing_checkpoint_needs_resume_or_restart(run, manifest) -> None:
    with pytest.raises(Stop):
        train_expert(run, manifest, "1", progress=stop_at(4))
    with pytest.raises(AtollError, match="--resume"):
        train_expert(run, manifest, "1")
    train_expert(run, manifest, "1", restart=True)
    with pytest.raises(AtollError, match="already trained"):
        train_expert(run, manifest, "1")


def changed(run: Path, old: str, new: str):
    text = (run / "atoll.yaml").read_text()
    assert old in text
    (run / "atoll.yaml").write_text(text.replace(old, new))
    return load_manifest(run)


def test_resuming_with_other_settings_is_refused(run, manifest) -> None:
    with pytest.raises(Stop):
        train_expert(run, manifest, "1", progress=stop_at(4))
    other = changed(run, "batch: 6", "batch: 5")
    with pytest.raises(AtollError, match="other settings"):
        train_expert(run, other, "1", resume=True)
    train_expert(run, changed(run, "batch: 5", "batch: 6"), "1", resume=True)
    with pytest.raises(AtollError, match="other settings"):
        train_expert(run, changed(run, "batch: 6", "batch: 5"), "1", resume=True)


def test_a_finished_expert_is_not_trained_again(run, manifest) -> None:
    path = train_expert(run, manifest, "1")
    before = (path / WEIGHTS).stat().st_mtime_ns
    assert train_expert(run, manifest, "1", resume=True) == path
    assert (path / WEIGHTS).stat().st_mtime_ns == before


def test_a_damaged_checkpoint_is_named(run, manifest) -> None:
    with pytest.raises(Stop):
        train_expert(run, manifest, "1", progress=stop_at(4))
    file = run / f"experts/.train-{NAME}" / "checkpoint.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(AtollError, match=r"damaged.*--restart"):
        train_expert(run, manifest, "1", resume=True)


def stopped(run: Path, manifest) -> Path:
    """Train to step 4; returns the checkpoint."""
    with pytest.raises(Stop):
        train_expert(run, manifest, "1", progress=stop_at(4))
    return run / f"experts/.train-{NAME}" / "checkpoint.safetensors"


def rewritten(file: Path, change) -> None:
    """Let `change` edit the tensors and the metadata of a safetensors file."""
    with safe_open(file, "pt") as stored:
        tensors, metadata = {name: stored.get_tensor(name) for name in stored.keys()}, stored.metadata()  # noqa: SIM118
    change(tensors, metadata)
    save_file(tensors, file, metadata)


@pytest.mark.parametrize("place", [b'"sha256":"', b'"numbers":"{', b'"mark":"', -5])
def test_one_changed_byte_of_a_checkpoint_is_noticed_at_resume(run, manifest, place) -> None:
    file = stopped(run, manifest)
    data = bytearray(file.read_bytes())
    position = place if isinstance(place, int) else data.index(place) + len(place) - (3 if b"sha" in place else -1)
    data[position] ^= 1
    file.write_bytes(data)
    with pytest.raises(AtollError, match=r"damaged.*--restart|other settings"):
        train_expert(run, manifest, "1", resume=True)
    assert not (run / "experts" / NAME).exists()


def test_nan_in_a_checkpoint_is_noticed_when_it_is_read(run, manifest) -> None:
    def spoil(tensors, metadata):
        name = next(name for name in tensors if name.startswith("ema.") and tensors[name].ndim)
        tensors[name].view(-1)[0] = float("nan")
        del metadata["sha256"]
        metadata.update(with_hash(tensors, metadata))

    file = stopped(run, manifest)
    rewritten(file, spoil)
    with pytest.raises(AtollError, match=r"damaged \(ema\..* holds NaN or infinity\).*--restart"):
        train_expert(run, manifest, "1", resume=True)


def test_a_checkpoint_of_before_hashes_is_resumed(run, trained_run, manifest) -> None:
    rewritten(stopped(run, manifest), lambda tensors, metadata: metadata.pop("sha256"))
    train_expert(run, manifest, "1", resume=True)
    assert_equal(weights(run), weights(trained_run))


@pytest.mark.filterwarnings("ignore:after step")
def test_an_average_that_is_not_finite_is_not_saved(run, manifest, monkeypatch) -> None:
    update = State.update

    def spoil_once(self):
        update(self)
        # Step 6 writes a checkpoint; after the return, the same step has other counters.
        if self.numbers.step == 6 and not self.numbers.rollbacks:
            self.ema[0].view(-1)[0] = float("inf")

    monkeypatch.setattr(State, "update", spoil_once)
    train_expert(run, manifest, "1")
    training = read_card(run / "experts" / NAME, ExpertCard).plain()["training"]
    assert (training["rollbacks"], training["skipped_batches"]) == (1, 3)
    assert all(torch.isfinite(value).all() for value in weights(run).values())


def poison(monkeypatch, *indices, value=float("nan")):
    """Multiply the losses of these batches by `value`."""
    original = Denoising.batch
    losses = Denoising.losses

    def batch(self, index, rows):
        factor = value if index in indices else 1.0
        return {**original(self, index, rows), "factor": torch.full((rows.stop - rows.start,), factor)}

    monkeypatch.setattr(Denoising, "batch", batch)
    monkeypatch.setattr(
        Denoising,
        "losses",
        lambda self, module, part: losses(self, module, part) * part["factor"],
    )


@pytest.mark.filterwarnings("ignore:the loss of step")
def test_nan_rolls_back_and_skips_batches(run, trained_run, manifest, monkeypatch) -> None:
    poison(monkeypatch, 4)
    path = train_expert(run, manifest, "1")
    training = read_card(path, ExpertCard).plain()["training"]
    # The checkpoint is of step 3: batches 3 and 4 are skipped.
    assert (training["rollbacks"], training["skipped_batches"]) == (1, 2)
    with pytest.raises(AssertionError):
        assert_equal(weights(run), weights(trained_run))
    events = [line for line in read_metrics(run / f"experts/.train-{NAME}") if "event" in line]
    assert len(events) == 1
    assert "back to step 3" in events[0]["event"]


@pytest.mark.filterwarnings("ignore:the loss of step")
def test_resume_is_bit_exact_after_a_rollback_and_kills(run, tmp_path, monkeypatch) -> None:
    other = write_run(tmp_path / "other")
    poison(monkeypatch, 4)
    train_expert(run, load_manifest(run), "1")
    for step in (4, 6):
        with pytest.raises(Stop):
            train_expert(other, load_manifest(other), "1", resume=True, progress=stop_at(step))
    train_expert(other, load_manifest(other), "1", resume=True)
    assert_equal(weights(run), weights(other))


@pytest.mark.filterwarnings("ignore:the loss of step")
def test_repeated_nan_fails_and_leaves_the_last_checkpoint(run, manifest, monkeypatch) -> None:
    poison(monkeypatch, *range(4, 40))
    with pytest.raises(AtollError, match=r"is nan, after 3 returns to a checkpoint; the one of step 3 is valid"):
        train_expert(run, manifest, "1")
    assert not (run / "experts" / NAME).exists()
    with __import__("safetensors").safe_open(run / f"experts/.train-{NAME}" / "checkpoint.safetensors", "pt") as stored:
        assert json.loads(stored.metadata()["numbers"])["step"] == 3
        assert all(torch.isfinite(stored.get_tensor(key)).all() for key in stored.keys())  # noqa: SIM118


@pytest.mark.filterwarnings("ignore:the loss of step")
def test_a_spike_of_the_loss_rolls_back(run, manifest, monkeypatch) -> None:
    monkeypatch.setattr(atoll.train.loop, "_CALM", 3)
    poison(monkeypatch, 5, value=1e6)
    path = train_expert(run, manifest, "1")
    assert read_card(path, ExpertCard).training.rollbacks == 1


def test_gradient_accumulation_gives_the_same_steps(run, trained_run) -> None:
    train_expert(run, changed(run, "log_every: 2", "log_every: 2\n  accumulate: 3"), "1")
    accumulated, whole = weights(run), weights(trained_run)
    for name in accumulated:
        torch.testing.assert_close(accumulated[name], whole[name], rtol=2e-3, atol=2e-5)


def test_a_full_disk_leaves_the_previous_checkpoint_valid(run, trained_run, manifest, monkeypatch) -> None:
    fsync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(AtollError, match="No space left"):
            train_expert(run, manifest, "1")
    train_expert(run, manifest, "1", resume=True)
    assert_equal(weights(run), weights(trained_run))


def test_a_corrupt_shard_is_named_with_its_key(run, manifest) -> None:
    shard = run / "clusters" / "cluster-001" / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(AtollError, match=r"shard-00000.*image-001"):
        train_expert(run, manifest, "1")
    assert not (run / "experts").exists()


def test_changed_bytes_of_a_shard_are_not_trained_on(run, manifest) -> None:
    shard = run / "clusters" / "cluster-001" / "shard-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-200:] = bytes(byte ^ 1 for byte in data[-200:])
    shard.write_bytes(data)
    with pytest.raises(AtollError, match=r"shard-00000.*its contents are not what.*atoll cluster --force"):
        train_expert(run, manifest, "1")
    assert not (run / "experts" / NAME).exists()


def test_an_assignment_of_other_data_is_refused(run, manifest) -> None:
    (run / "clusters" / "assignment.parquet").unlink()
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"key": ["other"], "cluster": [0]}), run / "clusters" / "assignment.parquet")
    with pytest.raises(AtollError, match="lacks the key"):
        train_router(run, manifest)


def test_each_epoch_is_a_permutation_for_any_batch_size() -> None:
    for rows, batch in ((10, 3), (7, 7), (3, 8)):
        order = SeededSampler(rows, batch, seed=1)
        seen = torch.cat([order.at(step) for step in range(rows * 2)])
        for epoch in seen[: len(seen) // rows * rows].reshape(-1, rows):
            assert sorted(epoch.tolist()) == list(range(rows))
        assert torch.equal(SeededSampler(rows, batch, seed=1).at(4), order.at(4))
    assert not torch.equal(SeededSampler(100, 50, seed=1).at(0), SeededSampler(100, 50, seed=2).at(0))


def test_dropped_rows_get_the_null_condition() -> None:
    encoder = HashEncoder(dim=8, length=5)
    condition = drop_condition(encoder(["a b", "c"]), encoder.null(1), torch.tensor([False, True]))
    expected = encoder(["a b", ""])
    assert torch.equal(condition.states, expected.states)
    assert torch.equal(condition.mask, expected.mask)
    assert torch.equal(condition.pooled, expected.pooled)


def test_a_batch_does_not_depend_on_the_number_of_processes(tmp_path) -> None:
    """Including mirrored images: every process draws for the whole batch and takes its rows."""
    latents = torch.arange(40.0).reshape(-1, 1, 1, 1).expand(-1, 1, 4, 8).half()
    with ShardWriter(tmp_path / "data", {}) as writer:
        captions = ["moss", "sand"] * 20
        columns = {"latent": latents, "latent_flip": -latents}
        writer.append([f"k{i}" for i in range(40)], captions, ["train"] * 40, columns)
    data = CaptionedLatents(Rows.of([Shards(tmp_path / "data")], "train"), HashEncoder(dim=8, length=4))
    task = RouterTask(torch.nn.Identity(), data, data, torch.arange(40) % 2, settings=TrainSettings(batch=12), seed=0)
    whole, parts = task.batch(2, slice(0, 12)), [task.batch(2, slice(i, i + 4)) for i in (0, 4, 8)]
    assert {bool(x) for x in whole["x0"][:, 0, 0, 0] < 0} == {True, False}
    for name, tensor in whole.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), tensor), name


def test_the_mark_of_a_training_keeps_its_value() -> None:
    """A mark names a training across versions: checkpoints and artifacts are matched by it."""
    identity = {
        "network": {
            "name": "dit", "patch": 2, "width": 16, "depth": 1, "heads": 2, "mlp_ratio": 4.0, "modulation": "single",
            "channels": 1, "size": [4, 8], "states_dim": 8, "pooled_dim": 8,
        },
        "objective": Objective("eps", "cosine").config(),
        "assignment": "0" * 64,
        "clusters": [1],
        "seed": 1,
    }  # fmt: skip
    assert training_mark(identity, TrainSettings()) == "258b5c79162b01da"
