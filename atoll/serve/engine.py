"""The engine: requests that began at different moments share every step, grouped by expert.

Three threads pass a job on. The first encodes prompts, several at a time. The second steps: at each tick it selects
units of images (`FairQueue`), evaluates each expert once for all of them (`Stepper`), and advances them; so a request
joins at any tick and leaves when it is finished. The third decodes what is finished, and previews. An image is that of
`atoll.Pipeline` for the same seed and settings, up to rounding, whoever shares its batch.
"""

import logging
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, cast

import torch

from atoll.choices import Method
from atoll.condition import Condition, move_to, select_rows
from atoll.ensemble.routing import Oracle
from atoll.errors import AtollError
from atoll.pipeline import Pipeline
from atoll.serve.decoder import Decoder
from atoll.serve.prompts import NULL
from atoll.serve.queue import FairQueue
from atoll.serve.stepper import Stepped, Stepper
from atoll.serve.types import Failed, ImageJob, ImageRequest, JobProgress, Listener, QueueFullError, Started
from atoll.serve.unit import EngineJob, Settings, Unit
from atoll.solver import Integration
from atoll.storage.memory import is_out_of_memory
from atoll.time_shift import check_shift

_UNIT = 4  # images of one request that advance together; fewer fill a batch better, more take less time to manage
_SLACK = 4  # full batches that a user may be ahead of another
_ENCODED = 256  # encoded prompts that are kept
_PROMPTS = 64  # prompts that are encoded at a time

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineLimits:
    """What an engine accepts, and how much it does at a time.

    Attributes:
        batch: images per tick, at most. It is halved for good when the device's memory does not suffice.
        tick_seconds: the time that a tick should take, at most; None: no target. A smaller target shortens the wait of
            a request that comes alone, and lengthens that of all when many come.
        queue: images that may wait or run, at most.
    """

    batch: int = 64
    tick_seconds: float | None = None
    queue: int = 1024


