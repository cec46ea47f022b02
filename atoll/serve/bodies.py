"""The bodies of requests: strict JSON, strict types, and the image request that they mean."""

import asyncio
import json
import math
import secrets
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import ClientDisconnect

from atoll.choices import Method
from atoll.ensemble import Alignment
from atoll.ensemble.routing import Nucleus, Oracle, Sample, parse_routing
from atoll.errors import AtollError
from atoll.image_size import ImageSize
from atoll.serve.describe import ModelCard
from atoll.serve.refusals import Refusal
from atoll.serve.settings import ServerSettings
from atoll.serve.types import ImageRequest
from atoll.storage import bounds

MAX_SEED = 2**53 - 1  # what a browser's numbers hold
_MAX_DRAWS = 64  # of routing sample-N, which hashes N numbers per image and step
_MIN_TEMPERATURE = 0.01  # of routing nucleus; less overflows
_MAX_SCALE = 100.0  # of guidance, in either direction
_MAX_SHIFT = 100.0  # of times, and its inverse

BodyT = TypeVar("BodyT", bound=BaseModel)
_Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]


class GenerationBody(BaseModel):
    """Body of POST /v1/images/generations. Null means the default. What OpenAI's API lacks is an extension."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    prompt: str = Field(description="What the images show.")
    model: str | None = Field(None, description="A name of GET /v1/models; default: the first one.")
    n: int | None = Field(None, ge=1, description="Number of images; default 1.")
    size: str | None = Field(None, max_length=32, description='WIDTHxHEIGHT in pixels, or "auto".')
    response_format: Literal["url", "b64_json"] | None = Field(None, description="Default url.")
    output_format: Literal["png"] | None = None
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    stream: Literal[False] | None = Field(None, description="Event streams are at POST /v1/jobs.")
    user: str | None = Field(None, max_length=256, description="Ignored: a client is its token or its address.")
    safety_identifier: str | None = Field(None, max_length=256, description="Ignored, as user is.")
    # extensions
    negative_prompt: str | None = Field(None, description="Extension. Needs guidance.")
    seed: _Seed | None = Field(None, description="Extension. Of the first image; the others count up.")
    seeds: list[_Seed] | None = Field(None, min_length=1, max_length=4096, description="Extension. One per image.")
    steps: int | None = Field(None, ge=1, description="Extension. Steps of the solver.")
    guidance_scale: float | None = Field(None, ge=-_MAX_SCALE, le=_MAX_SCALE, description="Extension.")
    guidance_range: list[Annotated[float, Field(ge=0, le=1)]] | None = Field(
        None,
        min_length=2,
        max_length=2,
        description="Extension. Times between which there is guidance: 0 data, 1 noise.",
    )
    method: Method | None = Field(None, description="Extension. The solver.")
    routing: str | None = Field(None, max_length=bounds.MAX_NAME, description="Extension. How experts are weighted.")
    shift: float | None = Field(
        None, ge=1 / _MAX_SHIFT, le=_MAX_SHIFT, description="Extension. Of the solver's times towards noise; 1: none."
    )
    alignment: Alignment | None = Field(None, description="Extension. snr is exact.")
    cluster: int | None = Field(None, ge=0, description="Extension. For routing oracle.")
    priority: int | None = Field(None, ge=-8, le=8, description="Extension. Your share is multiplied by 2^priority.")
    deadline: float | None = Field(None, gt=0, description="Extension. Seconds after which the request fails.")


class JobBody(GenerationBody):
    """Body of POST /v1/jobs."""

    preview_every: int | None = Field(None, ge=0, description="Steps between previews; default 0: none.")
    preview_format: Literal["png", "jpeg"] | None = Field(None, description="Default png.")


async def read_body(request: Request, kind: type[BodyT], settings: ServerSettings) -> BodyT:
    """Read and validate a request's body.

    Raises:
        Refusal: too large, too slow, no JSON, or not of this kind.
    """
    values = parse_json(await _read(request, settings))
    if not isinstance(values, dict):
        raise Refusal(400, "the body is no JSON object", code="invalid_json")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        _refuse_body(error, kind)


async def _read(request: Request, settings: ServerSettings) -> bytes:
    """Return the body's bytes; also of a chunked body, no more than allowed are held."""
    too_large = Refusal(413, f"the body has more than {settings.max_body:,} bytes", code="body_too_large")
    length = request.headers.get("content-length", "0")
    if not length.isdigit() or int(length[:20]) > settings.max_body:
        raise too_large
    content = bytearray()
    try:
        async with asyncio.timeout(settings.body_seconds):
            async for chunk in request.stream():
                content += chunk
                if len(content) > settings.max_body:
                    raise too_large
    except TimeoutError:
        message = f"the body did not arrive within {settings.body_seconds:g} s"
        raise Refusal(408, message, code="body_too_slow") from None
    except ClientDisconnect:
        raise Refusal(400, "the connection ended within the body") from None
    return bytes(content)


