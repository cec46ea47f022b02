"""train.fused_backward: the bits of the plain step, also after kills and rollbacks; freed gradients; refusals."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from atoll.errors import AtollError
from atoll.manifest import TrainSettings, load_manifest
from atoll.train.expert import train_expert
from atoll.train.island import Island
from atoll.train.loop import _set_up
from atoll.train.state import State, learning_rate
from atoll.train.track import read_metrics
from tests.conftest import write_run
from tests.train.test_train import NAME, Stop, assert_equal, poison, stop_at

STATE = f"experts/.train-{NAME}"
MMDIT = "\n  name: mmdit\n  dual_blocks: 1"
CHANGES = {"plain": "", "averages": "\n  ema_profiles: [0.1]\n  checkpointing: full", "mmdit": ""}


def make(path: Path, what: str, fused: bool) -> Path:
    run = write_run(path)
    text = (run / "atoll.yaml").read_text()
    if what == "mmdit":
        text = text.replace("patch: 2", f"patch: 2{MMDIT}", 1).replace("depth: 1", "depth: 3", 1)
    text = text.replace("batch: 6", f"batch: 6\n  clip: null{CHANGES[what]}", 1)
    (run / "atoll.yaml").write_text(text)
    return switched(run, fused)


def switched(run: Path, fused: bool) -> Path:
    text = (run / "atoll.yaml").read_text().replace("\n  fused_backward: true", "")
    if fused:
        text = text.replace("batch: 6", "batch: 6\n  fused_backward: true", 1)
    (run / "atoll.yaml").write_text(text)
    return run


def stored(run: Path) -> dict[str, torch.Tensor]:
    """Weights, averages and moments after the last step."""
    return load_file(run / STATE / "checkpoint.safetensors")


@pytest.fixture(params=list(CHANGES))
def runs(tmp_path, request) -> tuple[Path, Path]:
    """A plain run, trained, and a fused one, not trained."""
    plain = make(tmp_path / "plain", request.param, fused=False)
    train_expert(plain, load_manifest(plain), "1")
    return plain, make(tmp_path / "fused", request.param, fused=True)


def test_it_has_the_bits_of_the_plain_step(runs) -> None:
    plain, fused = runs
    train_expert(fused, load_manifest(fused), "1")
    assert_equal(stored(fused), stored(plain))
    lines, others = (read_metrics(run / STATE) for run in runs)
    for line, other in zip(lines, others, strict=True):
        assert line.get("loss") == other.get("loss")
        assert line.get("grad_norm", 0) == pytest.approx(other.get("grad_norm", 0), rel=1e-6)


@pytest.mark.parametrize("first", [True, False], ids=["fused-then-plain", "plain-then-fused"])
def test_either_resumes_what_the_other_saved(runs, first) -> None:
    plain, run = runs
    switched(run, first)
    with pytest.raises(Stop):
        train_expert(run, load_manifest(run), "1", progress=stop_at(4))
    switched(run, not first)
    train_expert(run, load_manifest(run), "1", resume=True)
    assert_equal(stored(run), stored(plain))


@pytest.mark.filterwarnings("ignore:the loss of step")
def test_a_bad_loss_rolls_back_as_in_the_plain_step(tmp_path, monkeypatch) -> None:
    """The weights are NaN by the time that the loss is looked at; the checkpoint has what was before."""
    poison(monkeypatch, 4)
    runs = [make(tmp_path / str(fused), "plain", fused) for fused in (False, True)]
    for run in runs:
        train_expert(run, load_manifest(run), "1")
    assert_equal(*map(stored, runs))


def test_8bit_moments_are_the_same(tmp_path) -> None:
    pytest.importorskip("torchao")
    runs = [make(tmp_path / str(fused), "plain", fused) for fused in (False, True)]
    for run in runs:
        text = (run / "atoll.yaml").read_text()
        (run / "atoll.yaml").write_text(text.replace("batch: 6", "batch: 6\n  optimizer_state: 8bit", 1))
        train_expert(run, load_manifest(run), "1")
    assert_equal(*map(stored, runs))


def test_one_gradient_exists_at_a_time(tmp_path, monkeypatch) -> None:
    run, counts = make(tmp_path / "run", "plain", fused=True), []
    step = torch.optim.AdamW.step

    def counted(self, *arguments):
        counts.append(sum(p.grad is not None for p in watched))
        return step(self, *arguments)

    watched: list[torch.nn.Parameter] = []
    init = torch.optim.AdamW.__init__

    def watching(self, parameters, *arguments, **options):
        watched.extend(parameters := list(parameters))
        init(self, parameters, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "__init__", watching)
    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    train_expert(run, load_manifest(run), "1")
    assert len(counts) == 8 * len(watched)
    assert set(counts) == {1}
    assert all(p.grad is None for p in watched)


@pytest.mark.parametrize("fused", [False, True])
def test_each_step_has_its_rate_before_the_backward_pass(fused) -> None:
    settings = TrainSettings(steps=10, warmup=4, decay_from=0.5, clip=None, fused_backward=fused)
    state = State(torch.nn.Linear(2, 2), settings)
    for step in range(10):
        state.begin()
        rates = {group["lr"] for optimizer in state._optimizers for group in optimizer.param_groups}
        assert rates == {learning_rate(step, settings)} == {state.lr}
        state.numbers.step += 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"fused_backward with clip 1: the norm of all gradients is known only after the steps; set clip: null"),
        ({"clip": None, "accumulate": 2}, r"fused_backward with accumulate 2: .*; set accumulate: 1"),
    ],
)
def test_what_needs_all_gradients_is_refused(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        TrainSettings(fused_backward=True, **settings)


@pytest.mark.parametrize("key", ["fused_backward", "block_swap"])
def test_several_processes_are_refused(key) -> None:
    settings = TrainSettings(clip=None, checkpointing="full", **{key: 1})
    with pytest.raises(AtollError, match=rf"train.{key}: takes each gradient before 2 processes could average it"):
        _set_up(torch.nn.Linear(1, 1), settings, Island(0, 2, torch.device("cpu")))
