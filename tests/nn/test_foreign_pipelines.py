"""Foreign networks sampled by Atoll against the diffusers pipelines' own calls, at the same noise and times."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from atoll.condition import Condition
from atoll.ensemble import Ensemble, Expert
from atoll.nn import Foreign
from atoll.objective import Objective
from atoll.solver import sample
from tests.nn.foreign_small import GUIDANCE, SMALL, TIME_SCALES, condition_for, latents, small

diffusers = pytest.importorskip("diffusers")

STEPS, HEIGHT, WIDTH = 3, 8, 12  # of the latent, no square


def plain(network: Foreign) -> Any:
    """The same network as diffusers builds it, without anything of Atoll's."""
    theirs = getattr(diffusers, network.config.cls)(**network.config.config)
    theirs.load_state_dict(network.network.state_dict())
    return theirs.eval()


def scheduler(shift: float = 3.0) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)


def embeds(condition: Condition, null: Condition, masks: bool = False, pooled: bool = False) -> dict[str, Tensor]:
    """The pipelines' arguments for text that is encoded already."""
    arguments = {"prompt_embeds": condition.states, "negative_prompt_embeds": null.states}
    if masks:
        arguments |= {"prompt_attention_mask": condition.mask, "negative_prompt_attention_mask": null.mask}
    if pooled:
        arguments |= {"pooled_prompt_embeds": condition.pooled, "negative_pooled_prompt_embeds": null.pooled}
    return arguments


# For each class: (network, noise [B,C,H,W], condition, null, scale of guidance) -> (latents, the times of the steps).
Run = Callable[[Foreign, Tensor, Condition, Condition, float], tuple[Tensor, Tensor]]


def run_prx(network: Foreign, noise: Tensor, condition: Condition, null: Condition, scale: float):
    from diffusers.pipelines.prx.pipeline_prx import PRXPipeline

    pipeline = PRXPipeline(plain(network), scheduler(), None, None)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        height=8 * HEIGHT,
        width=8 * WIDTH,
        num_inference_steps=STEPS,
        guidance_scale=scale,
        latents=noise,
        output_type="latent",
        use_resolution_binning=False,
        **embeds(condition, null, masks=True),
    ).images
    return images, pipeline.scheduler.sigmas


def run_sd3(network: Foreign, noise: Tensor, condition: Condition, null: Condition, scale: float):
    pipeline = diffusers.StableDiffusion3Pipeline(plain(network), scheduler(), *[None] * 7)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        height=8 * HEIGHT,
        width=8 * WIDTH,
        num_inference_steps=STEPS,
        guidance_scale=scale,
        latents=noise,
        output_type="latent",
        **embeds(condition, null, pooled=True),
    ).images
    return images, pipeline.scheduler.sigmas


def run_sana(network: Foreign, noise: Tensor, condition: Condition, null: Condition, scale: float):
    pipeline = diffusers.SanaPipeline(None, None, None, plain(network), scheduler())
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        negative_prompt=None,
        height=32 * HEIGHT,
        width=32 * WIDTH,
        num_inference_steps=STEPS,
        guidance_scale=scale,
        latents=noise,
        output_type="latent",
        use_resolution_binning=False,
        **embeds(condition, null, masks=True),
    ).images
    return images, pipeline.scheduler.sigmas


def run_lumina2(network: Foreign, noise: Tensor, condition: Condition, null: Condition, scale: float):
    pipeline = diffusers.Lumina2Pipeline(plain(network), scheduler(), None, None, None)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        height=8 * HEIGHT,
        width=8 * WIDTH,
        num_inference_steps=STEPS,
        guidance_scale=scale,
        cfg_normalization=False,  # a rescaling of the guided velocity, which no other pipeline does
        latents=noise,
        output_type="latent",
        **embeds(condition, null, masks=True),
    ).images
    return images, pipeline.scheduler.sigmas


