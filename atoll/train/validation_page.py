"""The page of a training's validation images: a strip over time for each prompt, the EMA's images above the weights'.

validation/00-a-red-boat-3f2a11/000001000-ema.png      all images of one prompt at one step, side by side
validation.html                                        shows these files, without scripts
"""

import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from atoll.manifest import ValidationSettings
from atoll.report.page import document, table
from atoll.storage.artifact import write_bytes
from atoll.storage.layout import TrainingLayout
from atoll.train.validation_images import strip_name

WEIGHTS = {"ema": "EMA", "trained": "weights"}  # name in files: name on the page
_COLUMNS = 24  # steps on the page, at most; all images stay beside it
_SMALL = 96  # pixels, below which an image is shown without smoothing


class ValidationStrips:
    """The images of one training so far, in its directory.

    Args:
        directory: the training's.
        prompts: that are drawn.
        settings: how.
    """

    def __init__(self, directory: Path, prompts: Sequence[str], settings: ValidationSettings):
        self.files, self.prompts, self.settings = TrainingLayout(directory), tuple(prompts), settings
        self.strips = [strip_name(number, prompt, settings) for number, prompt in enumerate(self.prompts)]

    def drop_after(self, step: int) -> None:
        """Remove the images of later steps, which are trained again."""
        for strip in self.strips:
            for later, weights in self.files.validation_images(strip):
                if later > step:
                    self.files.validation_image(strip, later, weights).unlink()

    def add(self, step: int, images: Mapping[str, Tensor]) -> list[Tensor]:
        """Write the images of one step, and the page anew.

        Args:
            step: of the training.
            images: by the key of WEIGHTS, [prompts * images, c, h, w] in [0, 1] each, the first prompt's first.

        Returns:
            For each prompt its images in one [c, rows, columns], a row for each of the weights.
        """
        rows: list[list[Tensor]] = [[] for _ in self.strips]
        for weights, drawn in images.items():
            for number, own in enumerate(drawn.split(self.settings.images)):
                row = own.permute(1, 2, 0, 3).flatten(2)  # [c, h, images * w]
                file = self.files.validation_image(self.strips[number], step, weights)
                file.parent.mkdir(parents=True, exist_ok=True)
                write_bytes(file, _png(row))
                rows[number].append(row)
        write_bytes(self.files.validation_page, self._page().encode())
        return [torch.cat(own, dim=1) for own in rows]

    def _page(self) -> str:
        s = self.settings
        lead = (
            f"<p>{escape(self.files.name)} alone, guidance {s.guidance_scale:g}, {s.steps} Euler steps, seeds from "
            f"{s.seed} on: the same noise at every step of the training. The newest are on the left; all are in "
            f"<code>{escape(self.files.validation.name)}/</code> beside this page.</p>"
        )
        sections = [
            (prompt, self._strip(strip, prompt)) for strip, prompt in zip(self.strips, self.prompts, strict=True)
        ]
        return document(f"Validation images of {self.files.name}", lead, sections)

    def _strip(self, strip: str, prompt: str) -> str:
        """The table of one prompt: a column for each step, a row for each of the weights."""
        existing = set(self.files.validation_images(strip))
        # The newest on the left, where a reader sees it first.
        steps = _spread(sorted({step for step, _ in existing}), _COLUMNS)[::-1]
        head = "".join(f'<th scope="col">{step:,}</th>' for step in steps)
        body = ""
        for weights, name in WEIGHTS.items():
            cells = ""
            for step in steps:
                file = self.files.validation_image(strip, step, weights)
                image = f"{step:,} steps, {name}: {prompt}"
                path = escape(file.relative_to(self.files.root).as_posix())
                shown = f'<a href="{path}"><img src="{path}" alt="{escape(image)}" loading="lazy"></a>'
                cells += f"<td>{shown if (step, weights) in existing else ''}</td>"
            body += f'<tr><th scope="row">{name}</th>{cells}</tr>'
        kind = "images" if self._is_small(strip, existing) else "images smooth"
        return table(f'<tr><th scope="row">steps</th>{head}</tr>', body, f"images of {prompt} over time", kind)

    def _is_small(self, strip: str, existing: set[tuple[int, str]]) -> bool:
        if not existing:
            return True
        with Image.open(self.files.validation_image(strip, *min(existing))) as image:
            return image.height < _SMALL


def _spread(steps: list[int], most: int) -> list[int]:
    """At most `most` of the steps, evenly spread, the first and the last among them."""
    if len(steps) <= most:
        return steps
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def _png(image: Tensor) -> bytes:
    """An image [1 or 3, h, w] in [0, 1] as PNG."""
    pixels = (image.clamp(0, 1) * 255).round().byte().expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "png")
    return sink.getvalue()
