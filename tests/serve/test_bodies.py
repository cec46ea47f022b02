"""Bodies: any bytes are an image request within the limits, or one refusal in the error format."""

import json
import socket
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from atoll.serve.bodies import MAX_SEED, JobBody, image_request, parse_json
from atoll.serve.describe import ModelCard, model_card
from atoll.serve.refusals import Refusal
from atoll.serve.settings import ServerSettings
from tests.waiting import SILENCE

SMALL = ServerSettings(max_n=8, max_steps=20, max_prompt=30, max_previews=10, max_deadline=60, max_pixels=8 * 4 * 6)


@pytest.fixture(scope="module")
def card(pipeline) -> ModelCard:
    return model_card("tiny", pipeline.loaded)


def requested(card: ModelCard, **values: Any):
    return image_request(JobBody(**{"prompt": "moss", **values}), card, SMALL, "a")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)
# Mostly right: each parameter has a value of its own kind, or anything.
FIELDS = {
    "prompt": st.text(max_size=40),
    "n": st.integers(-1, 10),
    "size": st.sampled_from(["auto", "8x4", "4x8", ""]),
    "response_format": st.sampled_from(["url", "b64_json", "svg"]),
    "negative_prompt": st.text(max_size=40),
    "seed": st.integers(-1, MAX_SEED + 1),
    "seeds": st.lists(st.integers(-1, MAX_SEED + 1), max_size=10),
    "steps": st.integers(0, 25),
    "guidance_scale": st.floats(-200, 200),
    "guidance_range": st.lists(st.floats(-0.5, 1.5), max_size=3),
    "method": st.sampled_from(["euler", "dpm++2m", "rk4"]),
    "routing": st.sampled_from(["top-1", "full", "sample-64", "sample-65", "nucleus-0.9@0.001", "oracle-2", "best"]),
    "alignment": st.sampled_from(["snr", "native", "exact"]),
    "cluster": st.integers(-1, 4),
    "priority": st.integers(-9, 9),
    "deadline": st.floats(-1, 100),
    "preview_every": st.integers(-1, 25),
    "model": st.sampled_from(["tiny", "other"]),
}
OPTIONAL = {name: kind for name, kind in FIELDS.items() if name != "prompt"}
BODIES = st.fixed_dictionaries({}, optional={name: kind | st.none() | VALUES for name, kind in FIELDS.items()})


@given(values=st.fixed_dictionaries({"prompt": FIELDS["prompt"]}, optional=OPTIONAL))
def test_every_accepted_request_is_within_the_limits(card, values) -> None:
    try:
        body = JobBody.model_validate(parse_json(json.dumps(values).encode()))
        request = image_request(body, card, SMALL, "a")
    except (Refusal, ValueError):
        return
    assert len(request.prompt) <= 30
    assert 1 <= len(request.seeds) <= 6  # pixels
    assert all(0 <= seed <= MAX_SEED for seed in request.seeds)
    assert request.steps is None or 1 <= request.steps <= 20
    assert request.priority <= 0
    assert request.deadline is None or 0 < request.deadline <= 60
    assert request.cluster is None or 0 <= request.cluster < 3
    if request.preview_every:
        assert len(request.seeds) * (request.steps or 3) <= 10 * request.preview_every
    assert request.routing in (None, "top-1", "full", "sample-64", "oracle-2")


