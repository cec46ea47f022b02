"""What users of diffusers take for granted of a pipeline: its arguments, properties, options and callbacks."""

import warnings
from dataclasses import replace
from inspect import signature

import numpy as np
import pytest
import torch

from atoll.convert import convert
from atoll.diffusers import AtollEnsemble, AtollPipeline, flow_sigmas
from atoll.encoders.text import HashEncoder, LabelEncoder, PromptEncoder
from atoll.ensemble import Sampler
from atoll.errors import AtollError
from atoll.runtime.libraries import quiet
from tests.diffusers.drawing import FLOW, PROMPTS, generators, latents, write_expert, write_pretrained

with quiet("diffusers"):
    import diffusers
    from diffusers.callbacks import MultiPipelineCallbacks, SDCFGCutoffCallback


def embeds(pipe: AtollPipeline, texts, prefix: str = "") -> dict[str, torch.Tensor | None]:
    names = ("prompt_embeds", "prompt_attention_mask", "pooled_prompt_embeds")
    return {f"{prefix}{name}": value for name, value in zip(names, pipe.encode_prompt(texts), strict=True)}


def one_line(caught) -> None:
    assert "\n" not in str(caught.value)


def test_the_arguments_have_the_names_of_diffusers_pipelines() -> None:
    """Those of its text-to-image pipelines; the first five may be passed by position."""
    names = list(signature(AtollPipeline.__call__).parameters)
    first = ["prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "num_images_per_prompt"]
    assert names[1:6] == first
    assert set(names) >= {
        *("height", "width", "generator", "latents", "output_type", "return_dict"),
        *("prompt_embeds", "prompt_attention_mask", "pooled_prompt_embeds"),
        *("negative_prompt_embeds", "negative_prompt_attention_mask", "negative_pooled_prompt_embeds"),
        *("callback_on_step_end", "callback_on_step_end_tensor_inputs"),
    }


# Numbers and sizes.


@pytest.mark.parametrize("kind", [np.int64, np.int32, torch.tensor, np.array])
def test_numpy_numbers_and_tensors_are_numbers(pipe, kind) -> None:
    scale = torch.tensor(2.0) if kind is torch.tensor else np.float32(2.0)
    assert torch.equal(latents(pipe, num_inference_steps=kind(6), guidance_scale=scale), latents(pipe))
    assert latents(pipe, prompt="moss", num_images_per_prompt=kind(2), generator=None).shape[0] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": torch.tensor([6])}, r"num_inference_steps is tensor\(\[6\]\)"),
        ({"num_inference_steps": np.float64(2.5)}, "num_inference_steps is .*expected a whole number"),
        ({"guidance_scale": np.nan}, "guidance_scale is nan"),
        ({"guidance_scale": torch.ones(2)}, "guidance_scale is tensor"),
        ({"height": 513}, "size: 8x513, expected sides that are multiples of 2"),
        ({"height": 4, "width": 0}, "size: height 4, width 0; expected whole numbers of pixels"),
        ({"width": "8"}, "width '8'; expected whole numbers"),
        ({"height": np.zeros(2)}, "size: height array"),
        ({"callback_on_step_end": 5}, "callback_on_step_end is a int; expected a function"),
        ({"prompt": None, "prompt_embeds": torch.zeros(4, 16)}, r"prompt_embeds are \[4, 16\] .* tensor \[1, 4, 8\]"),
    ],
)
def test_other_numbers_are_refused_in_one_line(pipe, arguments, message) -> None:
    with pytest.raises(AtollError, match=message) as caught:
        latents(pipe, **arguments)
    one_line(caught)


def test_the_ensembles_own_size_is_accepted(pipe) -> None:
    expected = latents(pipe)
    assert torch.equal(latents(pipe, height=4, width=8), expected)
    assert torch.equal(latents(pipe, height=np.int64(4), width=None), expected)


