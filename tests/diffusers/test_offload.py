"""diffusers' ways to offload weights, with the CPU as the accelerator: images are the same, and weights return.

What a CPU cannot show is a tensor left on another device. Two stand-ins show it: weights on "meta" between calls, as
accelerate's hooks leave them, and weights that are NaN while diffusers has them on the disk.
"""

import pytest
import torch
from torch import nn

from atoll.diffusers import AtollPipeline
from atoll.errors import AtollError
from tests.diffusers.drawing import latents, write_expert, write_pretrained

CPU = torch.device("cpu")


@pytest.fixture
def fresh(trained_run) -> AtollPipeline:
    """A pipeline whose hooks no other test sees."""
    return AtollPipeline.from_pretrained(trained_run / "ensemble")


def offload(module: nn.Module) -> None:
    """Keep the module's own parameters on "meta" except during its `forward`, as accelerate's hooks do."""
    stored = {name: value for name, value in module._parameters.items() if value is not None}

    def load(*_) -> None:
        module._parameters.update(stored)

    def unload(*_) -> None:
        module._parameters.update({name: nn.Parameter(value.to("meta"), False) for name, value in stored.items()})

    module.register_forward_pre_hook(load)
    module.register_forward_hook(unload)
    unload()


def test_weights_may_be_on_meta_between_calls(fresh, monkeypatch) -> None:
    expected = [latents(fresh), latents(fresh, negative_prompt="rust", block_cache=0.1)]
    for module in fresh.ensemble.networks.modules():
        offload(module)
    monkeypatch.setattr(AtollPipeline, "_execution_device", CPU)  # which diffusers reads from accelerate's hooks
    assert {weight.device.type for weight in fresh.ensemble.parameters()} == {"meta"}
    images = [latents(fresh), latents(fresh, negative_prompt="rust", block_cache=0.1)]
    assert all(map(torch.equal, images, expected))
    assert {weight.device.type for weight in fresh.ensemble.parameters()} == {"meta"}


@pytest.mark.parametrize("way", ["sequential", "model"])
def test_accelerates_offloading_gives_the_same_images_twice(fresh, monkeypatch, way) -> None:
    accelerate = pytest.importorskip("accelerate")
    expected = latents(fresh)
    if way == "sequential":
        # To accelerate, "cpu:0" is another device than "cpu", and moving there fails for any module.
        real = accelerate.cpu_offload
        monkeypatch.setattr(accelerate, "cpu_offload", lambda model, device, **options: real(model, CPU, **options))
        fresh.enable_sequential_cpu_offload(device="cpu")
        assert fresh.ensemble.device.type == "meta"
    else:
        fresh.enable_model_cpu_offload(device="cpu")
    assert fresh._execution_device.type == "cpu"
    for _ in range(2):
        assert torch.equal(latents(fresh), expected)
    fresh.remove_all_hooks()
    assert fresh.ensemble.device == CPU
    assert torch.equal(latents(fresh), expected)


def group_offload(pipe: AtollPipeline, kind: str, **options) -> None:
    pipe.enable_group_offload(onload_device=CPU, offload_type=kind, num_blocks_per_group=1, **options)


@pytest.fixture
def emptied(monkeypatch):
    """What diffusers leaves in memory of weights that are on the disk is NaN."""
    monkeypatch.setattr(torch, "empty_like", lambda x, **options: torch.full_like(x, torch.nan, **options))


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_groups_of_layers_are_loaded_before_they_are_used(fresh, tmp_path, request, kind) -> None:
    pytest.importorskip("accelerate")
    expected = latents(fresh), latents(fresh, negative_prompt="rust")
    request.getfixturevalue("emptied")
    group_offload(fresh, kind, offload_to_disk_path=str(tmp_path / "weights"))
    assert all(weight.isnan().all() for weight in fresh.ensemble.parameters())
    for _ in range(2):
        torch.testing.assert_close(latents(fresh), expected[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(latents(fresh, negative_prompt="rust"), expected[1], rtol=0, atol=1e-5)
    # Each network has its own files: those of one are not read for another.
    assert len({file.parent for file in (tmp_path / "weights").rglob("*.safetensors")}) == len(fresh.ensemble.networks)
    with pytest.raises(AtollError, match="block_cache and group offloading exclude each other"):
        latents(fresh, block_cache=0.1)


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_groups_of_layers_in_memory(trained_run, tmp_path, kind) -> None:
    pytest.importorskip("accelerate")
    pipe = AtollPipeline.from_pretrained(
        write_expert(tmp_path / "expert", write_pretrained(tmp_path / "sd")), trust_paths=True
    )
    for one in (pipe, AtollPipeline.from_pretrained(trained_run / "ensemble")):
        expected = latents(one)
        group_offload(one, kind)
        torch.testing.assert_close(latents(one), expected, rtol=0, atol=1e-5)
        assert one._execution_device == CPU


def test_old_files_are_not_taken_for_weights(fresh, tmp_path) -> None:
    """diffusers reads a file of the name that it would write, whatever is in it."""
    (tmp_path / "left.txt").write_text("")
    for place in (tmp_path, tmp_path / "left.txt"):
        with pytest.raises(AtollError, match="not an empty directory"):
            group_offload(fresh, "leaf_level", offload_to_disk_path=place)
    assert not fresh.ensemble.group_offloaded
