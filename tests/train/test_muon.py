"""Muon: torch's step for one matrix, batches by shape, fused layers apart, shards as one process, checkpoints."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from atoll.errors import AtollError
from atoll.manifest import TrainSettings, load_manifest
from atoll.nn.dit import DiT, DiTConfig
from atoll.nn.lora import add_lora
from atoll.nn.mmdit import MMDiT, MMDiTConfig
from atoll.storage.cards import LoraRecord
from atoll.storage.layout import TrainingLayout
from atoll.train.expert import train_expert
from atoll.train.muon import Muon, matrix_parts, orthogonalised
from atoll.train.state import State
from tests.train.test_island import alone, assert_equal, make, state, tensors
from tests.train.together import Training, start

MUON = "\n  optimizer: muon"
SIZES = {"size": (4, 4), "channels": 2, "patch": 2, "width": 16, "heads": 2, "states_dim": 6}


def stepped(make_optimizer, shapes, steps=4) -> list[torch.Tensor]:
    """The parameters after some steps along random gradients."""
    g = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(*shape, generator=g)) for shape in shapes]
    optimizer = make_optimizer(parameters)
    for _ in range(steps):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=g)
        optimizer.step()
    return [p.detach() for p in parameters]


def test_a_step_is_that_of_torch() -> None:
    shapes = [(64, 96), (96, 64), (48, 48)]
    mine = stepped(lambda ps: Muon(dict.fromkeys(ps, 1), 1e-2, 0.1), shapes)
    other = stepped(lambda ps: torch.optim.Muon(ps, 1e-2, 0.1, adjust_lr_fn="match_rms_adamw"), shapes)
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_matrices_of_one_shape_are_stepped_together_as_alone() -> None:
    shapes = [(24, 16), (40, 16), (24, 16), (72, 16)]  # the last is three of 24 x 16
    parts = [1, 1, 1, 3]
    together = stepped(lambda ps: Muon(dict(zip(ps, parts, strict=True)), 1e-2, 0.0), shapes)
    g = torch.Generator().manual_seed(0)
    alone = [nn.Parameter(torch.randn(*shape, generator=g)) for shape in shapes]
    cut = [[nn.Parameter(part) for part in p.detach().chunk(n)] for p, n in zip(alone, parts, strict=True)]
    optimizers = [Muon({part: 1}, 1e-2, 0.0) for one in cut for part in one]
    for _ in range(4):
        for whole, own in zip(alone, cut, strict=True):
            for part, gradient in zip(own, torch.randn(whole.shape, generator=g).chunk(len(own)), strict=True):
                part.grad = gradient
        for optimizer in optimizers:
            optimizer.step()
    for a, own in zip(together, cut, strict=True):
        torch.testing.assert_close(a, torch.cat([part.detach() for part in own]), rtol=0, atol=1e-5)


def test_a_step_has_the_size_of_an_adamw_step() -> None:
    """0.2 learning rates in the root mean square, for every shape: what lets AdamW's rate carry over."""
    for shape in ((64, 64), (256, 64), (64, 256)):
        before = stepped(lambda ps: Muon(dict.fromkeys(ps, 1), 1e-2, 0.0), [shape], steps=0)[0]
        after = stepped(lambda ps: Muon(dict.fromkeys(ps, 1), 1e-2, 0.0), [shape], steps=1)[0]
        assert (after - before).square().mean().sqrt().item() == pytest.approx(0.2 * 1e-2, rel=0.2)
    values = torch.linalg.svdvals(orthogonalised(torch.randn(3, 32, 64)).float())
    assert 0.6 < values.min() < values.max() < 1.3
    assert orthogonalised(torch.zeros(1, 8, 4)).eq(0).all()  # a matrix without a gradient is not moved


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (DiT(DiTConfig(**SIZES, depth=1, modulation="per-block")),
         {"attention.qkv": 3, "attention.out": 1, "cross.q": 1, "cross.kv": 2, "cross.out": 1, "mlp.0": 1, "mlp.2": 1}),
        (MMDiT(MMDiTConfig(**SIZES, depth=1)), {"qkv": 3, "out": 1, "kv": 2, "mlp.gate_up": 2, "mlp.down": 1}),
        (MMDiT(MMDiTConfig(**SIZES, depth=2, dual_blocks=1)),
         {f"{stream}.{layer}": parts for stream in ("image", "text") for layer, parts in
          {"qkv": 3, "out": 1, "mlp.gate_up": 2, "mlp.down": 1}.items()}),
    ],
)  # fmt: skip
def test_only_matrices_of_blocks_are_stepped(network, expected) -> None:
    for prefix in ("", "network.", "_orig_mod."):
        parts = {name: matrix_parts(f"{prefix}{name}", p) for name, p in network.named_parameters()}
        found = {name: n for name, n in parts.items() if n and not name.startswith("blocks.1.")}
        assert found == {f"blocks.0.{layer}.weight": n for layer, n in expected.items()}


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    run = make(tmp_path_factory.mktemp("one") / "run", "replicate", MUON)
    alone(run)
    return run


