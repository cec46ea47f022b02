"""Hosts, origins, tokens, rates, headers, slow clients, logs."""

import logging
import socket
import sys
from collections.abc import Callable

import httpx
import pytest

from atoll.errors import AtollError
from atoll.serve.server import CONNECTIONS, PatientProtocol, bind, check_access, connection_limit
from tests.waiting import SILENCE, wait_until

BODY = {"prompt": "a secret prompt"}
TOKENS = ("correct-horse", "battery-staple")


@pytest.fixture
def limited(serve) -> Callable[..., httpx.Client]:
    return lambda **settings: httpx.Client(base_url=serve(**settings).url)


@pytest.mark.parametrize("host", ["localhost", "localhost:9000", "127.0.0.1", "[::1]:8080", "LOCALHOST."])
def test_names_of_this_machine_are_accepted(client, host) -> None:
    assert client.get("/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.com", "127.0.0.1.evil.com", "evil@localhost", "localhost/evil", "", "[::1"])
def test_a_name_of_another_site_is_refused(client, engine, host) -> None:
    for method, path in (("GET", "/v1/models"), ("POST", "/v1/images/generations"), ("GET", "/")):
        response = client.request(method, path, json=BODY, headers={"Host": host})
        assert (response.status_code, response.json()["error"]["code"]) == (403, "unknown_host")
    assert not engine.jobs


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.com"},
        {"Origin": "null"},
        {"Origin": "http://["},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_a_page_of_another_site_cannot_use_the_server(client, engine, headers) -> None:
    response = client.post("/v1/images/generations", json=BODY, headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (403, "cross_origin")
    assert not engine.jobs
    # No header allows it, also not in advance.
    answers = [response, client.options("/v1/jobs", headers={**headers, "Access-Control-Request-Method": "POST"})]
    assert not [name for answer in answers for name in answer.headers if name.startswith("access-control")]


def test_the_servers_own_page_can_use_it(client) -> None:
    headers = {"Origin": str(client.base_url).rstrip("/"), "Sec-Fetch-Site": "same-origin"}
    assert client.post("/v1/images/generations", json=BODY, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer wrong-horse", "Basic correct-horse", "correct-horse", "Bearer \xe9\xff"],
)
def test_without_a_token_nothing_is_done(limited, engine, authorization) -> None:
    client = limited(tokens=TOKENS)
    headers = {} if authorization is None else {"Authorization": authorization.encode("latin-1")}
    for method, path in (("POST", "/v1/images/generations"), ("POST", "/v1/jobs"), ("GET", "/v1/jobs/x/events")):
        response = client.request(method, path, json=BODY, headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
        assert response.headers["www-authenticate"] == "Bearer"
    for path in ("/v1/models", "/metrics", "/v1/jobs/x", "/static/../v1/models", "//v1/models"):
        assert client.get(path, headers=headers).status_code == 401
    assert not engine.jobs


def test_with_a_token_everything_works_and_the_page_needs_none(limited) -> None:
    client = limited(tokens=TOKENS)
    for token in TOKENS:
        response = client.post("/v1/images/generations", json=BODY, headers={"Authorization": f"Bearer {token}"})
        assert response.status_code == 200
    url = response.json()["data"][0]["url"]
    for path in (url, "/healthz", "/readyz", "/docs", "/openapi.json", "/static/docs.css"):
        assert client.get(path).status_code == 200


def test_each_client_has_its_rate(limited, engine) -> None:
    client = limited(rate=6, tokens=TOKENS)
    headers = [{"Authorization": f"Bearer {token}"} for token in TOKENS]
    assert client.post("/v1/jobs", json=BODY, headers=headers[0]).status_code == 202
    response = client.post("/v1/jobs", json=BODY, headers=headers[0])
    assert (response.status_code, response.json()["error"]["type"]) == (429, "rate_limit_error")
    assert 1 <= int(response.headers["retry-after"]) <= 60
    # Reading is not limited, and neither is the other client.
    assert client.get("/v1/models", headers=headers[0]).status_code == 200
    assert client.post("/v1/jobs", json=BODY, headers=headers[1]).status_code == 202
    assert len(engine.jobs) == 2


def test_tokens_cannot_be_tried_quickly(limited) -> None:
    client = limited(rate=6, tokens=TOKENS)
    answers = [client.get("/v1/models", headers={"Authorization": f"Bearer {i}"}).status_code for i in range(2)]
    assert answers == [401, 429]
    # Whoever has a token is not locked out by those who try.
    assert client.get("/v1/models", headers={"Authorization": f"Bearer {TOKENS[0]}"}).status_code == 200


def test_a_forwarded_address_is_trusted_only_from_a_named_proxy(serve) -> None:
    for options, expected in (({}, [202, 429]), ({"forwarded_from": "127.0.0.1"}, [202, 202])):
        with httpx.Client(base_url=serve(options, rate=6).url) as client:
            answers = [
                client.post("/v1/jobs", json=BODY, headers={"X-Forwarded-For": f"10.0.0.{i}"}).status_code
                for i in range(2)
            ]
        assert answers == expected


def test_every_answer_carries_the_security_headers(client) -> None:
    paths = ("/", "/docs", "/v1/models", "/nothing", "/v1/jobs/x", "/static/docs.css", "/v1/files/x.png")
    for path in paths:
        headers = client.get(path).headers
        assert "default-src 'none'; script-src 'self'" in headers["content-security-policy"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert headers["cache-control"]
        assert "server" not in headers


def test_unexpected_errors_show_nothing_of_the_server(client, engine, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("internal details")

    monkeypatch.setattr(engine, "submit", fail)
    response = client.post("/v1/images/generations", json=BODY)
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "details" not in response.text
    assert response.headers["x-should-retry"] == "false"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert client.get("/healthz").status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/v1/jobs/", 404),
        ("POST", "/v1/models", 405),
        ("PUT", "/v1/jobs", 405),
        ("BREW", "/", 405),
        ("GET", "/v1/files/..%2f..%2fetc%2fpasswd", 404),
        ("GET", "/static/..%2fapp.py", 404),
        ("GET", "/static/%00", 404),
    ],
)
def test_what_does_not_exist_is_an_error_in_the_format(client, method, path, status) -> None:
    response = client.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]["message"]
    assert response.headers["x-should-retry"] == "false"


def test_prompts_are_logged_only_if_wanted(serve, caplog) -> None:
    for log_prompts in (False, True):
        caplog.clear()
        with caplog.at_level(logging.INFO), httpx.Client(base_url=serve(log_prompts=log_prompts).url) as client:
            client.post("/v1/images/generations", json={"prompt": "a secret\nprompt"})
            client.get("/v1/models?query=secret")
            client.post("/v1/images/generations", json={"prompt": "a secret prompt", "steps": "secret"})
        text = "\n".join(record.getMessage() for record in caplog.records if record.name == "atoll.serve")
        assert "127.0.0.1 POST /v1/images/generations 200" in text
        assert ("secret" in text) == log_prompts
        assert "'a secret\\nprompt'" in text or not log_prompts


def connected(server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), SILENCE)


