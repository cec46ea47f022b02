"""Foreign files: what is damaged, dangerous or unknown is told in one line, and nothing is executed."""

import argparse
import collections
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from atoll.convert import convert, detect
from atoll.convert.names import PREFIXES
from atoll.convert.read import ARGUMENTS, NESTED, Checkpoint, Taker, read_checkpoint
from atoll.errors import AtollError

W, B = torch.tensor([1.0, 2.0]), torch.tensor([3.0])


def test_the_averaged_weights_and_the_arguments_are_read(tmp_path) -> None:
    args = argparse.Namespace(model="DiT-S/8", lr=1e-4, data=Path("/data"))
    content = {"model": {"w": torch.zeros(2)}, "ema": {"w": torch.ones(2)}, "args": args, "loss": np.float64(0.3)}
    torch.save(content, tmp_path / "dit.pt")
    checkpoint = read_checkpoint(tmp_path / "dit.pt")
    assert torch.equal(checkpoint.tensors["w"], torch.ones(2))
    assert (checkpoint.key, checkpoint.args["model"], checkpoint.args["lr"]) == ("ema", "DiT-S/8", 1e-4)


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": {"model.w": W, "model.b": B}, "hyper_parameters": {"lr": 0.1}},
        {"state_dict": {"denoiser.w": W, "denoiser.b": B}, "loops": {}, "callbacks": {"x": {"best": 0.1}}},
        {"state_dict": {"net._orig_mod.w": W, "net._orig_mod.b": B}, "pytorch-lightning_version": "2.5.0"},
        {"module": {"w": W, "b": B}, "epoch": 3},
        {
            "module": {"module.w": W, "module.b": B},
            "optimizer": None,
            "param_shapes": [{"w": W.shape}],
            "dp_world_size": 8,
        },
        {"ema_model": {"w": W, "b": B}, "model": {"w": B, "b": B}},
        {"denoiser": {"w": W, "b": B}, "optimizer": {"state": {}}},
        {"ema": {"module": {"module.w": W, "module.b": B}}, "model": {"w": B, "b": B}},
        {"state_dict_ema": {"w": W, "b": B}, "state_dict": {"w": B, "b": B}},
        {"ema": None, "model": {"w": W, "b": B}},
        {"w": W, "b": B, "epoch": 3, "loss": np.float32(2), "name": "x", "args": argparse.Namespace(lr=1)},
        collections.OrderedDict(w=W, b=torch.nn.Parameter(B)),
        collections.defaultdict(list, model={"w": W, "b": B}),
    ],
    ids=lambda content: "-".join(content),
)
def test_weights_are_found_under_the_usual_keys(tmp_path, content) -> None:
    torch.save(content, tmp_path / "x.ckpt")
    tensors = read_checkpoint(tmp_path / "x.ckpt").tensors
    assert tensors.keys() == {"w", "b"}
    assert torch.equal(tensors["w"], W)
    assert not any(value.requires_grad for value in tensors.values())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
def test_any_protocol_of_pickle_is_read(tmp_path, protocol, zipped) -> None:
    content = {"ema": {"w": W}, "args": argparse.Namespace(lr=1.0), "step": np.int64(3)}
    torch.save(content, tmp_path / "x.pt", pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    checkpoint = read_checkpoint(tmp_path / "x.pt")
    assert torch.equal(checkpoint.tensors["w"], W)
    assert checkpoint.args == {"lr": 1.0}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "holds list; expected tensors by name"),
        ({}, "holds keys ; expected tensors by name"),
        ({"lr": 0.1, "step": 3}, "holds keys lr, step; expected tensors by name, or such under ema, state_dict_ema"),
        ({"model": {"w": 1}}, "holds keys model; expected"),
        ({"a": 1, "c": 2, "d": 3, "e": 4, "actor": {"w": W}}, "holds tensors under actor; expected tensors by name"),
        (
            {"ema": {"shadow_params": [W], "decay": 0.9}, "model": {"w": W}},
            "ema holds shadow_params, tensors without n",
        ),
        ({"model": torch.nn.Linear(2, 2)}, r"model is a whole torch\.nn\.modules\.linear\.Linear; save its state_dict"),
        (torch.nn.Linear(2, 2), r"holds a whole torch\.nn\.modules\.linear\.Linear \(save its state_dict"),
        ({"w": torch.eye(3).to_sparse()}, "the tensor w is not dense"),
        ({"w": torch.zeros(1).expand(10**7)}, "the tensor w is larger than the file"),
        ({"module.w": W, "module._orig_mod.w": W}, "holds module.w twice|holds w twice"),
    ],
    ids=str,
)
def test_what_a_pickle_holds_is_named(tmp_path, content, message) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(AtollError, match=message) as raised:
        read_checkpoint(tmp_path / "x.pt")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@given(wrappers=st.lists(st.sampled_from(["module.", "_orig_mod.", "average", "model."]), max_size=5))
@settings(max_examples=25)
def test_prefixes_of_wrappers_are_removed_in_any_order(tmp_path, suffix, wrappers) -> None:
    """average: torch's AveragedModel, which counts beside the network that it wraps as `module`."""
    named = {"blocks.0.w": W, "end.b": B}
    for wrapper in wrappers:
        if wrapper == "average":
            named = {f"module.{name}": value for name, value in named.items()} | {"n_averaged": torch.tensor(7)}
        else:
            named = {wrapper + name: value for name, value in named.items()}
    named = {name.replace("0.w", "0._orig_mod.w"): value for name, value in named.items()}  # one block was compiled
    file = tmp_path / f"x{suffix}"
    save_file(named, file) if suffix == ".safetensors" else torch.save({"model": named}, file)
    tensors = read_checkpoint(file).tensors
    assert tensors.keys() == {"blocks.0.w", "end.b"}
    assert torch.equal(tensors["blocks.0.w"], W)


