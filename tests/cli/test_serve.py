"""`atoll serve`: what it refuses in one line, and one server from start to SIGTERM."""

import builtins
import json
import os
import signal
import subprocess
import sys

import httpx
import openai
import pytest

from atoll.serve.server import bind
from tests.serve.test_jobs import events_of
from tests.waiting import communicate, wait_until


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such"], "no/such: no such directory"),
        (["a=no/such"], "no/such: no such directory"),
        ([".", "--host", "0.0.0.0"], "other machines could use the server; set --token"),
        ([".", "--token", "short"], "--token: expected at least 8"),
        ([".", "--port", "0"], "expected an ensemble's or an expert's directory"),
        (["x=.", "x=."], "the model's name 'x' is empty or taken"),
        (["=."], "the model's name '' is empty or taken"),
    ],
)
def test_what_cannot_be_served_is_one_line(atoll, monkeypatch, arguments, message) -> None:
    monkeypatch.delenv("ATOLL_TOKEN", raising=False)
    code, out, err = atoll("serve", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert message in err


def test_a_port_in_use_is_one_line(atoll, tmp_path) -> None:
    with bind("127.0.0.1", 0) as listener:
        listener.listen()
        code, _, err = atoll("serve", tmp_path, "--port", listener.getsockname()[1])
    assert (code, err.count("\n")) == (2, 1)
    assert "address already in use; choose another --port" in err


def test_a_missing_extra_is_one_line(atoll, monkeypatch, tmp_path) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: object, **options: object) -> object:
        if name.startswith("sse_starlette"):
            raise ImportError(name=name)
        return real(name, *arguments, **options)

    monkeypatch.setitem(sys.modules, "sse_starlette", None)
    monkeypatch.setattr(builtins, "__import__", without)
    code, _, err = atoll("serve", tmp_path)
    assert (code, err.count("\n")) == (2, 1)
    assert "pip install 'atoll[serve]'" in err


def test_a_server_answers_until_sigterm_and_tells_unfinished_jobs(trained_run) -> None:
    command = [sys.executable, "-m", "atoll", "serve", str(trained_run / "ensemble"), "--port", "0"]
    command += ["--max-steps", "10000"]
    environment = {**os.environ, "ATOLL_TOKEN": "correct-horse"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    line = process.stdout.readline()
    name, _, url = line.strip().partition(" at ")
    assert name == "run", line

    # The page's port answers OpenAI's client.
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="correct-horse")
    wait_until(lambda: client.images.generate(prompt="moss", extra_body={"steps": 2}).data, process=process)
    assert httpx.get(f"{url}/v1/models").status_code == 401

    # A long job is told the end.
    headers = {"Authorization": "Bearer correct-horse"}
    with httpx.Client(base_url=url, headers=headers) as jobs:
        job = jobs.post("/v1/jobs", json={"prompt": "moss", "steps": 10_000, "n": 64}).json()
        events = events_of(jobs, job["events"])
        assert next(events)[1] == "started"
        process.send_signal(signal.SIGTERM)
        *_, (_, last, data) = events
    assert (last, data["reason"]) == ("failed", "closed")
    _, errors = communicate(process)
    assert process.returncode == 0, errors
    assert errors is not None
    assert "POST /v1/images/generations 200" in errors
    assert "Traceback" not in errors
    assert "moss" not in errors
    assert json.dumps("correct-horse") not in errors
