"""Atoll as a diffusers pipeline: the same images, diffusers' conventions, and complete saved pipelines."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import atoll
from atoll.diffusers import AtollEnsemble, AtollPipeline, flow_sigmas
from atoll.ensemble import Ensemble
from atoll.ensemble.loading import load_ensemble
from atoll.errors import AtollError
from atoll.pipeline import Pipeline
from atoll.runtime.libraries import quiet
from atoll.storage.artifact import CARD, WEIGHTS
from tests.diffusers.drawing import FLOW, PROMPTS, generators, latents, write_expert, write_pretrained

with quiet("diffusers"):
    import diffusers


@pytest.fixture
def copied(trained_run, tmp_path) -> Path:
    """A copy of the run's ensemble and its parts, to be changed or removed."""
    for part in ("ensemble", "experts", "router"):
        shutil.copytree(trained_run / part, tmp_path / "run" / part)
    shutil.copy(trained_run / "atoll.yaml", tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(("steps", "scale"), [(1, 1.0), (6, 3.0), (17, 2.0)])
def test_images_equal_those_of_atolls_pipeline(pipe, trained_run, steps, scale) -> None:
    options = {"num_inference_steps": steps, "guidance_scale": scale}
    own = Pipeline.from_pretrained(trained_run / "ensemble")(PROMPTS, seeds=range(5), method="euler", **options)
    assert torch.equal(latents(pipe, **options), own.latents)
    images = pipe(PROMPTS, generator=generators(5), **options).images
    for mine, theirs in zip(images, own.images, strict=True):
        assert (np.asarray(mine) == np.asarray(theirs)).all()


def test_guidance_is_limited_to_its_range(pipe, trained_run) -> None:
    options = {"num_inference_steps": 6, "guidance_scale": 2.0, "guidance_range": (0.3, 0.7)}
    own = Pipeline.from_pretrained(trained_run / "ensemble")
    expected = own(PROMPTS, seeds=range(5), method="euler", **options).latents
    assert torch.equal(latents(pipe, **options), expected)
    assert not torch.equal(latents(pipe), expected)


def test_the_block_cache_reaches_the_prompt_cache(pipe, monkeypatch) -> None:
    caches = []

    def spy(self, *arguments, **options):
        caches.append(prompt_cache(self, *arguments, **options))
        return caches[-1]

    prompt_cache = Ensemble.prompt_cache
    monkeypatch.setattr(Ensemble, "prompt_cache", spy)
    latents(pipe, block_cache=0.2)
    assert [one.block_cache for one in caches] == [0.2]


def test_the_ensembles_sampling_defaults_are_used(pipe, trained_run) -> None:
    own = Pipeline.from_pretrained(trained_run / "ensemble")(PROMPTS, seeds=range(5), method="euler")
    images = pipe(PROMPTS, generator=generators(5), output_type="latent").images
    assert torch.equal(images, own.latents)


def test_a_saved_pipeline_loads_as_it_was(copied, tmp_path) -> None:
    """Also without the directory it came from, and under the options and the scheduler it had."""
    pipe = AtollPipeline.from_pretrained(copied / "ensemble", routing="top-1", alignment="native")
    pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(pipe.scheduler.config, **FLOW)
    expected = latents(pipe)
    assert not torch.equal(expected, latents(AtollPipeline.from_pretrained(copied / "ensemble")))
    pipe.save_pretrained(tmp_path / "saved")
    shutil.rmtree(copied)
    moved = shutil.move(tmp_path / "saved", tmp_path / "elsewhere")
    again = AtollPipeline.from_pretrained(moved)
    assert torch.equal(latents(again), expected)
    assert again.config.routing == "top-1"
    assert type(again.scheduler) is diffusers.UniPCMultistepScheduler
    changed = AtollPipeline.from_pretrained(
        moved, routing="full", scheduler=diffusers.FlowMatchEulerDiscreteScheduler()
    )
    assert changed.config.routing == "full"
    assert not torch.equal(latents(changed), expected)


def test_a_saved_pipeline_executes_nothing_and_is_an_ensemble(pipe, tmp_path) -> None:
    pipe.save_pretrained(tmp_path)
    assert {file.suffix for file in tmp_path.rglob("*") if file.is_file()} == {".json", ".safetensors"}
    assert {file.name for file in tmp_path.iterdir()} == {"model_index.json", "scheduler", "ensemble"}
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["ensemble"] == ["atoll.diffusers", "AtollEnsemble"]
    own = Pipeline.from_pretrained(tmp_path / "ensemble", strict=True)
    images = own(PROMPTS, seeds=range(5), num_inference_steps=6, guidance_scale=2.0, method="euler")
    assert torch.equal(images.latents, latents(pipe))


def test_a_pipeline_can_be_saved_over_itself(pipe, tmp_path) -> None:
    pipe.save_pretrained(tmp_path)
    again = AtollPipeline.from_pretrained(tmp_path)
    again.save_pretrained(tmp_path)
    again.save_pretrained(tmp_path)
    assert torch.equal(latents(AtollPipeline.from_pretrained(tmp_path)), latents(pipe))


def test_a_missing_expert_is_missing_in_the_saved_pipeline(copied, tmp_path) -> None:
    entry = json.loads((copied / "ensemble" / "ensemble.json").read_text())["experts"][1]
    shutil.rmtree(copied / "ensemble" / entry["url"])
    with pytest.warns(UserWarning, match="is missing"):
        pipe = AtollPipeline.from_pretrained(copied / "ensemble")
    pipe.save_pretrained(tmp_path / "saved")
    assert len(load_ensemble(tmp_path / "saved" / "ensemble", strict=True).ensemble.experts) == 2
    assert torch.equal(latents(AtollPipeline.from_pretrained(tmp_path / "saved")), latents(pipe))


def test_a_part_that_changed_after_loading_is_not_saved(copied, tmp_path) -> None:
    pipe = AtollPipeline.from_pretrained(copied / "ensemble")
    card = copied / "router" / CARD
    card.write_text(card.read_text() + " ")
    with pytest.raises(AtollError, match="was changed since it was loaded"):
        pipe.save_pretrained(tmp_path / "saved")
    shutil.rmtree(copied / "router")
    with pytest.raises(AtollError, match="is gone since it was loaded"):
        pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "ensemble").exists()
    assert not (tmp_path / "saved" / "model_index.json").exists()


