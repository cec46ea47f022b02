"""All images of one call on one sheet, and their routing trace."""

import io
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch

from atoll.choices import Method
from atoll.ensemble import Alignment, Trace
from atoll.ensemble.loading import Fetch
from atoll.ensemble.offload import WeightDtype
from atoll.errors import AtollError
from atoll.image_size import ImageSize
from atoll.pipeline import Pipeline, grid
from atoll.report.page import colour, document, table, weight_strip
from atoll.storage.artifact import write_bytes, write_json


def sample_to_file(
    ensemble: Path,
    prompts: Sequence[str],
    out: Path,
    *,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    negative_prompt: str | None = None,
    images_per_prompt: int = 1,
    guidance_range: tuple[float, float] = (0.0, 1.0),
    steps: int | None = None,
    guidance: float | None = None,
    routing: str | None = None,
    method: Method | None = None,
    size: ImageSize | None = None,
    shift: float | None = None,
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
    weak: Path | None = None,
) -> dict[str, str]:
    """Sample images of each prompt and write them as one sheet.

    Args:
        ensemble: a directory for `Pipeline.from_pretrained`.
        prompts: at least one.
        out: the image file to write.
        seed: of the first image; the next ones count up.
        seeds: one per image, or one per prompt, in place of `seed`.
        negative_prompt, images_per_prompt, guidance_range: as in `Pipeline`.
        steps: default: the ensemble's, like guidance, routing, method and replicas.
        guidance: the guidance scale.
        routing: as in `Pipeline.from_pretrained`.
        method: as in `Pipeline`.
        size: of the images; None: the ensemble's main size.
        shift: as in `Pipeline`.
        alignment, strict: as in `Pipeline.from_pretrained`.
        side: pixels of an image's longer side, at least.
        replicas: as in `Pipeline.from_pretrained`.
        trace: a JSON file for the routing trace; a page that shows it is written beside it.
        progress: called with (steps done, total steps).
        memory_budget, weights, allow_hub, trust_paths, fetch, weak: as in `Pipeline.from_pretrained`.

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
        weak=weak,
    )
    output = pipe(
        prompts,
        num_inference_steps=steps,
        guidance_scale=guidance,
        seeds=range(seed, seed + len(prompts) * images_per_prompt) if seeds is None else seeds,
        negative_prompt=negative_prompt,
        images_per_prompt=images_per_prompt,
        guidance_range=guidance_range,
        method=method,
        height=None if size is None else size.height,
        width=None if size is None else size.width,
        shift=shift,
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
        rows = [prompt for prompt in prompts for _ in range(images_per_prompt)]
        write_trace(trace, rows, [expert.name for expert in pipe.loaded.ensemble.experts], output.traces)
    return output.dropped


def write_trace(file: Path, prompts: Sequence[str], names: Sequence[str], traces: Sequence[Trace]) -> None:
    """Write routing traces as JSON, and as a page beside it.

    The JSON is {"experts": names, "prompts": [{"prompt", "t": [T], "weights": [T, E]}]}.

    Args:
        file: the JSON file.
        prompts: of B images.
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
