"""Jobs over HTTP: events, reconnecting, cancellation, disconnects, repetition, and the end of the server."""

import base64
import io
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.serve.fake_engine import image_of
from tests.waiting import SILENCE, wait_until

BODY = {"prompt": "moss", "seed": 5, "steps": 4}


def events_of(client: httpx.Client, path: str, **options: Any) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """The events of a stream: (id, name, data)."""
    with client.stream("GET", path, timeout=SILENCE, **options) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        event: dict[str, str] = {}
        for line in response.iter_lines():
            if line:
                key, _, value = line.partition(": ")
                event[key] = value
            elif "event" in event:
                yield int(event["id"]), event["event"], json.loads(event["data"])
                event = {}


def start(client: httpx.Client, **changes: Any) -> dict[str, Any]:
    response = client.post("/v1/jobs", json={**BODY, **changes})
    assert response.status_code == 202
    return response.json()


def wait_for_end(client: httpx.Client, job: dict[str, Any]) -> str:
    path = f"/v1/jobs/{job['id']}"
    wait_until(lambda: client.get(path).json()["status"] not in ("queued", "running"))
    return client.get(path).json()["status"]


def test_a_job_reports_progress_previews_and_who_drew_what(client) -> None:
    job = start(client, n=2, preview_every=2, preview_format="jpeg")
    events = list(events_of(client, job["events"]))
    assert [id for id, _, _ in events] == sorted(id for id, _, _ in events)
    names = [name for _, name, _ in events]
    assert (names[0], names[-1]) == ("started", "finished")
    previews = [data for _, name, data in events if name == "preview"]
    assert [(preview["step"], preview["index"]) for preview in previews] == [(2, 0), (2, 1), (4, 0), (4, 1)]
    assert Image.open(io.BytesIO(base64.b64decode(previews[0]["b64_json"]))).format == "JPEG"
    last = events[-1][2]
    assert len(last["times"]) == 4
    assert [[len(row) for row in image] for image in last["weights"]] == [[3] * 4] * 2
    assert len(last["experts"]) == 3
    assert last["truncated"] == ["too long"]
    assert [image["seed"] for image in last["images"]] == [5, 6]
    assert [image["settings"]["seed"] for image in last["images"]] == [5, 6]
    content = client.get(last["images"][1]["url"]).content
    assert Image.open(io.BytesIO(content)).tobytes() == image_of(6).tobytes()


def test_images_of_a_job_may_be_in_its_last_event(client) -> None:
    *_, (_, name, data) = events_of(client, start(client, response_format="b64_json")["events"])
    assert name == "finished"
    assert Image.open(io.BytesIO(base64.b64decode(data["images"][0]["b64_json"]))).size == (8, 4)


def test_a_reader_continues_after_the_last_event_that_it_saw(client) -> None:
    job = start(client, preview_every=1)
    everything = list(events_of(client, job["events"]))
    middle = everything[len(everything) // 2][0]
    rest = list(events_of(client, job["events"], headers={"Last-Event-ID": str(middle)}))
    assert rest == [event for event in everything if event[0] > middle]
    # 204 ends a browser's EventSource, which would come back for ever.
    response = client.get(job["events"], headers={"Last-Event-ID": str(everything[-1][0])})
    assert response.status_code == 204
    assert client.get(job["events"], headers={"Last-Event-ID": "-1"}).status_code == 400


def test_a_cancelled_job_ends_with_an_event(client, engine) -> None:
    engine.hold()
    job = start(client)
    events = events_of(client, job["events"])
    assert next(events)[1] == "started"
    assert client.delete(f"/v1/jobs/{job['id']}").status_code == 200
    *_, (_, name, data) = events
    assert (name, data["reason"]) == ("failed", "cancelled")
    assert client.get(f"/v1/jobs/{job['id']}").json()["status"] == "cancelled"


def test_a_failed_job_says_why(client) -> None:
    job = start(client, prompt="fail")
    *_, (_, name, data) = events_of(client, job["events"])
    assert (name, data) == ("failed", {"reason": "failed", "message": "the ensemble answered with NaN"})
    state = client.get(f"/v1/jobs/{job['id']}").json()
    assert (state["status"], state["error"]["reason"]) == ("failed", "failed")


def test_an_unknown_job_is_not_found(client) -> None:
    for method, path in (("GET", "/v1/jobs/x"), ("GET", "/v1/jobs/x/events"), ("DELETE", "/v1/jobs/x")):
        response = client.request(method, path)
        assert (response.status_code, response.json()["error"]["code"]) == (404, "not_found")


def test_a_client_that_disconnects_cancels_a_plain_generation(client, engine) -> None:
    engine.hold()
    wait_for_job(client, engine, {})
    wait_until(lambda: engine.jobs[0].cancelled.is_set())


def test_with_a_key_a_generation_outlives_its_connection(client, engine) -> None:
    engine.hold()
    wait_for_job(client, engine, {"Idempotency-Key": "a"})
    with httpx.Client(base_url=client.base_url) as second:
        engine.release()
        response = second.post("/v1/images/generations", json=BODY, headers={"Idempotency-Key": "a"})
    assert response.status_code == 200
    assert (len(engine.jobs), engine.images) == (1, 1)


def wait_for_job(client: httpx.Client, engine: Any, headers: dict[str, str]) -> None:
    """Send a generation, and close the connection once the engine has it."""
    url = client.base_url
    body = json.dumps(BODY).encode()
    lines = [f"POST /v1/images/generations HTTP/1.1\r\nHost: {url.host}\r\nContent-Length: {len(body)}\r\n"]
    lines += [f"{name}: {value}\r\n" for name, value in headers.items()]
    with socket.create_connection((url.host, url.port)) as connection:
        connection.sendall("".join(lines).encode() + b"\r\n" + body)
        wait_until(lambda: engine.jobs)


@pytest.mark.parametrize("path", ["/v1/images/generations", "/v1/jobs"])
def test_a_repetition_with_the_same_key_samples_nothing(client, engine, path) -> None:
    answers = [client.post(path, json=BODY, headers={"Idempotency-Key": "k"}).json() for _ in range(2)]
    assert answers[0].get("id") == answers[1].get("id")
    assert answers[0].get("data") == answers[1].get("data")
    assert len(engine.jobs) == 1
    other = client.post(path, json={**BODY, "seed": 6}, headers={"Idempotency-Key": "k"})
    assert (other.status_code, other.json()["error"]["code"]) == (400, "idempotency_key_reused")
    assert other.headers["x-should-retry"] == "false"
    client.post(path, json=BODY, headers={"Idempotency-Key": "l"})
    assert len(engine.jobs) == 2


def test_when_the_server_ends_unfinished_jobs_are_told(serve, engine) -> None:
    server = serve()
    engine.hold()
    with httpx.Client(base_url=server.url) as client:
        events = events_of(client, start(client)["events"])
        assert next(events)[1] == "started"
        server.server.should_exit = True
        *_, (_, name, data) = events
    assert (name, data["reason"]) == ("failed", "closed")
    wait_until(lambda: engine.jobs[0].cancelled.is_set())


def test_when_the_server_ends_a_plain_generation_is_answered(serve, engine) -> None:
    server = serve()
    engine.hold()
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(httpx.post, f"{server.url}/v1/images/generations", json=BODY, timeout=SILENCE)
        wait_until(lambda: engine.jobs)
        server.server.should_exit = True
        response = answer.result()
    assert (response.status_code, response.json()["error"]["code"]) == (503, "closed")
    assert response.headers["x-should-retry"] == "false"


def test_a_closing_server_refuses_before_work_begins(client, server, engine) -> None:
    server.app.state.service.close()
    response = client.post("/v1/jobs", json=BODY)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "closing")
    assert "x-should-retry" not in response.headers
    assert not engine.jobs
    assert client.get("/readyz").status_code == 503
    assert client.get("/healthz").status_code == 200


