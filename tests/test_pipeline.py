"""Prompts to images: seeds, batches, routing traces, the sheet of images."""

import errno
import os

import numpy as np
import pytest
import torch
from PIL import Image

from atoll.errors import AtollError
from atoll.pipeline import Pipeline, grid, sample_to_file


@pytest.fixture(scope="module")
def pipe(trained_run) -> Pipeline:
    return Pipeline.from_pretrained(trained_run / "ensemble")


PROMPTS = ["moss sand", "rain", "rust rust", "sand", "moss", "rain rust", "sand sand"]


@pytest.mark.parametrize("routing", ["top-1", "top-2", "full"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_image_does_not_depend_on_its_batch(pipe, routing, batch_size) -> None:
    arguments = {"seeds": range(7), "routing": routing, "guidance_scale": 2.0, "num_inference_steps": 6}
    together = pipe(PROMPTS, **arguments).images
    apart = pipe(PROMPTS, **arguments, batch_size=batch_size).images
    for a, b in zip(together, apart, strict=True):
        assert np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1


def test_each_image_keeps_its_cluster_in_any_batch(pipe) -> None:
    arguments = {"seeds": range(7), "routing": "oracle", "num_inference_steps": 4}
    together = pipe(PROMPTS, **arguments, clusters=[0, 1, 2, 0, 1, 2, 0]).latents
    apart = pipe(PROMPTS, **arguments, clusters=[0, 1, 2, 0, 1, 2, 0], batch_size=2).latents
    torch.testing.assert_close(apart, together, rtol=1e-4, atol=1e-4)
    other = pipe(PROMPTS, **arguments, clusters=[0, 1, 2, 0, 1, 2, 1]).latents
    assert not torch.allclose(other[6], together[6], rtol=1e-3, atol=1e-3)


def test_seeds_and_generators_determine_the_image(pipe) -> None:
    same = [np.asarray(pipe("moss", seeds=[5]).images[0]) for _ in range(2)]
    other = np.asarray(pipe("moss", seeds=[6]).images[0])
    assert (same[0] == same[1]).all()
    assert (same[0] != other).any()
    images = [np.asarray(pipe("moss", generator=torch.Generator().manual_seed(1)).images[0]) for _ in range(2)]
    assert (images[0] == images[1]).all()


def test_guidance_and_prompt_change_the_image(pipe) -> None:
    noise = {"seeds": [3], "num_inference_steps": 6}
    a = pipe("moss", **noise, guidance_scale=1.0).latents
    assert not torch.allclose(a, pipe("moss", **noise, guidance_scale=5.0).latents)
    assert not torch.allclose(a, pipe("rain", **noise, guidance_scale=1.0).latents)


def test_traces_and_callback_cover_every_step(pipe) -> None:
    calls = []
    out = pipe(PROMPTS, num_inference_steps=4, seeds=range(7), batch_size=4, callback=lambda *a: calls.append(a))
    assert calls == [(i, 8) for i in range(1, 9)]
    assert [len(trace.weights) for trace in out.traces] == [4, 4]
    assert out.traces[1].weights[0].shape == (3, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "no prompts"),
        ({"prompts": PROMPTS, "seeds": [1]}, "1 seeds for 7 prompts"),
        ({"prompts": "moss", "seeds": [1], "generator": torch.Generator()}, "both"),
        ({"prompts": "moss", "num_inference_steps": 0}, "steps is 0"),
        ({"prompts": "moss", "routing": "best"}, "unknown routing"),
        ({"prompts": "moss", "method": "rk4"}, "unknown method"),
    ],
)
def test_invalid_arguments_are_refused(pipe, arguments, message) -> None:
    with pytest.raises(AtollError, match=message):
        pipe(**arguments)


def test_the_grid_shows_every_image_enlarged() -> None:
    images = [Image.new("L", (8, 4), value) for value in (0, 50, 100)]
    sheet = grid(images, columns=2, min_side=16)
    assert sheet.size == (2 * 16 + 8, 2 * 8 + 8)
    assert [sheet.getpixel(at) for at in ((3, 3), (30, 3), (3, 20))] == [0, 50, 100]
    assert grid(images[:1], min_side=4).size == (8, 4)


def test_images_are_sampled_to_a_file(trained_run, tmp_path) -> None:
    sample_to_file(trained_run / "ensemble", ["moss", "rain"], tmp_path / "out.png", steps=2)
    assert Image.open(tmp_path / "out.png").size == (2 * 128 + 8, 64)
    assert [file.name for file in tmp_path.iterdir()] == ["out.png"]
    with pytest.raises(AtollError, match="no image format"):
        sample_to_file(trained_run / "ensemble", ["moss"], tmp_path / "out.txt")
    with pytest.raises(AtollError, match="no such directory"):
        sample_to_file(trained_run / "ensemble", ["moss"], tmp_path / "no" / "out.png")
    with pytest.raises(AtollError, match="no image format"):  # Pillow reads it only
        sample_to_file(trained_run / "ensemble", ["moss"], tmp_path / "out.psd")


def test_a_full_disk_leaves_the_earlier_image(trained_run, tmp_path, monkeypatch) -> None:
    (tmp_path / "out.png").write_bytes(b"earlier")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(AtollError, match=r"out\.png: cannot be written \(No space left.*untouched"):
        sample_to_file(trained_run / "ensemble", ["moss"], tmp_path / "out.png", steps=1)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("out.png", b"earlier")]
