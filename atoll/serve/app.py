"""The API of a server: OpenAI's images and models, jobs with events, metrics, health, and the page.

POST   /v1/images/generations   images in one answer, for OpenAI's clients
POST   /v1/jobs                 the same as a job
GET    /v1/jobs/ID              its state
GET    /v1/jobs/ID/events       its events, as server-sent events
DELETE /v1/jobs/ID              cancels it
GET    /v1/files/NAME.png       a finished image
GET    /v1/models               the models, /v1/models/NAME one of them
GET    /metrics /healthz /readyz /docs /openapi.json, and / for the page
"""

import asyncio
import base64
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Annotated, Any

import anyio
from fastapi import APIRouter, FastAPI, Header, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.types import Receive, Scope, Send

from atoll import __version__
from atoll.errors import escaped
from atoll.serve.bodies import GenerationBody, JobBody, image_request, read_body
from atoll.serve.describe import ModelCard, model_card
from atoll.serve.engine import Engine
from atoll.serve.files import FileStore
from atoll.serve.guard import Guard
from atoll.serve.jobs import JobStore, ServedJob, ServedModel
from atoll.serve.metrics import ServerMetrics
from atoll.serve.openapi import BODY_EXAMPLES, describe_bodies, error_responses
from atoll.serve.pages import add_pages
from atoll.serve.refusals import Refusal, add_error_handlers, logger
from atoll.serve.settings import DEFAULTS, ServerSettings

_GRACE_SECONDS = 3.0  # for the last events of streams when the server ends
_SEND_SECONDS = 30.0  # for a reader of events to take one
_MAX_KEY = 256  # characters of an Idempotency-Key

IdempotencyKey = Annotated[
    str | None,
    Header(description="A repetition with the same key gets the first images.", max_length=_MAX_KEY),
]


class Service:
    """The state of one app.

    Args:
        engines: the engines by their model's name; the first is the default.
        settings: the limits.
    """

    def __init__(self, engines: Mapping[str, Engine], settings: ServerSettings):
        self.settings = settings
        self.metrics = ServerMetrics(engines)
        self.models: dict[str, ServedModel] = {}
        for name, engine in engines.items():
            card = model_card(name, engine.pipeline.loaded, default=not self.models, licence=settings.licence)
            self.models[name] = ServedModel(card, engine, settings.weights)
        self.files = FileStore(settings.keep_seconds, settings.keep_bytes)
        self.jobs = JobStore(settings, self.files, self.metrics)
        self.streams: Counter[str] = Counter()  # by client
        self.metrics.unfinished.set_function(lambda: self.jobs.unfinished)
        self.metrics.streams.set_function(lambda: sum(self.streams.values()))
        self.metrics.file_bytes.set_function(lambda: self.files.bytes)

    def model(self, name: str | None) -> ServedModel:
        """Return a model by its name; the first one without a name. Raises Refusal if there is none."""
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            names = ", ".join(self.models)
            message = f"no model {name!r:.80}; expected one of {names}"
            raise Refusal(404, message, param="model", code="model_not_found")
        return self.models[name]

    def close(self) -> None:
        """Send every unfinished job its last event, and accept no more. The engines stay open."""
        self.jobs.close()

    async def submit(self, request: Request, kind: type[GenerationBody], key: str | None) -> ServedJob:
        """Start the job that a request's body describes, or return the one that it repeats."""
        body = await read_body(request, kind, self.settings)
        client: str = request.scope["client_name"]
        full_key = None if key is None else (client, request.url.path, key)
        if (job := self.jobs.repeated(full_key, content := body.model_dump_json().encode())) is not None:
            return job
        # In several processes, the next request would not find a file.
        response_format = body.response_format or ("b64_json" if self.settings.replicated else "url")
        if self.settings.replicated and response_format == "url":
            message = "this server has several processes and no files; expected b64_json"
            raise Refusal(400, message, param="response_format", code="invalid_value")
        model = self.model(body.model)
        images = image_request(body, model.card, self.settings, client)
        if self.settings.log_prompts:
            logger.info("%s %s", client, escaped(repr(body.prompt)))
        return self.jobs.start(
            model,
            images,
            key=full_key,
            body=content,
            preview_format=(isinstance(body, JobBody) and body.preview_format) or "png",
            response_format=response_format,
        )