@given(body=st.binary(max_size=60) | (BODIES | VALUES).map(lambda values: json.dumps(values).encode()))
@settings(max_examples=150)
@example(body=b"")
@example(body=b'{"prompt": NaN}')
@example(body=b'{"prompt": "moss", "steps": Infinity}')
@example(body=b'{"prompt": "moss", "guidance_scale": 1e999}')
@example(body=b'{"prompt": "moss", "seed": ' + b"9" * 5000 + b"}")
@example(body=b'{"prompt": "moss", "guidance_scale": ' + b"9" * 4000 + b"}")
@example(body=b"[" * 60_000)
@example(body=b'{"a":' * 20_000)
@example(body=b'{"prompt": "\\ud800"}')
@example(body=b'{"\\udfff": 1}')
@example(body=b'{"prompt": "moss", "prompt": "sand"}')
@example(body=b'\xff{"prompt": "moss"}')
@example(body=b'\xef\xbb\xbf{"prompt": "moss"}')
@example(body=b'{"prompt": "moss", "n": true}')
@example(body=b'{"prompt": "moss", "n": 1.0}')
@example(body=b'{"prompt": "\\u0000\\u202e\\n"}')
def test_any_body_is_answered_in_the_error_format(client, body) -> None:
    response = client.post("/v1/images/generations", content=body)
    if response.status_code == 200:
        assert response.json()["data"]
        return
    assert response.status_code in (400, 404)
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"].isprintable()
    assert len(error["message"]) < 500
    assert response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seed": 1, "seeds": [1]}, "seed and seeds are both set"),
        ({"n": 2, "seeds": [1]}, "1 seeds for n = 2"),
        ({"seeds": list(range(9))}, "n: 9 images; expected at most 8"),
        ({"n": 7}, "n: 224 pixels in all images; expected at most 192"),
        ({"seed": MAX_SEED, "n": 2}, "the last of 2 seeds is above"),
        ({"prompt": "x" * 31}, "prompt: 31 characters; expected at most 30"),
        ({"negative_prompt": "x" * 31}, "negative_prompt: 31 characters"),
        ({"steps": 21}, "steps: 21 steps; expected at most 20"),
        ({"priority": 1}, "priority: 1 for clients; expected at most 0"),
        ({"deadline": 61}, "deadline: 61"),
        ({"cluster": 3}, "cluster is 3; expected a number below 3"),
        ({"routing": "best"}, "unknown routing 'best'"),
        ({"routing": "sample-65"}, "routing: 65 draws; expected at most 64"),
        ({"routing": "nucleus-0.9@0.001"}, "temperature is below 0.01"),
        ({"guidance_range": [0.9, 0.1]}, "expected the smaller time first"),
        ({"steps": 11, "preview_every": 1}, "preview_every: 11 previews; expected at most 10"),
        ({"preview_every": 1, "n": 4}, "preview_every: 12 previews"),  # 3 steps by default
    ],
)
def test_a_value_beyond_a_limit_is_refused(card, values, message) -> None:
    with pytest.raises(Refusal, match=message) as error:
        requested(card, **values)
    assert error.value.status == 400
    assert error.value.param in (*values, "n")


def test_values_reach_the_engine(card) -> None:
    request = requested(card, seed=3, n=2, guidance_range=[0.2, 0.8], priority=-2, preview_every=2, user="me")
    assert (request.seeds, request.guidance_range, request.priority) == ((3, 4), (0.2, 0.8), -2)
    assert (request.preview_every, request.user, request.alignment) == (2, "a", "snr")
    assert requested(card, seeds=[9, 1]).seeds == (9, 1)
    assert len(set(requested(card, n=6).seeds)) == 6


@pytest.mark.parametrize(
    "sent",
    [b"Content-Length: 5000\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n1388\r\n" + b" " * 4500],
    ids=["content-length", "chunked"],
)
def test_a_body_that_is_too_large_is_refused_before_its_end(serve, sent) -> None:
    with socket.create_connection(("127.0.0.1", serve(max_body=4000).port), SILENCE) as connection:
        connection.sendall(b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\n" + sent)
        received = b""
        while part := connection.recv(1000):
            received += part
    assert received.startswith(b"HTTP/1.1 413")
    assert b'"code":"body_too_large"' in received


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b"[-Infinity]", "-Infinity is no JSON number"),
        (b"[1e999]", "a number is too large"),
        (b"[" + b"9" * 5000 + b"]", "a number has too many digits"),
        (b'{"a": 1, "a": 2}', "a key occurs twice"),
        (b'{"a": {"b": "\\udc00"}}', "half of a surrogate pair"),
        (b"[" * 100_000, "nested too deeply"),
        (b"\xff", "not UTF-8"),
        (b"{'a': 1}", "at character 1"),
    ],
)
def test_json_that_others_would_take_is_refused(content, message) -> None:
    with pytest.raises(Refusal, match=message) as error:
        parse_json(content)
    assert (error.value.status, error.value.code) == (400, "invalid_json")


def test_a_body_may_have_any_content_type(client) -> None:
    # curl -d sends application/x-www-form-urlencoded.
    headers = {"content-type": "application/x-www-form-urlencoded"}
    response = client.post("/v1/images/generations", content=b'{"prompt": "moss"}', headers=headers)
    assert response.status_code == 200