def parse_json(content: bytes) -> Any:
    """Parse strict JSON: UTF-8, no NaN, no number that overflows, no key twice, no lone surrogate.

    Raises:
        Refusal: it is not.
    """
    try:
        values = json.loads(
            content.decode("utf-8"), parse_float=_finite, parse_constant=_no_constant, object_pairs_hook=_unique
        )
    except RecursionError:
        raise Refusal(400, "lists and objects of the body are nested too deeply", code="invalid_json") from None
    except UnicodeDecodeError:
        raise Refusal(400, "the body is not UTF-8", code="invalid_json") from None
    except json.JSONDecodeError as error:
        raise Refusal(400, f"the body is no JSON: {error.msg} at character {error.pos}", code="invalid_json") from None
    except ValueError as error:
        # Python's own message about long integers names its configuration.
        reason = "a number has too many digits" if "digits" in str(error) else str(error)
        raise Refusal(400, f"the body is no JSON: {reason}", code="invalid_json") from None
    return values


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError("a number is too large")
    return value


def _no_constant(text: str) -> NoReturn:
    # Python's parser would accept NaN and Infinity.
    raise ValueError(f"{text} is no JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key occurs twice")
    # Half of a surrogate pair cannot be encoded, neither for a text encoder nor in a file.
    for text in (*values, *(value for value in values.values() if isinstance(value, str))):
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError("a string has half of a surrogate pair")
    return values


def _refuse_body(error: ValidationError, kind: type[BaseModel]) -> NoReturn:
    """Refuse a body by the first thing that is wrong with it; values are not repeated, they may be prompts."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    param = str(first["loc"][0])[:64] if first["loc"] else None
    if first["type"] == "extra_forbidden":
        message = f"unknown parameter {param!r}; expected {', '.join(kind.model_fields)}"
        raise Refusal(400, message, param=param, code="unknown_parameter")
    if first["type"] == "missing":
        raise Refusal(400, f"{param} is missing", param=param, code="missing_required_parameter")
    where = "".join(f"[{part}]" for part in first["loc"][1:] if isinstance(part, int))
    raise Refusal(400, f"{param}{where}: {first['msg'][:200]}", param=param, code="invalid_value")


def image_request(body: GenerationBody, card: ModelCard, settings: ServerSettings, user: str) -> ImageRequest:
    """Return the request that a body means, within the server's limits.

    Args:
        body: the body.
        card: the model that it is for.
        settings: the limits.
        user: the client.

    Raises:
        Refusal: a value beyond a limit, or one that the model does not have.
    """
    _limit("prompt", len(body.prompt), settings.max_prompt, "characters")
    _limit("negative_prompt", len(body.negative_prompt or ""), settings.max_prompt, "characters")
    seeds = _seeds(body, settings)
    size = _size(body.size, card)
    _limit("n", len(seeds) * size.width * size.height, settings.max_pixels, "pixels in all images")
    steps = card.defaults.steps if body.steps is None else body.steps
    _limit("steps", steps, settings.max_steps, "steps")
    _limit("priority", body.priority or 0, settings.max_priority, "for clients")
    _limit("deadline", body.deadline or 0, settings.max_deadline, "seconds")
    _check_routing(body.routing, body.cluster, card.clusters)
    every = _preview_every(body, steps, len(seeds), settings)
    low, high = body.guidance_range or (0.0, 1.0)
    if low > high:
        raise _invalid("guidance_range", f"guidance_range is {low:g} to {high:g}; expected the smaller time first")
    return ImageRequest(
        prompt=body.prompt,
        seeds=seeds,
        negative_prompt=body.negative_prompt,
        steps=body.steps,
        guidance_scale=body.guidance_scale,
        guidance_range=(low, high),
        method=body.method,
        routing=body.routing,
        alignment=body.alignment or "snr",
        cluster=body.cluster,
        user=user,
        priority=body.priority or 0,
        deadline=body.deadline,
        preview_every=every,
        size=size,
        shift=body.shift,
    )


def _size(text: str | None, card: ModelCard) -> ImageSize:
    """Return the size of a request's images: the main one, or any that the networks take."""
    main = ImageSize(card.height, card.width)
    if text in (None, "auto"):
        return main
    try:
        size = ImageSize.parse(text or "", "size")
        if size != main:
            size.require_multiple(card.size_step, "size")
    except AtollError as error:
        raise _invalid("size", str(error)) from None
    return size


