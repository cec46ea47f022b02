"""`AtollPipeline`: prompts to images, as one of diffusers' pipelines.

On disk it is a directory like theirs, and nothing in it executes:

    model_index.json                    the pipeline's class, options and components
    scheduler/scheduler_config.json
    ensemble/                           a complete ensemble, which `atoll sample` reads too
      ensemble.json
      experts/000/ ... router/          cards and safetensors, as they were
      frozen/                           the weights of the text encoders and the codec, if they have any
"""

import os
from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from math import isfinite
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from atoll.condition import Condition, move_to, select_rows
from atoll.diffusers.component import AtollEnsemble
from atoll.diffusers.sigmas import flow_sigmas
from atoll.ensemble import Sampler
from atoll.errors import AtollError
from atoll.runtime.libraries import quiet
from atoll.solver import Velocity
from atoll.storage.artifact import CARD, read_json
from atoll.storage.layout import ENSEMBLE, ENSEMBLE_CARD

with quiet("diffusers"):
    from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
    from diffusers.utils.torch_utils import randn_tensor

INDEX = "model_index.json"
_TRUST = ("allow_hub", "trust_paths")
_OPTIONS = ("ensemble", "scheduler", "routing", "alignment", "replicas", "torch_dtype", "dtype", *_TRUST)
_OUTPUTS = ("pil", "np", "pt", "latent")


