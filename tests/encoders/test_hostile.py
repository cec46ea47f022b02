"""Files of frozen networks load neither code nor weights from elsewhere, and a small file does not fill the memory."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from atoll.encoders.codec import build_codec
from atoll.encoders.feature import build_feature
from atoll.encoders.trust import STRANGER
from atoll.encoders.weights import also_found_in, load_pretrained, sha256_weights
from atoll.errors import AtollError
from tests.encoders.codec.test_codec import save_taef2

KERNEL = "kernels-community/flash-attn2"


@pytest.fixture
def network(tmp_path) -> Path:
    """The files of a text encoder; its config.json is read first, so the weights are any."""
    (tmp_path / "config.json").write_text('{"model_type": "clip_text_model"}')
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    return tmp_path


def load(directory: Path, **config: Any) -> None:
    content = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(content | config))
    load_pretrained("transformers", {"clip_text_model": "CLIPTextModel"}, directory)


@pytest.mark.parametrize(
    "config",
    [
        {"attn_implementation": KERNEL},
        {"_attn_implementation": KERNEL},
        {"_attn_implementation_internal": "flash_attention_2"},  # falls back to code of the hub
        {"_experts_implementation": KERNEL},
        {"attn_implementation": {"": KERNEL}},
        {"text_config": {"_attn_implementation": KERNEL}},
        {"layers": [{"inner": {"attn_implementation": KERNEL}}]},
        {"transformers_weights": "other.safetensors"},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
    ],
    ids=str,
)
def test_a_config_that_loads_code_or_weights_from_elsewhere_is_refused(network, config) -> None:
    with pytest.raises(AtollError, match=r"config\.json: sets .* which loads code or weights from elsewhere") as error:
        load(network, **config)
    assert "install" not in str(error.value)


@pytest.mark.parametrize(
    "config",
    [{"attn_implementation": None}, {"_attn_implementation": "sdpa"}, {"_attn_implementation_autoset": True}],
    ids=str,
)
def test_the_implementations_of_torch_itself_are_accepted(network, config) -> None:
    with pytest.raises(AtollError, match="tensors are not in its weights"):
        load(network, **config)


def test_an_adapter_beside_the_weights_is_refused(network) -> None:
    (network / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/name"}')
    with pytest.raises(AtollError, match=r"adapter_config\.json: an adapter, which is not applied"):
        load(network)


def test_a_pickle_beside_a_card_is_refused_and_safetensors_are_read(tmp_path) -> None:
    frozen = tmp_path / "frozen"
    config = {"name": "taef2", "weights": "codec"}
    save_taef2(frozen / "codec")
    with also_found_in(frozen), pytest.raises(AtollError, match=r"encoder\.pth: a pickle, which is never read from an"):
        build_codec(config, STRANGER)
    save_taef2(frozen / "codec", ".safetensors")
    with also_found_in(frozen):
        assert build_codec(config, STRANGER).channels == 6


def compressed(file: Path) -> None:
    """Write a zip file again, compressed."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def test_a_pickle_that_unpacks_to_much_more_than_its_size_is_refused(tmp_path) -> None:
    save_taef2(tmp_path)
    torch.save({"0.weight": torch.zeros(1_000_000)}, tmp_path / "taef2_encoder.pth")
    compressed(tmp_path / "taef2_encoder.pth")
    with pytest.raises(AtollError, match=r"taef2_encoder\.pth: unpacks to 4,\d+,\d+ bytes"):
        build_codec({"name": "taef2", "weights": str(tmp_path)})


def test_arrays_that_unpack_to_much_more_than_their_size_are_refused(tmp_path) -> None:
    file = tmp_path / "net.npz"
    np.savez_compressed(file, a=np.zeros(1_000_000))
    config = {"name": "squeezenet", "weights": str(file), "sha256": sha256_weights(file)}
    with pytest.raises(AtollError, match=r"net\.npz: unpacks to 8,\d+,\d+ bytes; expected a file of numpy"):
        build_feature(config)