def _seeds(body: GenerationBody, settings: ServerSettings) -> tuple[int, ...]:
    """Return one seed per image: those of the body, those that count up from the first, or random ones."""
    if body.seed is not None and body.seeds is not None:
        raise _invalid("seeds", "seed and seeds are both set; expected one of them")
    if body.seeds is not None and body.n not in (None, len(body.seeds)):
        raise _invalid("seeds", f"{len(body.seeds)} seeds for n = {body.n}; expected one seed per image")
    count = len(body.seeds) if body.seeds is not None else body.n or 1
    _limit("n", count, settings.max_n, "images")
    if body.seeds is not None:
        return tuple(body.seeds)
    if body.seed is None:
        return tuple(secrets.randbelow(2**31) for _ in range(count))
    if body.seed + count - 1 > MAX_SEED:
        raise _invalid("seed", f"seed: the last of {count} seeds is above {MAX_SEED}")
    return tuple(range(body.seed, body.seed + count))


def _check_routing(text: str | None, cluster: int | None, clusters: int) -> None:
    """Refuse a routing that does not exist, costs too much, or names a cluster that does not exist."""
    if cluster is not None and cluster >= clusters:
        raise _invalid("cluster", f"cluster is {cluster}; expected a number below {clusters}")
    if text is None:
        return
    try:
        routing = parse_routing(text)
    except AtollError as error:
        raise _invalid("routing", str(error)) from None
    if isinstance(routing, Oracle) and routing.cluster is not None and routing.cluster >= clusters:
        raise _invalid("routing", f"routing: cluster {routing.cluster}; expected a number below {clusters}")
    if isinstance(routing, Sample):
        _limit("routing", routing.count, _MAX_DRAWS, "draws")
    if isinstance(routing, Nucleus) and routing.temperature < _MIN_TEMPERATURE:
        raise _invalid("routing", f"routing: the temperature is below {_MIN_TEMPERATURE}")


def _preview_every(body: GenerationBody, steps: int, images: int, settings: ServerSettings) -> int:
    """Return the steps between previews; 0: none."""
    every = (body.preview_every or 0) if isinstance(body, JobBody) else 0
    if every:
        _limit("preview_every", math.ceil(steps / every) * images, settings.max_previews, "previews")
    return every


def _limit(param: str, value: float, most: float, unit: str) -> None:
    if value > most:
        raise _invalid(param, f"{param}: {value:,} {unit}; expected at most {most:,}")


def _invalid(param: str, message: str) -> Refusal:
    return Refusal(400, message, param=param, code="invalid_value")