class Engine:
    """Samples an ensemble for many requests at once.

        with Engine(pipeline) as engine:
            engine.submit(ImageRequest("digit seven", seeds=(0, 1)), print).done.wait()

    Args:
        pipeline: the ensemble with its text encoder and codec; while the engine runs, it belongs to the engine.
        limits: what is accepted.
    """

    def __init__(self, pipeline: Pipeline, limits: EngineLimits = EngineLimits()):
        self.pipeline, self.limits = pipeline, limits
        self._stepper = Stepper(pipeline)
        self._queue = FairQueue(_SLACK * limits.batch)
        self._batch, self._seconds_per_image = limits.batch, 0.0
        # What the threads share, under this lock.
        self._changed = threading.Condition()
        self._unfinished: dict[EngineJob, None] = {}
        self._to_encode, self._encoded = list[EngineJob](), list[EngineJob]()
        self._arrivals, self._ticks, self._stepped, self._closing = 0, 0, 0, False
        self._seconds = {"encode": 0.0, "step": 0.0}
        # The threads.
        self._decoder = Decoder(pipeline, self._over)
        loops = {"encode": self._encode_loop, "step": self._step_loop, "decode": self._decoder.loop}
        self._threads = [threading.Thread(target=loop, name=f"atoll-{name}") for name, loop in loops.items()]
        for thread in self._threads:
            thread.start()

    def submit(self, request: ImageRequest, listener: Listener) -> ImageJob:
        """Accept a request; thread-safe.

        Args:
            request: what to sample.
            listener: called with each event, one after the other, from threads of the engine; it must return quickly.
                After `Finished` or `Failed` it is not called again.

        Raises:
            QueueFullError: too many images wait already.
            AtollError: a request that cannot be sampled: no seeds, unknown method or routing, steps < 1, ...
        """
        # The images, in units that advance together.
        job = EngineJob(ImageJob(request, listener), self._settings(request))
        images = len(request.seeds)
        size = min(_UNIT, self.limits.batch)
        job.units = [Unit(job, range(start, min(start + size, images))) for start in range(0, images, size)]
        evaluations = job.settings.steps * (2 if job.settings.method in ("heun", "midpoint") else 1)
        job.evaluations_left = evaluations * images

        # Accept it, or refuse before any work begins.
        with self._changed:
            if self._closing:
                raise AtollError("the engine is closed")
            waiting = sum(len(one.handle.request.seeds) for one in self._unfinished)
            if waiting + images > self.limits.queue:
                raise QueueFullError(
                    f"{waiting} images wait already and {images} more were requested; the limit is "
                    f"{self.limits.queue}: try again later, or request fewer"
                )
            self._arrivals += 1
            job.arrival = self._arrivals
            self._unfinished[job] = None
            self._to_encode.append(job)
            self._changed.notify_all()
        return job.handle

    @property
    def alive(self) -> bool:
        """Whether the engine accepts requests and all of its threads run."""
        return not self._closing and all(thread.is_alive() for thread in self._threads)

    def statistics(self) -> dict[str, Any]:
        """Return numbers for monitoring; thread-safe.

        Returns:
            jobs, images, images_running: unfinished now; ticks, images_stepped: since the start; seconds: by stage;
            batch: images per tick, at most; images_by_expert, calls_by_expert: by name.
        """
        names = [expert.name for expert in self.pipeline.loaded.ensemble.experts]
        stepper = self._stepper
        with self._changed:
            return {
                "jobs": len(self._unfinished),
                "images": sum(len(job.handle.request.seeds) for job in self._unfinished),
                "images_running": sum(len(w.handle.request.seeds) for w in self._unfinished if w.started is not None),
                "ticks": self._ticks,
                "images_stepped": self._stepped,
                "seconds": self._seconds | {"decode": self._decoder.seconds},
                "batch": self._allowed(),
                "images_by_expert": {name: stepper.images_by_expert[index] for index, name in enumerate(names)},
                "calls_by_expert": {name: stepper.calls_by_expert[index] for index, name in enumerate(names)},
            }

    def close(self) -> None:
        """Fail what is unfinished with "closed", and end the threads."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._decoder.close()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        for job in list(self._unfinished):
            self._over(job, Failed("closed", "the server is closing"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Requests.

    def _settings(self, request: ImageRequest) -> Settings:
        """Return complete settings; errors as in `submit`."""
        # The ensemble's defaults.
        loaded = self.pipeline.loaded
        defaults, base = loaded.sampling, loaded.ensemble
        size = loaded.sizes.choose(*(request.size or ()))
        settings = Settings(
            defaults.steps_or(50) if request.steps is None else request.steps,
            defaults.guidance_or(1.0) if request.guidance_scale is None else request.guidance_scale,
            request.guidance_range,
            request.method or cast(Method, defaults.method or "euler"),
            request.routing or base.routing,
            request.alignment,
            request.cluster,
            size,
            loaded.shift(size) if request.shift is None else check_shift(request.shift),
        )

        # Refuse what a step would fail on.
        if not request.seeds:
            raise AtollError("no seeds; expected one per image")
        if not -8 <= request.priority <= 8:
            raise AtollError(f"priority is {request.priority}; expected -8 to 8")
        if request.preview_every < 0:
            raise AtollError(f"preview_every is {request.preview_every}; expected steps, or 0 for no previews")
        Integration(torch.zeros(1, 1), settings.steps, settings.method)
        rule = self._stepper.ensemble(settings.routing, settings.alignment).rule
        clusters = {cluster for expert in base.experts for cluster in expert.clusters}
        if isinstance(rule, Oracle) and rule.cluster is None and settings.cluster is None:
            raise AtollError(f"routing {settings.routing} needs the images' cluster")
        if settings.cluster is not None and settings.cluster not in clusters:
            raise AtollError(f"no expert covers cluster {settings.cluster}; expected one of {sorted(clusters)}")
        guided = settings.guidance_scale != 1.0
        if guided and base.null is None:
            raise AtollError(f"guidance_scale is {settings.guidance_scale}, but this ensemble has no null condition")
        if request.negative_prompt is not None and not guided:
            raise AtollError("a negative prompt needs guidance; set a guidance_scale other than 1")
        return settings

    # The threads.

    def _encode_loop(self) -> None:
        """Encode prompts as they come."""
        encoded: OrderedDict[str, tuple[Condition, ...]] = OrderedDict()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._to_encode or self._closing)
                if self._closing:
                    return
                jobs, self._to_encode = self._to_encode[:_PROMPTS], self._to_encode[_PROMPTS:]
            start = time.perf_counter()
            jobs = [job for job in jobs if not self._given_up(job)]
            texts = dict.fromkeys(text for job in jobs for text in _texts(job))
            self._encode([text for text in texts if text not in encoded], encoded)
            for job in jobs:
                job.conditions = {text: encoded[text] for text in _texts(job) if text in encoded}
                ends = (self.pipeline.loaded.encoder.truncated_text(text) for text in job.conditions)
                job.truncated = tuple(end for end in ends if end)
                if len(job.conditions) < len(set(_texts(job))):
                    self._over(job, Failed("failed", "the prompt could not be encoded; the server's log says more"))
            while len(encoded) > _ENCODED:
                encoded.popitem(last=False)
            with self._changed:
                self._seconds["encode"] += time.perf_counter() - start
                self._encoded += [job for job in jobs if not job.over]
                self._changed.notify_all()

    @torch.inference_mode()
    def _encode(self, texts: list[str], encoded: dict[str, tuple[Condition, ...]]) -> None:
        """Encode texts together, or, if that fails, one by one; a text that fails is left out."""
        if not texts:
            return
        device = self.pipeline.device
        try:
            conditions = move_to(self.pipeline.loaded.encoder(texts), device)
        except Exception:
            _log.exception("%d prompts could not be encoded", len(texts))
            for text in texts if len(texts) > 1 else []:
                self._encode([text], encoded)
            return
        for row, text in enumerate(texts):
            encoded[text] = select_rows(conditions, torch.tensor([row], device=device))

    def _step_loop(self) -> None:
        """Tick as long as there is something to sample."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._encoded or len(self._queue) or self._closing)
                if self._closing:
                    return
                arrived, self._encoded = self._encoded, []
            for job in arrived:
                prompts, (prompt, *negative) = self._stepper.prompts, _texts(job)
                job.prompt = prompts.acquire(prompt, job.conditions[prompt])
                job.null = prompts.acquire(negative[0], job.conditions[negative[0]]) if negative else NULL
                self._queue.add(job)
            try:
                self._tick()
            except Exception as error:  # the engine goes on, whatever happens
                for job in dict.fromkeys(unit.job for unit in list(self._queue)):
                    self._leave(job)
                    self._fail(job, error)

    @torch.inference_mode()
    def _tick(self) -> None:
        """Advance the units whose turn it is."""
        # What was given up leaves first.
        start = time.perf_counter()
        for job in dict.fromkeys(unit.job for unit in list(self._queue)):
            if self._given_up(job):
                self._leave(job)

        # Select and step.
        units = self._queue.select(self._allowed(), self._stepper.resident)
        for job in dict.fromkeys(unit.job for unit in units):
            if job.started is None:
                job.started = time.monotonic()
                job.tell(Started())
        try:
            outcomes = self._stepper.step(units)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._shrink(units, error)
            return
        for unit, outcome in outcomes.items():
            self._digest(unit, outcome)

        # Progress, by the slowest unit of each job.
        for job in dict.fromkeys(unit.job for unit in units):
            step = min(unit.integration.step if unit.integration else 0 for unit in job.units)
            if step > job.step:
                job.step = step
                job.tell(JobProgress(step, job.settings.steps))

        # The time of a tick, for its target.
        images, seconds = sum(map(len, units)), time.perf_counter() - start
        with self._changed:
            self._ticks, self._stepped = self._ticks + bool(images), self._stepped + images
            self._seconds["step"] += seconds
            if images:
                self._seconds_per_image = 0.8 * (self._seconds_per_image or seconds / images) + 0.2 * seconds / images

    def _digest(self, unit: Unit, outcome: Stepped | Exception) -> None:
        """Act on what a step did to a unit."""
        job, every = unit.job, unit.job.handle.request.preview_every
        if job.over:  # another unit of it failed at this tick
            return
        if isinstance(outcome, Exception):
            self._leave(job)
            self._fail(job, outcome)
            return
        job.evaluations_left -= len(unit)
        step = unit.running.step
        if unit.running.point is not None:
            if every and outcome.end and step % every == 0:
                self._decoder.preview(unit, step, outcome.x0)
            return
        # The unit is sampled.
        self._queue.remove(unit)
        if all(one.integration is not None and one.integration.point is None for one in job.units):
            job.sampled = time.monotonic()
            self._leave(job)
        self._decoder.finish(unit)

    def _shrink(self, units: list[Unit], error: Exception) -> None:
        """Halve the batch after the device's memory did not suffice; a unit that fails alone fails for good."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(units) > 1:
            self._batch = max(1, sum(map(len, units)) // 2)
            _log.warning("out of memory; from now on at most %d images per tick", self._batch)
            return
        self._leave(units[0].job)
        self._fail(units[0].job, error)

    def _allowed(self) -> int:
        """Return how many images the next tick may advance."""
        target = self.limits.tick_seconds
        if target is None or not self._seconds_per_image:
            return self._batch
        return max(1, min(self._batch, int(target / self._seconds_per_image)))

    # The end of a job.

    def _given_up(self, job: EngineJob) -> bool:
        """End a job that was cancelled, or whose deadline has passed; return whether it is over."""
        if job.handle.cancelled.is_set():
            self._over(job, Failed("cancelled", "the request was cancelled"))
        elif job.deadline is not None and time.monotonic() > job.deadline:
            seconds = job.handle.request.deadline
            self._over(job, Failed("deadline", f"the images were not ready within {seconds:g} seconds"))
        return job.over

    def _fail(self, job: EngineJob, error: Exception) -> None:
        """End a job that failed."""
        if isinstance(error, AtollError):
            self._over(job, Failed("failed", str(error)))
            return
        _log.error("job %s failed", job.handle.id, exc_info=error)
        if is_out_of_memory(error):
            self._over(
                job,
                Failed("failed", "too little memory for this request; request fewer images, or try later"),
            )
            return
        self._over(job, Failed("failed", f"sampling failed ({type(error).__name__}); the server's log says more"))

    def _leave(self, job: EngineJob) -> None:
        """Remove a job from the step thread's own data. Call it in that thread only."""
        for unit in job.units:
            self._queue.remove(unit)
        for number in (job.prompt, job.null):
            if number not in (NULL, -1):
                self._stepper.prompts.release(number)
        job.prompt = job.null = -1

    def _over(self, job: EngineJob, event: Any) -> None:
        """Send a job's last event, and forget the job; thread-safe."""
        with self._changed:
            self._unfinished.pop(job, None)
        job.tell(event)


def _texts(job: EngineJob) -> tuple[str, ...]:
    """Return the texts that a job reads: its prompt, then its negative prompt, if it has one."""
    request = job.handle.request
    return (request.prompt,) if request.negative_prompt is None else (request.prompt, request.negative_prompt)