def test_a_resumed_training_has_the_same_bits(one, tmp_path) -> None:
    run = make(tmp_path / "run", "replicate", MUON)
    alone(run, stop=4)
    alone(run)
    assert_equal(run, one)


def test_its_momentum_stays_in_float32_beside_8_bits(tmp_path) -> None:
    pytest.importorskip("torchao")
    whole, run = (make(tmp_path / name, "replicate", f"{MUON}\n  optimizer_state: 8bit") for name in ("whole", "run"))
    for one in (whole, run):  # matrices that are large enough for 8 bits
        text = (one / "atoll.yaml").read_text()
        (one / "atoll.yaml").write_text(text.replace("width: 16", "width: 64", 1))
    alone(whole)
    alone(run, stop=4)
    stored = load_file(TrainingLayout(state(run)).checkpoint)
    assert stored["optimizer.momentum.blocks.0.attention.qkv.weight"].dtype == torch.float32
    assert stored["optimizer.exp_avg.conditioner.time.0.weight#codes"].dtype == torch.uint8
    alone(run)
    assert_equal(run, whole)


def test_it_is_another_training_than_adamws(one, tmp_path) -> None:
    run = make(tmp_path / "run", "replicate")
    alone(run, stop=4)
    (run / "atoll.yaml").write_text((one / "atoll.yaml").read_text())
    with pytest.raises(AtollError, match=r"other settings|another"):
        train_expert(run, load_manifest(run), "1", resume=True)


@pytest.mark.parametrize("sharding", ["replicate", "shard"])
def test_two_processes_step_as_one(one, tmp_path, sharding) -> None:
    """Up to the rounding of gradients, which the iteration in bfloat16 magnifies."""
    run, halted = (make(tmp_path / name, sharding, MUON) for name in ("whole", "halted"))
    start([Training(str(run)), Training(str(halted), stop=4), Training(str(halted), resume=True)])
    assert_equal(run, halted)
    mine, other = tensors(run), tensors(one)
    for name, value in mine.items():
        assert (value - other[name]).abs().max() < 2e-4, name  # 8 steps of 0.2 learning rates move by 1e-3


@pytest.mark.parametrize(
    ("other", "message"),
    [({"fused_backward": True, "clip": None}, "fused_backward with optimizer muon"),
     ({"block_swap": 1, "checkpointing": "full"}, "block_swap with optimizer muon")],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(other, message) -> None:
    with pytest.raises(ValueError, match=message):
        TrainSettings(optimizer="muon", **other)


def test_a_low_rank_update_is_refused() -> None:
    """Its matrices lie in blocks too, and nothing would be left to AdamW."""
    network = DiT(DiTConfig(**SIZES, depth=1))
    add_lora(network, LoraRecord(rank=2, alpha=2.0, targets=[]))
    with pytest.raises(AtollError, match=r"no low-rank updates: .*lora\.train\.optimizer"):
        State(network, TrainSettings(optimizer="muon"))