def test_the_size_is_that_of_the_images(tmp_path) -> None:
    """Latents of 4 x 6 are images of 8 x 12 with this codec."""
    pipe = AtollPipeline.from_pretrained(
        write_expert(tmp_path / "expert", write_pretrained(tmp_path / "sd")), trust_paths=True
    )
    with pytest.raises(AtollError, match="size: 7x4, expected sides"):
        pipe("moss", height=4, width=7)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("moss", height=8, width=12, num_inference_steps=1).images[0].size == (12, 8)


# Properties and callbacks.


@pytest.mark.parametrize("scheduler", ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_guidance_scale_and_num_timesteps_are_properties(pipe, scheduler) -> None:
    pipe.scheduler = getattr(diffusers, scheduler)()
    seen = []

    def raise_guidance(pipeline, step, timestep, tensors) -> dict:
        seen.append((pipeline.guidance_scale, pipeline.num_timesteps, pipeline.interrupt))
        pipeline._guidance_scale += 1.0
        return tensors

    latents(pipe, callback_on_step_end=raise_guidance)
    assert seen == [(2.0 + step, pipe.num_timesteps, False) for step in range(pipe.num_timesteps)]
    assert pipe.num_timesteps == len(pipe.scheduler.timesteps)
    assert pipe.guidance_scale == 2.0 + pipe.num_timesteps
    latents(pipe)
    assert pipe.guidance_scale == 2.0


def set_at(step: int, scale: float):
    def callback(pipeline, index, timestep, tensors) -> dict:
        if index == step:
            pipeline._guidance_scale = scale
        return tensors

    return callback


def steps_of(pipe: AtollPipeline, **options) -> list[torch.Tensor]:
    """The latents after each step."""
    output = []
    own = options.pop("callback_on_step_end", lambda pipeline, step, timestep, tensors: tensors)

    def callback(pipeline, step, timestep, tensors) -> dict:
        output.append(tensors["latents"].clone())
        return own(pipeline, step, timestep, tensors)

    latents(pipe, callback_on_step_end=callback, **options)
    return output


def test_guidance_that_a_callback_sets_holds_from_the_next_step(pipe) -> None:
    """Equal to the plain run up to the step, and from there to a run with the other scale from its latents."""
    plain, changed = steps_of(pipe), steps_of(pipe, callback_on_step_end=set_at(2, 5.0))
    for step in range(3):
        assert torch.equal(changed[step], plain[step])
    assert not torch.equal(changed[3], plain[3])

    def jump(pipeline, step, timestep, tensors) -> dict:
        return {"latents": plain[2]} if step == 2 else tensors

    assert torch.equal(changed[-1], steps_of(pipe, guidance_scale=5.0, callback_on_step_end=jump)[-1])


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_a_callback_ends_guidance_by_0_or_1(pipe, scale) -> None:
    """diffusers' own callbacks set 0; steps at t = 1, 5/6 and 4/6 are guided."""
    expected = latents(pipe, guidance_range=(0.6, 1.0))
    assert torch.equal(latents(pipe, callback_on_step_end=set_at(2, scale)), expected)
    assert not torch.equal(expected, latents(pipe))


def test_a_callback_without_tensors(pipe) -> None:
    seen = []

    def callback(pipeline, step, timestep, tensors) -> dict:
        seen.append(tensors)
        return tensors

    options = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": None}
    assert torch.equal(latents(pipe, **options), latents(pipe))
    assert seen == [{}] * 6


def test_diffusers_cutoff_callback_ends_guidance(pipe) -> None:
    expected = latents(pipe, guidance_range=(0.6, 1.0))
    for cutoff in (SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=2), SDCFGCutoffCallback(0.34)):
        assert torch.equal(latents(pipe, callback_on_step_end=cutoff), expected)
        assert pipe.guidance_scale == 0.0
    both = MultiPipelineCallbacks([cutoff, SDCFGCutoffCallback(1.0)])
    assert torch.equal(latents(pipe, callback_on_step_end=both), expected)


@pytest.mark.parametrize("scale", [float("nan"), "7", None])
def test_no_number_as_guidance_in_a_callback_is_refused(pipe, scale) -> None:
    with pytest.raises(AtollError, match=r"_guidance_scale is .*expected a number"):
        latents(pipe, callback_on_step_end=set_at(0, scale))


