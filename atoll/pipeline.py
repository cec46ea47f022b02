"""Prompts -> images, with the manners of a diffusers pipeline."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from atoll.choices import Method
from atoll.condition import move_to
from atoll.ensemble import Alignment, Sampler, Trace
from atoll.ensemble.compiled import compile_blocks, compile_network
from atoll.ensemble.loading import LoadedEnsemble, load_ensemble
from atoll.ensemble.offload import WeightDtype
from atoll.errors import AtollError
from atoll.randomness import seeded_noise
from atoll.report.page import colour, document, table, weight_strip
from atoll.solver import sample
from atoll.storage.artifact import write_bytes, write_json

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class PipelineOutput:
    """images: PIL images, one per prompt; latents [B, C, H, W]; traces: who was asked when, one per batch; dropped:
    experts that failed in use, and how."""

    images: list["Image"]
    latents: Tensor
    traces: list[Trace]
    dropped: dict[str, str]


class Pipeline:
    """An ensemble with its text encoder and codec.

    pipe = atoll.Pipeline.from_pretrained("runs/demo/ensemble")
    pipe("latin capital letter a, serif bold", seeds=[0]).images[0].save("a.png")
    """

    def __init__(self, loaded: LoadedEnsemble, device: str | torch.device = "cpu"):
        self.loaded = loaded
        self.device = torch.device(device)
        self.sampler = Sampler(loaded.ensemble)  # an expert that fails in one call is left out of the next

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        routing: str | None = None,
        alignment: Alignment = "snr",
        strict: bool = False,
        device: str | torch.device | None = None,
        replicas: str | None = None,
        memory_budget: str | int | None = None,
        weights: WeightDtype | None = None,
    ) -> "Pipeline":
        """Loads an ensemble's directory, or one expert's. Raises AtollError as `load_ensemble` does."""
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        loaded = load_ensemble(path, routing, alignment, strict, device, replicas, memory_budget, weights)
        return cls(loaded, device)

    def compile(self, **options: Any) -> "Pipeline":
        """Compiles experts and router by torch.compile, and returns itself; the first images then take a minute or
        more, the others less time. Images differ by rounding alone.

        Args:
            options: torch.compile's own: backend, mode.

        Raises:
            AtollError: experts within a memory budget.
        """
        ensemble = self.loaded.ensemble
        experts = [replace(expert, network=compile_network(expert.network, **options)) for expert in ensemble.experts]
        if isinstance(ensemble.router, torch.nn.Module):  # its batches are whole ones: nothing to fill up
            compile_blocks(ensemble.router, **options)
        self.loaded = replace(self.loaded, ensemble=replace(ensemble, experts=experts))
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
        method: Method | None = None,
        routing: str | None = None,
        clusters: Sequence[int] | None = None,
        guidance_range: tuple[float, float] = (0.0, 1.0),
        batch_size: int = 64,
        callback: Callable[[int, int], Any] | None = None,
        block_cache: float = 0.0,
    ) -> PipelineOutput:
        """Draws one image per prompt.

        Args:
            prompts: one or several.
            num_inference_steps, guidance_scale, method, routing: the ensemble's own defaults where None.
            generator: draws the seeds; not together with seeds.
            seeds: one per prompt. An image depends on its prompt and its seed alone, not on its batch.
            clusters: one per prompt, for routing "oracle".
            guidance_range: the times (0 data, 1 noise) between which there is guidance.
            batch_size: images sampled at a time.
            callback: called with (steps done, steps in all) over all batches.
            block_cache: the threshold of first-block caching, of 0.05 to 0.3: faster, and not the same images
                (docs/fusion.md has what it costs); 0: none.

        Raises:
            AtollError: no prompts, seeds or clusters of another number than prompts, steps < 1, an unknown method or
                routing.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise AtollError("no prompts; expected at least one")
        seeds = self._seeds(len(prompts), generator, seeds)
        if clusters is not None and len(clusters) != len(prompts):
            raise AtollError(f"{len(clusters)} clusters for {len(prompts)} prompts; expected one cluster per prompt")
        self._warn_of_unread(prompts)
        defaults = self.loaded.sampling
        steps = defaults.steps_or(50) if num_inference_steps is None else num_inference_steps
        scale = defaults.guidance_or(1.0) if guidance_scale is None else guidance_scale
        method = method or cast(Method, defaults.method or "euler")
        sampler = self.sampler
        if routing is not None:
            sampler = Sampler(replace(self.loaded.ensemble, routing=routing))

        latents, traces = [], []
        batches = range(0, len(prompts), batch_size)
        for number, start in enumerate(batches):
            rows = slice(start, start + batch_size)
            conditions = move_to(self.loaded.encoder(prompts[rows]), self.device)
            velocity = partial(
                sampler.velocity,
                prompt_cache=sampler.ensemble.prompt_cache(conditions, block_cache=block_cache),
                guidance_scale=scale,
                cluster=None if clusters is None else torch.tensor(clusters[rows], device=self.device),
                guidance_range=guidance_range,
            )

            def tell(index: int, _: Tensor, number: int = number) -> None:
                if callback is not None:
                    callback(number * steps + index + 1, len(batches) * steps)

            with sampler.tracing() as trace:
                latents.append(sample(velocity, self.noise(seeds[rows]), steps, method, callback=tell))
            traces.append(trace)
        drawn = torch.cat(latents)
        return PipelineOutput(to_pil(self.loaded.codec.decode(drawn)), drawn, traces, dict(sampler.dropped))

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """x at t = 1, [B, C, H, W] float32: each row from its own seed, drawn on the CPU, equal on every device."""
        return seeded_noise(seeds, self.loaded.latent_shape).to(self.device)

    def _warn_of_unread(self, prompts: Sequence[str]) -> None:
        """Warns of words at a prompt's end that the text encoder leaves out, at the caller's line (torch's decorator of
        `__call__` is a frame too)."""
        for prompt in dict.fromkeys(prompts):
            if rest := self.loaded.encoder.truncated_text(prompt):
                warnings.warn(f"the prompt {_short(prompt)!r} is too long: not read is {_short(rest)!r}", stacklevel=4)

    @staticmethod
    def _seeds(count: int, generator: torch.Generator | None, seeds: Sequence[int] | None) -> list[int]:
        if seeds is None:
            return torch.randint(2**31, (count,), generator=generator).tolist()
        if generator is not None:
            raise AtollError("generator and seeds were both given; expected one of them")
        if len(seeds) != count:
            raise AtollError(f"{len(seeds)} seeds for {count} prompts; expected one seed per prompt")
        return list(seeds)


