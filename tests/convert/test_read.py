"""Foreign files: what is damaged, dangerous or unknown is told in one line, and nothing is executed."""

import argparse
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from atoll.convert import convert, detect
from atoll.convert.read import Checkpoint, Taker, read_checkpoint
from atoll.errors import AtollError


class Bomb:
    """Runs a command when it is unpickled, unless it is refused."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path) -> None:
    torch.save({"ema": Bomb(tmp_path / "boom")}, tmp_path / "dit.pt")
    with pytest.raises(AtollError, match="a pickle that holds more than tensors") as raised:
        convert(tmp_path / "dit.pt", tmp_path / "e")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "boom").exists()


def test_a_pickle_with_the_trainings_arguments_is_refused(tmp_path) -> None:
    torch.save({"ema": {"w": torch.ones(2)}, "args": argparse.Namespace(lr=1.0)}, tmp_path / "dit.pt")
    with pytest.raises(AtollError, match=r"Namespace.*let its author save the weights alone") as raised:
        read_checkpoint(tmp_path / "dit.pt")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "holds list; expected tensors by name"),
        ({}, "holds keys ; expected tensors by name"),
        ({"lr": 0.1, "step": 3}, "holds keys lr, step; expected tensors by name, or such under ema, model, state_dict"),
        ({"model": {"w": 1}}, "holds keys w; expected"),
    ],
)
def test_what_a_pickle_holds_is_named(tmp_path, content, message) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(AtollError, match=message):
        read_checkpoint(tmp_path / "x.pt")


def test_names_are_unwrapped(tmp_path) -> None:
    torch.save({"model": {"module._orig_mod.w": torch.ones(2), "module._orig_mod.b": torch.ones(1)}}, tmp_path / "x.pt")
    assert set(read_checkpoint(tmp_path / "x.pt").tensors) == {"w", "b"}


def test_an_unknown_layout_tells_what_is_recognised(tmp_path) -> None:
    save_file({f"down_blocks.{i}.weight": torch.ones(1) for i in range(9)}, tmp_path / "unet.safetensors")
    with pytest.raises(AtollError, match="unknown layout") as raised:
        convert(tmp_path / "unet.safetensors", tmp_path / "e")
    for part in ("down_blocks.0.weight", "down_blocks.3.weight", "dit (", "pixart (", "diffusers-dit ("):
        assert part in str(raised.value)
    with pytest.raises(AtollError, match="no tensors"):
        detect(Checkpoint({}, None, {}, "here"))


def test_nothing_there_and_unknown_files(tmp_path) -> None:
    with pytest.raises(AtollError, match=r"nothing\.pt: not found; expected a checkpoint"):
        read_checkpoint(tmp_path / "nothing.pt")
    with pytest.raises(AtollError, match=r"holds nothing; expected diffusion_pytorch_model\.safetensors"):
        read_checkpoint(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(AtollError, match=r"unknown kind of file; expected one of \.safetensors, \.pt"):
        read_checkpoint(tmp_path / "model.onnx")
    with pytest.raises(AtollError, match=r"holds model\.onnx; expected"):
        read_checkpoint(tmp_path)


@settings(max_examples=60)
@given(st.binary(max_size=200), st.sampled_from(["x.pt", "x.bin", "x.safetensors"]))
def test_any_bytes_are_an_error_of_one_line(tmp_path, data, name) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(AtollError) as raised:
        read_checkpoint(tmp_path / name)
    assert "\n" not in str(raised.value)


@settings(max_examples=30)
@given(st.data())
def test_a_damaged_checkpoint_is_refused_or_converted_whole(dit, tmp_path, data) -> None:
    """Tensors that vanish, change their shape or come on top: an AtollError, or the network of before."""
    names = data.draw(st.lists(st.sampled_from(sorted(dit)), min_size=1, max_size=3, unique=True))
    shape = data.draw(st.lists(st.integers(0, 5), max_size=4))
    changed = {k: v for k, v in dit.items() if k not in names}
    if data.draw(st.booleans()):
        changed |= {name: torch.zeros(shape) for name in names}
    torch.save(changed, tmp_path / "dit.pt")
    with pytest.raises(AtollError):
        convert(tmp_path / "dit.pt", tmp_path / "e", condition={"name": "hash"}, heads=4)
    assert not (tmp_path / "e").exists()


def test_all_problems_are_told_at_once() -> None:
    taker = Taker(Checkpoint({f"extra.{i}": torch.ones(1) for i in range(9)}, None, {}, "here"))
    assert taker.take("lost", 2, 3).shape == (2, 3)
    with pytest.raises(AtollError, match=r"here: 10 tensors do not fit \(lost: missing, expected \[2, 3\]; extra\.0"):
        taker.done()


def test_halves_are_read_as_floats(tmp_path) -> None:
    save_file({"w": torch.ones(2, dtype=torch.float16)}, tmp_path / "x.safetensors")
    taker = Taker(read_checkpoint(tmp_path / "x.safetensors"))
    assert taker.take("w", 2).dtype == torch.float32
    taker.done()