def test_frozen_networks_are_saved_too(tmp_path, monkeypatch) -> None:
    """The text encoder, its tokenizer and the codec are found though they are gone from where the card says."""
    monkeypatch.setenv("ATOLL_WEIGHTS", str(tmp_path / "nowhere"))
    frozen = write_pretrained(tmp_path / "sd")
    pipe = AtollPipeline.from_pretrained(write_expert(tmp_path / "expert", frozen), trust_paths=True)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "pt"}
    expected = pipe(PROMPTS[:3], generator=generators(3), **options).images
    assert expected.shape == (3, 3, 8, 12)
    pipe.save_pretrained(tmp_path / "saved")
    shutil.rmtree(frozen)
    with pytest.raises(AtollError, match="not found"):
        AtollPipeline.from_pretrained(tmp_path / "expert", trust_paths=True)
    shutil.rmtree(tmp_path / "expert")
    for place in ("saved", "again"):  # and from there once more
        again = AtollPipeline.from_pretrained(tmp_path / place)
        again.set_progress_bar_config(disable=True)
        assert torch.equal(again(PROMPTS[:3], generator=generators(3), **options).images, expected)
        again.save_pretrained(tmp_path / "again")
    assert not list(tmp_path.rglob("*.bin"))
    own = Pipeline.from_pretrained(tmp_path / "saved" / "ensemble")  # the directory is all that it needs too
    expected_latents = own(
        PROMPTS[:3], seeds=range(3), num_inference_steps=2, guidance_scale=3.0, method="euler"
    ).latents
    assert torch.equal(own.loaded.codec.decode(expected_latents), expected)


def test_frozen_pickles_are_not_saved(tmp_path) -> None:
    frozen = write_pretrained(tmp_path / "sd")
    pipe = AtollPipeline.from_pretrained(write_expert(tmp_path / "expert", frozen), trust_paths=True)
    weights = next((frozen / "vae").glob("*.safetensors"))
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(AtollError, match="no safetensors to save"):
        pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "ensemble").exists()


EXACT = [  # what each is off by at 40 steps, at most, where noise leads to 1 + noise/2
    (diffusers.FlowMatchEulerDiscreteScheduler(), 0.1),
    (diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0), 0.12),
    (diffusers.FlowMatchEulerDiscreteScheduler(use_beta_sigmas=True), 0.1),
    (diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True), 0.1),
    (diffusers.FlowMatchHeunDiscreteScheduler(), 0.002),
    (diffusers.UniPCMultistepScheduler(**FLOW), 0.01),
    (diffusers.UniPCMultistepScheduler(**FLOW, use_karras_sigmas=True), 0.02),
    (diffusers.DPMSolverMultistepScheduler(**FLOW), 0.01),
    (diffusers.DPMSolverSinglestepScheduler(**FLOW, lower_order_final=True), 0.01),
]


