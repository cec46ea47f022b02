"""The API with the real engine: images are those of the pipeline, whoever shares the steps."""

import base64
import io
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from PIL import Image

from atoll.pipeline import Pipeline
from atoll.serve.app import create_app
from atoll.serve.engine import Engine
from atoll.serve.settings import ServerSettings
from tests.serve.conftest import RunningServer
from tests.serve.test_jobs import events_of
from tests.waiting import SILENCE


@pytest.fixture(scope="module")
def real(trained_run):
    with Engine(Pipeline.from_pretrained(trained_run / "ensemble")) as engine:
        server = RunningServer(create_app({"tiny": engine}, ServerSettings(rate=0)))
        yield server
        server.stop()


REQUESTS = [
    {"prompt": "moss sand", "seed": 3, "n": 2, "steps": 5},
    {"prompt": "rain", "seeds": [9], "steps": 4, "guidance_scale": 3.0, "negative_prompt": "rust", "method": "heun"},
    {"prompt": "rust", "seed": 1, "routing": "oracle", "cluster": 2, "alignment": "native", "priority": -2},
    {"prompt": "", "seed": 2, "guidance_scale": 2.0, "guidance_range": [0.2, 0.8], "method": "dpm++2m"},
]


def test_images_are_those_of_the_pipeline(real, pipeline) -> None:
    def generate(body):
        return httpx.post(
            f"{real.url}/v1/images/generations", json={**body, "response_format": "b64_json"}, timeout=SILENCE
        )

    with ThreadPoolExecutor(len(REQUESTS)) as pool:
        answers = list(pool.map(generate, REQUESTS))
    for body, answer in zip(REQUESTS, answers, strict=True):
        assert answer.status_code == 200, answer.text
        data = answer.json()["data"]
        if body.get("alignment") == "native":
            continue  # not an option of a pipeline's call
        expected = pipeline(
            body["prompt"],
            body.get("steps"),
            body.get("guidance_scale"),
            images_per_prompt=len(data),
            seeds=[one["seed"] for one in data],
            negative_prompt=body.get("negative_prompt"),
            method=body.get("method"),
            guidance_range=tuple(body.get("guidance_range", (0, 1))),
        ).images
        for one, image in zip(data, expected, strict=True):
            received = np.asarray(Image.open(io.BytesIO(base64.b64decode(one["b64_json"]))), int)
            assert np.abs(received - np.asarray(image, int)).max() <= 1


def test_events_show_the_steps_and_the_weights(real) -> None:
    with httpx.Client(base_url=real.url, timeout=SILENCE) as client:
        job = client.post("/v1/jobs", json={"prompt": "moss", "seed": 4, "n": 2, "steps": 6, "preview_every": 2})
        events = list(events_of(client, job.json()["events"]))
    names = [name for _, name, _ in events]
    assert (names[0], names[-1]) == ("started", "finished")
    assert {data["step"] for _, name, data in events if name == "preview"} >= {2, 4}
    last = events[-1][2]
    weights = np.asarray(last["weights"])  # [n, V, E]
    assert weights.shape == (2, 6, 3)
    np.testing.assert_allclose(weights.sum(2), 1, atol=1e-3)
    assert last["times"] == sorted(last["times"], reverse=True)


@pytest.mark.parametrize(
    "body",
    [
        {"routing": "time-switch-0.5:a:b"},
        {"routing": "oracle"},
        {"routing": "oracle-3"},
        {"routing": "threshold-0." + "0" * 280},  # longer than what a PNG file's settings hold
        {"negative_prompt": "rust", "guidance_scale": 1.0},
    ],
)
def test_what_the_engine_cannot_sample_is_the_clients_error(real, body) -> None:
    answer = httpx.post(f"{real.url}/v1/images/generations", json={"prompt": "moss", **body})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_extreme_settings_of_one_request_do_not_harm_others(real) -> None:
    extreme = {"guidance_scale": 100.0, "routing": "nucleus-0.0001@0.01", "steps": 1, "prompt": "moss" * 900}
    for body in (extreme, {**extreme, "guidance_scale": -100.0, "method": "heun"}, {"prompt": "moss"}):
        answer = httpx.post(f"{real.url}/v1/images/generations", json={"seed": 0, **body}, timeout=SILENCE)
        assert answer.status_code == 200


def test_the_metrics_have_the_batches_of_each_expert(real) -> None:
    httpx.post(f"{real.url}/v1/images/generations", json={"prompt": "moss"}, timeout=SILENCE)
    text = httpx.get(f"{real.url}/metrics").text
    assert 'atoll_engine_images_by_expert{key="0-eps-cosine",model="tiny"}' in text
    assert "atoll_engine_ticks" in text
