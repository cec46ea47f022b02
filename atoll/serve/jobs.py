"""Jobs of clients: the engine's events, brought to the event loop, and the results, kept for a bounded time."""

import asyncio
import base64
import hashlib
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from atoll.image_settings import ImageSettings, encode_png
from atoll.serve.describe import ModelCard, expert_weights, image_settings
from atoll.serve.engine import Engine
from atoll.serve.event_log import EventLog
from atoll.serve.files import FileStore, largest_owner
from atoll.serve.metrics import ServerMetrics
from atoll.serve.previews import encode_preview
from atoll.serve.refusals import Refusal, logger
from atoll.serve.settings import ServerSettings
from atoll.serve.types import (
    Event,
    Failed,
    Finished,
    ImageJob,
    ImageRequest,
    JobProgress,
    Preview,
    QueueFullError,
    Started,
)

_PREVIEW_SHARES = 64  # jobs among which the memory for previews is divided, at least
_RETRY_SECONDS = 2.0  # after which a full queue may have room
_STATUS = {"cancelled": 409, "deadline": 504, "closed": 503, "failed": 500}  # of a plain generation that failed


@dataclass(frozen=True)
class ServedModel:
    """A model of this server. weights: the dtype that its experts' weights were rounded to."""

    card: ModelCard
    engine: Engine
    weights: str | None = None


@dataclass(eq=False)
class ServedJob:
    """One accepted request; it belongs to the event loop.

    Attributes:
        model: what it samples.
        request: the request.
        preview_format: of the previews.
        response_format: of the images in the last event.
        key: under which the client may repeat the request.
        id: unguessable.
        log: its events.
        done: set with the last event.
        events: the engine's events that were not handled yet.
        job: the engine's own job.
        images: PNG files, when it is finished.
        names: their names in the file store.
        truncated: ends of the prompts that were cut off.
        failure: why there are none.
        finished_at: on the store's clock; None while it is unfinished.
    """

    model: ServedModel
    request: ImageRequest
    log: EventLog
    preview_format: Literal["png", "jpeg"] = "png"
    response_format: Literal["url", "b64_json"] = "url"
    key: tuple[str, ...] | None = None
    id: str = field(default_factory=lambda: secrets.token_urlsafe(16))
    created: int = field(default_factory=lambda: int(time.time()))
    status: Literal["queued", "running", "finished", "failed", "cancelled"] = "queued"
    done: asyncio.Event = field(default_factory=asyncio.Event)
    events: "asyncio.Queue[Event]" = field(default_factory=asyncio.Queue)
    job: ImageJob | None = None
    images: list[bytes] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    truncated: tuple[str, ...] = ()
    failure: Failed | None = None
    finished_at: float | None = None

    def cancel(self) -> None:
        """Cancel the job; its last event comes from the engine."""
        if self.job is not None:
            self.job.cancel()

    def state(self) -> dict[str, Any]:
        """Return what a client sees of it."""
        state: dict[str, Any] = {
            "id": self.id,
            "object": "job",
            "created": self.created,
            "model": self.model.card.id,
            "status": self.status,
            "seeds": list(self.request.seeds),
            "events": f"/v1/jobs/{self.id}/events",
        }
        if self.failure is not None:
            state["error"] = {"reason": self.failure.reason, "message": self.failure.message}
        return state

    @property
    def notes(self) -> list[str]:
        """What the client should know: a size that no expert was trained for."""
        sizes = self.model.engine.pipeline.loaded.sizes
        note = sizes.note(self.request.size or sizes.main)
        return [note] if note else []

    def settings(self, dropped: Sequence[str]) -> list[ImageSettings]:
        """Return what samples each image again. dropped: experts that were dropped while sampling."""
        model = self.model
        loaded = model.engine.pipeline.loaded
        return image_settings(model.card.id, loaded, self.request, weights=model.weights, dropped=dropped)

    def refusal(self) -> Refusal:
        """Return the error of a job that failed. Work began, so it is not to be repeated."""
        assert self.failure is not None
        return Refusal(_STATUS.get(self.failure.reason, 500), self.failure.message, code=self.failure.reason)