def driven(scheduler, steps: int, rounded: bool = False) -> float:
    """What is missed where x0 ~ N(1, 1/4): the velocity is known, and carries noise z to 1 + z/2."""
    x = noise = torch.linspace(-2.5, 2.5, 7).reshape(7, 1, 1, 1)
    sigmas = flow_sigmas(scheduler, steps)
    for timestep, sigma in zip(scheduler.timesteps, sigmas, strict=True):
        t = timestep / 1000 if rounded else sigma
        variance, excess = (1 - t) ** 2 / 4 + t**2, x - (1 - t)
        eps, x0 = t / variance * excess, 1 + (1 - t) / 4 / variance * excess
        x = scheduler.step(eps - x0, timestep, x, return_dict=False)[0]
    return float((x - (1 + noise / 2)).abs().max())


@pytest.mark.parametrize(("scheduler", "bound"), EXACT, ids=lambda value: type(value).__name__)
def test_flow_sigmas_lead_any_flow_scheduler_to_the_data(scheduler, bound) -> None:
    assert driven(scheduler, 40) < bound
    assert driven(scheduler, 40) < bound  # it may be used again


def test_timesteps_are_not_used_as_times() -> None:
    scheduler = diffusers.UniPCMultistepScheduler(**FLOW)
    exact, rounded = driven(scheduler, 160), driven(scheduler, 160, rounded=True)
    assert exact < 0.0003
    assert rounded > 5 * exact


@pytest.fixture(scope="module")
def fine(loaded) -> torch.Tensor:
    return latents(loaded, num_inference_steps=128)


@pytest.mark.parametrize("scheduler", [one for one, _ in EXACT], ids=lambda value: type(value).__name__)
def test_schedulers_drive_the_pipeline(pipe, fine, scheduler) -> None:
    pipe.scheduler = scheduler
    coarse, near = ((latents(pipe, num_inference_steps=steps) - fine).square().mean().sqrt() for steps in (4, 32))
    assert near < 0.3 * coarse
    assert near < 0.3  # of latents that spread by 0.3; Euler in Karras' spacing is the worst