def test_a_callback_sees_all_tensors_and_changes_nothing_by_returning_them(pipe) -> None:
    seen = {}

    def look(pipeline, step, timestep, tensors) -> dict:
        seen.update({name: tensor.shape for name, tensor in tensors.items()})
        return tensors

    names = pipe._callback_tensor_inputs
    images = latents(pipe, callback_on_step_end=look, callback_on_step_end_tensor_inputs=names)
    encoder = pipe.ensemble.loaded.encoder.encoders[0]
    states = (5, encoder.length, encoder.dim)
    assert seen == {"latents": (5, 1, 4, 8), "prompt_embeds": states, "negative_prompt_embeds": states}
    assert torch.equal(images, latents(pipe))


@pytest.mark.parametrize("cut", [slice(-1, None), slice(-2, None)])
def test_a_callback_may_cut_rows_as_for_stable_diffusion(pipe, cut) -> None:
    def callback(pipeline, step, timestep, tensors) -> dict:
        return {"prompt_embeds": tensors["prompt_embeds"][cut]}

    options = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    assert torch.equal(latents(pipe, **options), latents(pipe))


@pytest.mark.parametrize(
    ("name", "argument"), [("prompt_embeds", "prompt"), ("negative_prompt_embeds", "negative_prompt")]
)
def test_states_that_a_callback_returns_hold_from_the_next_step(pipe, name, argument) -> None:
    """Equal to the plain run up to the step, and from there to a run under the other prompt from its latents."""
    others = ["fern moss", "fern", "rain fern", "", "moss"]
    states = pipe.encode_prompt(others)[0]
    own = pipe.encode_prompt(PROMPTS if argument == "prompt" else "")[2]

    def callback(pipeline, step, timestep, tensors) -> dict:
        if step == 2:
            tensors[name].copy_(states)  # in place counts, too
        return tensors

    options = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["latents", name]}
    changed, plain = steps_of(pipe, **options), steps_of(pipe)
    assert torch.equal(changed[2], plain[2])
    assert not torch.equal(changed[3], plain[3])

    def jump(pipeline, step, timestep, tensors) -> dict:
        return {"latents": plain[2]} if step == 2 else tensors

    # The pooled vectors stay those of the call.
    prefix = argument.removesuffix("prompt")
    call = {f"{prefix}prompt_embeds": states, f"{prefix}pooled_prompt_embeds": own.expand(5, -1)}
    call |= {"prompt": None} if argument == "prompt" else {}
    expected = steps_of(pipe, **call, callback_on_step_end=jump)[-1]
    torch.testing.assert_close(changed[-1], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (torch.zeros(5, 3), r"prompt_embeds are \[5, 3\] torch.float32; expected a floating-point tensor \[5,"),
        (None, "prompt_embeds are NoneType"),
        (torch.zeros(0), "prompt_embeds are"),
    ],
)
def test_other_states_from_a_callback_are_refused(pipe, returned, message) -> None:
    options = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with pytest.raises(AtollError, match=message) as caught:
        latents(pipe, callback_on_step_end=lambda *_: {"prompt_embeds": returned}, **options)
    one_line(caught)


# Prompts as states.


def test_states_in_place_of_prompts_give_the_same_images(pipe) -> None:
    expected = latents(pipe, negative_prompt="rust")
    options = {**embeds(pipe, PROMPTS), **embeds(pipe, "rust", "negative_")}
    assert torch.equal(latents(pipe, prompt=None, **options), expected)
    # Padding of the encoder "hash" is zeros, so that its mask can be left out.
    options = {name: value for name, value in options.items() if not name.endswith("mask")}
    assert torch.equal(latents(pipe, prompt=None, **options), expected)
    # One side may be text.
    assert torch.equal(latents(pipe, **embeds(pipe, "rust", "negative_")), expected)
    assert torch.equal(latents(pipe, prompt=None, negative_prompt="rust", **embeds(pipe, PROMPTS)), expected)


