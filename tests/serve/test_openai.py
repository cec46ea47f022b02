"""The real OpenAI client against a running server."""

import base64
import io
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from atoll.image_settings import read_settings
from atoll.storage.artifact import sha256_file
from tests.serve.fake_engine import image_of
from tests.waiting import wait_until


@pytest.fixture
def images(server) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none").images


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def test_images_come_in_base64(images) -> None:
    answer = images.generate(
        prompt="moss", model="tiny", n=2, size="8x4", response_format="b64_json", extra_body={"seed": 7}
    )
    received = [opened(base64.b64decode(one.b64_json)) for one in answer.data]
    assert [image.tobytes() for image in received] == [image_of(seed).tobytes() for seed in (7, 8)]
    assert [one.seed for one in answer.data] == [7, 8]
    assert (answer.size, answer.output_format) == ("8x4", "png")
    assert answer.model_extra["truncated"] == ["too long"]


def test_images_come_by_url_with_their_settings(images, trained_run) -> None:
    answer = images.generate(prompt="möss", extra_body={"seed": 3, "steps": 5})
    response = httpx.get(answer.data[0].url)
    assert response.headers["content-type"] == "image/png"
    settings = read_settings(response.content)
    assert (settings.prompt, settings.seed, settings.steps, settings.size) == ("möss", 3, 5, (8, 4))
    assert (settings.routing, settings.method, settings.ensemble) == ("top-2", "euler", "tiny")
    assert settings.ensemble_sha256 == sha256_file(trained_run / "ensemble" / "ensemble.json")


def test_models_are_listed_and_found(server) -> None:
    models = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none").models
    assert [model.id for model in models.list()] == ["tiny"]
    assert models.retrieve("tiny").sizes == ["8x4"]
    with pytest.raises(openai.NotFoundError, match="no model 'other'; expected one of tiny"):
        models.retrieve("other")


@pytest.mark.parametrize(
    ("arguments", "param", "message"),
    [
        ({"n": 65}, "n", "n: 65 images; expected at most 64"),
        ({"size": "9x4"}, "size", "multiples of 2; the nearest is"),
        ({"quality": "hd"}, "quality", "Input should be 'auto' or 'standard'"),
        ({"extra_body": {"colour": "red"}}, "colour", "unknown parameter 'colour'"),
        ({"prompt": "refuse"}, None, "steps is 0"),
    ],
)
def test_errors_are_in_the_clients_words(images, arguments, param, message) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as error:
        images.generate(**{"prompt": "moss", **arguments})
    assert error.value.param == param
    assert error.value.type == "invalid_request_error"


def test_a_failed_generation_is_not_repeated(images, engine) -> None:
    with pytest.raises(openai.InternalServerError, match="answered with NaN"):
        images.generate(prompt="fail")
    assert len(engine.jobs) == 1


def test_a_full_queue_is_repeated_and_samples_once(images, engine, monkeypatch) -> None:
    refusals = []
    submit = engine.submit

    def full_once(request, listener):
        engine.full = not refusals
        refusals.append(engine.full)
        return submit(request, listener)

    monkeypatch.setattr(engine, "submit", full_once)
    assert len(images.generate(prompt="moss").data) == 1
    assert (refusals, engine.images) == ([True, False], 1)


def test_a_client_that_gives_up_takes_its_generations_with_it(server, engine) -> None:
    engine.hold()
    seconds = 0.2
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=seconds, max_retries=1)
    with pytest.raises(openai.APITimeoutError):
        client.images.generate(prompt="moss")
    # Each attempt was given up by its disconnect, whether or not it arrived in time.
    wait_until(lambda: all(job.cancelled.is_set() and job.done.is_set() for job in engine.jobs))
    assert engine.images == 0


def test_a_wrong_token_is_an_authentication_error(serve) -> None:
    server = serve(tokens=("correct-horse",))
    for key, expected in (("correct-horse", None), ("wrong-horse", openai.AuthenticationError)):
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=key)
        if expected is None:
            assert client.images.generate(prompt="moss").data
        else:
            with pytest.raises(expected, match="no valid token"):
                client.images.generate(prompt="moss")
