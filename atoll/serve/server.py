"""uvicorn around an app: a socket of our own, slow clients, and an end within seconds."""

import asyncio
import logging
import os
import socket
import threading
from collections.abc import Iterable
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from atoll.errors import AtollError
from atoll.serve.engine import Engine
from atoll.serve.guard import is_loopback
from atoll.serve.rates import client_of_address
from atoll.serve.refusals import logger
from atoll.serve.settings import HEADER_BYTES, LOOPBACK_NAMES

HEADER_SECONDS = 15.0  # for a request's headers to arrive
TAKE_SECONDS = 30.0  # in which a client takes at least something of its answer
CONNECTIONS = 2048
_BACKLOG = 256  # connections that are accepted at once, before those too many of them are closed
_OTHER_FILES = _BACKLOG + 128  # that the process may have open beside its connections
_GRACE_SECONDS = 5  # for open requests to end, once their jobs have their last events


class PatientProtocol(H11Protocol):
    """HTTP/1.1 with limits that uvicorn lacks.

    A connection that sends no headers is closed, and so is one that takes nothing of an answer, or one too many. One
    address has at most half of all connections.
    """

    header_seconds = HEADER_SECONDS
    take_seconds = TAKE_SECONDS
    _header_timer: asyncio.TimerHandle | None = None
    _take_timer: asyncio.TimerHandle | None = None
    _client_name = ""
    _waiting = 0  # bytes of answers that the client had not taken when the take timer started

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timers, or close a connection too many."""
        super().connection_made(transport)
        self._client_name = client_of_address(self.client[0] if self.client else None)
        # Behind a proxy, all connections have its address.
        most = self.limit_concurrency or CONNECTIONS
        too_many = not self.config.proxy_headers and self._own_connections() > max(1, most // 2)
        if too_many or len(self.connections) > most:
            transport.abort()
            return
        self._watch()
        self._watch_taking()

    def _own_connections(self) -> int:
        """Return the number of connections of this one's client."""
        own = self._client_name
        return sum(isinstance(one, PatientProtocol) and one._client_name == own for one in self.connections)

    def _watch_taking(self) -> None:
        self._waiting = self.transport.get_write_buffer_size()
        self._take_timer = self.loop.call_later(self.take_seconds, self._check_taking)

    def _check_taking(self) -> None:
        # Also after `close`, which waits for the client without a limit.
        if 0 < self.transport.get_write_buffer_size() == self._waiting:
            self.transport.abort()
        else:
            self._watch_taking()

    def data_received(self, data: bytes) -> None:
        """Stop the timer when the headers are complete; start it when the next request begins."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        super().connection_lost(exc)
        self._stop()
        if self._take_timer is not None:
            self._take_timer.cancel()

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop()
        elif self._header_timer is None:
            self._header_timer = self.loop.call_later(self.header_seconds, self._give_up)

    def _stop(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _give_up(self) -> None:
        # While an answer is under way, its client is not slow.
        self._header_timer = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.transport.close()


class AtollServer(uvicorn.Server):
    """A server that sends unfinished jobs their last event before it ends, by SIGTERM or SIGINT with exit code 0."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End: jobs get their last event, requests their answer, then connections are closed."""
        app = self.config.loaded_app
        while not isinstance(app, FastAPI):
            app = app.app
        app.state.service.close()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: Any) -> None:
        """End gracefully; at once with the second signal."""
        # uvicorn would raise the signal again at the end, which is an exit code of failure.
        self.force_exit = self.should_exit
        self.should_exit = True


def make_server(app: FastAPI, forwarded_from: str | None = None, **options: Any) -> AtollServer:
    """Return a server for an app.

    Args:
        app: from `create_app`.
        forwarded_from: addresses of proxies, by commas, whose X-Forwarded-For names the client; None: nobody's.
        options: more options of `uvicorn.Config`.
    """
    values: dict[str, Any] = {
        "http": PatientProtocol,
        "ws": "none",
        "loop": "asyncio",
        "lifespan": "on",
        "log_config": None,
        "access_log": False,  # with queries; the guard logs requests
        "server_header": False,
        "proxy_headers": forwarded_from is not None,
        "forwarded_allow_ips": forwarded_from or "",
        "h11_max_incomplete_event_size": HEADER_BYTES,
        "limit_concurrency": connection_limit(),
        "backlog": _BACKLOG,
        "timeout_graceful_shutdown": _GRACE_SECONDS,
    }
    return AtollServer(uvicorn.Config(app, **{**values, **options}))


def connection_limit() -> int:
    """Return how many connections there may be, after raising the limit of open files as far as they need it.

    Without files for them, asyncio writes thousands of log lines per second.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return CONNECTIONS
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = CONNECTIONS + _OTHER_FILES
    if 0 <= files < wanted:  # -1: unlimited
        files = min(wanted, most) if most >= 0 else wanted
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, most))
    return CONNECTIONS if files < 0 else max(2, min(CONNECTIONS, files - _OTHER_FILES))


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound, so that a port in use is known before anything is loaded.

    Raises:
        AtollError: an unknown address, or a port that is in use or not allowed.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError, OverflowError) as error:
        raise AtollError(f"--host {host}: no such address ({error}); expected one of this machine") from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        bound.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise AtollError(f"{host} port {port}: {reason.lower()}; choose another --port or --host") from None
    return bound


def close_engines(engines: Iterable[Engine], seconds: float = 5.0) -> bool:
    """Close engines. Returns whether all were closed within the time: a long step cannot be interrupted."""
    threads = [threading.Thread(target=engine.close, daemon=True) for engine in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
    return not any(thread.is_alive() for thread in threads)


def end_process() -> None:
    """End the process at once, whatever its threads do."""
    os._exit(0)


def check_access(host: str, tokens: tuple[str, ...]) -> tuple[str, ...] | None:
    """Return the accepted Host names; None: any.

    Args:
        host: the address to listen on.
        tokens: the accepted tokens.

    Raises:
        AtollError: other machines could use the server without a token, or a token is too short.
    """
    # A short token can be guessed, whatever the rate limit.
    if any(len(token) < 8 or not token.isascii() or not token.isprintable() or " " in token for token in tokens):
        raise AtollError("--token: expected at least 8 ASCII characters without spaces")
    if is_loopback(host):
        return (*LOOPBACK_NAMES, host)
    if not tokens:
        raise AtollError(f"--host {host}: other machines could use the server; set --token or ATOLL_TOKEN")
    return None


def address_of(host: str, listener: socket.socket) -> str:
    """Return the URL of a listening socket."""
    name = f"[{host}]" if ":" in host else host
    return f"http://{name}:{listener.getsockname()[1]}"


def log_to_stderr() -> None:
    """Log requests and errors to stderr."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    logger.setLevel(logging.INFO)