def test_states_of_negative_prompts_are_one_for_each_prompt(pipe) -> None:
    each = ["rust", "", "rust", "sand", "moss"]
    own = latents(pipe, negative_prompt=each)
    assert torch.allclose(latents(pipe, **embeds(pipe, each, "negative_")), own, atol=1e-5)
    own = latents(pipe, negative_prompt=each, num_images_per_prompt=2, generator=generators(10))
    both = {**embeds(pipe, PROMPTS), **embeds(pipe, each, "negative_"), "num_images_per_prompt": 2}
    assert torch.allclose(latents(pipe, prompt=None, generator=generators(10), **both), own, atol=1e-5)


def test_states_are_taken_in_any_precision(pipe) -> None:
    options = {name: None if value is None else value.double() for name, value in embeds(pipe, PROMPTS).items()}
    options["prompt_attention_mask"] = options["prompt_attention_mask"].long()
    assert torch.equal(latents(pipe, prompt=None, **options), latents(pipe))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": PROMPTS}, "prompt and prompt_embeds were both passed"),
        ({"prompt_embeds": None}, "prompt_attention_mask without prompt_embeds"),
        ({"prompt_embeds": torch.zeros(5, 99, 16)}, r"prompt_embeds are \[5, 99, 16\] .*expected a .*tensor \[5, "),
        ({"prompt_embeds": [1.0]}, "prompt_embeds are list"),
        ({"prompt_embeds": "nan"}, "prompt_embeds contain NaN"),
        ({"prompt_embeds": torch.zeros(0, 8, 16)}, r"prompt_embeds are \[0, 8, 16\]"),
        ({"prompt_attention_mask": torch.zeros(5, 4)}, "a row without a token"),
        ({"prompt_attention_mask": torch.full((5, 8), -1e4)}, "prompt_attention_mask is .*True at a token"),
        ({"prompt_attention_mask": torch.ones(5, 3)}, r"prompt_attention_mask is \[5, 3\]"),
        ({"pooled_prompt_embeds": torch.zeros(5, 3)}, r"pooled_prompt_embeds are \[5, 3\]"),
        ({"negative_pooled_prompt_embeds": torch.zeros(1, 16)}, "without negative_prompt_embeds"),
        ({"negative_prompt_embeds": "two"}, "2 negative prompts for 5 prompts"),
        ({"negative_prompt_embeds": "two", "negative_prompt": "rust"}, "negative_prompt and negative_prompt_embeds"),
    ],
)
def test_other_states_are_refused_in_one_line(pipe, change, message) -> None:
    options = embeds(pipe, PROMPTS)
    if change.get("prompt_embeds") == "nan":
        change = {"prompt_embeds": torch.full_like(options["prompt_embeds"], torch.nan)}
    if change.get("negative_prompt_embeds") == "two":
        change = {**change, **embeds(pipe, ["rust", "sand"], "negative_")}
    with pytest.raises(AtollError, match=message) as caught:
        latents(pipe, **{"prompt": None, **options, **change})
    one_line(caught)
    with pytest.raises(AtollError, match=r"no prompt; expected prompt, .* or prompt_embeds"):
        latents(pipe, prompt=None)


def test_a_pooled_vector_is_needed_where_one_is_read(pipe) -> None:
    own = pipe.ensemble.loaded.ensemble
    reads = [getattr(network, "config", None) for network in (*(e.network for e in own.experts), own.router)]
    options = {**embeds(pipe, PROMPTS), "pooled_prompt_embeds": None, "prompt": None}
    if any(getattr(config, "pooled_dim", None) for config in reads):
        with pytest.raises(AtollError, match=r"prompt_embeds without pooled_prompt_embeds: .*encode_prompt"):
            latents(pipe, **options)
    else:
        assert torch.equal(latents(pipe, **options), latents(pipe))


