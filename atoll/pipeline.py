"""Prompts -> images, with the manners of a diffusers pipeline."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from atoll.ensemble import Alignment, Trace
from atoll.errors import AtollError
from atoll.loading import LoadedEnsemble, load_ensemble
from atoll.solver import Method, sample

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Output:
    """images: PIL images, one per prompt; latents [B, C, H, W]; trace: who was asked when, one per batch."""

    images: list["Image"]
    latents: Tensor
    traces: list[Trace]


class Pipeline:
    """An ensemble with its text encoder and codec.

    pipe = atoll.Pipeline.from_pretrained("runs/demo/ensemble")
    pipe("latin capital letter a, serif bold", seeds=[0]).images[0].save("a.png")
    """

    def __init__(self, loaded: LoadedEnsemble, device: str | torch.device = "cpu"):
        self.loaded = loaded
        self.device = torch.device(device)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        routing: str | None = None,
        alignment: Alignment = "snr",
        strict: bool = False,
        device: str | torch.device | None = None,
    ) -> "Pipeline":
        """Loads an ensemble's directory, or one expert's. Raises AtollError as `load_ensemble` does."""
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return cls(load_ensemble(path, routing, alignment, strict, device), device)

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
        batch_size: int = 64,
        callback: Callable[[int, int], Any] | None = None,
    ) -> Output:
        """Draws one picture per prompt.

        Args:
            prompts: one or several.
            num_inference_steps, guidance_scale, method, routing: the ensemble's own defaults where None.
            generator: draws the seeds; not together with seeds.
            seeds: one per prompt. A picture depends on its prompt and its seed alone, not on its batch.
            batch_size: pictures sampled at a time.
            callback: called with (steps done, steps in all) over all batches.

        Raises:
            AtollError: no prompts, seeds of another number than prompts, steps < 1, an unknown method or routing.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise AtollError("no prompts; expected at least one")
        seeds = self._seeds(len(prompts), generator, seeds)
        defaults = self.loaded.card["sampling"]
        steps = num_inference_steps if num_inference_steps is not None else defaults.get("steps", 50)
        scale = guidance_scale if guidance_scale is not None else defaults.get("guidance_scale", 1.0)
        method = method or defaults.get("method", "euler")
        ensemble = self.loaded.ensemble
        if routing is not None:
            ensemble = ensemble.with_options(routing=routing)

        latents, traces = [], []
        batches = range(0, len(prompts), batch_size)
        for number, start in enumerate(batches):
            condition = self.loaded.encoder(prompts[start : start + batch_size]).to(self.device)
            noise = self.noise(seeds[start : start + batch_size])
            velocity = partial(ensemble.velocity, condition=condition, guidance_scale=scale)

            def tell(index: int, _: Tensor, number: int = number) -> None:
                if callback is not None:
                    callback(number * steps + index + 1, len(batches) * steps)

            with ensemble.tracing() as trace:
                latents.append(sample(velocity, noise, steps, method, callback=tell))
            traces.append(trace)
        drawn = torch.cat(latents)
        return Output(to_pil(self.loaded.codec.decode(drawn)), drawn, traces)

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """x at t = 1, [B, C, H, W] float32: each row from its own seed, drawn on the CPU, equal on every device."""
        rows = [torch.randn(self.loaded.latent_shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return torch.stack(rows).to(self.device)

    @staticmethod
    def _seeds(count: int, generator: torch.Generator | None, seeds: Sequence[int] | None) -> list[int]:
        if seeds is None:
            return torch.randint(2**31, (count,), generator=generator).tolist()
        if generator is not None:
            raise AtollError("generator and seeds were both given; expected one of them")
        if len(seeds) != count:
            raise AtollError(f"{len(seeds)} seeds for {count} prompts; expected one seed per prompt")
        return list(seeds)


def to_pil(images: Tensor) -> list["Image"]:
    """[B, 1 or 3, h, w] in [0, 1] -> grey or RGB pictures of 8 bits."""
    from PIL import Image

    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p) for p in pixels]


def grid(images: Sequence["Image"], columns: int | None = None, min_side: int = 128) -> "Image":
    """The pictures on one sheet of white paper, enlarged without smoothing until a side has `min_side` pixels."""
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
    progress: Callable[[int, int], Any] | None = None,
) -> None:
    """Draws one picture per prompt and writes them as one sheet.

    Raises:
        AtollError: as `Pipeline` does, or `out` is of no picture format or cannot be written.
    """
    from PIL import Image

    Image.init()
    if out.suffix.lower() not in Image.EXTENSION:
        raise AtollError(f"{out}: no picture format is known by {out.suffix!r}; expected .png, .jpg or .webp")
    if not out.parent.is_dir():
        raise AtollError(f"{out.parent}: no such directory; make it first")
    pipe = Pipeline.from_pretrained(ensemble, routing, alignment, strict)
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
