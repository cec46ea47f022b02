"""Prompts to images, with the interface of a diffusers pipeline."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from atoll.choices import Method
from atoll.condition import move_to
from atoll.encoders.trust import Trust
from atoll.ensemble import Alignment, Ensemble, Expert, Sampler, Trace
from atoll.ensemble.compiled import compile_blocks, compile_network
from atoll.ensemble.loading import Fetch, LoadedEnsemble, load_ensemble
from atoll.ensemble.offload import WeightDtype, expert_cache_of
from atoll.ensemble.prompt_cache import PromptCache
from atoll.errors import AtollError
from atoll.image_size import ImageSize
from atoll.randomness import seeded_noise
from atoll.solver import sample, shifted_times
from atoll.time_shift import check_shift

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class PipelineOutput:
    """The B images of a call, those of one prompt consecutive.

    Attributes:
        images: PIL images.
        latents: x at t = 0 [B, C, H, W].
        traces: the routing trace of each batch.
        dropped: the experts that were dropped while sampling, and why.
    """

    images: list["Image"]
    latents: Tensor
    traces: list[Trace]
    dropped: dict[str, str]


class Pipeline:
    """An ensemble with its text encoder and codec.

        pipe = atoll.Pipeline.from_pretrained("runs/demo/ensemble")
        pipe("latin capital letter a, serif bold", seeds=[0]).images[0].save("a.png")

    Args:
        loaded: from `load_ensemble`.
        device: where it was loaded.

    Attributes:
        loaded: the ensemble, its text encoder and its codec.
        device: where experts and router are evaluated.
        sampler: what evaluates the ensemble; an expert that is dropped in one call stays excluded in the next.
    """

    def __init__(self, loaded: LoadedEnsemble, device: str | torch.device = "cpu"):
        self.loaded = loaded
        self.device = torch.device(device)
        self.sampler = Sampler(loaded.ensemble)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        routing: str | None = None,
        alignment: Alignment = "snr",
        strict: bool = False,
        device: str | torch.device | None = None,
        *,
        replicas: str | None = None,
        memory_budget: str | int | None = None,
        weights: WeightDtype | None = None,
        allow_hub: bool = False,
        trust_paths: bool = False,
        fetch: Fetch | None = None,
        weak: str | Path | None = None,
    ) -> "Pipeline":
        """Load an ensemble's directory, or an expert's; arguments and errors as in `load_ensemble`.

        Args:
            path: the directory.
            routing: in place of the ensemble's default.
            alignment: "snr" (exact) or "native" (HDDM's formulas).
            strict: whether a missing expert is an error.
            device: default: a GPU if there is one.
            replicas: in place of the ensemble's default.
            memory_budget: "16GB", or bytes.
            weights: fp32, bf16, fp16 or int8; None: as stored.
            allow_hub, trust_paths: what cards may reach.
            fetch: downloads an expert's weights when they are first needed.
            weak: the directory of a weaker ensemble of the same clusters, or of one expert of all clusters: guidance
                then leads away from it in place of the null condition (`atoll.ensemble.weak`). Loaded with the same
                options, and within the same memory budget.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        loaded = load_ensemble(
            path,
            routing,
            alignment,
            strict,
            device,
            replicas=replicas,
            memory_budget=memory_budget,
            weights=weights,
            trust=Trust(hub=allow_hub, paths=trust_paths),
            fetch=fetch,
        )
        if weak is not None:
            # One budget for both; a missing expert would leave its cluster without guidance.
            networks = [expert.network for expert in loaded.ensemble.experts]
            other = load_ensemble(
                weak,
                alignment=alignment,
                strict=True,
                device=device,
                replicas=replicas,
                memory_budget=None if memory_budget is None else expert_cache_of(networks),
                weights=weights,
                trust=Trust(hub=allow_hub, paths=trust_paths),
            )
            loaded = loaded.with_weak(other, Path(weak))
        return cls(loaded, device)

    def compile(self, **options: Any) -> "Pipeline":
        """Compile experts and router by torch.compile, and return the pipeline.

        The first images then take a minute or more, later ones less time. Images differ only by rounding.

        Args:
            options: for torch.compile: backend, mode.

        Raises:
            AtollError: experts within a memory budget.
        """
        # The ensemble is immutable: compiled networks make a new one, with a new sampler.
        ensemble = self.loaded.ensemble

        # Each network is compiled by itself; experts of one architecture share their graphs.
        def compiled(one: Ensemble) -> list[Expert]:
            return [replace(expert, network=compile_network(expert.network, **options)) for expert in one.experts]

        if isinstance(ensemble.router, torch.nn.Module):  # it always sees the whole batch: no padding
            compile_blocks(ensemble.router, **options)
        weak = None if ensemble.weak is None else replace(ensemble.weak, experts=compiled(ensemble.weak))
        self.loaded = replace(self.loaded, ensemble=replace(ensemble, experts=compiled(ensemble), weak=weak))
        self.sampler = Sampler(self.loaded.ensemble)
        return self

    @torch.inference_mode()
    def __call__(
        self,
        prompts: str | Sequence[str],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | None = None,
        seeds: Sequence[int] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        images_per_prompt: int | Sequence[int] = 1,
        method: Method | None = None,
        routing: str | None = None,
        clusters: Sequence[int] | None = None,
        guidance_range: tuple[float, float] = (0.0, 1.0),
        batch_size: int = 64,
        callback: Callable[[int, int], Any] | None = None,
        block_cache: float = 0.0,
        height: int | None = None,
        width: int | None = None,
        shift: float | None = None,
    ) -> PipelineOutput:
        """Sample images of each prompt: all images of the first one, then all of the second one, and so on.

        Args:
            prompts: one or several.
            num_inference_steps: default: the ensemble's.
            guidance_scale: default: the ensemble's. With a weak ensemble, away from it.
            generator: draws the seeds; not together with `seeds`.
            seeds: one per image; or one per prompt, from which the seeds of its images count up. An image depends on
                its prompts and its seed only, not on its batch.
            negative_prompt: what guidance leads away from, in place of the empty prompt: one for all, or one per
                prompt. Needs a guidance scale other than 1, and no weak ensemble.
            images_per_prompt: one number for all, or one per prompt.
            method: "euler", "heun", "midpoint", "dpm++2m" or "unipc"; default: the ensemble's.
            routing: default: the ensemble's.
            clusters: one per prompt, for routing "oracle".
            guidance_range: the times (0 data, 1 noise) between which there is guidance.
            batch_size: images sampled at a time.
            callback: called with (steps done, total steps) over all batches.
            block_cache: the threshold of first-block caching, 0.05 to 0.3: faster, but other images (docs/fusion.md
                says how much other); 0: none.
            height, width: of the images in pixels; default: the main size's. Sides are multiples of the codec's factor
                times the networks' patches. There is a warning if no expert was trained for the size.
            shift: of the solver's times towards noise (`atoll.time_shift`); 1: even times. Default: the ensemble's, or
                what its experts were trained with.

        Raises:
            AtollError: no prompts; another number of seeds than images or prompts; another number of clusters,
                negative prompts or image counts than prompts; a negative prompt without guidance; steps < 1; an unknown
                method or routing; a size that the networks do not take; a shift out of bounds.
        """
        # Arguments, completed by the ensemble's defaults.
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise AtollError("no prompts; expected at least one")
        counts = _image_counts(len(prompts), images_per_prompt)
        owners = [prompt for prompt, count in enumerate(counts) for _ in range(count)]  # the prompt of each image
        seeds = _seeds(counts, generator, seeds)
        if clusters is not None and len(clusters) != len(prompts):
            raise AtollError(f"{len(clusters)} clusters for {len(prompts)} prompts; expected one cluster per prompt")
        defaults = self.loaded.sampling
        steps = defaults.steps_or(50) if num_inference_steps is None else num_inference_steps
        scale = defaults.guidance_or(1.0) if guidance_scale is None else guidance_scale
        method = method or cast(Method, defaults.method or "euler")
        negatives = _negatives(len(prompts), negative_prompt, scale)
        if negatives is not None and self.loaded.ensemble.weak is not None:
            raise AtollError("negative_prompt has no effect with a weak ensemble, which takes its place; leave one out")
        size = self.loaded.sizes.choose(height, width)
        times = shifted_times(steps, self.loaded.shift(size) if shift is None else check_shift(shift))
        if note := self.loaded.sizes.note(size):
            warnings.warn(note, stacklevel=3)
        # Frame 4 is the caller's: torch's decorator of `__call__` is a frame too.
        self.loaded.encoder.warn_of_truncated(prompts, "prompt", stacklevel=4)
        self.loaded.encoder.warn_of_truncated(negatives or [], "negative prompt", stacklevel=4)
        sampler = self.sampler
        if routing is not None:
            sampler = Sampler(replace(self.loaded.ensemble, routing=routing))

        # Latents and routing traces, batch by batch.
        latents, traces = [], []
        batches = range(0, len(owners), batch_size)
        for number, start in enumerate(batches):
            # Each batch has its own prompts, and its own cache of them.
            rows = owners[start : start + batch_size]
            cluster = None if clusters is None else torch.tensor([clusters[row] for row in rows], device=self.device)
            velocity = partial(
                sampler.velocity,
                prompt_cache=self._prompt_cache(sampler.ensemble, prompts, negatives, rows, block_cache),
                guidance_scale=scale,
                cluster=cluster,
                guidance_range=guidance_range,
            )

            def report(index: int, _: Tensor, number: int = number) -> None:
                if callback is not None:
                    callback(number * steps + index + 1, len(batches) * steps)

            with sampler.tracing() as trace:
                noise = self.noise(seeds[start : start + batch_size], size)
                latents.append(sample(velocity, noise, steps, method, times=times, callback=report))
            traces.append(trace)
        x0 = torch.cat(latents)
        return PipelineOutput(to_pil(self.loaded.codec.decode(x0)), x0, traces, dict(sampler.dropped))

    def noise(self, seeds: Sequence[int], size: ImageSize | None = None) -> Tensor:
        """Return x at t = 1, [B, C, H, W] float32: one seed per row, sampled on the CPU, so equal on every device.

        Args:
            seeds: one per row.
            size: of the images; None: the main one.
        """
        size = self.loaded.sizes.main if size is None else size
        shape = (self.loaded.latent_shape[0], *size.latent(self.loaded.codec.factor))
        return seeded_noise(seeds, shape).to(self.device)

    def _prompt_cache(
        self,
        ensemble: Ensemble,
        prompts: Sequence[str],
        negatives: Sequence[str] | None,
        rows: Sequence[int],
        block_cache: float,
    ) -> PromptCache:
        """Return the cache of one batch, in which each prompt and each negative prompt is one row.

        Args:
            ensemble: what is sampled.
            prompts: P prompts.
            negatives: one per prompt; None: the ensemble's own null condition.
            rows: the prompt of each image in the batch [b].
            block_cache: as in `PromptCache`.
        """
        # Images of one prompt share its row; equal prompts by different numbers do not.
        used = list(dict.fromkeys(rows))
        conditions = move_to(self.loaded.encoder([prompts[row] for row in used]), self.device)
        prompt_of = [used.index(row) for row in rows]
        if negatives is None:
            return ensemble.prompt_cache(conditions, block_cache=block_cache, prompt_of=prompt_of)
        # Equal negative prompts share a row.
        texts = list(dict.fromkeys(negatives[row] for row in used))
        null = move_to(self.loaded.encoder(texts), self.device)
        null_of = [texts.index(negatives[row]) for row in rows]
        return ensemble.prompt_cache(conditions, null, block_cache=block_cache, prompt_of=prompt_of, null_of=null_of)


def _image_counts(prompts: int, images: int | Sequence[int]) -> list[int]:
    """Return the number of images of each prompt."""
    # One number for all prompts, or one for each.
    counts = list(images) if isinstance(images, Sequence) else [images] * prompts
    if len(counts) != prompts or not all(type(n) is int and n >= 1 for n in counts):
        raise AtollError(
            f"images_per_prompt is {images!r:.60} for {prompts} prompts; expected a number from 1, or one per prompt"
        )
    return counts


def _negatives(count: int, negative: str | Sequence[str] | None, scale: float) -> list[str] | None:
    """Return one negative prompt per prompt; None without any."""
    if negative is None:
        return None
    # Without guidance, only the prompts are evaluated.
    if scale == 1.0:
        raise AtollError("negative_prompt changes nothing at guidance_scale 1; set guidance_scale, or leave it out")
    # One for all, or one per prompt.
    texts = [negative] * count if isinstance(negative, str) else list(negative)
    if not all(isinstance(text, str) for text in texts):
        raise AtollError(f"negative_prompt is {negative!r:.60}; expected a string, or a list of them")
    if len(texts) != count:
        raise AtollError(f"{len(texts)} negative prompts for {count} prompts; expected one, or one for each")
    return texts


def _seeds(counts: Sequence[int], generator: torch.Generator | None, seeds: Sequence[int] | None) -> list[int]:
    """Return one seed per image: the given ones, those that count up from each prompt's, or random ones.

    Args:
        counts: the number of images of each prompt.
        generator: draws the seeds.
        seeds: one per image, or one per prompt.
    """
    # An image depends on its seed only, so a generator draws seeds and not noise.
    prompts, images = len(counts), sum(counts)
    if seeds is None:
        return torch.randint(2**31, (images,), generator=generator).tolist()
    if generator is not None:
        raise AtollError("generator and seeds were both given; expected one of them")
    if len(seeds) == images:
        return list(seeds)
    if len(seeds) != prompts:
        expected = "one seed per prompt" + (f", or one for each of {images} images" if images > prompts else "")
        raise AtollError(f"{len(seeds)} seeds for {prompts} prompts; expected {expected}")
    # The images of a prompt count up from its seed.
    return [seed + number for seed, count in zip(seeds, counts, strict=True) for number in range(count)]


def to_pil(images: Tensor) -> list["Image"]:
    """Convert images [B, 1 or 3, h, w] in [0, 1] to grey or RGB PIL images with 8 bits."""
    # PIL is imported here: latents alone need no image library.
    from PIL import Image

    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p) for p in pixels]


def grid(images: Sequence["Image"], columns: int | None = None, min_side: int = 128) -> "Image":
    """Arrange images on one white sheet.

    Args:
        images: of one size.
        columns: default: about as many as rows.
        min_side: pixels of an image's longer side; smaller images are enlarged without smoothing.
    """
    from PIL import Image

    width, height = images[0].size
    # Small images are enlarged, large ones stay as they are.
    factor = max(1, -(-min_side // max(width, height)))
    # The sheet: cells of one image and a gap each.
    columns = columns or min(len(images), max(1, round(len(images) ** 0.5 + 0.49)))
    gap = 8 if len(images) > 1 else 0
    cell = (width * factor + gap, height * factor + gap)
    rows = -(-len(images) // columns)
    sheet = Image.new(images[0].mode, (columns * cell[0] - gap, rows * cell[1] - gap), "white")
    # Enlarge by whole factors, so that pixels stay squares.
    for index, image in enumerate(images):
        enlarged = image.resize((width * factor, height * factor), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (index % columns * cell[0], index // columns * cell[1]))
    return sheet