FIRST = "x_embedder.proj.weight"


@pytest.mark.parametrize("prefix", ["model.", "net.", "denoiser.", "unet_or_dit.", "model.diffusion_model."])
def test_the_one_network_of_a_lightning_module_is_read_and_the_rest_is_named(tmp_path, prefix) -> None:
    rest = {"vae.encoder.conv_in.weight": B, "text_encoder.embeddings.weight": B, "loss_ema": B}
    content = {f"{prefix}_orig_mod.{FIRST}": W, f"{prefix}_orig_mod.end.b": B, **rest}
    torch.save({"state_dict": content}, tmp_path / "x.ckpt")
    with pytest.warns(match=r"x\.ckpt: reading .*\*; loss_ema\.\*, text_encoder\.\*, vae\.\* not read"):
        tensors = read_checkpoint(tmp_path / "x.ckpt").tensors
    assert tensors.keys() == {FIRST, "end.b"}
    assert torch.equal(tensors[FIRST], W)


def test_the_page_names_every_key_and_prefix_that_is_read() -> None:
    page = (Path(__file__).parents[2] / "docs" / "convert.md").read_text()
    for names in (NESTED, ARGUMENTS, PREFIXES):
        assert ", ".join(f"`{name}`" for name in names) in page


def test_two_networks_in_one_module_are_named_and_refused(tmp_path) -> None:
    torch.save({"state_dict": {f"model.{FIRST}": W, f"ema_model.{FIRST}": W, "vae.w": B}}, tmp_path / "x.ckpt")
    with pytest.raises(AtollError, match=r"holds 2 networks, ema_model\.\*, model\.\*; expected one: save the state_d"):
        read_checkpoint(tmp_path / "x.ckpt")


def test_a_file_is_read_by_what_it_is(tmp_path) -> None:
    save_file({"w": W}, tmp_path / "x.bin")
    torch.save({"w": W}, tmp_path / "y.safetensors")
    for name in ("x.bin", "y.safetensors"):
        assert torch.equal(read_checkpoint(tmp_path / name).tensors["w"], W)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n", "is a Git LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html>Log in", "is a web page"),
        (b"", "is empty"),
        (b"\x1f\x8b\x08\x00", "is an archive; unpack it"),
    ],
)
@pytest.mark.parametrize("name", ["x.pt", "x.pth.tar", "x.safetensors"])
def test_what_came_instead_of_a_checkpoint_is_named(tmp_path, data, words, name) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(AtollError, match=words) as raised:
        read_checkpoint(tmp_path / name)
    assert "fresh copy" not in str(raised.value)


def test_a_download_that_was_cut_off_says_how_much_is_missing(tmp_path) -> None:
    save_file({"w": torch.zeros(1000)}, tmp_path / "x.safetensors")
    data = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(data[:-1500])
    with pytest.raises(AtollError, match=rf"is cut off: {len(data) - 1500:,} of {len(data):,} bytes"):
        read_checkpoint(tmp_path / "x.safetensors")


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


@pytest.mark.parametrize(("name", "value"), [("dit.pt", torch.nan), ("dit.safetensors", -torch.inf)])
def test_weights_that_are_not_finite_are_refused_by_name(dit, tmp_path, name, value) -> None:
    dit["blocks.1.attn.qkv.bias"][3] = value
    (torch.save if name.endswith(".pt") else save_file)(dit, tmp_path / name)
    with pytest.raises(AtollError, match=r"the tensor 'blocks\.1\.attn\.qkv\.bias' holds NaN or infinity"):
        read_checkpoint(tmp_path / name)


def test_tensors_that_share_their_memory_to_claim_more_than_the_file_are_refused(tmp_path) -> None:
    shared = torch.zeros(200_000)
    torch.save({f"blocks.{i}.weight": shared for i in range(20)}, tmp_path / "x.pt")
    with pytest.raises(AtollError, match=r"its 20 tensors have 16,000,000 bytes in a file of .*share memory"):
        read_checkpoint(tmp_path / "x.pt")
    # Tied weights, and the same weights under two keys, are usual.
    torch.save({"model": {"a": shared, "b": shared}, "ema": {"a": shared, "b": shared}}, tmp_path / "y.pt")
    assert read_checkpoint(tmp_path / "y.pt").tensors.keys() == {"a", "b"}


def test_entries_that_hold_themselves_or_each_other_end_the_search(tmp_path) -> None:
    content: dict = {"w": W}
    content["ema"] = content
    torch.save(content, tmp_path / "x.pt")
    assert torch.equal(read_checkpoint(tmp_path / "x.pt").tensors["w"], W)
    nested: dict = {}
    for _ in range(30):
        nested = dict.fromkeys(("ema", "model", "state_dict", "module", "net"), nested)
    torch.save(nested, tmp_path / "y.pt")
    with pytest.raises(AtollError, match="expected tensors by name"):
        read_checkpoint(tmp_path / "y.pt")
