"""Training past the planned steps: what is exact to the bit, what is not and says so, and what is refused."""

import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from atoll.errors import AtollError
from atoll.manifest import Manifest, TrainSettings, load_manifest
from atoll.storage.artifact import WEIGHTS, read_card
from atoll.storage.cards import ExpertCard, RouterCard
from atoll.storage.tensor_hash import with_hash
from atoll.train.expert import train_expert, train_monolith
from atoll.train.plans import is_exact
from atoll.train.router import train_router
from atoll.train.snapshots import reconstruct_expert, snapshots_of
from atoll.train.state import Counters, learning_rate
from atoll.train.track import read_metrics
from tests.conftest import write_run
from tests.train.test_workers import call, run_killed

NAME = "1-flow-linear"
STATE = f"experts/.train-{NAME}"
PARTS = {"expert": f"experts/{NAME}", "router": "router", "monolith": "monolith"}


def planned(run: Path, steps: int, **settings: object) -> Manifest:
    """The run's manifest with this plan, written into the run."""
    if not (run / "atoll.yaml").exists():
        write_run(run)
    lines = (run / "atoll.yaml").read_text().splitlines()
    changes = {"steps": steps, **settings}
    start = lines.index("train:") + 1
    kept = [line for line in lines[start:] if line.split(":")[0].strip() not in changes or not line.startswith("  ")]
    lines[start:] = [*(f"  {key}: {json.dumps(value)}" for key, value in changes.items()), *kept]
    (run / "atoll.yaml").write_text("\n".join(lines))
    return load_manifest(run)


def trained(part: str, run: Path, manifest: Manifest, **options: object) -> Path:
    if part == "expert":
        return train_expert(run, manifest, "1", **options)
    return {"router": train_router, "monolith": train_monolith}[part](run, manifest, **options)


def assert_equal(a: Path, b: Path, part: str = "expert") -> None:
    """Weights and checkpoint, with average and moments, are equal to the bit, and so are the marks."""
    path = PARTS[part]
    state = f"{Path(path).parent / f'.train-{Path(path).name}'}/checkpoint.safetensors"
    for file in (f"{path}/{WEIGHTS}", state):
        mine, other = load_file(a / file), load_file(b / file)
        assert mine.keys() == other.keys()
        for name in mine:
            assert torch.equal(mine[name], other[name]), (file, name)
    kind = RouterCard if part == "router" else ExpertCard
    assert read_card(a / path, kind).training.mark == read_card(b / path, kind).training.mark


class Stop(Exception):
    pass


def stop_at(step: int):
    def progress(line):
        if line["step"] >= step:
            raise Stop

    return progress


@pytest.mark.parametrize("part", PARTS)
def test_an_extended_training_is_the_one_planned_at_the_start(tmp_path, part) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    trained(part, whole, planned(whole, 14))
    trained(part, run, planned(run, 8))
    with pytest.warns(UserWarning, match=r"8 steps were planned, now 14: from step 8 on, exactly as if these"):
        trained(part, run, planned(run, 14), resume=True)
    assert_equal(run, whole, part)
    training = read_card(run / PARTS[part], RouterCard if part == "router" else ExpertCard).training
    assert [(plan.steps, plan.until, plan.exact) for plan in training.plans] == [(8, 8, True)]
    assert training.steps == 14
    # The finished one is not trained again.
    before = (run / PARTS[part] / WEIGHTS).stat().st_mtime_ns
    trained(part, run, planned(run, 14), resume=True)
    assert (run / PARTS[part] / WEIGHTS).stat().st_mtime_ns == before


@pytest.mark.filterwarnings("ignore:.* steps were planned")
def test_an_interrupted_training_is_extended_and_extended_again(tmp_path) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    train_expert(whole, planned(whole, 16), "1")
    with pytest.raises(Stop):
        train_expert(run, planned(run, 8), "1", progress=stop_at(4))  # the checkpoint is of step 3
    with pytest.raises(Stop):
        train_expert(run, planned(run, 12), "1", resume=True, progress=stop_at(10))
    train_expert(run, planned(run, 16), "1", resume=True)
    assert_equal(run, whole)
    plans = read_card(run / PARTS["expert"], ExpertCard).training.plans
    assert [(plan.steps, plan.until) for plan in plans] == [(8, 3), (12, 9)]
    assert "plans" not in read_card(whole / PARTS["expert"], ExpertCard).plain()["training"]
    events = [line["event"] for line in read_metrics(run / STATE) if "event" in line]
    assert [text.split(":")[0] for text in events] == ["8 steps were planned, now 12", "12 steps were planned, now 16"]