def test_stochastic_schedulers_follow_the_generators(pipe) -> None:
    pipe.scheduler = diffusers.FlowMatchLCMScheduler()
    images = [latents(pipe, generator=generators(5)) for _ in range(2)]
    assert torch.equal(*images)
    other = [torch.Generator().manual_seed(seed) for seed in (0, 1, 2, 3, 9)]
    assert (
        (latents(pipe, generator=other) != images[0]).flatten(1).any(1) == torch.tensor([0, 0, 0, 0, 1]).bool()
    ).all()


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (diffusers.DDIMScheduler(), "DDIMScheduler.*not for flow matching; expected FlowMatchEuler"),
        (diffusers.EulerDiscreteScheduler(), "EulerDiscreteScheduler.*not for flow matching"),
        (diffusers.UniPCMultistepScheduler(), "UniPC.*not for flow matching"),
        (diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction"), "not for flow matching"),
        (diffusers.UniPCMultistepScheduler(**FLOW, use_beta_sigmas=True), "no sigmas that fall from 1 to 0"),
        (diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "no sigmas that fall from 1 to 0"),
        (diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "`mu` must be passed"),
        (diffusers.DEISMultistepScheduler(**FLOW), "stops in noise, at sigma 0.1"),
        (diffusers.UniPCMultistepScheduler(**FLOW, final_sigmas_type="sigma_min"), "stops in noise"),
        (diffusers.CMStochasticIterativeScheduler(), "no sigmas that fall|cannot be driven"),
        (object(), "object, as it is set"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_other_schedulers_are_refused(scheduler, message) -> None:
    with pytest.raises(AtollError, match=message) as caught:
        flow_sigmas(scheduler, 8)
    assert "\n" not in str(caught.value)


def test_a_callback_sees_every_step_and_may_change_the_latents(pipe) -> None:
    calls = []

    def double(pipeline, step, timestep, inputs) -> dict:
        assert pipeline is pipe
        calls.append((step, round(float(timestep)), tuple(inputs["latents"].shape)))
        return {"latents": 2 * inputs["latents"]} if step == 5 else inputs

    assert torch.equal(latents(pipe, callback_on_step_end=double), 2 * latents(pipe))
    assert calls == [(step, round(1000 * (6 - step) / 6), (5, 1, 4, 8)) for step in range(6)]


def test_a_callback_may_stop_sampling(pipe) -> None:
    def end(pipeline, step, _, inputs) -> dict:
        pipeline._interrupt = step == 2
        return inputs

    ended = latents(pipe, callback_on_step_end=end)
    steps = []
    latents(pipe, callback_on_step_end=lambda _, __, ___, inputs: steps.append(inputs["latents"]) or {})
    assert torch.equal(ended, steps[2])
    assert len(steps) == 6


def test_images_of_one_prompt_are_consecutive(pipe) -> None:
    images = latents(pipe, prompt=["moss", "rain rust"], num_images_per_prompt=3, generator=generators(6))
    apart = latents(pipe, prompt=["moss"] * 3 + ["rain rust"] * 3, generator=generators(6))
    assert images.shape == (6, 1, 4, 8)
    assert torch.equal(images, apart)


def test_output_types(pipe) -> None:
    options = {"num_inference_steps": 3}
    images = {
        kind: pipe(PROMPTS, generator=generators(5), output_type=kind, **options).images
        for kind in ("pil", "np", "pt", "latent")
    }
    assert images["pt"].shape == (5, 1, 4, 8)
    assert torch.equal(images["pt"], pipe.ensemble.loaded.codec.decode(images["latent"]))
    assert (images["np"] == images["pt"].permute(0, 2, 3, 1).numpy()).all()
    for image, array in zip(images["pil"], images["np"], strict=True):
        assert isinstance(image, Image.Image)
        assert (np.asarray(image) == (array[..., 0] * 255).round()).all()
    alone = pipe(PROMPTS, generator=generators(5), output_type="np", return_dict=False, **options)
    assert isinstance(alone, tuple)
    assert (alone[0] == images["np"]).all()


def test_a_single_generator_or_given_latents(pipe) -> None:
    images = [latents(pipe, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*images)
    assert not torch.equal(images[0], latents(pipe, generator=torch.Generator().manual_seed(4)))
    noise = torch.randn(5, 1, 4, 8, generator=torch.Generator().manual_seed(3))
    assert torch.equal(latents(pipe, generator=None, latents=noise), images[0])


def test_a_negative_prompt_replaces_the_null_condition(pipe) -> None:
    plain = latents(pipe)
    assert torch.equal(latents(pipe, negative_prompt=""), plain)  # the null condition is the empty prompt's
    assert not torch.allclose(latents(pipe, negative_prompt="rust"), plain)
    same = latents(pipe, negative_prompt=PROMPTS, guidance_scale=7.0)  # nothing is between a prompt and itself
    assert torch.allclose(same, latents(pipe, guidance_scale=1.0), atol=1e-4)


def test_each_prompt_may_have_its_own_negative_prompt(pipe) -> None:
    each = ["rust", "", "rust", "sand", "moss"]
    together = latents(pipe, negative_prompt=each)
    for row, text in enumerate(each):
        assert torch.allclose(together[row], latents(pipe, negative_prompt=text)[row], atol=1e-5)
    twice = latents(
        pipe,
        prompt=["moss", "rain"],
        negative_prompt=["rust", "sand"],
        num_images_per_prompt=3,
        generator=generators(6),
    )
    one = latents(pipe, prompt=["rain"] * 6, negative_prompt="sand", generator=generators(6))
    assert torch.allclose(twice[3:], one[3:], atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": 3}, "prompt is 3"),
        ({"prompt": []}, r"prompt is \[\]"),
        ({"prompt": ["moss", None]}, "prompt is .*expected a string"),
        ({"negative_prompt": 7, "guidance_scale": 2.0}, "negative_prompt is 7"),
        ({"negative_prompt": ["a", "b"], "guidance_scale": 2.0}, "2 negative prompts for 5 prompts"),
        ({"negative_prompt": "a", "guidance_scale": 1.0}, "changes nothing at guidance_scale 1"),
        ({"guidance_scale": "7"}, "guidance_scale is '7'"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"num_inference_steps": 2.5}, "num_inference_steps is 2.5"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"generator": generators(2)}, "2 generators for 5 images"),
        ({"generator": 5}, "generator is a int"),
        ({"latents": torch.zeros(5, 1, 8, 4)}, r"latents are \[5, 1, 8, 4\]; expected a tensor \[5, 1, 4, 8\]"),
        ({"block_cache": -1.0}, "block_cache"),
        ({"output_type": "jpeg"}, "output_type 'jpeg'"),
        ({"callback_on_step_end_tensor_inputs": ["add_time_ids"]}, "unknown 'add_time_ids'"),
        ({"callback_on_step_end": lambda *_: None}, "returned a NoneType"),
        ({"callback_on_step_end": lambda *_: {"latents": torch.zeros(2)}}, r"latents are \[2\]"),
    ],
)
def test_invalid_arguments_are_refused_in_one_line(pipe, arguments, message) -> None:
    with pytest.raises(AtollError, match=message) as caught:
        pipe(**{"prompt": PROMPTS, **arguments})
    assert "\n" not in str(caught.value)