class JobStore:
    """All jobs of a server, and the keys under which clients repeat requests.

    Args:
        settings: the limits.
        files: takes finished images.
        metrics: counts.
        clock: seconds.
    """

    def __init__(
        self,
        settings: ServerSettings,
        files: FileStore,
        metrics: ServerMetrics,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._settings, self._files, self._metrics, self._clock = settings, files, metrics, clock
        self._jobs: dict[str, ServedJob] = {}  # unfinished ones, and finished ones that can be fetched
        self._finished: OrderedDict[str, int] = OrderedDict()  # bytes by id, the oldest first
        self._bytes = 0  # of the finished ones
        self._keys: dict[tuple[str, ...], tuple[bytes, ServedJob]] = {}
        self._images: Counter[str] = Counter()  # unfinished images by client
        self._tasks: set[asyncio.Task[None]] = set()
        self._raw_bytes = 0  # of previews that are not encoded yet
        self.closing = False

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def unfinished(self) -> int:
        """The number of jobs that are not finished."""
        return len(self._jobs) - len(self._finished)

    def repeated(self, key: tuple[str, ...] | None, body: bytes) -> ServedJob | None:
        """Return the job that a client started under a key; None if there is none.

        Raises:
            Refusal: it was another request.
        """
        self._evict()
        if key is None or key not in self._keys:
            return None
        digest, job = self._keys[key]
        if digest != hashlib.sha256(body).digest():
            raise Refusal(400, "this Idempotency-Key was used for another request", code="idempotency_key_reused")
        return job

    def start(
        self,
        model: ServedModel,
        request: ImageRequest,
        *,
        key: tuple[str, ...] | None = None,
        body: bytes = b"",
        preview_format: Literal["png", "jpeg"] = "png",
        response_format: Literal["url", "b64_json"] = "url",
    ) -> ServedJob:
        """Submit a request to its engine.

        Args:
            model: the model.
            request: the request.
            key: (client, path, Idempotency-Key).
            body: what a repetition must have too.
            preview_format: of the previews.
            response_format: of the images in the last event.

        Raises:
            Refusal: no room now.
            AtollError: the engine cannot sample it.
        """
        if self.closing:
            raise Refusal(503, "the server is closing", code="closing", retry_after=_RETRY_SECONDS)
        self._require_room(model, request)
        # The more jobs there are, the fewer previews each of them stores.
        log = EventLog(self._settings.keep_bytes // max(_PREVIEW_SHARES, self.unfinished + 1))
        job = ServedJob(model, request, log, preview_format, response_format, key)
        loop = asyncio.get_running_loop()

        def listener(event: Event) -> None:
            # The engine's threads may outlive the loop.
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._receive, job, event)

        try:
            job.job = model.engine.submit(request, listener)
        except QueueFullError as error:
            raise Refusal(503, str(error), code="queue_full", retry_after=_RETRY_SECONDS) from None
        # Nothing can fail from here on: what the engine accepted is in the store.
        self._jobs[job.id] = job
        self._images[request.user] += len(request.seeds)
        if key is not None:
            self._keys[key] = hashlib.sha256(body).digest(), job
        task = loop.create_task(self._handle_events(job))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return job

    def _receive(self, job: ServedJob, event: Event) -> None:
        """Take an event from the engine; previews that come faster than they are encoded are left out."""
        if job.log.closed:
            return
        if isinstance(event, Preview):
            if self._raw_bytes >= self._settings.keep_bytes:
                return
            self._raw_bytes += _bytes_of(event)
        job.events.put_nowait(event)

    def _require_room(self, model: ServedModel, request: ImageRequest) -> None:
        """Refuse what would let one client fill the queue."""
        most = self._settings.client_queue or max(1, model.engine.limits.queue // 2)
        if len(request.seeds) > most:
            raise Refusal(
                400, f"n: {len(request.seeds)} images; expected at most {most}", param="n", code="invalid_value"
            )
        if self._images[request.user] + len(request.seeds) > most:
            message = f"{self._images[request.user]} images of yours are unfinished; at most {most} may be"
            raise Refusal(429, message, code="too_many_images", retry_after=_RETRY_SECONDS)

    def get(self, id: str) -> ServedJob:
        """Return a job. Raises Refusal if it is unknown or was removed."""
        self._evict()
        if (job := self._jobs.get(id)) is None:
            raise Refusal(404, "no such job; finished jobs stay for a limited time", code="not_found")
        return job

    def close(self) -> None:
        """Send every unfinished job its last event, and accept no more."""
        self.closing = True
        for job in self._jobs.values():
            if not job.done.is_set():
                job.events.put_nowait(Failed("closed", "the server is closing"))
                job.cancel()

    async def _handle_events(self, job: ServedJob) -> None:
        """Handle a job's events, one after the other, until the last."""
        event: Event
        try:
            while not job.log.closed:
                event = await job.events.get()
                await self._handle(job, event)
        except Exception:
            # A mistake here must not leave a client waiting.
            logger.exception("job %s", job.id)
            job.cancel()
            if not job.log.closed:
                self._fail(job, Failed("failed", "the server failed; its log says why"))
        self._end(job)

    async def _handle(self, job: ServedJob, event: Event) -> None:
        """Handle one event. Images are encoded in threads: the event loop serves others meanwhile."""
        if isinstance(event, Started):
            job.status = "running"
            job.log.append("started", {"id": job.id, "model": job.model.card.id, "seeds": list(job.request.seeds)})
        elif isinstance(event, JobProgress):
            job.log.append("progress", {"step": event.step, "steps": event.steps})
        elif isinstance(event, Preview):
            try:
                encoded = await asyncio.to_thread(encode_preview, event.image, job.preview_format)
            finally:
                self._raw_bytes -= _bytes_of(event)
            data = {"index": event.index, "step": event.step, "format": job.preview_format, "b64_json": encoded}
            job.log.append("preview", data)
        elif isinstance(event, Finished):
            await self._finish(job, event)
        else:
            self._fail(job, event)

    async def _finish(self, job: ServedJob, event: Finished) -> None:
        settings, job.truncated = job.settings(event.dropped), event.truncated
        started = self._clock()
        job.images = await asyncio.to_thread(_encode_all, event, settings)
        if job.response_format == "url":
            job.names = [self._files.add(image) for image in job.images]
        self._metrics.finished(job.model.card.id, event, self._clock() - started)
        # All images in base64, and their weights, are megabytes.
        data = await asyncio.to_thread(_finished_data, job, event, settings)
        job.status = "finished"
        job.log.append("finished", data, last=True)

    def _fail(self, job: ServedJob, event: Failed) -> None:
        job.status, job.failure = ("cancelled" if event.reason == "cancelled" else "failed"), event
        self._metrics.failed(job.model.card.id, event)
        job.log.append("failed", {"reason": event.reason, "message": event.message}, last=True)

    def _end(self, job: ServedJob) -> None:
        """Count a job as finished, and wake who waits for it."""
        # Events behind the last one: the server ended the job before the engine did.
        while not job.events.empty():
            if isinstance(event := job.events.get_nowait(), Preview):
                self._raw_bytes -= _bytes_of(event)
        self._images[job.request.user] -= len(job.request.seeds)
        if self._images[job.request.user] <= 0:
            del self._images[job.request.user]
        job.finished_at = self._clock()
        self._finished[job.id] = size = job.log.bytes + sum(map(len, job.images))
        self._bytes += size
        job.done.set()
        self._evict()

    def _evict(self) -> None:
        """Remove finished jobs that are too old, or too many."""
        now = self._clock()
        while self._finished:
            job = self._jobs[next(iter(self._finished))]
            assert job.finished_at is not None
            young = job.finished_at + self._settings.keep_seconds > now
            few = len(self._finished) <= self._settings.keep_jobs
            if young and few and self._bytes <= self._settings.keep_bytes:
                break
            if young:  # there are too many: whoever has the most of them loses the oldest
                users = {id: self._jobs[id].request.user for id in self._finished}
                most = largest_owner((users[id], size if few else 1) for id, size in self._finished.items())
                job = self._jobs[next(id for id, user in users.items() if user == most)]
            self.remove(job)

    def remove(self, job: ServedJob) -> None:
        """Forget a finished job."""
        # The store itself may have removed it already.
        if job.id in self._finished:
            self._bytes -= self._finished.pop(job.id)
            del self._jobs[job.id]
            if job.key is not None:
                del self._keys[job.key]


def _bytes_of(event: Preview) -> int:
    """Return the size of a preview in memory."""
    return event.image.width * event.image.height * len(event.image.getbands())


def _encode_all(event: Finished, settings: list[ImageSettings]) -> list[bytes]:
    return [encode_png(image, one) for image, one in zip(event.images, settings, strict=True)]


def _finished_data(job: ServedJob, event: Finished, settings: list[ImageSettings]) -> dict[str, Any]:
    """Return the data of the last event: images, and who sampled them."""
    images = []
    for index, seed in enumerate(job.request.seeds):
        content = {"b64_json": base64.b64encode(job.images[index]).decode()}
        if job.response_format == "url":
            content = {"url": f"/v1/files/{job.names[index]}"}
        images.append({"index": index, "seed": seed, **content, "settings": settings[index].model_dump(mode="json")})
    return {
        "id": job.id,
        "model": job.model.card.id,
        "images": images,
        "experts": list(event.experts),
        "dropped": list(event.dropped),
        "truncated": list(event.truncated),
        **({"notes": job.notes} if job.notes else {}),
        **expert_weights(event.times, event.weights),
        "queue_seconds": round(event.queue_seconds, 4),
        "sample_seconds": round(event.sample_seconds, 4),
    }
