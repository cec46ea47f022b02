"""What /openapi.json says beyond FastAPI's own: bodies that the routes read by themselves, errors, examples."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

BODY_EXAMPLES: dict[str, Any] = {
    "plain": {"summary": "Four images, as files", "value": {"prompt": "digit seven, sans bold", "n": 4}},
    "settings": {
        "summary": "One image that can be sampled again, with settings of its own",
        "value": {
            "prompt": "digit seven, sans bold",
            "response_format": "b64_json",
            "seed": 7,
            "steps": 30,
            "guidance_scale": 3.0,
            "guidance_range": [0.1, 0.9],
            "routing": "top-1",
        },
    },
}
_ERROR = {"error": {"message": "n: 100 images; expected at most 64", "type": "invalid_request_error", "param": "n"}}
_MEANINGS = {
    400: "A body or a parameter that is not accepted.",
    401: "No valid token.",
    404: "No such model, job or file.",
    429: "Too many requests of this client; no work began.",
    503: "No room now, or the server is closing.",
}


class ErrorDetail(BaseModel):
    """What was got, and what was expected. code: a word for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """The body of every error, in OpenAI's format."""

    error: ErrorDetail


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return OpenAPI's description of the errors of a route."""
    content = {"application/json": {"example": _ERROR}}
    return {status: {"model": ErrorAnswer, "description": _MEANINGS[status], "content": content} for status in statuses}


def describe_bodies(app: FastAPI, kinds: Sequence[type[BaseModel]]) -> None:
    """Add the schemas of bodies to an app's /openapi.json."""
    standard = app.openapi

    def openapi() -> dict[str, Any]:
        schema = standard()
        schemas = schema.setdefault("components", {}).setdefault("schemas", {})
        schemas.update({kind.__name__: kind.model_json_schema() for kind in kinds})
        # FastAPI describes errors of its own format, which this server never sends.
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        return schema

    app.openapi = openapi  # type: ignore[method-assign]