def test_a_server_whose_engine_has_stopped_is_not_ready(client, engine) -> None:
    assert client.get("/readyz").json() == {"status": "ready"}
    engine.alive = False
    response = client.get("/readyz")
    assert (response.status_code, response.json()) == (503, {"status": "stopped"})


def test_one_client_cannot_fill_the_queue(serve, engine) -> None:
    engine.hold()
    with httpx.Client(base_url=serve(client_queue=3).url) as client:
        job = start(client, n=2)
        response = client.post("/v1/jobs", json={**BODY, "n": 2})
        assert (response.status_code, response.json()["error"]["code"]) == (429, "too_many_images")
        assert 1 <= int(response.headers["retry-after"]) <= 60
        client.delete(f"/v1/jobs/{job['id']}")
        wait_for_end(client, job)
        start(client, n=2)


def test_one_client_cannot_open_endless_streams(serve, engine) -> None:
    engine.hold()
    with httpx.Client(base_url=serve(client_streams=1).url) as client:
        path = start(client)["events"]
        events = events_of(client, path)
        next(events)
        with httpx.Client(base_url=client.base_url) as second:
            response = second.get(path)
        assert (response.status_code, response.json()["error"]["code"]) == (429, "too_many_streams")
        engine.release()
        assert list(events)[-1][1] == "finished"
        # Both have ended: there is room again.
        assert list(events_of(client, path))[-1][1] == "finished"


@pytest.mark.parametrize("limit", [{"keep_jobs": 3}, {"keep_bytes": 20_000}])
def test_many_jobs_of_one_client_do_not_displace_those_of_another(serve, engine, limit) -> None:
    server = serve(tokens=("correct-horse", "battery-staple"), **limit)
    headers = [{"Authorization": f"Bearer {token}"} for token in ("correct-horse", "battery-staple")]
    with (
        httpx.Client(base_url=server.url, headers=headers[0]) as one,
        httpx.Client(base_url=server.url, headers=headers[1]) as many,
    ):
        own = start(one)
        wait_for_end(one, own)
        jobs = [start(many) for _ in range(20)]
        wait_until(lambda: not server.app.state.service.jobs.unfinished)
        assert one.get(f"/v1/jobs/{own['id']}").status_code == 200
        assert many.get(f"/v1/jobs/{jobs[0]['id']}").status_code == 404


def test_streams_that_are_opened_at_once_are_counted(serve, engine) -> None:
    engine.hold()
    server = serve(client_streams=2)
    with httpx.Client(base_url=server.url) as client:
        request = f"GET {start(client)['events']} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        connections = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(30)]
        for connection in connections:
            connection.sendall(request)
        answers = [connection.recv(12) for connection in connections]
        for connection in connections:
            connection.close()
    assert answers.count(b"HTTP/1.1 200") == 2
    assert answers.count(b"HTTP/1.1 429") == 28
    wait_until(lambda: not server.app.state.service.streams)


def test_several_processes_have_neither_jobs_nor_files(serve, engine) -> None:
    with httpx.Client(base_url=serve(replicated=True).url) as client:
        assert client.post("/v1/jobs", json=BODY).status_code == 404
        assert "b64_json" in client.post("/v1/images/generations", json=BODY).json()["data"][0]
        response = client.post("/v1/images/generations", json={**BODY, "response_format": "url"})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "response_format")
    assert len(engine.jobs) == 1
