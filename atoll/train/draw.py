"""What an expert draws during training, by itself alone: the sample grid of held-out captions."""

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pydantic import BaseModel
from torch import Tensor

from atoll.condition import Condition
from atoll.encoders.codec import build_codec
from atoll.encoders.trust import STRANGER, Trust
from atoll.ensemble import Ensemble, Expert, Sampler
from atoll.nn import patch_of
from atoll.objective import Objective
from atoll.randomness import Stream, seeded
from atoll.solver import sample, shifted_times
from atoll.storage.artifact import write_bytes
from atoll.storage.shards import LATENTS
from atoll.train.batches import CaptionedLatents

_IMAGES, _STEPS = 16, 20


def draw_grid(
    module: Callable[..., Tensor],
    objective: Objective,
    data: CaptionedLatents,
    *,
    codec: dict[str, Any],
    file: Path | None,
    seed: int,
    trust: Trust = STRANGER,
) -> None:
    """Sample up to 16 images of the main size for captions of `data`, and write them as a PNG.

    Args:
        module: the expert's network.
        objective: what it is trained with.
        data: held-out latents; their captions and their main shape are used.
        codec: the codec's card entry.
        file: where the PNG is written; None to sample only, in all processes but the first.
        seed: of captions and noise, the same at every call.
        trust: what the codec's entry may reach.
    """
    device = next(module.parameters()).device  # type: ignore[attr-defined]
    # The same captions and noise at every call, so grids of different steps compare.
    condition = Condition.cat([condition for _, condition in data.some(_IMAGES, seed)]).to(device)
    shape = (len(condition), *data.rows.shards[0].shape(LATENTS[0]))

    # Noise, then the images that this expert alone makes of it.
    noise = torch.randn(shape, generator=seeded(seed, 0, Stream.SAMPLES)).to(device)
    latents = sample_alone(module, objective, noise, condition, data.encoder.null(1).to(device), steps=_STEPS)
    if file is None:
        return
    # Only the first process decodes, since only it writes the file.
    images = build_codec(codec, trust).decode(latents.cpu().float())  # [B,C,h,w]
    write_bytes(file, _png(images))


def sample_alone(
    module: Callable[..., Tensor],
    objective: Objective,
    noise: Tensor,
    condition: Condition,
    null: Condition,
    *,
    steps: int,
    guidance_scale: float = 1.0,
) -> Tensor:
    """Sample latents [B, C, H, W] from noise of that shape by one expert that is not calibrated yet.

    Args:
        module: the expert's network.
        objective: what it is trained with.
        noise: on the network's device, as the conditions are.
        condition: of B rows.
        null: the null condition, of one row.
        steps: of the solver.
        guidance_scale: 1 for none.
    """

    def float_module(x: Tensor, time: Tensor, rows: Condition | None) -> Tensor:
        return module(x, time, rows).float()

    # Without a calibration, the x0 of an eps-expert is clamped.
    ensemble = Ensemble([Expert(float_module, objective, (0,), None, "alone")], None, "full", null=(null,))
    sampler = Sampler(ensemble)
    # By the shift that it is trained with.
    config = getattr(module, "config", None)
    patch = patch_of(config.model_dump(by_alias=True)) if isinstance(config, BaseModel) else 1
    shift = 1.0 if objective.shift is None else objective.shift.at(math.prod(noise.shape[2:]) // patch**2)
    times = shifted_times(steps, shift)
    return sample(lambda x, t: sampler.velocity(x, t, (condition,), guidance_scale), noise, steps=steps, times=times)


def _png(images: Tensor) -> bytes:
    """A square grid of images [n, c, h, w] in [0, 1], each enlarged to at least 64 pixels, with white between."""
    # Grey images become RGB; small ones are enlarged by whole pixels.
    images = images.expand(-1, 3, -1, -1)
    scale = max(1, math.ceil(64 / images.shape[-1]))
    images = images.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    columns = math.ceil(math.sqrt(len(images)))
    rows, (h, w) = math.ceil(len(images) / columns), images.shape[-2:]
    # One pixel of white around each image.
    grid = torch.ones(3, rows * (h + 2), columns * (w + 2))
    for i, image in enumerate(images):
        y, x = i // columns * (h + 2), i % columns * (w + 2)
        grid[:, y : y + h, x : x + w] = image
    # Encode the grid as PNG in memory.
    sink = io.BytesIO()
    Image.fromarray((grid * 255).round().byte().permute(1, 2, 0).numpy()).save(sink, "png")
    return sink.getvalue()