def run_flux(network: Foreign, noise: Tensor, condition: Condition, null: Condition, scale: float):
    pipeline = diffusers.FluxPipeline(scheduler(), *[None] * 5, plain(network))
    pipeline.set_progress_bar_config(disable=True)
    packed = pipeline._pack_latents(noise, len(noise), network.channels, HEIGHT, WIDTH)
    images = pipeline(
        height=8 * HEIGHT,
        width=8 * WIDTH,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        true_cfg_scale=scale,
        latents=packed,
        output_type="latent",
        **embeds(condition, null, pooled=True),
    ).images
    return pipeline._unpack_latents(images, 8 * HEIGHT, 8 * WIDTH, 8), pipeline.scheduler.sigmas


class NoStatistics:
    """A codec whose latents are not standardised: [klein] undoes that even for output_type="latent"."""

    class bn:
        running_mean = torch.zeros(16)
        running_var = torch.ones(16)

    class config:
        batch_norm_eps = 0.0
        block_out_channels = (1, 1, 1, 1)


def run_flux2(network: Foreign, noise: Tensor, condition: Condition, null: Condition, scale: float):
    """FLUX.2 [dev], which embeds its guidance scale and has no other; [klein], which guides by a null prompt."""
    from diffusers.pipelines.flux2.pipeline_flux2_klein import Flux2KleinPipeline

    distilled = network.config.guidance is not None
    cls = diffusers.Flux2Pipeline if distilled else Flux2KleinPipeline
    pipeline = cls(scheduler(), None, None, None, plain(network))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae = NoStatistics()
    text = embeds(condition, null)
    if distilled:
        del text["negative_prompt_embeds"]
    images = pipeline(
        height=16 * HEIGHT,
        width=16 * WIDTH,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE if distilled else scale,
        latents=noise,
        output_type="latent",
        **text,
    ).images
    # [dev] returns tokens, [klein] 2 x 2 latent pixels for one of ours.
    images = images.mT.unflatten(2, (HEIGHT, WIDTH)) if distilled else pipeline._patchify_latents(images)
    return images, pipeline.scheduler.sigmas


RUNS: dict[str, Run] = {
    "PRXTransformer2DModel": run_prx,
    "SD3Transformer2DModel": run_sd3,
    "SanaTransformer2DModel": run_sana,
    "Lumina2Transformer2DModel": run_lumina2,
    "FluxTransformer2DModel": run_flux,
    "Flux2Transformer2DModel": run_flux2,
}
CASES = [
    *((cls, {}, 1.0) for cls in SMALL),
    *((cls, {}, 4.0) for cls in SMALL if cls != "Flux2Transformer2DModel"),
    ("FluxTransformer2DModel", {"guidance_embeds": False}, 4.0),
    ("Flux2Transformer2DModel", {"guidance_embeds": False}, 4.0),
    ("SanaTransformer2DModel", {"timestep_scale": 0.001, "out_channels": 8, "interpolation_scale": 2}, 4.0),
]


@pytest.mark.parametrize(("cls", "changes", "scale"), CASES, ids=str)
def test_sampling_equals_the_pipelines_own(cls, changes, scale) -> None:
    """Sign, time, order and masks of the text, guidance: one wrong, and the latents are others."""
    network = small(cls, **changes)
    # diffusers 0.42.1's PRXPipeline repeats the time twice for guidance, whatever the batch.
    rows = 1 if cls == "PRXTransformer2DModel" and scale > 1 else 3
    noise, condition = latents(network, rows), condition_for(network, rows)
    null = condition_for(network, rows, seed=7)
    expected, sigmas = RUNS[cls](network, noise, condition, null, scale)
    # The same by Atoll: an expert in an ensemble, guided in one batch.
    objective = Objective("flow", "linear", time_scale=TIME_SCALES[cls] * changes.get("timestep_scale", 1))
    ensemble = Ensemble([Expert(network, objective)], None, "full")
    cache = ensemble.prompt_cache((condition,), (null,))
    got = sample(
        lambda x, t: ensemble.velocity(x, t, guidance_scale=scale, prompt_cache=cache), noise, times=sigmas.double()
    )
    assert expected.shape == noise.shape
    assert expected.std() > 0.5
    assert (got - expected).norm() / expected.norm() < 5e-4
