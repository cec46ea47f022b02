"""Weights are found, and wrong ones are refused. No test touches the network."""

import json
import socket
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from atoll.encoders.weights import (
    find_weights,
    identity,
    load_pretrained,
    pretrained_files,
    require_sha256,
    same,
    sha256_files,
    sha256_weights,
)
from atoll.errors import AtollError
from atoll.runtime.libraries import quiet


@pytest.fixture
def no_network(monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=refuse))
    monkeypatch.delenv("ATOLL_WEIGHTS", raising=False)


@pytest.fixture
def hub(monkeypatch) -> list:
    """A hub that knows nothing; the calls to it."""
    calls: list = []

    def download(repository: str, **options: object) -> str:
        calls.append((repository, options))
        raise ConnectionError("offline\nand more")

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=download))
    monkeypatch.delenv("ATOLL_WEIGHTS", raising=False)
    return calls


def test_a_local_path_is_used_without_the_hub(tmp_path, monkeypatch, no_network) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "net.npz").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    assert find_weights("org/name").resolve() == (tmp_path / "org" / "name").resolve()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SOMEWHERE", str(tmp_path))
    assert find_weights("~/net.npz") == find_weights("$SOMEWHERE/net.npz") == tmp_path / "net.npz"


def test_a_variable_that_is_not_set_is_named(monkeypatch) -> None:
    monkeypatch.delenv("NOWHERE", raising=False)
    with pytest.raises(AtollError, match=r"weights '\$NOWHERE/a': \$NOWHERE is not set in the environment"):
        find_weights("$NOWHERE/a")


def test_the_directory_of_weights_is_searched_by_whole_and_last_name(tmp_path, monkeypatch, no_network) -> None:
    monkeypatch.setenv("ATOLL_WEIGHTS", str(tmp_path))
    (tmp_path / "name").mkdir()
    assert find_weights("org/name") == tmp_path / "name"
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert find_weights("org/name") == tmp_path / "org" / "name"
    assert find_weights("/gone/elsewhere/name") == tmp_path / "name"


