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
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atoll.diffusers.arguments import OUTPUTS, check_numbers, check_size, guidance, initial
from atoll.diffusers.callback import Callback, StepCallback
from atoll.diffusers.component import AtollEnsemble, check_variant
from atoll.diffusers.options import check_options
from atoll.diffusers.prompts import Prompts, PromptSide, check_texts, encode_prompts, only_encoder
from atoll.diffusers.saved import INDEX, check_saved
from atoll.diffusers.sigmas import flow_sigmas
from atoll.ensemble import Sampler
from atoll.ensemble.prompt_cache import CACHE_BYTES
from atoll.errors import AtollError
from atoll.runtime.libraries import quiet
from atoll.storage.artifact import CARD
from atoll.storage.layout import ENSEMBLE, ENSEMBLE_CARD
from atoll.storage.memory import refuse_out_of_memory

with quiet("diffusers"):
    from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput

_TRUST = ("allow_hub", "trust_paths")
_OPTIONS = ("ensemble", "scheduler", "routing", "alignment", "replicas", "torch_dtype", "dtype", *_TRUST)


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
        # A callback may set these: to end the sampling, and to change the guidance from the next step on.
        self._interrupt, self._guidance_scale = False, ensemble.loaded.sampling.guidance_or(1.0)
        self._num_timesteps = 0
        self._sampled, self._sampler = ensemble, self._new_sampler()  # unknown options raise here

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any) -> "AtollPipeline":
        """Load a pipeline that `save_pretrained` wrote, or create one from an ensemble's or an expert's directory.

        Args:
            pretrained_model_name_or_path: a local directory; download a repository of the hub first.
            options: ensemble, scheduler, routing, alignment, replicas, in place of the saved ones; torch_dtype or
                dtype, allow_hub and trust_paths, as in `AtollEnsemble.from_pretrained`. Other options of diffusers
                (use_safetensors, cache_dir, local_files_only) are accepted where they change nothing.

        Raises:
            AtollError: no such directory, or one of another kind; an unknown option; as `load_ensemble` does.
        """
        # The kind of directory.
        path = Path(pretrained_model_name_or_path)
        check_options(options, _OPTIONS)
        options = {name: value for name, value in options.items() if name in _OPTIONS}
        saved = (path / INDEX).is_file()
        if saved:
            check_saved(path, bool(options.get("trust_paths")))
        elif not (path / ENSEMBLE_CARD).is_file() and not (path / CARD).is_file():
            raise AtollError(
                f"{path}: no {INDEX}, no {ENSEMBLE_CARD} and no {CARD} in it; expected the local directory of a saved "
                "pipeline, an ensemble or an expert"
            )

        # The ensemble, unless it is given.
        trust = {name: options.pop(name) for name in _TRUST if name in options}
        dtypes = {name: options.pop(name, None) for name in ("torch_dtype", "dtype")}
        if "ensemble" not in options:
            # A saved pipeline has the ensemble in a directory of its own.
            options["ensemble"] = AtollEnsemble.from_pretrained(path / ENSEMBLE if saved else path, **dtypes, **trust)
        elif any(one is not None for one in dtypes.values()):
            raise AtollError("an ensemble and a dtype were both given; expected one of them: the ensemble has a dtype")
        # A new pipeline has the default scheduler, with the shift of the ensemble.
        if not saved:
            loaded = options["ensemble"].loaded
            scheduler = FlowMatchEulerDiscreteScheduler(shift=loaded.shift(loaded.sizes.main))
            return cls(**{"scheduler": scheduler, **options})
        # diffusers reads the index and loads the scheduler.
        with quiet("diffusers"):
            try:
                return super().from_pretrained(str(path), **options)
            except AtollError:
                raise
            except Exception as error:  # anything: diffusers does not check an index or a scheduler's config
                refuse_out_of_memory(error, path)
                reason = " ".join(str(error).split())[:200]
                raise AtollError(f"{path}: cannot be loaded ({reason}); save it again with this diffusers") from None

    def save_pretrained(  # type: ignore[override]  # the base class names all options of diffusers' models
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        variant: str | None = None,
        **options: Any,
    ) -> None:
        """Save the pipeline to a directory that needs nothing else.

        Args:
            save_directory: the directory.
            safe_serialization: changes nothing: the files are always safetensors and JSON.
            variant: refused, since an ensemble has one set of weights.
            options: those of diffusers' pipelines, such as push_to_hub; max_shard_size changes nothing: the files are
                copies.

        Raises:
            AtollError: a variant; as `AtollEnsemble.save_pretrained` does.
        """
        check_variant(variant)
        super().save_pretrained(save_directory, safe_serialization, **options)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int | None = 1,
        *,
        height: int | None = None,
        width: int | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = ("latents",),
        guidance_range: tuple[float, float] = (0.0, 1.0),
        block_cache: float = 0.0,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample `num_images_per_prompt` images per prompt: B in total, those of one prompt consecutive.

        Args:
            prompt: one or several; None with prompt_embeds.
            negative_prompt: one, or one per prompt; replaces the null condition.
            num_inference_steps: default: the ensemble's. Numpy numbers and tensors of no dimension are accepted here
                and in the next two.
            guidance_scale: default: the ensemble's.
            num_images_per_prompt: images of each prompt.
            height: of the images in pixels; default: the main size's. There is a warning if no expert was trained for
                the size. The scheduler's own shift holds for every size.
            width: likewise.
            prompt_embeds: the text encoder's states [P, L, D] of P prompts, in place of prompt; L and D are the
                encoder's length and dim. For ensembles with a single text encoder. `encode_prompt` returns these three.
            prompt_attention_mask: [P, L], True at a token. Default for the encoders "hash" and "label": True where the
                states are not all zero; other encoders need it.
            pooled_prompt_embeds: [P, pooled_dim]; needed if the experts or the router read the pooled vector.
            negative_prompt_embeds: [1, L, D] or [P, L, D], in place of negative_prompt.
            negative_prompt_attention_mask: its mask.
            negative_pooled_prompt_embeds: its pooled vectors.
            generator: one, or one per image. With the default scheduler and a generator per image, an image equals, bit
                for bit on a CPU, that of `atoll.Pipeline` by "euler" with the generator's seed.
            latents: x at t = 1 [B, C, H, W], in place of noise.
            output_type: "pil"; "np" [B, h, w, c] or "pt" [B, c, h, w], in [0, 1]; "latent", x at t = 0 [B, C, H, W].
            return_dict: False returns a tuple with the images.
            callback_on_step_end: called with (pipeline, step, timestep, tensors) after each call of the scheduler. The
                tensors that it returns replace those of the next step; so does `pipeline._guidance_scale`, where 0
                ends guidance, as 1 does. If it sets `pipeline._interrupt`, sampling ends with this step.
            callback_on_step_end_tensor_inputs: the names of those tensors: "latents", and, with a single text encoder,
                "prompt_embeds" and "negative_prompt_embeds" [B, L, D]; masks stay those of the call, except for the
                encoders "hash" and "label". A callback of diffusers' own brings its names.
            guidance_range: as in `atoll.Pipeline`.
            block_cache: as in `atoll.Pipeline`.

        Raises:
            AtollError: an argument of another type or number; a scheduler that `flow_sigmas` refuses; as
                `Ensemble.velocity` does.
        """
        # Arguments, completed by the ensemble's defaults and checked before any network runs.
        loaded, device = self.ensemble.loaded, self._execution_device
        numbers = check_numbers(loaded, num_inference_steps, guidance_scale, num_images_per_prompt)
        size = check_size(loaded, height, width)
        if note := loaded.sizes.note(size):
            warnings.warn(note, stacklevel=3)
        if output_type not in OUTPUTS:
            raise AtollError(f"unknown output_type {output_type!r}; expected one of {', '.join(OUTPUTS)}")
        callback = StepCallback.of(
            callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs
        )

        # Conditions by image.
        positive = PromptSide("", prompt, prompt_embeds, prompt_attention_mask, pooled_prompt_embeds)
        negative = PromptSide(
            "negative_",
            negative_prompt,
            negative_prompt_embeds,
            negative_prompt_attention_mask,
            negative_pooled_prompt_embeds,
        )
        prompts = encode_prompts(positive, negative, loaded, images=numbers.images, device=device)
        if not negative.missing and numbers.scale == 1.0 and callback is None:
            raise AtollError("negative_prompt changes nothing at guidance_scale 1; set guidance_scale, or leave it out")
        # Frame 4 is the caller's: torch's decorator of `__call__` is a frame too.
        for kind, side in (("prompt", positive), ("negative prompt", negative)):
            if side.text is not None:
                loaded.encoder.warn_of_truncated(side.texts(), kind, stacklevel=4)

        # Integrate from t = 1 to 0.
        shape = (loaded.latent_shape[0], *size.latent(loaded.codec.factor))
        x = initial((len(prompts.conditions[0]), *shape), latents, generator, device)
        sigmas = flow_sigmas(self.scheduler, numbers.steps, device)
        self._guidance_scale, self._num_timesteps = numbers.scale, len(sigmas)
        velocity = partial(self._velocity, guidance_range=guidance_range, block_cache=block_cache)
        x = self._integrate(velocity, x, sigmas, prompts, generator=generator, callback=callback)
        self.maybe_free_model_hooks()  # type: ignore[no-untyped-call]
        images = self._decode(x, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def encode_prompt(self, prompt: str | Sequence[str]) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return what the call takes in place of P prompts, or of negative prompts.

        Returns:
            prompt_embeds [P, L, D], prompt_attention_mask [P, L] bool, and pooled_prompt_embeds [P, pooled_dim], None
            if the text encoder has none.

        Raises:
            AtollError: no prompt, or an ensemble with several text encoders.
        """
        encoder = only_encoder(self.ensemble.loaded.encoder, "encode_prompt", "prompt")
        texts = check_texts("prompt", prompt)
        self.ensemble.loaded.encoder.warn_of_truncated(texts, "prompt", stacklevel=3)
        condition = encoder(texts).to(self._execution_device)
        return condition.states, condition.mask, condition.pooled

    @property
    def guidance_scale(self) -> float:
        """The guidance scale of the current step, or of the last call's last one."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """The scheduler's steps in the current call, or in the last one: 2 N - 1 for Heun's N steps."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback has ended the sampling."""
        return self._interrupt

    @property
    def _callback_tensor_inputs(self) -> tuple[str, ...]:
        """The tensors that a callback may see and replace."""
        single = len(self.ensemble.loaded.encoder.encoders) == 1
        return ("latents", "prompt_embeds", "negative_prompt_embeds") if single else ("latents",)

    @property
    def dropped(self) -> dict[str, str]:
        """The experts that were dropped while sampling, and why; they stay excluded."""
        return dict(self._current_sampler().dropped)

    def _integrate(
        self,
        velocity: Callable[[Prompts], Callable[[Tensor, Tensor, float], Tensor]],
        x: Tensor,
        sigmas: Tensor,
        prompts: Prompts,
        *,
        generator: torch.Generator | list[torch.Generator] | None,
        callback: StepCallback | None,
    ) -> Tensor:
        """Return x at t = 0 [B, C, H, W] from x at t = 1, by the scheduler's steps at sigmas [N]."""
        # Only stochastic schedulers take a generator.
        extra = {"generator": generator} if "generator" in signature(self.scheduler.step).parameters else {}
        self._interrupt = False
        scale = shown = self._guidance_scale
        at = velocity(prompts)
        with self.progress_bar(total=len(sigmas)) as bar:
            for step, (timestep, sigma) in enumerate(zip(self.scheduler.timesteps, sigmas, strict=True)):
                # t = sigma on this path; the timestep is the scheduler's own.
                u = at(x, sigma.expand(len(x)), scale)
                x = self.scheduler.step(u, timestep, x, **extra, return_dict=False)[0]
                # A callback may change x, the prompts and the guidance from the next step on.
                if callback is not None:
                    x, changed = callback(self, step, timestep, x, prompts)
                    if changed is not prompts:
                        prompts, at = changed, velocity(changed)
                    if self._guidance_scale != shown:
                        shown = guidance("_guidance_scale", self._guidance_scale)
                        scale = shown or 1.0  # diffusers' callbacks set 0 to end guidance
                bar.update()
                if self._interrupt:
                    break
        return x

    def _velocity(
        self, prompts: Prompts, guidance_range: tuple[float, float], block_cache: float
    ) -> Callable[[Tensor, Tensor, float], Tensor]:
        """Return (x [B, C, H, W], t [B], guidance scale) -> velocity; it reads each prompt once."""
        # Groups of layers are moved at their `forward`, which reading a prompt ahead of it would bypass.
        limit = 0 if self.ensemble.group_offloaded else CACHE_BYTES
        if block_cache and not limit:
            raise AtollError("block_cache and group offloading exclude each other; leave block_cache at 0")
        sampler = self._current_sampler()
        caches = prompts.caches(sampler.ensemble, block_cache, limit)

        def velocity(x: Tensor, t: Tensor, scale: float) -> Tensor:
            u = torch.empty_like(x)
            # The module call runs the hooks of diffusers.
            for rows, cache in caches:
                u[rows] = self.ensemble(sampler, x[rows], t[rows], cache, scale, guidance_range=guidance_range)
            return u

        return velocity

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
