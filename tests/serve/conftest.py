"""A server on loopback with a fake engine, and its clients."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from atoll.pipeline import Pipeline
from atoll.serve.app import create_app
from atoll.serve.server import AtollServer, bind, make_server
from atoll.serve.settings import ServerSettings
from tests.serve.browser import chromium, studio
from tests.serve.fake_engine import FakeEngine
from tests.waiting import wait_until


@pytest.fixture(scope="session")
def pipeline(trained_run) -> Pipeline:
    return Pipeline.from_pretrained(trained_run / "ensemble")


@pytest.fixture
def engine(pipeline) -> FakeEngine:
    return FakeEngine(pipeline)


class RunningServer:
    """uvicorn in a thread."""

    def __init__(self, app: Any, **options: Any):
        self.app = app
        self.listener = bind("127.0.0.1", 0)
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server: AtollServer = make_server(app, **options)
        self._thread = threading.Thread(target=self.server.run, args=([self.listener],), daemon=True)
        self._thread.start()
        wait_until(lambda: self.server.started)

    def stop(self) -> None:
        self.server.should_exit = True
        self._thread.join()


@pytest.fixture
def serve(engine) -> Iterator[Callable[..., RunningServer]]:
    """Starts servers of the fake engine: serve(rate=60) has these settings."""
    servers = []

    def start(options: dict[str, Any] | None = None, **settings: Any) -> RunningServer:
        app = create_app({"tiny": engine}, ServerSettings(**{"rate": 0, **settings}))
        servers.append(RunningServer(app, **(options or {})))
        return servers[-1]

    yield start
    engine.release()
    for server in servers:
        server.stop()


@pytest.fixture
def server(serve) -> RunningServer:
    return serve()


@pytest.fixture
def client(server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url) as client:
        yield client


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser, server):
    with studio(browser, server.url) as page:
        yield page
