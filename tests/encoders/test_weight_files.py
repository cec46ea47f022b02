"""Which weights of a directory are read: those that the library itself loads, whole, in shards, plain or a variant."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from atoll.convert import convert
from atoll.encoders.weight_files import weight_files
from atoll.encoders.weights import load_pretrained, pretrained_files
from atoll.errors import AtollError
from atoll.runtime.libraries import quiet

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

FORMS: dict[str, dict[str, Any]] = {
    "whole": {},
    "shards": {"max_shard_size": "20KB"},
    "fp16": {"variant": "fp16"},
    "bf16 shards": {"variant": "bf16", "max_shard_size": "20KB"},
}
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
CLIP = {**SMALL, "vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
VAE = {"block_out_channels": (32, 32), "norm_num_groups": 8, "down_block_types": ("DownEncoderBlock2D",) * 2}
VAE |= {"up_block_types": ("UpDecoderBlock2D",) * 2}
STEMS = {"transformers": "model", "diffusers": "diffusion_pytorch_model"}


def network(library: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    with quiet(library):
        if library == "transformers":
            return transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP))
        return diffusers.AutoencoderKL(**VAE)


def loaded(library: str, directory: Path) -> dict[str, torch.Tensor]:
    classes = {"clip_text_model": "CLIPTextModel", "AutoencoderKL": "AutoencoderKL"}
    return load_pretrained(library, classes, directory).state_dict()


def hashed(library: str, directory: Path) -> dict[str, torch.Tensor]:
    """The tensors in the files whose hash stands for the network."""
    files = [
        file for name, file in pretrained_files(directory, STEMS[library]).items() if name.endswith(".safetensors")
    ]
    return {name: value for file in files for name, value in load_file(file).items()}


def save(model: nn.Module, directory: Path, library: str, **options: Any) -> Path:
    with quiet(library):
        model.save_pretrained(directory, **options)
    return directory


def assert_same(library: str, directory: Path) -> None:
    got, expected = loaded(library, directory), hashed(library, directory)
    assert expected
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("library", STEMS)
@pytest.mark.parametrize("form", FORMS)
def test_a_network_is_loaded_from_whatever_form_there_is(tmp_path, library, form) -> None:
    model = network(library, 0)
    dtype = {"fp16": torch.float16, "bf16 shards": torch.bfloat16}.get(form, torch.float32)
    save(model.to(dtype), tmp_path / "n", library, **FORMS[form])
    got = loaded(library, tmp_path / "n")
    for name, value in model.state_dict().items():
        assert torch.equal(got[name], value.to(got[name].dtype)), name
        assert got[name].dtype != dtype or dtype == torch.float32 or not value.is_floating_point()


@pytest.mark.parametrize("library", STEMS)
@pytest.mark.parametrize("forms", list(itertools.permutations(FORMS, 2)), ids="+".join)
def test_what_is_hashed_is_what_is_loaded_of_two_networks_in_one_directory(tmp_path, library, forms) -> None:
    """The libraries remove files of an earlier save, so both are written apart and put together."""
    for seed, form in enumerate(forms):
        save(network(library, seed), tmp_path / form, library, **FORMS[form])
        shutil.copytree(tmp_path / form, tmp_path / "n", dirs_exist_ok=True)
    assert_same(library, tmp_path / "n")


@pytest.mark.parametrize("library", STEMS)
def test_a_stale_index_is_named_with_the_file_beside_it(tmp_path, library) -> None:
    save(network(library, 0), tmp_path / "n", library, max_shard_size="20KB")
    for shard in (tmp_path / "n").glob("*-of-*"):
        shard.unlink()
    save(network(library, 1), tmp_path / "m", library)
    shutil.copytree(tmp_path / "m", tmp_path / "n", dirs_exist_ok=True)
    if library == "transformers":  # which does not look at the index
        assert_same(library, tmp_path / "n")
        return
    index, whole = f"{STEMS[library]}.safetensors.index.json", f"{STEMS[library]}.safetensors"
    with pytest.raises(AtollError, match=f"not found, though {index} names it; .*if {whole} beside it is the network"):
        pretrained_files(tmp_path / "n", STEMS[library])


def test_convert_refuses_two_saves_in_one_directory(tmp_path) -> None:
    config = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1, "sample_size": 8}
    config |= {"cross_attention_dim": 24, "caption_channels": 10}
    for form, options in (("whole", {}), ("shards", {"max_shard_size": "20KB"})):
        save(diffusers.PixArtTransformer2DModel(**config), tmp_path / form, "diffusers", **options)
        shutil.copytree(tmp_path / form, tmp_path / "n", dirs_exist_ok=True)
    with pytest.raises(AtollError, match=r"index\.json with its shards, and diffusion_pytorch_model\.safetensors: two"):
        convert(tmp_path / "n", tmp_path / "e")
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["m.fp16.safetensors", "m.safetensors"], "m.safetensors"),
        (["m.fp16.safetensors", "m.bin"], "m.bin"),
        (["m.fp16.safetensors", "m.bf16.safetensors"], "m.bf16.safetensors"),
        (["m.non_ema.safetensors"], "m.non_ema.safetensors"),
        (["m.fp16.bin", "m.fp16.safetensors"], "m.fp16.safetensors"),
        (["m-00001-of-00002.safetensors", "other.safetensors"], None),
        (["m.fp16-00001-of-00002.safetensors"], None),
    ],
)
def test_the_order_of_preference(tmp_path, names, chosen) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"")
    weights = weight_files(tmp_path, "m", "index", (".safetensors", ".bin"))
    assert (None if weights is None else weights.files[0].name) == chosen


def test_several_unknown_variants_are_refused(tmp_path) -> None:
    for name in ("m.a.safetensors", "m.b.safetensors"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(AtollError, match="holds the variants a, b of m; keep the one to be read"):
        weight_files(tmp_path, "m")


@given(
    st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda x: st.lists(x) | st.dictionaries(st.text(), x))
)
def test_any_index_is_read_or_an_error(tmp_path, content) -> None:
    index = tmp_path / "m.safetensors.index.json"
    for value in (content, {"weight_map": content}):
        index.write_text(json.dumps(value))
        with pytest.raises(AtollError):
            weight_files(tmp_path, "m")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer.*git lfs pull"),
        (None, "is cut off: .* of .* bytes; get the whole file"),
    ],
)
def test_weights_that_cannot_be_loaded_say_what_they_are(tmp_path, damage, words) -> None:
    file = save(network("transformers", 0), tmp_path / "n", "transformers") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9] if damage is None else damage)
    with pytest.raises(AtollError, match=words):
        loaded("transformers", tmp_path / "n")
    save_file({"a": torch.ones(1)}, file)
    with pytest.raises(AtollError, match="of the network's tensors are not in its weights"):
        loaded("transformers", tmp_path / "n")
