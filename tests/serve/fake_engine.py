"""An engine of the same interface that samples nothing, and moves when the test says so."""

import threading
import time
from typing import Any

import torch
from PIL import Image

from atoll.errors import AtollError
from atoll.serve.engine import EngineLimits
from atoll.serve.types import (
    Event,
    Failed,
    Finished,
    ImageJob,
    ImageRequest,
    JobProgress,
    Listener,
    Preview,
    QueueFullError,
    Started,
)


class FakeEngine:
    """Finishes each job in a thread of its own; with `hold()`, only after `release()` or a cancellation."""

    def __init__(self, pipeline: Any, queue: int = 1024):
        self.pipeline, self.limits = pipeline, EngineLimits(queue=queue)
        self.jobs: list[ImageJob] = []
        self.full = False
        self.alive = True
        self.images = 0  # sampled
        self._go = threading.Event()
        self._go.set()

    def hold(self) -> None:
        self._go.clear()

    def release(self) -> None:
        self._go.set()

    def submit(self, request: ImageRequest, listener: Listener) -> ImageJob:
        if self.full:
            raise QueueFullError("1024 images wait already; try again later")
        if request.prompt == "refuse":
            raise AtollError("steps is 0; expected at least 1")
        job = ImageJob(request, listener)
        self.jobs.append(job)
        threading.Thread(target=self._run, args=(job,), daemon=True).start()
        return job

    def _run(self, job: ImageJob) -> None:
        try:
            self._sample(job)
        except Exception as error:  # a test that waits for the end must see one
            self._end(job, Failed("failed", f"the fake engine raised {error!r}"))

    def _sample(self, job: ImageJob) -> None:
        request = job.request
        steps = request.steps or 3
        self._emit(job, Started())
        for step in range(1, steps + 1):
            self._emit(job, JobProgress(step, steps))
            if request.preview_every and step % request.preview_every == 0:
                for index, seed in enumerate(request.seeds):
                    self._emit(job, Preview(index, step, image_of(seed)))
        while not (self._go.is_set() or job.cancelled.is_set()):
            time.sleep(0.005)
        if job.cancelled.is_set():
            self._end(job, Failed("cancelled", "the job was cancelled"))
        elif request.prompt == "fail":
            self._end(job, Failed("failed", "the ensemble answered with NaN"))
        else:
            n = len(request.seeds)
            self.images += n
            experts = tuple(expert.name for expert in self.pipeline.loaded.ensemble.experts)
            weights = torch.full((steps, n, len(experts)), 1 / len(experts))
            times = torch.linspace(1, 0, steps + 1)[:-1]
            images = [image_of(seed) for seed in request.seeds]
            latents, truncated = torch.zeros(n, 1, 4, 8), ("too long",)
            self._end(job, Finished(images, latents, times, weights, experts, (), truncated, 0.5, 1.5))

    def _emit(self, job: ImageJob, event: Event) -> None:
        job.listener(event)

    def _end(self, job: ImageJob, event: Event) -> None:
        job.listener(event)
        job.done.set()

    def statistics(self) -> dict[str, Any]:
        return {"queue": len(self.jobs), "rows": {"0-eps": 2, "1-flow": 3}, "device": "cpu"}

    def close(self) -> None:
        self.release()


def image_of(seed: int) -> Image.Image:
    return Image.new("L", (8, 4), seed % 256)
