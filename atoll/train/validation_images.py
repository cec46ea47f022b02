"""Validation images: what an expert alone draws for the user's own prompts while it is trained, from fixed seeds."""

import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atoll.encoders.codec import Codec, build_codec
from atoll.encoders.text import TextEncoder
from atoll.encoders.trust import Trust
from atoll.errors import AtollError
from atoll.manifest import ValidationSettings
from atoll.objective import Objective
from atoll.randomness import seeded_noise
from atoll.train.draw import sample_alone
from atoll.train.plans import fingerprint


class ValidationImages:
    """Draws the validation images of one training.

    The noise is seeded per image, and no other random number is drawn: the training keeps its bits.

    Args:
        settings: `train.validation`.
        run: the run's directory; a file of prompts is relative to it.
        objective: of the expert.
        encoder: of the prompts.
        shape: of a latent.
        codec: the codec's card entry.
        trust: what that entry may reach.
        rows: of the network in one call, at most: what a step of the training has.

    Raises:
        AtollError: the file of the prompts cannot be read, or is empty.
    """

    def __init__(
        self,
        settings: ValidationSettings,
        run: Path,
        *,
        objective: Objective,
        encoder: TextEncoder,
        shape: Sequence[int],
        codec: dict[str, Any],
        trust: Trust,
        rows: int,
    ):
        self.settings, self.objective, self.shape = settings, objective, tuple(shape)
        self.prompts = read_prompts(settings.prompts, run)
        for prompt in self.prompts:
            if rest := encoder.truncated_text(prompt):
                warnings.warn(f"train.validation: the text encoder does not read the end {rest!r:.80}", stacklevel=2)
        # Encoded once, on the CPU. Guidance evaluates two rows for an image.
        self._null = encoder.null(1)
        captions = [prompt for prompt in self.prompts for _ in range(settings.images)]
        self._condition = encoder(captions)  # [n, L, D]
        self._rows = max(1, rows if settings.guidance_scale == 1 else rows // 2)
        self._codec_config, self._trust = codec, trust
        self._codec: Codec | None = None

    @torch.no_grad()
    def draw(self, module: Callable[..., Tensor], decodes: bool) -> Tensor | None:
        """Draw all images, those of the first prompt first.

        Args:
            module: the expert's network.
            decodes: whether this process needs the images; in one that does not, it computes the latents only.

        Returns:
            [n, c, h, w] in [0, 1] on the CPU; None without `decodes`.
        """
        settings, device = self.settings, next(module.parameters()).device  # type: ignore[attr-defined]
        seeds = range(settings.seed, settings.seed + len(self._condition))
        images = []
        for rows in torch.arange(len(self._condition)).split(self._rows):
            latents = sample_alone(
                module,
                self.objective,
                seeded_noise([seeds[row] for row in rows.tolist()], self.shape).to(device),
                self._condition.index(rows).to(device),
                self._null.to(device),
                steps=settings.steps,
                guidance_scale=settings.guidance_scale,
            )
            # One at a time: a decoder needs more memory than the latents suggest.
            images += [self._decode(latent[None]) for latent in latents.cpu().float()] if decodes else []
        return torch.cat(images) if decodes else None

    def _decode(self, latents: Tensor) -> Tensor:
        if self._codec is None:
            self._codec = build_codec(self._codec_config, self._trust)
        return self._codec.decode(latents)


def read_prompts(prompts: Sequence[str] | str, run: Path) -> tuple[str, ...]:
    """Return the prompts of `train.validation`: themselves, or the lines of a text file that are not blank.

    Raises:
        AtollError: the file cannot be read, or has no prompt.
    """
    if not isinstance(prompts, str):
        return tuple(prompts)
    file = run / prompts
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise AtollError(
            f"train.validation.prompts: {file} cannot be read ({getattr(error, 'strerror', None) or error}); "
            "expected a text file with one prompt per line, or a list of prompts"
        ) from None
    if not (texts := tuple(line.strip() for line in lines if line.strip())):
        raise AtollError(f"train.validation.prompts: {file} has no prompt; expected one per line")
    return texts


def strip_name(number: int, prompt: str, settings: ValidationSettings) -> str:
    """Return the name of the directory of a prompt's images: "00-a-red-boat-3f2a11"."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-")
    # Images of other settings are not one strip with these.
    same = fingerprint({"prompt": prompt, **settings.model_dump(exclude={"prompts", "every"})})
    return f"{number:02d}-{words or 'prompt'}-{same[:6]}"