def _short(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:60]} ... {text[-50:]}"


def to_pil(images: Tensor) -> list["Image"]:
    """[B, 1 or 3, h, w] in [0, 1] -> grey or RGB images of 8 bits."""
    from PIL import Image

    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p) for p in pixels]


def grid(images: Sequence["Image"], columns: int | None = None, min_side: int = 128) -> "Image":
    """The images on one sheet of white paper, enlarged without smoothing until a side has `min_side` pixels."""
    from PIL import Image

    width, height = images[0].size
    factor = max(1, -(-min_side // max(width, height)))
    columns = columns or min(len(images), max(1, round(len(images) ** 0.5 + 0.49)))
    gap = 8 if len(images) > 1 else 0
    cell = (width * factor + gap, height * factor + gap)
    rows = -(-len(images) // columns)
    sheet = Image.new(images[0].mode, (columns * cell[0] - gap, rows * cell[1] - gap), "white")
    for index, image in enumerate(images):
        enlarged = image.resize((width * factor, height * factor), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (index % columns * cell[0], index // columns * cell[1]))
    return sheet


def sample_to_file(
    ensemble: Path,
    prompts: Sequence[str],
    out: Path,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    routing: str | None = None,
    method: Method | None = None,
    alignment: Alignment = "snr",
    strict: bool = False,
    side: int = 128,
    replicas: str | None = None,
    trace: Path | None = None,
    progress: Callable[[int, int], Any] | None = None,
    memory_budget: str | None = None,
    weights: WeightDtype | None = None,
) -> dict[str, str]:
    """Draws one image per prompt and writes them as one sheet; returns the experts that failed in use, and how.

    trace: a JSON file to write of who was asked when; a page that shows it is written beside it.

    Raises:
        AtollError: as `Pipeline` does, or `out` is of no image format or cannot be written.
    """
    from PIL import Image

    Image.init()
    if out.suffix.lower() not in Image.EXTENSION:
        raise AtollError(f"{out}: no image format is known by {out.suffix!r}; expected .png, .jpg or .webp")
    if not out.parent.is_dir():
        raise AtollError(f"{out.parent}: no such directory; make it first")
    if trace is not None and (trace.suffix != ".json" or not trace.parent.is_dir()):
        raise AtollError(f"{trace}: expected a file that ends in .json, in a directory that exists")
    pipe = Pipeline.from_pretrained(
        ensemble, routing, alignment, strict, replicas=replicas, memory_budget=memory_budget, weights=weights
    )
    drawn = pipe(
        prompts,
        num_inference_steps=steps,
        guidance_scale=guidance,
        seeds=range(seed, seed + len(prompts)),
        method=method,
        callback=progress,
    )
    try:
        grid(drawn.images, min_side=side).save(out)
    except OSError as error:
        raise AtollError(f"{out}: cannot be written ({error})") from None
    if trace is not None:
        write_trace(trace, prompts, [expert.name for expert in pipe.loaded.ensemble.experts], drawn.traces)
    return drawn.dropped


def write_trace(file: Path, prompts: Sequence[str], names: Sequence[str], traces: Sequence[Trace]) -> None:
    """Who was asked when: {"experts": names, "prompts": [{"prompt", "t": [T], "weights": [T, E]}]}, and as a page."""
    rows = []
    for trace in traces:
        times, weights = torch.stack(trace.times, 1), torch.stack(trace.weights, 1)  # [b, T], [b, T, E]
        for t, weight in zip(times.tolist(), weights.tolist(), strict=True):
            rows.append((t, weight))
    told = [
        {"prompt": prompt, "t": [round(v, 6) for v in t], "weights": [[round(w, 6) for w in step] for step in weight]}
        for prompt, (t, weight) in zip(prompts, rows, strict=True)
    ]
    write_json(file, {"experts": list(names), "prompts": told})
    key = " ".join(
        f'<span style="white-space:nowrap"><span style="background:{colour(i)}">&emsp;</span> {escape(name)}</span>'
        for i, name in enumerate(names)
    )
    lines = "".join(
        f"<tr><th scope=row>{escape(prompt)}</th><td>{weight_strip(torch.tensor(weight), prompt)}</td></tr>"
        for prompt, (_, weight) in zip(prompts, rows, strict=True)
    )
    lead = (
        f"<p>One column per step ({len(rows[0][0])}, from noise at the left, t = 1, to the image at the right, "
        f"t = 0); the height of a colour is the expert's weight.</p><p>{key}</p>"
    )
    strips = table("", lines, "Weights of the experts by step", "usage")
    page = document("Who was asked when", lead, [("Prompts", strips)])
    write_bytes(file.with_suffix(".html"), page.encode())
