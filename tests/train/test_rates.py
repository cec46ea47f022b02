"""Rates by width: which parameters are scaled, the decay that is not, every optimizer, resuming, refusals."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from atoll.encoders.text import HashEncoder
from atoll.errors import AtollError
from atoll.manifest import Manifest, TrainSettings
from atoll.nn import build_network
from atoll.nn.lora import add_lora
from atoll.storage.cards import LoraRecord
from atoll.storage.shards import Shards
from atoll.train import plans
from atoll.train.batches import CaptionedLatents, Rows
from atoll.train.island import Island
from atoll.train.loop import train
from atoll.train.muon import matrix_parts
from atoll.train.plans import TrainingMarks, fingerprint, training_mark
from atoll.train.state import State
from tests.conftest import RUN, write_run
from tests.train.test_token_routing import SHAPE, Stop, kill_at, task_on

SIZES = {"size": [4, 4], "channels": 2, "patch": 2, "heads": 2, "depth": 2}
TEXT = {"states_dim": 6, "pooled_dim": 5}
NETWORKS = {
    "dit": {"name": "dit", **SIZES, **TEXT, "text_layers": 2, "modulation": "per-block"},
    "single": {"name": "dit", **SIZES, **TEXT},
    "mmdit": {"name": "mmdit", **SIZES, **TEXT, "dual_blocks": 1, "size_embedding": True, "bottleneck": 3},
    "router": {"name": "router", **SIZES, "clusters": 3},
}


def network_of(kind: str, width: int) -> nn.Module:
    torch.manual_seed(0)
    return build_network({**NETWORKS[kind], "width": width})


def rates(network: nn.Module, **settings: object) -> dict[str, float]:
    """The rate of each parameter in the first step."""
    state = State(network, TrainSettings(**{"lr": 1e-2, "warmup": 0, **settings}))
    state.begin()
    groups = [group for optimizer in state._optimizers for group in optimizer.param_groups]
    by_parameter = {p: float(group["lr"]) for group in groups for p in group["params"]}
    return {name: by_parameter[p] for name, p in network.named_parameters()}


def hidden_names(kind: str) -> set[str]:
    """Matrices with more inputs at a larger width; tables are vectors."""
    small, large = (dict(network_of(kind, width).named_parameters()) for width in (16, 32))
    wider = {name for name, p in small.items() if p.ndim == 2 and large[name].shape[1] > p.shape[1]}
    return {name for name in wider if not name.endswith("table")}


@pytest.mark.parametrize("kind", list(NETWORKS))
@pytest.mark.parametrize("width", [16, 32])
def test_adamw_scales_matrices_whose_inputs_grow(kind, width) -> None:
    expected = {True: pytest.approx(1e-2 * 8 / width), False: 1e-2}
    hidden = hidden_names(kind)
    for name, rate in rates(network_of(kind, width), lr_width=8).items():
        assert rate == expected[name in hidden], name
    assert {"final.weight", "head.weight"} & hidden
    assert "conditioner.time.2.weight" in hidden
    assert not {"embed.weight", "embed.1.weight", "embed_states.weight", "conditioner.pooled.weight"} & hidden


def test_muon_scales_by_the_root() -> None:
    network = network_of("mmdit", 32)
    hidden = hidden_names("mmdit")
    for name, rate in rates(network, lr_width=8, optimizer="muon").items():
        scale = 0.5 if matrix_parts(name, network.get_parameter(name)) else 0.25 if name in hidden else 1
        assert rate == pytest.approx(1e-2 * scale), name


@pytest.mark.parametrize("lr_width", [None, 16])
def test_off_or_at_its_own_width_there_is_one_group(lr_width) -> None:
    network = network_of("mmdit", 16)
    state = State(network, TrainSettings(lr_width=lr_width, weight_decay=0.1))
    (optimizer,) = state._optimizers
    (group,) = optimizer.param_groups
    assert all(a is b for a, b in zip(group["params"], network.parameters(), strict=True))
    assert (group["lr"], group["weight_decay"]) == (1e-3, 0.1)
    muon = State(network, TrainSettings(lr_width=lr_width, weight_decay=0.1, optimizer="muon"))
    assert [(o.param_groups[0]["lr"], o.param_groups[0]["weight_decay"]) for o in muon._optimizers] == [(1e-3, 0.1)] * 2


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_decay_of_a_step_does_not_depend_on_the_width(optimizer) -> None:
    network = network_of("mmdit", 32)
    for p in network.parameters():
        nn.init.ones_(p)
    settings = TrainSettings(lr=1e-2, warmup=0, weight_decay=0.5, lr_width=8, optimizer=optimizer, clip=None)
    state = State(network, settings)
    state.begin()
    for p in network.parameters():
        p.grad = torch.zeros_like(p)
    state.update()
    for name, p in network.named_parameters():
        torch.testing.assert_close(p.detach(), torch.full_like(p, 1 - 1e-2 * 0.5), msg=name)


@pytest.mark.parametrize("options", [{}, {"fused_backward": True}, {"optimizer_state": "8bit"}])
def test_a_step_has_the_scaled_size(options) -> None:
    if "optimizer_state" in options:
        pytest.importorskip("torchao")
    network, hidden = network_of("mmdit", 32), hidden_names("mmdit")
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    state = State(network, TrainSettings(lr=1e-2, warmup=0, lr_width=8, clip=None, **options))
    state.begin()
    sum(p.sum() for p in network.parameters()).backward()
    state.update()
    for name, p in network.named_parameters():
        moved = (before[name] - p.detach()).mean().item()  # AdamW's first step is one rate
        assert moved == pytest.approx(1e-2 * (0.25 if name in hidden else 1), rel=1e-3), name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_training_has_the_same_bits(tmp_path, optimizer) -> None:
    shards = [Shards(write_run(tmp_path / "run", shape=SHAPE) / "clusters" / "cluster-001")]
    data = CaptionedLatents(Rows.of(shards, "train"), HashEncoder(dim=8, length=4))

    def trained(name: str, stop: int | None = None, **settings: object) -> dict[str, torch.Tensor]:
        options = {"steps": 3, "checkpoint_every": 1, "log_every": 1, "validate_every": 0, "precision": "fp32"}
        task = task_on(data, None, **options, optimizer=optimizer, track="none", **settings)
        progress = None if stop is None else kill_at(stop)
        marks, island = TrainingMarks({}, task.settings), Island(0, 1, torch.device("cpu"))
        train(task, task.settings, tmp_path / name, marks, island, resume=True, progress=progress)
        return load_file(Path(tmp_path / name / "checkpoint.safetensors"))

    whole = trained("whole", lr_width=4)
    with pytest.raises(Stop):
        trained("part", stop=2, lr_width=4)
    part = trained("part", lr_width=4)
    assert part.keys() == whole.keys()
    assert all(torch.equal(part[name], whole[name]) for name in part)
    with pytest.raises(AtollError, match=r"other settings|another"):
        trained("part", lr_width=8)
    plain, own = trained("plain"), trained("own", lr_width=16)
    assert all(torch.equal(plain[name], own[name]) for name in plain)
    assert plain.keys() == whole.keys()
    assert any(not torch.equal(plain[name], whole[name]) for name in plain)


def test_it_is_part_of_the_mark_only_if_set() -> None:
    settings = TrainSettings()
    marks = {training_mark({}, settings.model_copy(update={"lr_width": width})) for width in (None, 64, 128)}
    assert len(marks) == 3
    # The mark of before there was such a rate.
    left_out = plans._MAY_CHANGE | plans._ADDED | plans._TARGETS | plans._ROUTE | {"lr_width"}
    assert training_mark({}, settings) == fingerprint({"train": settings.model_dump(exclude=left_out)})


def test_the_router_and_low_rank_updates_have_it_only_by_themselves() -> None:
    router = {**RUN["router"], "train": {"lr_width": 4}}
    manifest = Manifest(**{**RUN, "train": {**RUN["train"], "lr_width": 8}})
    assert manifest.train_of(manifest.experts[0]).lr_width == manifest.train_of(manifest.monolith).lr_width == 8
    assert manifest.train_of(manifest.router).lr_width is None
    assert manifest.train_lora_of(manifest.experts[0]).lr_width is None
    manifest = Manifest(**{**RUN, "router": router})
    assert manifest.train_of(manifest.router).lr_width == 4


def test_networks_of_unknown_width_and_low_rank_updates_are_refused() -> None:
    with pytest.raises(AtollError, match=r"lr_width: the matrices of a network None are not known; expected dit"):
        State(nn.Linear(2, 2), TrainSettings(lr_width=8))
    network = network_of("dit", 16)
    add_lora(network, LoraRecord(rank=2, alpha=2.0, targets=[]))
    with pytest.raises(AtollError, match=r"a low-rank update has a rank, .*leave it out of lora\.train"):
        State(network, TrainSettings(lr_width=8))
