"""The thread that turns latents into images, so that the step loop never waits for the codec."""

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from atoll.errors import AtollError
from atoll.pipeline import Pipeline, to_pil
from atoll.serve.types import Event, Failed, Finished, Preview
from atoll.serve.unit import EngineJob, Unit
from atoll.storage.memory import is_out_of_memory

if TYPE_CHECKING:
    from PIL.Image import Image

_IMAGES = 16  # decoded at a time

_log = logging.getLogger(__name__)


class Decoder:
    """Decodes finished images and previews, several at a time; finished ones first.

    Args:
        pipeline: has the codec.
        over: called with a job and its last event.

    Attributes:
        seconds: spent on decoding.
    """

    def __init__(self, pipeline: Pipeline, over: Callable[[EngineJob, Event], None]):
        self._pipeline, self._over = pipeline, over
        self._changed = threading.Condition()
        self._finished: deque[tuple[EngineJob, int, Tensor]] = deque()
        self._previews: OrderedDict[tuple[EngineJob, int], tuple[int, Tensor]] = OrderedDict()
        self._closing = False
        self.seconds = 0.0

    def finish(self, unit: Unit) -> None:
        """Decode the images of a unit that is sampled; the job is over when all of its images are decoded."""
        with self._changed:
            self._finished += [(unit.job, row, x) for row, x in zip(unit.rows, unit.running.x, strict=True)]
            self._changed.notify_all()

    def preview(self, unit: Unit, step: int, x0: Tensor) -> None:
        """Decode an estimate when there is time; a newer one of the same image replaces it."""
        with self._changed:
            self._previews |= {(unit.job, row): (step, x) for row, x in zip(unit.rows, x0, strict=True)}
            self._changed.notify_all()

    def close(self) -> None:
        """End the loop."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def loop(self) -> None:
        """Decode until `close`."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._finished or self._previews or self._closing)
                if self._closing:
                    return
                # Nobody looks at the preview of a job that is over.
                finals = [self._finished.popleft() for _ in range(min(_IMAGES, len(self._finished)))]
                previews = (
                    [] if finals else [self._previews.popitem(last=False) for _ in list(self._previews)[:_IMAGES]]
                )
            if finals:
                self._finish([item for item in finals if not item[0].over])
            self._preview([item for item in previews if not item[0][0].over])

    def _finish(self, items: Sequence[tuple[EngineJob, int, Tensor]]) -> None:
        """Decode final images, and end the jobs that are complete."""
        # A sample that is not finite is no image.
        good = []
        for job, row, x in items:
            if x.isfinite().all():
                good.append((job, row, x))
            else:
                self._over(job, Failed("failed", "the samples became NaN or infinity; lower the guidance scale"))
        try:
            images = self._decode([x for _, _, x in good])
        except Exception as error:
            text = str(error) if isinstance(error, AtollError) else f"decoding failed ({type(error).__name__})"
            if is_out_of_memory(error):
                text = "too little memory to decode the images; request fewer, or try later"
            for job in dict.fromkeys(job for job, _, _ in good):
                self._over(job, Failed("failed", text))
            return
        for (job, row, _), image in zip(good, images, strict=True):
            job.images[row] = image
            if len(job.images) == len(job.handle.request.seeds) and not job.over:
                self._over(job, self._finished_event(job))

    def _preview(self, items: Sequence[tuple[tuple[EngineJob, int], tuple[int, Tensor]]]) -> None:
        """Decode previews; one that fails is left out."""
        good = [(job, row, step, x) for (job, row), (step, x) in items if x.isfinite().all()]
        try:
            images = self._decode([x for _, _, _, x in good])
        except Exception:
            _log.warning("a preview failed", exc_info=True)
            return
        for (job, row, step, _), image in zip(good, images, strict=True):
            job.tell(Preview(row, step, image))

    def _finished_event(self, job: EngineJob) -> Finished:
        """Return the last event of a job whose images are all decoded."""
        experts = self._pipeline.loaded.ensemble.experts
        started, sampled = job.started or job.submitted, job.sampled or job.submitted
        return Finished(
            images=[job.images[row] for row in range(len(job.images))],
            latents=torch.cat([unit.running.x for unit in job.units]).cpu(),
            times=torch.tensor(job.units[0].times),
            weights=torch.cat([torch.stack(unit.weights) for unit in job.units], dim=1),
            experts=tuple(expert.name for expert in experts),
            dropped=tuple(experts[index].name for index in sorted(job.excluded)),
            truncated=job.truncated,
            queue_seconds=started - job.submitted,
            sample_seconds=sampled - started,
        )

    @torch.inference_mode()
    def _decode(self, latents: Sequence[Tensor]) -> "list[Image]":
        """Decode latents [C, H, W], those of one size together."""
        start = time.perf_counter()
        images: dict[int, Image] = {}
        for shape in dict.fromkeys(x.shape for x in latents):
            places = [place for place, x in enumerate(latents) if x.shape == shape]
            decoded = self._pipeline.loaded.codec.decode(torch.stack([latents[place] for place in places]))
            images |= dict(zip(places, to_pil(decoded), strict=True))
        self.seconds += time.perf_counter() - start
        return [images[place] for place in range(len(latents))]