@pytest.mark.parametrize("end", ["finished", "killed"])
def test_a_decay_is_extended_from_before_it(tmp_path, end) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    train_expert(whole, planned(whole, 16, decay_from=0.5), "1")
    with suppress(Stop):  # killed in step 8, the last checkpoint is of step 6
        train_expert(run, planned(run, 8, decay_from=0.5), "1", progress=stop_at(8) if end == "killed" else None)
    with pytest.warns(UserWarning, match="from step 4 on, exactly as if"):
        train_expert(run, planned(run, 16), "1", resume=True)
    assert_equal(run, whole)
    assert [line["step"] for line in read_metrics(run / STATE) if "loss" in line] == [*range(2, 17, 2)]


def test_a_shorter_plan_ahead_of_the_steps_done_is_followed(tmp_path) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    train_expert(whole, planned(whole, 8), "1")
    with pytest.raises(Stop):
        train_expert(run, planned(run, 16), "1", progress=stop_at(6))
    with pytest.warns(UserWarning, match="16 steps were planned, now 8: from step 3 on, exactly"):
        train_expert(run, planned(run, 8), "1", resume=True)
    assert_equal(run, whole)


def test_a_decay_that_stays_in_the_weights_is_another_training(tmp_path) -> None:
    run, whole, killed = tmp_path / "run", tmp_path / "whole", tmp_path / "killed"
    settings = {"decay_from": 0.5, "keep_checkpoints": "last", "log_every": 1}
    train_expert(whole, planned(whole, 16, **settings), "1")
    train_expert(run, planned(run, 8, **settings), "1")
    shutil.copytree(run, killed)
    with pytest.warns(UserWarning, match=r"from step 8 on, the learning rate is that of the new plan; the decay of"):
        train_expert(run, planned(run, 16), "1", resume=True)
    mine, other = (read_card(path / PARTS["expert"], ExpertCard).training for path in (run, whole))
    assert mine.mark != other.mark
    assert [(plan.until, plan.exact) for plan in mine.plans] == [(8, False)]
    rates = [line["lr"] for line in read_metrics(run / STATE) if "lr" in line]
    assert rates[7] < rates[8] == pytest.approx(TrainSettings().lr * 9 / 50)  # warm-up goes on where it was
    # It resumes like any other: killed in the extension, the same bits.
    with pytest.warns(UserWarning, match="of the new plan"), pytest.raises(Stop):
        train_expert(killed, planned(killed, 16), "1", resume=True, progress=stop_at(13))
    train_expert(killed, planned(killed, 16), "1", resume=True)
    assert_equal(killed, run)


def test_resume_is_bit_exact_after_a_kill_in_the_extension(tmp_path) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    settings = {"checkpoint_every": 1, "decay_from": 0.9}
    train_expert(whole, planned(whole, 60, **settings), "1")
    train_expert(run, planned(run, 20, **settings), "1")
    manifest = planned(run, 60)
    run_killed(run, 1, [], 8, seed=0)
    train_expert(run, manifest, "1", resume=True)
    assert_equal(run, whole)
    assert [plan.until for plan in read_card(run / PARTS["expert"], ExpertCard).training.plans] == [18]


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["replicate", "shard"])
def test_two_processes_extend_alike(tmp_path, sharding) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    settings = {"decay_from": 0.5, "sharding": sharding}
    planned(whole, 16, **settings)
    planned(run, 8, **settings)
    for path in (run, whole):
        assert call(path, "--nproc", 2, "--quiet").returncode == 0
    planned(run, 16)
    done = call(run, "--nproc", 2, "--resume", "--quiet")
    assert done.returncode == 0
    assert done.stderr.count("from step 4 on, exactly") == 1
    mine, other = (load_file(path / PARTS["expert"] / WEIGHTS) for path in (run, whole))
    assert all(torch.equal(mine[name], other[name]) for name in other)


@pytest.mark.filterwarnings("ignore:.* steps were planned")
def test_snapshots_of_an_earlier_plan_count_for_the_average(tmp_path) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    tracked = {"ema_profiles": [0.05, 0.15], "ema_snapshot_every": 2, "decay_from": 0.5}
    expert = train_expert(whole, planned(whole, 16, **tracked), "1")
    other = reconstruct_expert(expert, 0.1, tmp_path / "other")
    train_expert(run, planned(run, 8, **tracked), "1")
    expert = train_expert(run, planned(run, 16), "1", resume=True)
    files = [[s.file.name for s in snapshots_of(path / STATE / "ema")] for path in (run, whole)]
    assert files[0] == files[1]
    mine = reconstruct_expert(expert, 0.1, tmp_path / "mine")
    mine, other = load_file(mine / WEIGHTS), load_file(other / WEIGHTS)
    assert all(torch.equal(mine[name], other[name]) for name in other)


