"""8 bits per moment: one process, replicas and shards quantise alike, and each resumes what another one saved."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from atoll.storage.layout import TrainingLayout
from atoll.train.eight_bit import BLOCK, adamw_8bit, block_size, eager_on_cpu, moment_tensors
from tests.train.test_island import SHARDINGS, alone, assert_equal, make, state, tensors
from tests.train.together import Training, start

pytest.importorskip("torchao")

EIGHT_BIT = "\n  optimizer_state: 8bit"
QUANTISED = "optimizer.exp_avg_sq.conditioner.time.0.weight"  # [16, 256], the only large one of the tiny network


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """A training of one process."""
    run = make(tmp_path_factory.mktemp("one") / "run", "replicate", EIGHT_BIT)
    alone(run)
    return run


@pytest.fixture(scope="module")
def island(tmp_path_factory) -> Path:
    """All trainings of two processes, in one pair of processes: <sharding>-<what>/."""
    path = tmp_path_factory.mktemp("island")
    for sharding in SHARDINGS:
        for what in ("whole", "halted", "from-one", "to-one"):
            make(path / f"{sharding}-{what}", sharding, EIGHT_BIT)
        alone(path / f"{sharding}-from-one", stop=4)
    trainings = []
    for sharding in SHARDINGS:
        runs = {what: str(path / f"{sharding}-{what}") for what in ("whole", "halted", "from-one", "to-one")}
        trainings += [Training(runs["whole"]), Training(runs["halted"], stop=4), Training(runs["to-one"], stop=4)]
        trainings += [Training(runs["halted"], resume=True), Training(runs["from-one"], resume=True)]
    start(trainings)
    for sharding in SHARDINGS:
        shutil.copytree(path / f"{sharding}-to-one", path / f"{sharding}-stopped")
        alone(path / f"{sharding}-to-one")
    return path


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("what", ["whole", "halted", "from-one", "to-one"])
def test_any_number_of_processes_trains_and_resumes_as_one_does(island, one, sharding, what) -> None:
    mine, other = tensors(island / f"{sharding}-{what}"), tensors(one)
    assert mine.keys() == other.keys()
    for name in mine:
        # Sums over two processes round otherwise, and a moment at the border of two codes may take the other one.
        moved = (mine[name] - other[name]).abs()
        assert moved.max() < 1e-4, name
        quantised = QUANTISED.endswith(name.removeprefix("network."))
        assert (moved > 1e-6 + 1e-5 * other[name].abs()).float().mean() <= (0.01 if quantised else 0), name


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_resumed_by_as_many_processes_it_is_bit_exact(island, sharding) -> None:
    assert_equal(island / f"{sharding}-halted", island / f"{sharding}-whole")


def test_resumed_by_one_process_it_is_bit_exact(one, tmp_path) -> None:
    run = make(tmp_path / "run", "replicate", EIGHT_BIT)
    alone(run, stop=4)
    alone(run)
    assert_equal(run, one)


def test_checkpoints_hold_the_same_codes_and_few_bytes(island, one, tmp_path) -> None:
    """A sharded checkpoint, read by one process that writes it again, has what a whole one has."""
    stored = load_file(TrainingLayout(state(one)).checkpoint)
    codes, scale = stored[f"{QUANTISED}#codes"], stored[f"{QUANTISED}#scale"]
    assert (codes.dtype, codes.shape, scale.shape) == (torch.uint8, (16, 256), (16, 1))
    assert QUANTISED not in stored
    assert stored["optimizer.exp_avg_sq.conditioner.time.2.weight"].dtype == torch.float32  # too small to quantise
    run = shutil.copytree(island / "shard-to-one", tmp_path / "run")
    again = load_file(TrainingLayout(state(run)).checkpoint)
    assert again.keys() == stored.keys()
    # Gradients of two processes differ in their last bits, so a code may fall on the other side.
    moved = (again[f"{QUANTISED}#codes"].int() - codes.int()).abs()
    assert moved.max() <= 1
    assert (moved > 0).float().mean() < 0.01


@given(st.lists(st.integers(1, 3000), min_size=0, max_size=4), st.integers(1, 9))
def test_no_block_crosses_a_row_however_the_rows_are_shared(shape, processes) -> None:
    block = block_size(shape)
    if block is None:
        return
    assert block <= BLOCK
    for rows in {-(-shape[0] // processes), max(0, shape[0] - (processes - 1) * -(-shape[0] // processes))}:
        assert rows * math.prod(shape[1:]) % block == 0


@pytest.mark.parametrize(
    ("shape", "block"),
    [((1152, 1152), 192), ((16, 256), 256), ((6, 1152), 192), ((8192,), None), ((15, 256), None), ((9, 509), None)],
)
def test_block_sizes(shape, block) -> None:
    assert block_size(shape) == block


def test_a_step_is_adamws_but_for_tiny_gradients() -> None:
    """Far below its block's largest gradient an entry's second moment is stored as 0: its steps are too long."""
    gradient = torch.ones(16, 256)
    gradient[:, 0], gradient[:, 1] = 1e-2, 1e-4
    lengths = []
    for eight_bit in (False, True):
        parameter = torch.nn.Parameter(torch.zeros(16, 256))
        options = {"lr": 1e-3, "weight_decay": 0.0, "betas": (0.9, 0.99)}
        optimizer = adamw_8bit([parameter], options) if eight_bit else torch.optim.AdamW([parameter], **options)
        for _ in range(200):
            before, parameter.grad = parameter.detach().clone(), gradient.clone()
            with eager_on_cpu(parameter.device):
                optimizer.step()
        lengths.append((parameter.detach() - before).abs().mean(0) / 1e-3)  # [256], in learning rates
    exact, rounded = lengths
    assert torch.allclose(exact, torch.ones(256), rtol=1e-2)
    assert torch.allclose(rounded[[0, *range(2, 256)]], torch.ones(255), rtol=2e-2)
    assert rounded[1] > 5  # docs/training.md says so


def test_the_tensors_of_a_moment_share_its_memory() -> None:
    parameter = torch.nn.Parameter(torch.zeros(16, 256))
    optimizer = adamw_8bit([parameter], {"lr": 1e-3})
    tensors = moment_tensors("m", optimizer.state[parameter]["exp_avg"])
    tensors["m#scale"].fill_(2.0)
    tensors["m#codes"].fill_(255)
    assert torch.equal(optimizer.state[parameter]["exp_avg"].dequantize(), torch.full((16, 256), 2.0))
