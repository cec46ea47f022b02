"""Errors as OpenAI's clients expect them: {"error": {"message", "type", "param", "code"}}.

The client repeats a request after 408, 409, 429, 5xx and lost connections, up to two times. Only a refusal before any
work began may be repeated; every other error says `x-should-retry: false`, so that no image is sampled twice.
"""

import logging
import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from atoll.errors import AtollError, escaped

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}

logger = logging.getLogger("atoll.serve")


class Refusal(Exception):
    """A request that is answered with an error.

    Args:
        status: the HTTP status, from 400.
        message: one line: what was got, what was expected.
        param: the parameter of the request that is wrong.
        code: a word for programs, such as "unknown_parameter".
        retry_after: seconds after which the same request may succeed; only if no work began. None: never repeat.
        headers: more headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, escaped(message), param, code
        self.retry_after, self.headers = retry_after, headers or {}

    def content(self) -> dict[str, Any]:
        """Return the error's JSON."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """Return the HTTP answer."""
        # The client waits as long as Retry-After says, so it is never long.
        if self.retry_after is None:
            retry = {"x-should-retry": "false"}
        else:
            retry = {"retry-after": str(min(60, max(1, math.ceil(self.retry_after))))}
        return JSONResponse(self.content(), self.status, {**retry, **self.headers})


def add_error_handlers(app: FastAPI) -> None:
    """Answer every exception of an app in the error format."""

    async def refuse(_: Request, error: Exception) -> Response:
        return as_refusal(error).response()

    for kind in (Refusal, AtollError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, refuse)


def as_refusal(error: Exception) -> Refusal:
    """Return what a client reads about an exception; nothing of an unexpected one."""
    # An AtollError is a message for whoever sent the request.
    if isinstance(error, Refusal):
        return error
    if isinstance(error, AtollError):
        return Refusal(400, str(error), code="invalid_value")
    if isinstance(error, HTTPException):
        return Refusal(error.status_code, str(error.detail), headers=dict(error.headers or {}))
    if isinstance(error, RequestValidationError):
        return Refusal(400, "the address or a header of the request is not valid", code="invalid_value")
    # Everything else is a mistake of the server, and its log has the traceback.
    return Refusal(500, "the server failed; its log says why")
