"""Prompts to images, with the interface of a diffusers pipeline."""

import io
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
from atoll.encoders.trust import Trust
from atoll.ensemble import Alignment, Sampler, Trace
from atoll.ensemble.compiled import compile_blocks, compile_network
from atoll.ensemble.loading import Fetch, LoadedEnsemble, load_ensemble
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
    """What a pipeline returns for B prompts.

    Attributes:
        images: PIL images, one per prompt.
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
        experts = [replace(expert, network=compile_network(expert.network, **options)) for expert in ensemble.experts]
        if isinstance(ensemble.router, torch.nn.Module):  # it always sees the whole batch: no padding
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
        *,
        method: Method | None = None,
        routing: str | None = None,
        clusters: Sequence[int] | None = None,
        guidance_range: tuple[float, float] = (0.0, 1.0),
        batch_size: int = 64,
        callback: Callable[[int, int], Any] | None = None,
        block_cache: float = 0.0,
    ) -> PipelineOutput:
        """Sample one image per prompt.

        Args:
            prompts: one or several.
            num_inference_steps: default: the ensemble's.
            guidance_scale: default: the ensemble's.
            generator: draws the seeds; not together with `seeds`.
            seeds: one per prompt. An image depends on its prompt and its seed only, not on its batch.
            method: "euler", "heun", "midpoint" or "dpm++2m"; default: the ensemble's.
            routing: default: the ensemble's.
            clusters: one per prompt, for routing "oracle".
            guidance_range: the times (0 data, 1 noise) between which there is guidance.
            batch_size: images sampled at a time.
            callback: called with (steps done, total steps) over all batches.
            block_cache: the threshold of first-block caching, 0.05 to 0.3: faster, but other images (docs/fusion.md
                says how much other); 0: none.

        Raises:
            AtollError: no prompts, another number of seeds or clusters than prompts, steps < 1, an unknown method or
                routing.
        """
        # Arguments, completed by the ensemble's defaults.
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise AtollError("no prompts; expected at least one")
        seeds = self._seeds(len(prompts), generator, seeds)
        if clusters is not None and len(clusters) != len(prompts):
            raise AtollError(f"{len(clusters)} clusters for {len(prompts)} prompts; expected one cluster per prompt")
        # Frame 4 is the caller's: torch's decorator of `__call__` is a frame too.
        self.loaded.encoder.warn_of_truncated(prompts, "prompt", stacklevel=4)
        defaults = self.loaded.sampling
        steps = defaults.steps_or(50) if num_inference_steps is None else num_inference_steps
        scale = defaults.guidance_or(1.0) if guidance_scale is None else guidance_scale
        method = method or cast(Method, defaults.method or "euler")
        sampler = self.sampler
        if routing is not None:
            sampler = Sampler(replace(self.loaded.ensemble, routing=routing))

        # Latents and routing traces, batch by batch.
        latents, traces = [], []
        batches = range(0, len(prompts), batch_size)
        for number, start in enumerate(batches):
            rows = slice(start, start + batch_size)
            # Each batch has its own prompts, and its own cache of them.
            conditions = move_to(self.loaded.encoder(prompts[rows]), self.device)
            velocity = partial(
                sampler.velocity,
                prompt_cache=sampler.ensemble.prompt_cache(conditions, block_cache=block_cache),
                guidance_scale=scale,
                cluster=None if clusters is None else torch.tensor(clusters[rows], device=self.device),
                guidance_range=guidance_range,
            )

            def report(index: int, _: Tensor, number: int = number) -> None:
                if callback is not None:
                    callback(number * steps + index + 1, len(batches) * steps)

            with sampler.tracing() as trace:
                latents.append(sample(velocity, self.noise(seeds[rows]), steps, method, callback=report))
            traces.append(trace)
        x0 = torch.cat(latents)
        return PipelineOutput(to_pil(self.loaded.codec.decode(x0)), x0, traces, dict(sampler.dropped))

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """Return x at t = 1, [B, C, H, W] float32: one seed per row, sampled on the CPU, so equal on every device."""
        return seeded_noise(seeds, self.loaded.latent_shape).to(self.device)

    @staticmethod
    def _seeds(count: int, generator: torch.Generator | None, seeds: Sequence[int] | None) -> list[int]:
        """Return one seed per prompt: the given ones, or random ones."""
        # An image depends on its seed only, so a generator draws seeds and not noise.
        if seeds is None:
            return torch.randint(2**31, (count,), generator=generator).tolist()
        if generator is not None:
            raise AtollError("generator and seeds were both given; expected one of them")
        if len(seeds) != count:
            raise AtollError(f"{len(seeds)} seeds for {count} prompts; expected one seed per prompt")
        return list(seeds)


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


def sample_to_file(
    ensemble: Path,
    prompts: Sequence[str],
    out: Path,
    *,
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
    allow_hub: bool = False,
    trust_paths: bool = False,
    fetch: Fetch | None = None,
) -> dict[str, str]:
    """Sample one image per prompt and write them as one sheet.

    Args:
        ensemble: a directory for `Pipeline.from_pretrained`.
        prompts: at least one.
        out: the image file to write.
        seed: of the first image; the next ones count up.
        steps: default: the ensemble's, like guidance, routing, method and replicas.
        guidance: the guidance scale.
        routing: as in `Pipeline.from_pretrained`.
        method: as in `Pipeline`.
        alignment, strict: as in `Pipeline.from_pretrained`.
        side: pixels of an image's longer side, at least.
        replicas: as in `Pipeline.from_pretrained`.
        trace: a JSON file for the routing trace; a page that shows it is written beside it.
        progress: called with (steps done, total steps).
        memory_budget, weights, allow_hub, trust_paths, fetch: as in `Pipeline.from_pretrained`.

    Returns:
        The experts that were dropped while sampling, and why.

    Raises:
        AtollError: as `Pipeline` does; `out` has no image format or cannot be written.
    """
    from PIL import Image

    # Refuse what cannot be written before anything is computed.
    Image.init()
    if (image_format := Image.EXTENSION.get(out.suffix.lower())) not in Image.SAVE:  # it reads more than it writes
        raise AtollError(f"{out}: no image format is known by {out.suffix!r}; expected .png, .jpg or .webp")
    if not out.parent.is_dir():
        raise AtollError(f"{out.parent}: no such directory; create it first")
    if trace is not None and (trace.suffix != ".json" or not trace.parent.is_dir()):
        raise AtollError(f"{trace}: expected a file that ends in .json, in a directory that exists")
    pipe = Pipeline.from_pretrained(
        ensemble,
        routing,
        alignment,
        strict,
        replicas=replicas,
        memory_budget=memory_budget,
        weights=weights,
        allow_hub=allow_hub,
        trust_paths=trust_paths,
        fetch=fetch,
    )
    output = pipe(
        prompts,
        num_inference_steps=steps,
        guidance_scale=guidance,
        seeds=range(seed, seed + len(prompts)),
        method=method,
        callback=progress,
    )
    # Write the sheet, atomically, and the trace.
    encoded = io.BytesIO()
    try:
        grid(output.images, min_side=side).save(encoded, image_format)
    except (OSError, ValueError) as error:  # a format that lacks the mode, or limits the size
        raise AtollError(f"{out}: cannot be written as {image_format} ({error}); name a .png file") from None
    write_bytes(out, encoded.getvalue())
    if trace is not None:
        write_trace(trace, prompts, [expert.name for expert in pipe.loaded.ensemble.experts], output.traces)
    return output.dropped


def write_trace(file: Path, prompts: Sequence[str], names: Sequence[str], traces: Sequence[Trace]) -> None:
    """Write routing traces as JSON, and as a page beside it.

    The JSON is {"experts": names, "prompts": [{"prompt", "t": [T], "weights": [T, E]}]}.

    Args:
        file: the JSON file.
        prompts: B prompts.
        names: the experts' names, E of them.
        traces: one per batch.
    """
    # Times and weights by prompt.
    rows = []
    for trace in traces:
        times, weights = torch.stack(trace.times, 1), torch.stack(trace.weights, 1)  # [b, T], [b, T, E]
        # A batch's trace has the steps first; a page has the prompts first.
        for t, weight in zip(times.tolist(), weights.tolist(), strict=True):
            rows.append((t, weight))
    entries = [
        {"prompt": prompt, "t": [round(v, 6) for v in t], "weights": [[round(w, 6) for w in step] for step in weight]}
        for prompt, (t, weight) in zip(prompts, rows, strict=True)
    ]
    write_json(file, {"experts": list(names), "prompts": entries})
    # The page: one strip of colours per prompt.
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
    page = document("Routing trace", lead, [("Prompts", strips)])
    write_bytes(file.with_suffix(".html"), page.encode())