def test_states_of_a_pretrained_encoder_need_their_mask(tmp_path) -> None:
    """CLIP's padding is not zero: without the mask it would count as text."""
    pipe = AtollPipeline.from_pretrained(
        write_expert(tmp_path / "expert", write_pretrained(tmp_path / "sd")), trust_paths=True
    )
    options = {"generator": generators(2), "guidance_scale": 3.0, "num_inference_steps": 2}
    expected = latents(pipe, prompt=["moss", "rain"], **options)
    states = embeds(pipe, ["moss", "rain"])
    options["generator"] = generators(2)
    assert torch.equal(latents(pipe, prompt=None, **states, **options), expected)
    with pytest.raises(AtollError, match=r"prompt_embeds without prompt_attention_mask: padding of .*'clip'") as caught:
        latents(pipe, prompt=None, **{**states, "prompt_attention_mask": None}, **options)
    one_line(caught)
    # No network reads this encoder's pooled vector, so it can be left out.
    options["generator"] = generators(2)
    assert torch.equal(latents(pipe, prompt=None, **{**states, "pooled_prompt_embeds": None}, **options), expected)


def test_states_are_refused_where_experts_read_several_encoders(pipe, monkeypatch) -> None:
    states = embeds(pipe, "moss")
    encoder = pipe.ensemble.loaded.encoder.encoders[0]
    several = PromptEncoder([encoder, HashEncoder(dim=8, length=4)])
    monkeypatch.setattr(pipe.ensemble, "loaded", replace(pipe.ensemble.loaded, encoder=several))
    for call in (lambda: pipe(**states), lambda: pipe.encode_prompt("moss")):
        with pytest.raises(AtollError, match=r"experts read 2 text encoders .*cannot hold; use prompt") as caught:
            call()
        one_line(caught)
    assert pipe._callback_tensor_inputs == ("latents",)


def test_the_zeros_of_no_class_are_a_token() -> None:
    """The null condition of "label" is zeros, and its only token must not be masked."""
    from atoll.diffusers.prompts import _checked_mask

    encoder = LabelEncoder(("moss", "rain"))
    null = encoder.null(1)
    mask = _checked_mask("prompt_attention_mask", None, null.states, encoder, "prompt_embeds")
    assert torch.equal(mask, null.mask)


# Prompts that are cut.


def long(pipe: AtollPipeline, last: str) -> str:
    return " ".join(["word"] * pipe.ensemble.loaded.encoder.encoders[0].length) + f" {last}"


def test_prompts_that_are_cut_are_named_once(pipe) -> None:
    for arguments, kind in (
        ({"prompt": [long(pipe, "lighthouse")] * 5}, "the prompt '"),
        ({"negative_prompt": long(pipe, "lighthouse")}, "the negative prompt '"),
    ):
        with pytest.warns(UserWarning, match=f"{kind}.*is too long: .*lighthouse' is cut off") as caught:
            latents(pipe, **arguments)
        assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        latents(pipe, negative_prompt="rust")
    with pytest.warns(UserWarning, match="lighthouse") as caught:
        pipe(long(pipe, "lighthouse"), num_inference_steps=1)
    assert caught[0].filename == __file__  # the caller's line
    with pytest.warns(UserWarning, match="lighthouse") as caught:
        pipe.encode_prompt(long(pipe, "lighthouse"))
    assert caught[0].filename == __file__


# Loading and saving.