@pytest.mark.parametrize("given_", ["/no/such/place", "./org/name", "org/name/more", "name.npz", "../org/name"])
def test_a_name_that_is_no_repository_is_not_downloaded(given_, hub, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("ATOLL_WEIGHTS", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AtollError, match=r"not found \(tried .*correct the path, or set \$ATOLL_WEIGHTS") as caught:
        find_weights(given_)
    assert str(tmp_path) in str(caught.value)
    assert not hub


def test_an_offline_hub_is_an_error_of_one_line(hub, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        AtollError, match=r"'org/name': not found \(tried org/name\).*the hub does not provide them \(offline\)"
    ) as caught:
        find_weights("org/name")
    assert "\n" not in str(caught.value)


def test_only_the_needed_files_of_a_repository_are_downloaded(hub, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for subfolders in (("",), ("vae",)):
        with pytest.raises(AtollError):
            find_weights("org/name", subfolders)
    (_, top), (_, vae) = hub
    assert top["allow_patterns"] == ["*.json", "*.safetensors", "*.txt", "*.model"]
    assert top["ignore_patterns"] == ["*/*"]
    assert vae["allow_patterns"] == ["vae/*.json", "vae/*.safetensors", "vae/*.txt", "vae/*.model"]
    assert vae["ignore_patterns"] is None


def test_the_hubs_missing_package_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ATOLL_WEIGHTS", raising=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(AtollError, match=r"huggingface_hub is needed: pip install 'atoll\[hub\]'"):
        find_weights("org/name")


def test_hash_of_a_file_and_of_a_directory(tmp_path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b").write_bytes(b"2")
    one = "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"
    assert sha256_weights(tmp_path / "a") == one
    whole = sha256_weights(tmp_path)
    assert whole == sha256_weights(tmp_path, ["sub/b", "a"]) != sha256_weights(tmp_path, ["a"])
    assert sha256_files({"a": tmp_path / "a", "sub/b": tmp_path / "sub" / "b"}) == whole
    (tmp_path / "c").write_bytes(b"not read")
    assert sha256_weights(tmp_path, ["a", "sub/b"]) == whole
    (tmp_path / "sub" / "b").rename(tmp_path / "b")
    assert sha256_weights(tmp_path, ["a", "b"]) != whole
    with pytest.raises(AtollError, match="gone: cannot be read"):
        sha256_weights(tmp_path, ["gone"])


@given(st.dictionaries(st.text(min_size=1), st.integers()), st.text(), st.text())
def test_identity_ignores_only_the_place_of_the_weights(options, here, there) -> None:
    options = {
        key: value for key, value in options.items() if key not in ("weights", "revision", "subfolder", "tokenizer")
    }
    assert identity({**options, "weights": here}) == identity({**options, "weights": there}) == options


def test_weights_with_another_hash_are_refused(tmp_path) -> None:
    require_sha256("codec 'kl'", tmp_path, "a" * 64, None)
    require_sha256("codec 'kl'", tmp_path, "a" * 64, "a" * 64)
    with pytest.raises(AtollError, match=r"codec 'kl'.*sha256 aaaaaaaaaaaaaaaa\.\.\., the config expects bbbbbbbb"):
        require_sha256("codec 'kl'", tmp_path, "a" * 64, "b" * 64)


def test_the_files_of_a_network_are_listed(tmp_path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "other.txt").write_text("")
    save_file({"a": torch.zeros(1)}, tmp_path / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert sorted(pretrained_files(tmp_path, "model")) == [
        "config.json",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
    ]
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert sorted(pretrained_files(tmp_path, "model")) == ["config.json", "model.safetensors"]
    for name in ("model.safetensors", "model.safetensors.index.json"):
        (tmp_path / name.replace("model", "diffusion_pytorch_model")).write_bytes((tmp_path / name).read_bytes())
    assert sorted(pretrained_files(tmp_path, "diffusion_pytorch_model")) == [
        "config.json",
        "diffusion_pytorch_model.safetensors.index.json",
        "model-00001-of-00001.safetensors",
    ]
    (tmp_path / "config.json").unlink()
    with pytest.raises(AtollError, match=r"config.json: not found"):
        pretrained_files(tmp_path, "model")


@pytest.mark.parametrize("name", ["gone.safetensors", "../outside.safetensors"])
def test_an_index_names_only_files_beside_it(name, tmp_path) -> None:
    directory = tmp_path / "net"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (tmp_path / "outside.safetensors").write_bytes(b"")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(AtollError, match=r"not found, though model\.safetensors\.index\.json names it; get all shards"):
        pretrained_files(directory, "model")


def test_pickles_are_never_read(tmp_path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(AtollError, match=r"only pytorch_model.bin, which is never read; convert it to safetensors"):
        pretrained_files(tmp_path, "model")


@pytest.mark.parametrize("content", ["[]", "{", '{"model_type": "bert"}'])
def test_another_kind_of_network_is_refused_before_it_is_loaded(content, tmp_path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(AtollError, match=r"config\.json"):
        load_pretrained("transformers", {"dinov2": "Dinov2Model"}, tmp_path)


def test_a_missing_library_is_named_with_its_installation(tmp_path, monkeypatch) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "dinov2"}')
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(AtollError, match=r"transformers is needed: pip install 'atoll\[hub\]'"):
        load_pretrained("transformers", {"dinov2": "Dinov2Model"}, tmp_path)


def test_quiet_restores_the_librarys_settings() -> None:
    import logging

    from transformers.utils import logging as settings

    before = settings.get_verbosity(), settings.is_progress_bar_enabled(), logging.root.manager.disable
    with quiet("transformers"):
        assert settings.get_verbosity() == settings.ERROR
        assert not settings.is_progress_bar_enabled()
    assert (settings.get_verbosity(), settings.is_progress_bar_enabled(), logging.root.manager.disable) == before


def test_configs_in_cards_are_compared_by_identity() -> None:
    assert same({"name": "kl", "weights": "a", "sha256": "1"}, {"name": "kl", "weights": "b", "sha256": "1"})
    assert not same({"name": "kl", "weights": "a", "sha256": "1"}, {"name": "kl", "weights": "a", "sha256": "2"})
    assert same([4, 8, 8], [4, 8, 8])
    assert not same({"name": "kl"}, None)