class AtollPipeline(DiffusionPipeline):
    """Prompts to images, by an ensemble and a flow-matching scheduler of diffusers.

    pipe = AtollPipeline.from_pretrained("runs/demo/ensemble").to("cuda")
    pipe("latin capital letter a, serif bold", generator=torch.Generator().manual_seed(0)).images[0].save("a.png")

    Args:
        ensemble: the component that holds experts, router, text encoder and codec.
        scheduler: a flow-matching scheduler of diffusers.
        routing: as in `atoll.Pipeline.from_pretrained`; saved with the pipeline.
        alignment: likewise.
        replicas: likewise.

    Raises:
        AtollError: an unknown routing, alignment or way to combine replicas.
    """

    ensemble: AtollEnsemble
    scheduler: Any
    config: Any
    model_cpu_offload_seq: str = "ensemble"  # type: ignore[assignment]  # None in diffusers' base class
    _callback_tensor_inputs = ("latents",)

    def __init__(
        self,
        ensemble: AtollEnsemble,
        scheduler: SchedulerMixin,
        routing: str | None = None,
        alignment: str = "snr",
        replicas: str | None = None,
    ):
        # As diffusers requires: components, then options, which are saved with them.
        super().__init__()
        self.register_modules(ensemble=ensemble, scheduler=scheduler)  # type: ignore[no-untyped-call]
        self.register_to_config(routing=routing, alignment=alignment, replicas=replicas)  # type: ignore[no-untyped-call]
        # A callback may set it to end the sampling.
        self._interrupt = False
        self._sampled, self._sampler = ensemble, self._new_sampler()  # unknown options raise here

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any) -> "AtollPipeline":
        """Load a pipeline that `save_pretrained` wrote, or create one from an ensemble's or an expert's directory.

        Args:
            pretrained_model_name_or_path: a local directory; download a repository of the hub first.
            options: ensemble, scheduler, routing, alignment, replicas, in place of the saved ones; torch_dtype or
                dtype, allow_hub and trust_paths, as in `AtollEnsemble.from_pretrained`.

        Raises:
            AtollError: no such directory, or one of another kind; an unknown option; as `load_ensemble` does.
        """
        # The kind of directory.
        path = Path(pretrained_model_name_or_path)
        if unknown := options.keys() - set(_OPTIONS):
            raise AtollError(f"unknown option {min(unknown)!r}; expected one of {', '.join(_OPTIONS)}")
        saved = (path / INDEX).is_file()
        if saved:
            index = read_json(path / INDEX)
            if (named := index.get("_class_name") if isinstance(index, dict) else None) != cls.__name__:
                raise AtollError(f"{path / INDEX}: names the pipeline {named}; expected {cls.__name__}")
        elif not (path / ENSEMBLE_CARD).is_file() and not (path / CARD).is_file():
            raise AtollError(
                f"{path}: no {INDEX}, no {ENSEMBLE_CARD} and no {CARD} in it; expected the local directory of a saved "
                "pipeline, an ensemble or an expert"
            )

        # The ensemble, unless it is given.
        trust = {name: options.pop(name) for name in _TRUST if name in options}
        dtypes = [options.pop(name) for name in ("torch_dtype", "dtype") if name in options]
        if "ensemble" not in options:
            # A saved pipeline has the ensemble in a directory of its own.
            options["ensemble"] = AtollEnsemble.from_pretrained(
                path / ENSEMBLE if saved else path, *dtypes[:1], **trust
            )
        elif dtypes:
            raise AtollError("an ensemble and a dtype were both given; expected one of them: the ensemble has a dtype")
        # A new pipeline has the default scheduler.
        if not saved:
            return cls(**{"scheduler": FlowMatchEulerDiscreteScheduler(), **options})
        # diffusers reads the index and loads the scheduler.
        with quiet("diffusers"):
            try:
                return super().from_pretrained(str(path), **options)
            except AtollError:
                raise
            except Exception as error:  # anything: diffusers does not check an index or a scheduler's config
                reason = " ".join(str(error).split())[:200]
                raise AtollError(f"{path}: cannot be loaded ({reason}); save it again with this diffusers") from None

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        *,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        guidance_range: tuple[float, float] = (0.0, 1.0),
        block_cache: float = 0.0,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample `num_images_per_prompt` images per prompt: B in total, those of one prompt consecutive.

        Args:
            prompt: one or several.
            negative_prompt: one, or one per prompt; replaces the null condition.
            num_inference_steps: default: the ensemble's.
            guidance_scale: default: the ensemble's.
            num_images_per_prompt: images of each prompt.
            generator: one, or one per image. With the default scheduler and a generator per image, an image equals, bit
                for bit on a CPU, that of `atoll.Pipeline` by "euler" with the generator's seed.
            latents: x at t = 1 [B, C, H, W], in place of noise.
            output_type: "pil"; "np" [B, h, w, c] or "pt" [B, c, h, w], in [0, 1]; "latent", x at t = 0 [B, C, H, W].
            return_dict: False returns a tuple with the images.
            callback_on_step_end: called with (pipeline, step, timestep, {"latents": x}) after each call of the
                scheduler; "latents" in the dictionary that it returns replace x. If it sets `pipeline._interrupt`,
                sampling ends with this step.
            callback_on_step_end_tensor_inputs: only "latents".
            guidance_range: as in `atoll.Pipeline`.
            block_cache: as in `atoll.Pipeline`.

        Raises:
            AtollError: an argument of another type or number; a scheduler that `flow_sigmas` refuses; as
                `Ensemble.velocity` does.
        """
        # Arguments, completed by the ensemble's defaults.
        prompts, loaded, device = _texts("prompt", prompt), self.ensemble.loaded, self._execution_device
        defaults = loaded.sampling
        steps = defaults.steps_or(50) if num_inference_steps is None else num_inference_steps
        scale = defaults.guidance_or(1.0) if guidance_scale is None else guidance_scale
        _check(steps, scale, num_images_per_prompt, output_type, callback_on_step_end_tensor_inputs)

        # Conditions by image, and a prompt cache for each negative prompt.
        owners = [
            number for number in range(len(prompts)) for _ in range(num_images_per_prompt)
        ]  # the prompt of each image
        conditions = move_to(loaded.encoder(prompts), device)
        conditions = select_rows(conditions, torch.tensor(owners, device=device))
        sampler = self._current_sampler()
        caches = [
            (rows, sampler.ensemble.prompt_cache(select_rows(conditions, rows), null, block_cache=block_cache))
            for rows, null in self._null_conditions(prompts, negative_prompt, owners, scale, device)
        ]

        # Integrate from t = 1 to 0; the module call runs the hooks of diffusers.
        x = _initial((len(owners), *loaded.latent_shape), latents, generator, device)
        sigmas = flow_sigmas(self.scheduler, steps, device)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            u = torch.empty_like(x)
            for rows, cache in caches:
                u[rows] = self.ensemble(sampler, x[rows], t[rows], cache, scale, guidance_range=guidance_range)
            return u

        callback = None if callback_on_step_end is None else partial(callback_on_step_end, self)
        x = self._integrate(velocity, x, sigmas, generator, callback, callback_on_step_end_tensor_inputs)
        self.maybe_free_model_hooks()  # type: ignore[no-untyped-call]
        images = self._decode(x, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @property
    def dropped(self) -> dict[str, str]:
        """The experts that were dropped while sampling, and why; they stay excluded."""
        return dict(self._current_sampler().dropped)

    def _integrate(
        self,
        velocity: Velocity,
        x: Tensor,
        sigmas: Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
        callback: Callable[..., dict[str, Any]] | None,
        inputs: Sequence[str],
    ) -> Tensor:
        """Return x at t = 0 [B, C, H, W] from x at t = 1, by the scheduler's steps at sigmas [N]."""
        # Only stochastic schedulers take a generator.
        extra = {"generator": generator} if "generator" in signature(self.scheduler.step).parameters else {}
        self._interrupt = False
        with self.progress_bar(total=len(sigmas)) as bar:
            for step, (timestep, sigma) in enumerate(zip(self.scheduler.timesteps, sigmas, strict=True)):
                # t = sigma on this path; the timestep is the scheduler's own.
                u = velocity(x, sigma.expand(len(x)))
                x = self.scheduler.step(u, timestep, x, **extra, return_dict=False)[0]
                if callback is not None:
                    x = _replaced(x, callback(step, timestep, dict.fromkeys(inputs, x)))
                bar.update()
                if self._interrupt:
                    break
        return x

    def _decode(self, x: Tensor, output_type: str) -> Any:
        """Return latents [B, C, H, W] as images of `output_type`."""
        # Latents need no codec.
        if output_type == "latent":
            return x
        # The codec's images; diffusers' output types differ in the axis of the channels.
        images = self.ensemble.loaded.codec.decode(x)  # [B, c, h, w] in [0, 1]
        if output_type == "pt":
            return images
        arrays = images.permute(0, 2, 3, 1).cpu().numpy()  # [B, h, w, c]
        return arrays if output_type == "np" else self.numpy_to_pil(arrays)  # type: ignore[no-untyped-call]

    def _null_conditions(
        self,
        prompts: list[str],
        negative_prompt: str | Sequence[str] | None,
        owners: list[int],
        scale: float,
        device: torch.device,
    ) -> list[tuple[Tensor, tuple[Condition, ...] | None]]:
        """Return the rows [b] of each negative prompt, with its encoding or the ensemble's own null condition."""
        # The ensemble's own null condition, for all rows.
        if negative_prompt is None:
            null = self.ensemble.loaded.ensemble.null
            return [(torch.arange(len(owners), device=device), None if null is None else move_to(null, device))]

        # One negative prompt for all, or one per prompt.
        texts = _texts("negative_prompt", negative_prompt)
        texts = texts * len(prompts) if isinstance(negative_prompt, str) else texts
        if len(texts) != len(prompts):
            raise AtollError(f"{len(texts)} negative prompts for {len(prompts)} prompts; expected one, or one for each")
        if scale == 1.0:
            raise AtollError("negative_prompt changes nothing at guidance_scale 1; set guidance_scale, or leave it out")

        # Rows with equal negative prompts share one cache.
        parts: list[tuple[Tensor, tuple[Condition, ...] | None]] = []
        for text in dict.fromkeys(texts):
            rows = [row for row, owner in enumerate(owners) if texts[owner] == text]
            null = move_to(self.ensemble.loaded.encoder([text]), device)
            parts.append((torch.tensor(rows, device=device), null))
        return parts

    def _new_sampler(self) -> Sampler:
        """Return a sampler of the component under the pipeline's own options."""
        # The options are in the config, so that they are saved with the pipeline.
        return self.ensemble.sampler(self.config.routing, self.config.alignment, self.config.replicas)

    def _current_sampler(self) -> Sampler:
        """Return the sampler: the same one for every call, so that an expert that failed once stays excluded."""
        # Somebody may replace the component of a pipeline.
        if self._sampled is not self.ensemble:
            self._sampled, self._sampler = self.ensemble, self._new_sampler()
        return self._sampler


