"""`AtollPipeline`: prompts -> images, with the manners of diffusers' own pipelines.

On disk it is a directory like theirs, and nothing in it executes:

    model_index.json                    the pipeline's class and options, and what its components are
    scheduler/scheduler_config.json
    ensemble/                           an ensemble of Atoll's, whole: `atoll sample` reads it too
      ensemble.json
      experts/000/ ... router/          cards and safetensors, as they were
      frozen/                           the weights of the text encoders and the codec, where these have any
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
_OPTIONS = ("ensemble", "scheduler", "routing", "alignment", "replicas", "torch_dtype", "dtype")
_OUTPUTS = ("pil", "np", "pt", "latent")


class AtollPipeline(DiffusionPipeline):
    """Prompts -> images, by an ensemble of Atoll's and a flow-matching scheduler of diffusers'.

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
        super().__init__()
        self.register_modules(ensemble=ensemble, scheduler=scheduler)  # type: ignore[no-untyped-call]
        self.register_to_config(routing=routing, alignment=alignment, replicas=replicas)  # type: ignore[no-untyped-call]
        self._interrupt = False
        self._sampled, self._sampler = ensemble, self._new_sampler()  # unknown options raise here

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any) -> "AtollPipeline":
        """The pipeline that `save_pretrained` wrote; or a new one, of an ensemble's or an expert's own directory.

        Args:
            pretrained_model_name_or_path: a local directory; a repository of the hub has to be fetched first.
            options: ensemble, scheduler, routing, alignment, replicas, in the place of what is there; torch_dtype or
                dtype, as in `AtollEnsemble.from_pretrained`.

        Raises:
            AtollError: no such directory, or one of another kind; an unknown option; as `load_ensemble` does.
        """
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
        dtypes = [options.pop(name) for name in ("torch_dtype", "dtype") if name in options]
        if "ensemble" not in options:
            options["ensemble"] = AtollEnsemble.from_pretrained(path / ENSEMBLE if saved else path, *dtypes[:1])
        elif dtypes:
            raise AtollError("an ensemble and a dtype were both given; expected one of them: the ensemble has a dtype")
        if not saved:
            return cls(**{"scheduler": FlowMatchEulerDiscreteScheduler(), **options})
        with quiet("diffusers"):
            try:
                return super().from_pretrained(str(path), **options)
            except AtollError:
                raise
            except Exception as error:  # diffusers raises whatever it meets in an index or a scheduler's config
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
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        guidance_range: tuple[float, float] = (0.0, 1.0),
        block_cache: float = 0.0,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draws `num_images_per_prompt` images of each prompt: B in all, those of one prompt side by side.

        Args:
            negative_prompt: one, or one per prompt; takes the place of the null condition.
            num_inference_steps, guidance_scale: the ensemble's own defaults where None.
            generator: one, or one per image. With the scheduler that is set at first, the image of a generator of
                its own is, bit for bit on a CPU, that of `atoll.Pipeline` by "euler" with its seed.
            latents: x at t = 1 [B, C, H, W], in the place of noise.
            output_type: "pil"; "np" [B, h, w, c] or "pt" [B, c, h, w], in [0, 1]; "latent", x at t = 0 [B, C, H, W].
            return_dict: False gives a tuple of the images alone.
            callback_on_step_end: called with (pipeline, step, timestep, {"latents": x}) after each call of the
                scheduler; "latents" in the dictionary it returns take the place of x. Where it sets
                `pipeline._interrupt`, sampling ends with this step.
            guidance_range, block_cache: as of `atoll.Pipeline`.

        Raises:
            AtollError: an argument of another type or number; a scheduler that `flow_sigmas` refuses; as
                `Ensemble.velocity` does.
        """
        prompts, loaded, device = _texts("prompt", prompt), self.ensemble.loaded, self._execution_device
        defaults = loaded.sampling
        steps = defaults.steps_or(50) if num_inference_steps is None else num_inference_steps
        scale = defaults.guidance_or(1.0) if guidance_scale is None else guidance_scale
        _check(steps, scale, num_images_per_prompt, output_type, callback_on_step_end_tensor_inputs)
        owners = [number for number in range(len(prompts)) for _ in range(num_images_per_prompt)]  # of B images
        conditions = move_to(loaded.encoder(prompts), device)
        conditions = select_rows(conditions, torch.tensor(owners, device=device))
        sampler = self._current_sampler()
        caches = [
            (rows, sampler.ensemble.prompt_cache(select_rows(conditions, rows), null, block_cache=block_cache))
            for rows, null in self._null_conditions(prompts, negative_prompt, owners, scale, device)
        ]
        x = _first((len(owners), *loaded.latent_shape), latents, generator, device)
        sigmas = flow_sigmas(self.scheduler, steps, device)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            u = torch.empty_like(x)
            for rows, cache in caches:
                u[rows] = self.ensemble(sampler, x[rows], t[rows], cache, scale, guidance_range)
            return u

        tell = None if callback_on_step_end is None else partial(callback_on_step_end, self)
        x = self._integrate(velocity, x, sigmas, generator, tell, callback_on_step_end_tensor_inputs)
        self.maybe_free_model_hooks()  # type: ignore[no-untyped-call]
        images = self._finished(x, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @property
    def dropped(self) -> dict[str, str]:
        """Experts that failed in use, and how; they are not asked again."""
        return dict(self._current_sampler().dropped)

    def _integrate(
        self,
        velocity: Velocity,
        x: Tensor,
        sigmas: Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
        tell: Callable[..., dict[str, Any]] | None,
        inputs: Sequence[str],
    ) -> Tensor:
        """x at t = 0 [B, C, H, W] from x at t = 1, by the scheduler's steps, which ask the velocity at sigmas [N]."""
        extra = {"generator": generator} if "generator" in signature(self.scheduler.step).parameters else {}
        self._interrupt = False
        with self.progress_bar(total=len(sigmas)) as bar:
            for step, (timestep, sigma) in enumerate(zip(self.scheduler.timesteps, sigmas, strict=True)):
                u = velocity(x, sigma.expand(len(x)))
                x = self.scheduler.step(u, timestep, x, **extra, return_dict=False)[0]
                if tell is not None:
                    x = _replaced(x, tell(step, timestep, dict.fromkeys(inputs, x)))
                bar.update()
                if self._interrupt:
                    break
        return x

    def _finished(self, x: Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return x
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
        if negative_prompt is None:
            null = self.ensemble.loaded.ensemble.null
            return [(torch.arange(len(owners), device=device), None if null is None else move_to(null, device))]
        texts = _texts("negative_prompt", negative_prompt)
        texts = texts * len(prompts) if isinstance(negative_prompt, str) else texts
        if len(texts) != len(prompts):
            raise AtollError(f"{len(texts)} negative prompts for {len(prompts)} prompts; expected one, or one for each")
        if scale == 1.0:
            raise AtollError("negative_prompt changes nothing at guidance_scale 1; set guidance_scale, or leave it out")
        parts: list[tuple[Tensor, tuple[Condition, ...] | None]] = []
        for text in dict.fromkeys(texts):
            rows = [row for row, owner in enumerate(owners) if texts[owner] == text]
            null = move_to(self.ensemble.loaded.encoder([text]), device)
            parts.append((torch.tensor(rows, device=device), null))
        return parts

    def _new_sampler(self) -> Sampler:
        """Return a sampler of the component under the pipeline's own options."""
        return self.ensemble.sampler(self.config.routing, self.config.alignment, self.config.replicas)

    def _current_sampler(self) -> Sampler:
        """Return the sampler: the same one for every call, so that an expert that failed once stays excluded."""
        if self._sampled is not self.ensemble:
            self._sampled, self._sampler = self.ensemble, self._new_sampler()
        return self._sampler


def _texts(what: str, given: str | Sequence[str]) -> list[str]:
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) for text in texts):
        raise AtollError(f"{what} is {given!r:.60}; expected a string, or a list of one at least")
    return list(texts)


