"""train.block_swap: the bits of a training without it, what moves when, copies alone compute, what is refused."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from atoll.manifest import TrainSettings, load_manifest
from atoll.nn import build_network
from atoll.train.block_swap import BlockSwap
from atoll.train.expert import train_expert
from tests.conftest import write_run
from tests.nn.test_dit import config, inputs
from tests.train.test_train import NAME, Stop, assert_equal, stop_at

STATE = f"experts/.train-{NAME}"
NETWORKS = {"dit": "", "mmdit": "\n  name: mmdit\n  dual_blocks: 1"}
CPU = torch.device("cpu")


def make(path: Path, network: str, more: str) -> Path:
    run = write_run(path)
    text = (run / "atoll.yaml").read_text()
    text = text.replace("patch: 2", f"patch: 2{NETWORKS[network]}", 1).replace("depth: 1", "depth: 3", 1)
    (run / "atoll.yaml").write_text(text.replace("batch: 6", f"batch: 6{more}", 1))
    return run


def swapped(run: Path, count: int = 2) -> Path:
    text = (run / "atoll.yaml").read_text()
    (run / "atoll.yaml").write_text(text.replace("batch: 6", f"batch: 6\n  block_swap: {count}", 1))
    return run


def trained(run: Path, **options) -> dict[str, torch.Tensor]:
    """Weights, averages and moments after the last step, and the artifact's tensors."""
    path = train_expert(run, load_manifest(run), "1", **options)
    return load_file(run / STATE / "checkpoint.safetensors") | load_file(path / "weights.safetensors")


@pytest.mark.parametrize(
    ("network", "more"),
    [
        ("dit", "\n  checkpointing: full\n  ema_profiles: [0.1]"),
        ("dit", "\n  checkpointing: selective\n  accumulate: 3"),
        ("mmdit", "\n  checkpointing: full\n  clip: null\n  fused_backward: true\n  precision: bf16"),
        ("mmdit", "\n  checkpointing: selective\n  precision: bf16"),
    ],
)
def test_it_has_the_bits_of_a_training_without_it(tmp_path, network, more) -> None:
    plain = trained(make(tmp_path / "plain", network, more))
    run = swapped(make(tmp_path / "swapped", network, more))
    with pytest.raises(Stop):
        train_expert(run, load_manifest(run), "1", progress=stop_at(4))
    assert_equal(trained(run, resume=True), plain)


def network_of_four() -> torch.nn.Module:
    torch.manual_seed(0)
    network = build_network({**config(depth=4).model_dump(mode="json")})
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    for block in network.blocks:
        block.checkpointing = "full"
    return network


def test_only_the_blocks_copies_compute() -> None:
    """The values at rest are NaN: what is computed, forward and backward, comes from what was fetched."""
    plain, network = network_of_four(), network_of_four()
    x, time, condition = inputs(torch.float32)
    plain(x, time, condition).square().sum().backward()
    swap = BlockSwap(network, 2, CPU)
    true = {home.data_ptr(): home.clone() for home in swap._homes.values()}
    for home in swap._homes.values():
        home.fill_(float("nan"))
    swap._fetch = lambda home: true[home.data_ptr()].clone()
    output = network(x, time, condition)
    assert output.isfinite().all()
    output.square().sum().backward()
    for (name, mine), other in zip(network.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, other.grad), name
        assert mine.isnan().all() == (mine in swap._homes), name


def test_each_block_visits_twice_a_step_and_no_two_at_once() -> None:
    network = network_of_four()
    swap, x = BlockSwap(network, 3, CPU), inputs(torch.float32)
    count = sum(1 for block in network.blocks[:3] for _ in block.parameters())
    visits: Counter[torch.nn.Module] = Counter()
    enter = swap._on_device

    def counted(block):
        assert all(p.data_ptr() == swap._homes[p].data_ptr() for b in network.blocks[:3] for p in b.parameters())
        visits[block] += 1
        return enter(block)

    swap._on_device = counted
    with torch.no_grad():
        network(*x)
    assert (swap.fetched, swap.returned) == (count, 0)
    network(*x).sum().backward()
    assert (swap.fetched, swap.returned) == (3 * count, count)
    assert visits == dict.fromkeys(network.blocks[:3], 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"block_swap with checkpointing none: not supported; set checkpointing to full or selective"),
        ({"checkpointing": "full", "compile": True}, r"block_swap with compile True"),
        ({"checkpointing": "full", "optimizer_state": "8bit"}, r"block_swap with optimizer_state 8bit"),
    ],
)
def test_settings_that_would_hold_the_weights_are_refused(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        TrainSettings(block_swap=1, **settings)


def test_all_blocks_swap_where_there_are_fewer() -> None:
    """As in the router of a run whose experts have more."""
    network = network_of_four()
    swap = BlockSwap(network, 5, CPU)
    assert set(swap._homes) == {p for block in network.blocks for p in block.parameters()}