def create_app(engines: Mapping[str, Engine], settings: ServerSettings = DEFAULTS) -> FastAPI:
    """Return the app; `app.state.service` is its `Service`.

    Args:
        engines: by the name of their model; the first one is the default. The caller closes them.
        settings: the limits.
    """
    service = Service(engines, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(
        title="Atoll",
        version=__version__,
        summary="Images of an ensemble. OpenAI's clients work with base_url=http://HOST:PORT/v1.",
        docs_url=None,  # FastAPI's page loads scripts from another host; ours is in pages.py
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    app.state.service = service
    add_error_handlers(app)
    for router in (_images(service), _models(service), _operation(service)):
        app.include_router(router)
    if not settings.replicated:
        app.include_router(_jobs(service))
    describe_bodies(app, [GenerationBody, JobBody])
    add_pages(app)
    app.add_middleware(Guard, settings=settings, metrics=service.metrics)
    return app


def _body(kind: type[GenerationBody]) -> dict[str, Any]:
    """Return OpenAPI's description of a body, which the route reads by itself: FastAPI's parser takes NaN."""
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    content = {"application/json": {"schema": schema, "examples": BODY_EXAMPLES}}
    return {"requestBody": {"required": True, "content": content}}


def _images(service: Service) -> APIRouter:
    """The routes of images."""
    router = APIRouter(tags=["images"], responses=error_responses(400, 401, 404, 429, 503))

    @router.post(
        "/v1/images/generations",
        summary="Sample images",
        openapi_extra=_body(GenerationBody),
        response_description="The images, with the seed of each.",
    )
    async def generate(request: Request, idempotency_key: IdempotencyKey = None) -> JSONResponse:
        """Sample images and return them in one answer, as OpenAI's API does.

        If the client goes away, the images are cancelled, unless it sent an Idempotency-Key: it may come back then.
        """
        job = await service.submit(request, GenerationBody, idempotency_key)
        await _finished_or_gone(request, job)
        # An abandoned job ends by itself; nobody reads this answer.
        if not job.done.is_set():
            return JSONResponse({}, 499)
        if job.failure is not None:
            raise job.refusal()
        # Encoding megabytes takes a while, and others wait for the event loop.
        answer = await asyncio.to_thread(_answer, job, str(request.base_url))
        if job.key is None:
            service.jobs.remove(job)
        return answer

    @router.get("/v1/files/{name}", summary="A finished image", response_class=Response)
    async def file(name: str) -> Response:
        """Return an image by its unguessable name, which is all that protects it. Images stay for a limited time."""
        if (content := service.files.get(name)) is None:
            raise Refusal(404, "no such file; files stay for a limited time", code="not_found")
        stays = f"private, max-age={int(service.settings.keep_seconds)}, immutable"
        return Response(content, media_type="image/png", headers={"cache-control": stays})

    return router


async def _finished_or_gone(request: Request, job: ServedJob) -> None:
    """Wait for the end of a job, or of the client's connection; without a key, the latter cancels the job."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    done, left = asyncio.create_task(job.done.wait()), asyncio.create_task(gone())
    try:
        await asyncio.wait({done, left}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        # Also if the server itself cancels this request.
        if not job.done.is_set() and job.key is None:
            job.cancel()
        done.cancel()
        left.cancel()


def _answer(job: ServedJob, base: str) -> JSONResponse:
    """Return the answer to a plain generation."""
    data = []
    for index, seed in enumerate(job.request.seeds):
        if job.response_format == "url":
            data.append({"url": f"{base}v1/files/{job.names[index]}", "seed": seed})
        else:
            data.append({"b64_json": base64.b64encode(job.images[index]).decode(), "seed": seed})
    card, notes = job.model.card, job.notes
    size = str(job.request.size or card.sizes[0])
    answer = {"created": job.created, "data": data, "size": size, "output_format": "png", "model": card.id}
    return JSONResponse({**answer, "truncated": list(job.truncated), **({"notes": notes} if notes else {})})


def _jobs(service: Service) -> APIRouter:
    """The routes of jobs."""
    router = APIRouter(tags=["jobs"], responses=error_responses(400, 401, 404, 429, 503))

    @router.post("/v1/jobs", status_code=202, summary="Start a job", openapi_extra=_body(JobBody))
    async def start(request: Request, idempotency_key: IdempotencyKey = None) -> JSONResponse:
        """Start a job and return at once; its events report the rest. It continues if the client goes away."""
        job = await service.submit(request, JobBody, idempotency_key)
        return JSONResponse(job.state(), 202, {"location": f"/v1/jobs/{job.id}"})

    @router.get("/v1/jobs/{id}", summary="A job's state")
    async def state(id: str) -> JSONResponse:
        """Return a job's state: queued, running, finished, failed or cancelled."""
        return JSONResponse(service.jobs.get(id).state())

    @router.delete("/v1/jobs/{id}", summary="Cancel a job")
    async def cancel(id: str) -> JSONResponse:
        """Cancel a job; its place is free at the next step. A finished job stays as it is."""
        job = service.jobs.get(id)
        job.cancel()
        return JSONResponse(job.state())

    @router.get("/v1/jobs/{id}/events", summary="A job's events", response_class=EventSourceResponse)
    async def events(
        request: Request,
        id: str,
        last_event_id: Annotated[str | None, Header(description="Continue after this event.", max_length=20)] = None,
    ) -> Response:
        """Return a job's events from the first, or from where the reader stopped.

        started, progress (step, steps), preview (index, step, b64_json), and as the last one either finished (images,
        and each expert's weight over time) or failed (reason, message). A stream without one of these two was cut.
        """
        job = service.jobs.get(id)
        after = last_event_id or "0"
        if not (after.isascii() and after.isdigit()):
            raise Refusal(400, "Last-Event-ID is no number", param="Last-Event-ID", code="invalid_value")
        # 204 keeps a browser's EventSource from coming back for ever.
        if job.log.closed and int(after) >= job.log.last_id:
            return Response(status_code=204)
        client = request.scope["client_name"]
        if service.streams[client] >= service.settings.client_streams:
            message = f"{service.settings.client_streams} event streams of yours are open; close one"
            raise Refusal(429, message, code="too_many_streams", retry_after=1)
        return _CountedStream(
            service.streams,
            client,
            job,
            int(after),
            sep="\n",
            send_timeout=_SEND_SECONDS,
            shutdown_event=anyio.Event(),
            shutdown_grace_period=_GRACE_SECONDS,
        )

    return router


class _CountedStream(EventSourceResponse):
    """An event stream that counts as its client's from the request on: many at once would all be below the limit.

    Args:
        streams: open streams by client.
        client: the client.
        job, after, options: events of a job above a number; options of `EventSourceResponse`.
    """

    def __init__(self, streams: Counter[str], client: str, job: ServedJob, after: int, **options: Any):
        super().__init__(self._follow(job, after), **options)
        self._streams, self._client, self._open = streams, client, True
        streams[client] += 1

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._release()

    async def _follow(self, job: ServedJob, after: int) -> AsyncIterator[ServerSentEvent]:
        try:
            async for event in job.log.follow(after):
                yield ServerSentEvent(event.data, event=event.name, id=str(event.id))
        finally:
            # Before the end is sent: whoever reads it may open the next stream.
            self._release()

    def _release(self) -> None:
        if self._open:
            self._open = False
            self._streams[self._client] -= 1
            if not self._streams[self._client]:
                del self._streams[self._client]


def _models(service: Service) -> APIRouter:
    """The routes of models."""
    router = APIRouter(tags=["models"], responses=error_responses(401, 404))

    @router.get("/v1/models", summary="All models")
    async def models() -> dict[str, Any]:
        """List the models: experts, routings, methods, defaults, licence, hashes; and the limits of this server."""
        settings = service.settings
        limits = {
            "n": settings.max_n,
            "steps": settings.max_steps,
            "pixels": settings.max_pixels,
            "prompt": settings.max_prompt,
            "previews": settings.max_previews,
            "priority": settings.max_priority,
            "deadline": settings.max_deadline,
        }
        data = [model.card.model_dump() for model in service.models.values()]
        return {"object": "list", "data": data, "limits": limits}

    @router.get("/v1/models/{name:path}", summary="One model")
    async def model(name: str) -> ModelCard:
        """Describe one model."""
        return service.model(name).card

    return router


def _operation(service: Service) -> APIRouter:
    """The routes for whoever operates the server."""
    router = APIRouter(tags=["operation"])

    @router.get("/metrics", summary="Numbers for Prometheus", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Return queue, batches, rows and latencies in Prometheus' text format."""
        content = await asyncio.to_thread(service.metrics.render)
        return Response(content, media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/healthz", summary="Whether the process answers")
    async def healthz() -> dict[str, str]:
        """Return 200 as long as the process answers."""
        return {"status": "ok"}

    @router.get("/readyz", summary="Whether requests are accepted")
    async def readyz() -> JSONResponse:
        """Return 200, or 503 while the server is closing or if an engine has stopped."""
        stopped = not all(model.engine.alive for model in service.models.values())
        status = "closing" if service.jobs.closing else "stopped" if stopped else "ready"
        return JSONResponse({"status": status}, 200 if status == "ready" else 503)

    return router