def _check(steps: int, scale: float, images: int, output_type: str, inputs: Sequence[str]) -> None:
    if not isinstance(scale, int | float) or not isfinite(scale):
        raise AtollError(f"guidance_scale is {scale!r}; expected a number")
    for name, value in (("num_inference_steps", steps), ("num_images_per_prompt", images)):
        if not isinstance(value, int) or value < 1:
            raise AtollError(f"{name} is {value!r}; expected a whole number of 1 at least")
    if output_type not in _OUTPUTS:
        raise AtollError(f"unknown output_type {output_type!r}; expected one of {', '.join(_OUTPUTS)}")
    if unknown := set(inputs) - {"latents"}:
        raise AtollError(f"callback_on_step_end_tensor_inputs: unknown {min(unknown)!r}; there are only latents")


def _first(
    shape: tuple[int, ...],
    latents: Tensor | None,
    generator: torch.Generator | list[torch.Generator] | None,
    device: torch.device,
) -> Tensor:
    """x at t = 1: what is given, or noise, where there are several generators each row from its own."""
    if latents is not None:
        return _given(latents, shape, device)
    if isinstance(generator, list) and len(generator) != shape[0]:
        raise AtollError(f"{len(generator)} generators for {shape[0]} images; expected one, or one for each")
    for one in generator if isinstance(generator, list) else [generator]:
        if one is not None and not isinstance(one, torch.Generator):
            raise AtollError(f"generator is a {type(one).__name__}; expected a torch.Generator, or a list of them")
    return cast(Tensor, randn_tensor(shape, generator=generator, device=device, dtype=torch.float32))


def _given(latents: Tensor, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Latents of the user's. float32: the integration is, whatever the networks compute in."""
    if not isinstance(latents, Tensor) or tuple(latents.shape) != shape:
        got = list(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
        raise AtollError(f"latents are {got}; expected a tensor {list(shape)}")
    return latents.to(device, torch.float32)


def _replaced(x: Tensor, returned: Any) -> Tensor:
    """x, or the latents that a callback returned in its place."""
    if not isinstance(returned, dict):
        raise AtollError(f"callback_on_step_end returned a {type(returned).__name__}; expected a dictionary")
    return _given(returned.get("latents", x), tuple(x.shape), x.device)