def test_what_cannot_be_loaded_is_refused(pipe, trained_run, tmp_path) -> None:
    with pytest.raises(AtollError, match=r"no model_index\.json, no ensemble\.json and no card\.json"):
        AtollPipeline.from_pretrained(tmp_path / "nothing")
    pipe.save_pretrained(tmp_path)
    for index, message in (
        ('{"_class_name": "FluxPipeline"}', "names the pipeline FluxPipeline; expected AtollPipeline"),
        ('["AtollPipeline"]', "names the pipeline None"),
        ('{"_class_name": "AtollPipeline"}', "cannot be loaded.*scheduler"),
        ("{", "not readable JSON"),
    ):
        (tmp_path / "model_index.json").write_text(index)
        with pytest.raises(AtollError, match=message) as caught:
            AtollPipeline.from_pretrained(tmp_path)
        assert "\n" not in str(caught.value)
    for options, message in (
        ({"routing": "best"}, "unknown routing"),
        ({"alignment": "none"}, "unknown alignment"),
        ({"dtype": torch.int8}, "expected torch.float32, torch.bfloat16"),
        ({"device_map": "cuda"}, "device_map 'cuda': load without"),
        ({"dream": 1}, "unknown option 'dream'"),
        ({"dtype": torch.float32, "ensemble": pipe.ensemble}, "both given"),
    ):
        with pytest.raises(AtollError, match=message):
            AtollPipeline.from_pretrained(trained_run / "ensemble", **options)
    with pytest.raises(AtollError, match="device_map"):
        AtollEnsemble.from_pretrained(trained_run / "ensemble", device_map={"": "cpu"})


def test_weights_of_a_saved_pipeline_are_checked(pipe, tmp_path) -> None:
    pipe.save_pretrained(tmp_path)
    file = tmp_path / "ensemble" / "experts" / "001" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    with pytest.raises(AtollError, match="altered or damaged"):
        AtollPipeline.from_pretrained(tmp_path)


def test_a_single_expert_is_a_pipeline(trained_run, tmp_path) -> None:
    pipe = AtollPipeline.from_pretrained(trained_run / "monolith")
    own = Pipeline.from_pretrained(trained_run / "monolith")(PROMPTS, seeds=range(5), num_inference_steps=6)
    assert torch.equal(latents(pipe, guidance_scale=1.0), own.latents)
    pipe.save_pretrained(tmp_path)
    assert torch.equal(latents(AtollPipeline.from_pretrained(tmp_path)), latents(pipe))


def test_moving_and_casting(trained_run, tmp_path) -> None:
    pipe = AtollPipeline.from_pretrained(trained_run / "ensemble")
    expected = latents(pipe)
    assert pipe.to("cpu") is pipe
    assert pipe.device == torch.device("cpu")
    pipe.to(torch.bfloat16)
    assert pipe.dtype == torch.bfloat16
    cast_weights = latents(pipe)
    assert cast_weights.dtype == torch.float32  # the integration's
    assert 0 < (cast_weights - expected).abs().max() < 0.2
    rounded = AtollPipeline.from_pretrained(trained_run / "ensemble", dtype=torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    assert (latents(rounded) - expected).abs().max() < 0.2
    rounded.save_pretrained(tmp_path)
    assert torch.equal(latents(AtollPipeline.from_pretrained(tmp_path)), expected)  # as the weights were


def test_the_progress_bar_can_be_disabled(loaded, capfd) -> None:
    pipe = AtollPipeline(**loaded.components)
    pipe("moss", num_inference_steps=4)
    assert "4/4" in capfd.readouterr().err
    pipe.set_progress_bar_config(disable=True)
    pipe("moss", num_inference_steps=4)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("routing", [None, "full"])
def test_an_expert_that_answered_nan_stays_excluded(trained_run, routing) -> None:
    pipe = AtollPipeline.from_pretrained(trained_run / "ensemble", routing=routing)
    with torch.no_grad():
        for parameter in pipe.ensemble.networks[1].parameters():
            parameter.fill_(torch.nan)
    with pytest.warns(UserWarning, match="answered with NaN"):
        latents(pipe)
    assert list(pipe.dropped) == [pipe.ensemble.loaded.ensemble.experts[1].name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert latents(pipe).isfinite().all()


def test_it_is_a_diffusers_pipeline() -> None:
    assert atoll.AtollPipeline is AtollPipeline
    assert issubclass(AtollPipeline, diffusers.DiffusionPipeline)