def test_harmless_options_of_from_pretrained_are_accepted(trained_run, tmp_path) -> None:
    options = {
        "variant": None,
        "use_safetensors": True,
        "local_files_only": True,
        "low_cpu_mem_usage": True,
        "cache_dir": str(tmp_path),
        "revision": None,
        "device_map": None,
        "torch_dtype": None,
        "dtype": None,
        "token": None,
        "force_download": False,
    }
    pipe = AtollPipeline.from_pretrained(trained_run / "ensemble", **options)
    pipe.save_pretrained(tmp_path / "saved")
    assert torch.equal(latents(AtollPipeline.from_pretrained(tmp_path / "saved", **options)), latents(pipe))
    AtollEnsemble.from_pretrained(trained_run / "ensemble", **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "fp16"}, "variant 'fp16': .*set dtype"),
        ({"revision": "v2"}, "revision 'v2'"),
        ({"device_map": "balanced"}, "device_map 'balanced': .*enable_model_cpu_offload"),
        ({"use_safetensors": False}, "use_safetensors False"),
        ({"custom_pipeline": "x"}, "custom_pipeline 'x': nothing in the directory is executed"),
        ({"trust_remote_code": True}, "nothing in the directory is executed"),
        ({"quantization_config": {}}, "weights='int8'"),
        ({"use_safetensor": True}, "unknown option 'use_safetensor'"),
    ],
)
def test_options_that_would_be_ignored_are_refused(trained_run, options, message) -> None:
    for cls in (AtollPipeline, AtollEnsemble):
        with pytest.raises(AtollError, match=message) as caught:
            cls.from_pretrained(trained_run / "ensemble", **options)
        one_line(caught)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bfloat16, torch.bfloat16),
        ("float16", torch.float16),
        ({"ensemble": torch.bfloat16, "default": torch.float16}, torch.bfloat16),
        ({"scheduler": torch.bfloat16, "default": torch.float16}, torch.float16),
        ({"ensemble": "bfloat16"}, torch.bfloat16),
        ({"scheduler": torch.bfloat16}, torch.float32),
    ],
)
@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_a_dtype_for_each_component(trained_run, name, dtype, expected) -> None:
    pipe = AtollPipeline.from_pretrained(trained_run / "ensemble", **{name: dtype})
    assert pipe.ensemble.dtype == expected
    assert AtollEnsemble.from_pretrained(trained_run / "ensemble", **{name: dtype}).dtype == expected


def test_other_dtypes_are_refused(trained_run, pipe) -> None:
    for options, message in (
        ({"dtype": {"transformer": torch.float16}}, "dtype of 'transformer': no such component; expected ensemble"),
        ({"dtype": {"ensemble": torch.int8}}, "dtype torch.int8: expected torch.float32"),
        ({"dtype": "auto"}, "dtype 'auto'"),
        ({"dtype": 16}, "dtype 16"),
        ({"dtype": torch.float32, "torch_dtype": torch.float32}, "both passed"),
        ({"dtype": {}, "ensemble": pipe.ensemble}, "both given"),
    ):
        with pytest.raises(AtollError, match=message) as caught:
            AtollPipeline.from_pretrained(trained_run / "ensemble", **options)
        one_line(caught)


def test_a_variant_is_not_saved(pipe, tmp_path) -> None:
    for save in (pipe.save_pretrained, pipe.ensemble.save_pretrained):
        with pytest.raises(AtollError, match=r"variant 'fp16': .*leave variant out") as caught:
            save(tmp_path / "saved", variant="fp16")
        one_line(caught)
    assert not (tmp_path / "saved").exists()
    pipe.save_pretrained(tmp_path / "saved", safe_serialization=False, variant=None, max_shard_size="1MB")
    assert torch.equal(latents(AtollPipeline.from_pretrained(tmp_path / "saved")), latents(pipe))


def test_components_and_another_pipeline_of_them(pipe) -> None:
    assert set(pipe.components) == {"ensemble", "scheduler"}
    again = AtollPipeline.from_pipe(pipe)
    again.set_progress_bar_config(disable=True)
    assert again.ensemble is pipe.ensemble
    assert torch.equal(latents(again), latents(pipe))


def test_half_precision_changes_images_little(trained_run) -> None:
    """Cast or loaded so; the integration stays in float32."""
    expected = latents(AtollPipeline.from_pretrained(trained_run / "ensemble"))
    for pipe in (
        AtollPipeline.from_pretrained(trained_run / "ensemble").to(torch.float16),
        AtollPipeline.from_pretrained(trained_run / "ensemble", dtype=torch.float16),
    ):
        images = latents(pipe)
        assert images.dtype == torch.float32
        assert 0 < (images - expected).abs().max() < 0.05


def test_what_an_ensemble_cannot_do_is_refused(pipe) -> None:
    with pytest.raises(AtollError, match=r"layerwise casting: .*weights='int8'") as caught:
        pipe.ensemble.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    one_line(caught)


