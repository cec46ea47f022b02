"""Before every route: host, origin, token, rate. After it: security headers, a log line, counts."""

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import itertools
import re
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from atoll.errors import escaped
from atoll.serve.metrics import ServerMetrics
from atoll.serve.rates import RateLimit, client_of_address
from atoll.serve.refusals import Refusal, as_refusal, logger
from atoll.serve.settings import HEADER_BYTES, ServerSettings

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}
# What needs no token: the page, its files, the description of the API, health, and images, whose names are secrets.
_OPEN = ("/", "/docs", "/openapi.json", "/healthz", "/readyz")
_OPEN_BELOW = ("/static/", "/v1/files/")
_READING = ("GET", "HEAD")
# Of a body that is refused, as much is read, so that its client gets the answer.
_DRAIN_BYTES = 2**24
_DRAIN_SECONDS = 5.0
_DRAIN_PAUSE = 0.5  # whoever sends nothing for so long has the answer already


class Guard:
    """ASGI middleware. Pure, so that routes see a client that goes away.

    Args:
        app: the app behind it.
        settings: tokens, hosts, rate.
        metrics: counts requests.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings, metrics: ServerMetrics):
        self._app, self._settings, self._metrics = app, settings, metrics
        # Hashes have one length, so the time of a comparison depends on no token.
        self._tokens = [hashlib.sha256(token.encode()).digest() for token in settings.tokens]
        self._rate = RateLimit(settings.rate)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, complete = time.perf_counter(), not _has_body(Headers(scope=scope))
        status: int | None = None

        async def receive_body() -> Message:
            nonlocal complete
            message = await receive()
            complete = complete or not message.get("more_body", False)
            return message

        async def send_guarded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("cache-control", "no-store")
                # Whoever is answered before the body ended does not send the rest.
                if not complete:
                    headers["connection"] = "close"
            elif not complete and status != 408 and not message.get("more_body", False):
                # A client that still sends loses the answer if the connection is closed: it may send a little more.
                await send({**message, "more_body": True})
                message = {"type": "http.response.body"}
                await _drain(receive_body)
            await send(message)

        try:
            try:
                scope["client_name"] = self._admit(scope)
            except Refusal as refusal:
                await refusal.response()(scope, receive_body, send_guarded)
            else:
                await self._app(scope, receive_body, send_guarded)
        except Exception:
            # Once an answer has begun, only the connection can be ended.
            if status is not None:
                raise
            logger.exception("%s %s", scope["method"][:20], escaped(scope["path"][:200]))
            await as_refusal(RuntimeError()).response()(scope, receive_body, send_guarded)
        finally:
            seconds, route = time.perf_counter() - started, getattr(scope.get("route"), "path", "other")
            self._metrics.request(scope["method"], route, status or 0, seconds)
            # A path is foreign text, and a query is not logged at all.
            line = escaped(f"{scope['method']:.20} {scope['path']:.200} {status or 0} {seconds:.3f} s")
            logger.info("%s %s", scope.get("client_name", "refused"), line)

    def _admit(self, scope: Scope) -> str:
        """Return the client's name. Raises Refusal if the request is not to be handled."""
        headers, method, path = Headers(scope=scope), scope["method"], scope["path"]
        # uvicorn's own limit does not apply to headers that arrive together.
        address_size = len(scope.get("raw_path") or path) + len(scope["query_string"])
        size = address_size + sum(map(len, itertools.chain(*scope["headers"])))
        if size > HEADER_BYTES:
            raise Refusal(431, f"the address and the headers have more than {HEADER_BYTES:,} bytes", code="too_large")
        address = client_of_address(scope["client"][0] if scope.get("client") else None)
        # A name that resolves to this machine but is not its own: DNS rebinding.
        host = headers.get("host", "")
        if self._settings.hosts is not None and _name_of(host) not in self._settings.hosts:
            expected = ", ".join(self._settings.hosts)
            raise Refusal(403, f"the Host header is {host!r:.80}; expected {expected}", code="unknown_host")
        # Browsers send simple requests of other sites without a preflight; only a token keeps them out.
        if not self._tokens and method not in _READING and _from_elsewhere(headers, host):
            raise Refusal(403, "requests from other sites are not accepted", code="cross_origin")
        client = address
        if self._tokens and path not in _OPEN and not path.startswith(_OPEN_BELOW):
            number = self._token(headers)
            if number is None:
                self._take(f"refused {address}")
                message = "no valid token; send the header `Authorization: Bearer TOKEN`"
                raise Refusal(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
            # Several tokens are several clients; one token is shared by all, who differ by address.
            client = f"token {number + 1}" if len(self._tokens) > 1 else address
        if method not in _READING:
            self._take(client)
        return client

    def _token(self, headers: Headers) -> int | None:
        """Return the number of the token that a request has, in constant time; None without a valid one."""
        kind, _, value = headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(value.strip().encode("utf-8", "surrogateescape")).digest()
        # All tokens are compared, whichever fits.
        fits = [hmac.compare_digest(digest, token) for token in self._tokens]
        return fits.index(True) if any(fits) and kind.lower() == "bearer" else None

    def _take(self, client: str) -> None:
        wait = self._rate.take(client)
        if wait:
            message = f"more than {self._settings.rate:g} requests per minute; try again in {wait:.1f} s"
            raise Refusal(429, message, code="rate_limit_exceeded", retry_after=wait)


def is_loopback(host: str) -> bool:
    """Return whether an address can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _name_of(host: str) -> str:
    """Return the name or address in a Host header, without the port; "" if it is none."""
    match = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([\w.-]+))(?::\d*)?", host.lower(), re.ASCII)
    return "" if match is None else (match[1] or match[2]).rstrip(".")


def _from_elsewhere(headers: Headers, host: str) -> bool:
    """Return whether a browser sent the request for a page of another site."""
    if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        return True
    origin = headers.get("origin")
    return origin is not None and origin.partition("://")[2] != host


async def _drain(receive: Receive) -> None:
    """Discard the rest of a body, within limits."""
    left = _DRAIN_BYTES
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DRAIN_SECONDS):
            more = True
            while more and left > 0:
                message = await asyncio.wait_for(receive(), _DRAIN_PAUSE)
                more, left = message.get("more_body", False), left - len(message.get("body", b""))


def _has_body(headers: Headers) -> bool:
    return "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