@pytest.mark.parametrize("sent", [b"", b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: "], ids=["nothing", "half"])
def test_a_client_that_sends_no_headers_is_disconnected(serve, monkeypatch, sent) -> None:
    monkeypatch.setattr(PatientProtocol, "header_seconds", 0.05)
    with connected(serve()) as connection:
        connection.sendall(sent)
        assert connection.recv(100) == b""


def test_a_client_whose_second_request_is_slow_is_disconnected(serve, monkeypatch) -> None:
    monkeypatch.setattr(PatientProtocol, "header_seconds", 0.05)
    with connected(serve()) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        received = connection.recv(1000)
        connection.sendall(b"GET /hea")
        while part := connection.recv(1000):
            received += part
    assert received.count(b"HTTP/1.1 200") == 1


def test_the_time_for_headers_does_not_limit_answers(serve, engine, monkeypatch) -> None:
    monkeypatch.setattr(PatientProtocol, "header_seconds", 0.05)
    engine.hold()
    with httpx.Client(base_url=serve().url) as client:
        # The engine goes on only after the time for headers of another connection is over.
        with connected_later(client, engine) as connection:
            assert connection.recv(100) == b""
            engine.release()
        assert client.get("/healthz").status_code == 200
    assert not engine.jobs[0].cancelled.is_set()


def connected_later(client: httpx.Client, engine) -> socket.socket:
    """Start a generation, then open another connection."""
    import threading

    def generate() -> None:
        with httpx.Client(base_url=client.base_url, timeout=SILENCE) as other:
            assert other.post("/v1/images/generations", json=BODY).status_code == 200

    threading.Thread(target=generate, daemon=True).start()
    wait_until(lambda: engine.jobs)
    return socket.create_connection((client.base_url.host, client.base_url.port), SILENCE)


def test_a_body_that_does_not_arrive_is_refused(serve, engine) -> None:
    with connected(serve(body_seconds=0.05)) as connection:
        head = b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"
        connection.sendall(head)
        received = b""
        while part := connection.recv(1000):
            received += part
    assert received.startswith(b"HTTP/1.1 408")
    assert b"x-should-retry: false" in received
    assert b'"body_too_slow"' in received
    assert not engine.jobs


def test_headers_beyond_a_size_are_refused(serve) -> None:
    with connected(serve()) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 17_000)
        assert connection.recv(100).startswith(b"HTTP/1.1 400")


def test_headers_beyond_a_size_are_refused_also_when_they_arrive_together(client, engine) -> None:
    for headers, path in (({f"X-{i}": "x" * 80 for i in range(250)}, "/v1/jobs"), ({}, "/v1/jobs?" + "x" * 17_000)):
        response = client.post(path, json=BODY, headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (431, "too_large")
    assert not engine.jobs


def test_there_are_never_more_connections_than_files(monkeypatch) -> None:
    resource = pytest.importorskip("resource")
    limits = [(256, 1000)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, values: limits.append(values))
    assert connection_limit() == 1000 - 384
    assert limits[-1] == (1000, 1000)
    limits.append((1024, -1))
    assert connection_limit() == CONNECTIONS
    assert limits[-1] == (CONNECTIONS + 384, -1)


@pytest.mark.parametrize("path", ["/v1/jobs", "/nothing"])
def test_a_client_that_sends_too_much_reads_why(serve, path) -> None:
    # It reads nothing before it has sent everything, as most clients do.
    content = b"x" * 3_000_000
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
    with connected(serve()) as connection:
        connection.sendall(head.encode() + content)
        received = b""
        while part := connection.recv(1000):
            received += part
    assert received.startswith(b"HTTP/1.1 413" if path == "/v1/jobs" else b"HTTP/1.1 404")
    assert b"x-should-retry: false" in received


def test_a_client_that_takes_nothing_of_its_answers_is_disconnected(serve, monkeypatch) -> None:
    monkeypatch.setattr(PatientProtocol, "take_seconds", 0.05)
    server = serve()
    connections = server.server.server_state.connections
    with connected(server) as connection:
        # Until the buffers of both sides are full.
        connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000)
        wait_until(lambda: connections)
        wait_until(lambda: not connections)
    assert httpx.get(f"{server.url}/healthz").status_code == 200


def test_one_address_has_half_of_the_connections(serve) -> None:
    server = serve({"limit_concurrency": 4})
    with connected(server), connected(server):
        wait_until(lambda: len(server.server.server_state.connections) == 2)
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{server.url}/healthz")
        if sys.platform == "linux":  # elsewhere, loopback has one address
            with httpx.Client(transport=httpx.HTTPTransport(local_address="127.0.0.2")) as other:
                assert other.get(f"{server.url}/healthz").status_code == 200


def test_other_machines_need_a_token() -> None:
    assert check_access("127.0.0.1", ()) is not None
    assert check_access("0.0.0.0", ("long enough".replace(" ", "-"),)) is None
    for host in ("0.0.0.0", "::", "192.168.0.7", "example.com", ""):
        with pytest.raises(AtollError, match="set --token or ATOLL_TOKEN"):
            check_access(host, ())
    for token in ("short", "with a space", "ümläutümläut", ""):
        with pytest.raises(AtollError, match="at least 8 ASCII characters"):
            check_access("0.0.0.0", (token,))


def test_an_address_that_cannot_be_used_is_one_line() -> None:
    with bind("127.0.0.1", 0) as listener:
        listener.listen()
        with pytest.raises(AtollError, match="address already in use; choose another --port"):
            bind("127.0.0.1", listener.getsockname()[1])
    with pytest.raises(AtollError, match="no such address"):
        bind("no.such.host.invalid", 0)