def test_images_of_a_batch_are_those_of_each_prompt_alone(pipe) -> None:
    together = latents(pipe)
    for row, prompt in enumerate(PROMPTS):
        alone = latents(pipe, prompt=prompt, generator=generators(5)[row])
        assert torch.allclose(alone[0], together[row], atol=1e-5)


def test_a_call_leaves_nothing_behind(pipe) -> None:
    """A call with another scale, a callback and negative prompts changes no later one."""
    expected = latents(pipe)
    latents(pipe, negative_prompt="rust", guidance_scale=4.0, callback_on_step_end=set_at(1, 0.0))
    assert torch.equal(latents(pipe), expected)


# Schedulers at as many steps as they were trained with, and more.


@pytest.mark.parametrize("steps", [999, 1000])
def test_experts_are_evaluated_at_the_times_of_x(pipe, monkeypatch, steps) -> None:
    """Even times from 1, each once, at 999 and 1,000 steps of the default scheduler; x is on the line between both."""
    times, evaluated = [], []

    def velocity(self, x, t, **options) -> torch.Tensor:
        assert (t == t[0]).all()
        times.append(float(t[0]))
        evaluated.append(x.clone())
        return torch.ones_like(x)

    monkeypatch.setattr(Sampler, "velocity", velocity)
    noise = torch.randn(1, 1, 4, 8)
    x0 = latents(pipe, prompt="moss", latents=noise, generator=None, num_inference_steps=steps)
    assert times == pytest.approx([1 - step / steps for step in range(steps)], abs=1e-6)
    # Under a constant velocity of 1, x tells the time that it is at.
    for t, x in zip(times, evaluated, strict=True):
        torch.testing.assert_close(x, noise - (1 - t), atol=2e-4, rtol=0)
    torch.testing.assert_close(x0, noise - 1, atol=2e-4, rtol=0)


@pytest.mark.parametrize("steps", [999, 1000, 1001])
@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        diffusers.FlowMatchHeunDiscreteScheduler(),
        diffusers.UniPCMultistepScheduler(**FLOW),
        diffusers.DPMSolverMultistepScheduler(**FLOW),
    ],
    ids=lambda value: type(value).__name__,
)
def test_sigmas_are_the_times_of_x_for_any_number_of_steps(scheduler, steps) -> None:
    """Under a constant velocity, x at each evaluation must be where its sigma says."""
    sigmas = flow_sigmas(scheduler, steps)
    x = torch.full((1, 1, 1, 1), float(sigmas[0]), dtype=torch.float64)
    for timestep, sigma in zip(scheduler.timesteps, sigmas, strict=True):
        assert float(x) == pytest.approx(float(sigma), abs=2e-4)
        x = scheduler.step(torch.ones_like(x), timestep, x, return_dict=False)[0]
    assert float(x) == pytest.approx(0, abs=2e-4)


def test_a_converted_expert_warns_too(tmp_path) -> None:
    """An expert's directory is a pipeline whose encoder cuts prompts: not only an ensemble's."""
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 1, "out_channels": 1, "num_layers": 1}
    sizes |= {"sample_size": 4, "patch_size": 2, "caption_channels": 16, "cross_attention_dim": 16}
    network = diffusers.PixArtTransformer2DModel(**sizes, use_additional_conditions=False, norm_num_groups=2)
    network.save_pretrained(tmp_path / "pixart")
    condition = {"name": "hash", "dim": 16, "length": 4}
    objective = {"prediction": "flow", "schedule": "linear"}
    codec = {"name": "pixels", "channels": 1}
    convert(tmp_path / "pixart", tmp_path / "e", objective=objective, condition=condition, codec=codec)
    pipe = AtollPipeline.from_pretrained(tmp_path / "e")
    pipe.set_progress_bar_config(disable=True)
    with pytest.warns(UserWarning, match=r"'three lighthouse' is cut off|'lighthouse' is cut off"):
        pipe("one two three lighthouse", num_inference_steps=1)