def _texts(name: str, value: str | Sequence[str]) -> list[str]:
    """Return a prompt argument as a list of texts."""
    # A single string is one prompt.
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) for text in texts):
        raise AtollError(f"{name} is {value!r:.60}; expected a string, or a list of at least one")
    return list(texts)


def _check(steps: int, scale: float, images: int, output_type: str, inputs: Sequence[str]) -> None:
    """Raise AtollError for an argument of another type or outside its range."""
    # Each argument is checked before any network runs.
    if not isinstance(scale, int | float) or not isfinite(scale):
        raise AtollError(f"guidance_scale is {scale!r}; expected a number")
    for name, value in (("num_inference_steps", steps), ("num_images_per_prompt", images)):
        if not isinstance(value, int) or value < 1:
            raise AtollError(f"{name} is {value!r}; expected a whole number from 1")
    if output_type not in _OUTPUTS:
        raise AtollError(f"unknown output_type {output_type!r}; expected one of {', '.join(_OUTPUTS)}")
    if unknown := set(inputs) - {"latents"}:
        raise AtollError(f"callback_on_step_end_tensor_inputs: unknown {min(unknown)!r}; there are only latents")


def _initial(
    shape: tuple[int, ...],
    latents: Tensor | None,
    generator: torch.Generator | list[torch.Generator] | None,
    device: torch.device,
) -> Tensor:
    """Return x at t = 1: the given latents, or noise; with several generators, each row from its own."""
    # A caller's latents replace the noise.
    if latents is not None:
        return _checked_latents(latents, shape, device)
    # One generator per image makes an image independent of the others.
    if isinstance(generator, list) and len(generator) != shape[0]:
        raise AtollError(f"{len(generator)} generators for {shape[0]} images; expected one, or one for each")
    for one in generator if isinstance(generator, list) else [generator]:
        if one is not None and not isinstance(one, torch.Generator):
            raise AtollError(f"generator is a {type(one).__name__}; expected a torch.Generator, or a list of them")
    return cast(Tensor, randn_tensor(shape, generator=generator, device=device, dtype=torch.float32))


def _checked_latents(latents: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Return a user's latents in float32, the dtype of the integration."""
    # Another shape would fail deep inside the networks.
    if not isinstance(latents, Tensor) or tuple(latents.shape) != shape:
        got = list(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
        raise AtollError(f"latents are {got}; expected a tensor {list(shape)}")
    return latents.to(device, torch.float32)


def _replaced(x: Tensor, returned: Any) -> Tensor:
    """Return x, or the latents that a callback returned in its place."""
    # A callback that forgets to return would replace x by None.
    if not isinstance(returned, dict):
        raise AtollError(f"callback_on_step_end returned a {type(returned).__name__}; expected a dictionary")
    return _checked_latents(returned.get("latents", x), tuple(x.shape), x.device)