def test_without_checkpoints_the_extension_is_refused(tmp_path) -> None:
    run = tmp_path / "run"
    for part in ("expert", "router"):
        trained(part, run, planned(run, 8, keep_checkpoints="none", decay_from=0.5))
        with pytest.raises(AtollError, match=r"trained for 8 steps, and .* holds no checkpoint .*train\.init"):
            trained(part, run, planned(run, 16), resume=True)
        trained(part, run, planned(run, 8), resume=True)  # the artifact stands
    assert not list((run / STATE).glob("*check*"))
    assert not (run / STATE / "before-decay").exists()


@pytest.mark.filterwarnings("ignore:.* steps were planned")
def test_what_is_kept_depends_on_the_settings(tmp_path) -> None:
    run = tmp_path / "run"
    train_expert(run, planned(run, 8), "1")
    early = run / STATE / "before-decay" / "checkpoint.safetensors"
    assert not early.exists()  # without a decay there is no such state
    train_expert(run, planned(run, 8, decay_from=0.5), "1", restart=True)
    assert early.exists()
    train_expert(run, planned(run, 8, keep_checkpoints="last"), "1", restart=True)
    assert not early.exists()
    assert (run / STATE / "checkpoint.safetensors").exists()


def test_what_cannot_be_extended_is_refused_in_a_line(tmp_path) -> None:
    run = tmp_path / "run"
    train_expert(run, planned(run, 8), "1")
    with pytest.raises(AtollError, match=r"trained for 8 steps already, train.steps is 6; set more to extend it"):
        train_expert(run, planned(run, 6), "1", resume=True)
    with pytest.raises(AtollError, match=r"trained for 8 steps; --resume extends it to train.steps, 16; --restart"):
        train_expert(run, planned(run, 16), "1")
    with pytest.raises(AtollError, match="other settings"):
        train_expert(run, planned(run, 16, batch=5), "1", resume=True)
    shutil.rmtree(run / PARTS["expert"])
    with pytest.raises(AtollError, match=r"8 of 8 steps are trained already, train.steps is 6; expected more"):
        train_expert(run, planned(run, 6, batch=6), "1", resume=True)


def rewritten(file: Path, change) -> None:
    """Let `change` edit the counters of a checkpoint."""
    with safe_open(file, "pt") as stored:
        metadata = dict(stored.metadata())
    tensors = load_file(file)
    numbers = json.loads(metadata["numbers"])
    change(numbers)
    metadata["numbers"] = json.dumps(numbers)
    del metadata["sha256"]
    save_file(tensors, file, with_hash(tensors, metadata))


@pytest.mark.filterwarnings("ignore:.* steps were planned")
def test_a_checkpoint_of_before_plans_is_extended(tmp_path) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    train_expert(whole, planned(whole, 14), "1")
    train_expert(run, planned(run, 8), "1")
    rewritten(run / STATE / "checkpoint.safetensors", lambda numbers: [numbers.pop("planned"), numbers.pop("plans")])
    train_expert(run, planned(run, 14), "1", resume=True)
    assert_equal(run, whole)


@pytest.mark.parametrize("wrong", [7, ["plan"], [{"steps": 8}], [{"mark": "m", "steps": 0, "until": 8, "exact": 1}]])
def test_damaged_plans_in_a_checkpoint_are_named(tmp_path, wrong) -> None:
    run = tmp_path / "run"
    train_expert(run, planned(run, 8), "1")
    shutil.rmtree(run / PARTS["expert"])
    rewritten(run / STATE / "checkpoint.safetensors", lambda numbers: numbers.update(plans=wrong))
    with pytest.raises(AtollError, match=r"damaged .*earlier plans.*--restart"):
        train_expert(run, planned(run, 14), "1", resume=True)


@given(st.integers(1, 60), st.integers(1, 60), st.floats(0, 1), st.integers(0, 60), st.integers(0, 9))
def test_exact_means_equal_rates(old, new, decay_from, done, warmup) -> None:
    done = min(done, old)
    first, second = (TrainSettings(steps=steps, decay_from=decay_from, warmup=warmup) for steps in (old, new))
    rates = [[learning_rate(step, settings) for step in range(done)] for settings in (first, second)]
    exact = is_exact(Counters(step=done, planned=old), second)
    if exact:
        assert rates[0] == rates[1]
    elif old != new and done > min(old, new) * decay_from + 2:
        assert rates[0] != rates[1]
