"""Prompts to images: seeds, negative prompts, batches, routing traces, the grid of images."""

import numpy as np
import pytest
import torch
from PIL import Image

from atoll.errors import AtollError
from atoll.pipeline import Pipeline, grid


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


def test_images_of_a_prompt_follow_each_other_and_have_seeds_that_count_up(pipe) -> None:
    options = {"num_inference_steps": 3, "guidance_scale": 2.0}
    apart = pipe(["moss", "moss", "rain", "rain"], seeds=[3, 4, 8, 9], **options).latents
    for seeds in ([3, 8], [3, 4, 8, 9]):
        together = pipe(["moss", "rain"], seeds=seeds, images_per_prompt=2, **options).latents
        torch.testing.assert_close(together, apart)
    one = pipe(["moss", "rain"], seeds=[3, 8], images_per_prompt=[1, 2], clusters=[0, 1], batch_size=2, **options)
    torch.testing.assert_close(one.latents, apart[[0, 2, 3]])
    assert len(one.images) == 3


def test_each_prompt_has_its_own_negative_prompt(pipe) -> None:
    options = {"num_inference_steps": 4, "guidance_scale": 40.0}  # the tiny networks barely read their prompts
    both = pipe(["moss", "rain"], seeds=[1, 2], negative_prompt=["sand", "rust"], images_per_prompt=2, **options)
    for row, (prompt, negative, seed) in enumerate([("moss", "sand", 1), ("moss", "sand", 2), ("rain", "rust", 2)]):
        alone = pipe(prompt, seeds=[seed], negative_prompt=negative, **options).latents
        torch.testing.assert_close(both.latents[row], alone[0])
    assert not torch.allclose(both.latents[:1], pipe("moss", seeds=[1], **options).latents, rtol=1e-3)
    empty = pipe("moss", seeds=[1], negative_prompt="", **options).latents
    assert torch.equal(empty, pipe("moss", seeds=[1], **options).latents)


def test_networks_read_each_prompt_and_negative_prompt_once(pipe, monkeypatch) -> None:
    rows = []
    network = type(pipe.loaded.ensemble.experts[0].network)
    read_prompt = network.read_prompt
    monkeypatch.setattr(network, "read_prompt", lambda self, c: rows.append(len(c)) or read_prompt(self, c))
    negative = ["sand", "sand", "rust"]
    options = {"negative_prompt": negative, "images_per_prompt": 3, "guidance_scale": 2.0, "routing": "full"}
    pipe(["moss", "rain", "moss"], num_inference_steps=3, **options)
    assert rows == [3 + 2] * len(pipe.loaded.ensemble.experts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "no prompts"),
        ({"prompts": PROMPTS, "seeds": [1]}, "1 seeds for 7 prompts"),
        ({"prompts": "moss", "seeds": [1], "generator": torch.Generator()}, "both"),
        ({"prompts": "moss", "num_inference_steps": 0}, "steps is 0"),
        ({"prompts": "moss", "routing": "best"}, "unknown routing"),
        ({"prompts": "moss", "method": "rk4"}, "unknown method"),
        (
            {"prompts": "moss", "negative_prompt": "rain", "guidance_scale": 1.0},
            "negative_prompt changes nothing at guidance_scale 1",
        ),
        ({"prompts": PROMPTS, "negative_prompt": ["a"], "guidance_scale": 2.0}, "1 negative prompts for 7 prompts"),
        ({"prompts": "moss", "negative_prompt": [None], "guidance_scale": 2.0}, "expected a string, or a list of them"),
        ({"prompts": "moss", "images_per_prompt": 0}, "images_per_prompt is 0 for 1 prompts; expected a number from 1"),
        ({"prompts": PROMPTS, "images_per_prompt": [1, 2]}, "expected a number from 1, or one per prompt"),
        ({"prompts": ["a", "b"], "images_per_prompt": 3, "seeds": [1]}, "or one for each of 6 images"),
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
