"""What the server says about itself: models, metrics, the API's page."""

import re

import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from atoll.serve.app import create_app
from atoll.serve.describe import image_settings, model_card
from atoll.serve.pages import add_pages
from atoll.serve.settings import ServerSettings
from atoll.serve.types import ImageRequest
from tests.serve.fake_engine import FakeEngine


def test_models_name_experts_choices_defaults_and_hashes(client, pipeline) -> None:
    answer = client.get("/v1/models").json()
    [model] = answer["data"]
    assert (model["id"], model["object"], model["default"], model["kind"]) == ("tiny", "model", True, "ensemble")
    assert (model["width"], model["height"], model["clusters"], model["guidance"]) == (8, 4, 3, True)
    assert [expert["name"] for expert in model["experts"]] == ["0-eps-cosine", "1-flow-linear", "2-x0-linear-beta"]
    entries = pipeline.loaded.card.experts
    assert [expert["sha256"] for expert in model["experts"]] == [entry.sha256 for entry in entries]
    assert model["experts"][0]["prediction"] == "eps"
    assert (model["defaults"]["steps"], model["defaults"]["routing"]) == (3, "top-2")
    assert model["routings"][0]["name"] == "top-2"
    for choices in ("routings", "alignments", "methods"):
        assert all(choice["description"].endswith(".") for choice in model[choices])
    assert {"n", "steps", "pixels", "prompt", "previews", "priority", "deadline"} == answer["limits"].keys()
    assert client.get("/v1/models/tiny").json() == model


def test_every_routing_of_a_model_samples(pipeline) -> None:
    card = model_card("tiny", pipeline.loaded)
    alone = [expert.routing for expert in card.experts]
    for routing in [*(choice.name for choice in card.routings), *alone]:
        arguments = {"clusters": [0]} if routing == "oracle" else {}
        output = pipeline("moss", seeds=[0], routing=routing, num_inference_steps=1, **arguments)
        if routing in alone:
            assert output.traces[0].weights[0][0, alone.index(routing)] == 1


def test_a_single_expert_is_a_model_without_a_router(trained_run) -> None:
    from atoll.pipeline import Pipeline

    pipeline = Pipeline.from_pretrained(next((trained_run / "experts").iterdir()))
    card = model_card("one", pipeline.loaded, licence="CC0-1.0")
    assert (card.kind, len(card.experts), card.router, card.licence) == ("expert", 1, None, "CC0-1.0")
    assert card.experts[0].sha256 == pipeline.loaded.card.weights_sha256
    request = ImageRequest("moss", (1, 2), routing="oracle", cluster=0, guidance_scale=2)
    first, second = image_settings("one", pipeline.loaded, request, weights="bf16", dropped=["0-eps"])
    assert (first.seed, second.seed, first.weights, first.dropped_experts) == (1, 2, "bf16", ("0-eps",))
    assert (first.routing, first.guidance_scale) == ("oracle-0", 2.0)


def test_the_first_of_several_models_is_the_default(pipeline) -> None:
    from starlette.testclient import TestClient

    engines = {name: FakeEngine(pipeline) for name in ("a", "b")}
    client = TestClient(create_app(engines, ServerSettings(hosts=None)))
    for body in ({}, {"model": "b"}, {"model": None}):
        assert client.post("/v1/images/generations", json={"prompt": "moss", **body}).status_code == 200
    assert [len(engine.jobs) for engine in engines.values()] == [2, 1]


def test_metrics_count_requests_jobs_and_the_engines_numbers(client) -> None:
    for prompt in ("moss", "fail"):
        client.post("/v1/images/generations", json={"prompt": prompt, "n": 2})
    client.request("BREW", "/v1/nothing/secret")
    client.get("/v1/files/secret.png")
    families = list(text_string_to_metric_families(client.get("/metrics").text))
    values = {(sample.name, *sample.labels.values()): sample.value for family in families for sample in family.samples}
    assert values["atoll_http_requests_total", "POST", "/v1/images/generations", "200"] == 1
    assert values["atoll_http_requests_total", "POST", "/v1/images/generations", "500"] == 1
    assert values["atoll_http_requests_total", "other", "other", "404"] == 1
    assert values["atoll_http_requests_total", "GET", "/v1/files/{name}", "404"] == 1
    assert values["atoll_images_total", "tiny"] == 2
    assert values["atoll_jobs_total", "tiny", "finished"] == values["atoll_jobs_total", "tiny", "failed"] == 1
    assert values["atoll_stage_seconds_sum", "tiny", "queue"] == 0.5
    assert values["atoll_jobs_unfinished",] == 0
    assert values["atoll_engine_rows", "1-flow", "tiny"] == 3
    assert not [key for key in values if "secret" in str(key)]


def test_the_description_of_the_api_is_complete_and_loads_nothing_from_elsewhere(client) -> None:
    schema = client.get("/openapi.json").json()
    assert {"GenerationBody", "JobBody", "ErrorAnswer"} <= schema["components"]["schemas"].keys()
    assert "HTTPValidationError" not in str(schema)
    generation = schema["paths"]["/v1/images/generations"]["post"]
    examples = generation["requestBody"]["content"]["application/json"]["examples"]
    page = client.get("/docs").text
    for path, operations in schema["paths"].items():
        assert path in page
        for operation in operations.values():
            assert operation["summary"]
            assert operation["description"]
    loaded = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert all(re.match(r"/|#", url) and not url.startswith("//") for url in loaded)
    assert "<script" not in page
    assert "<style" not in page
    # Each example works.
    for example in examples.values():
        assert client.post("/v1/images/generations", json=example["value"]).status_code == 200


def test_all_names_in_the_schema_are_defined(client) -> None:
    text = client.get("/openapi.json").text
    schema = client.get("/openapi.json").json()
    references = set(re.findall(r'"#/components/schemas/(\w+)"', text))
    assert references <= schema["components"]["schemas"].keys()


@pytest.fixture
def page(tmp_path):
    """An app with a page of its own; the directory changes afterwards."""
    from starlette.testclient import TestClient

    from atoll.serve.refusals import add_error_handlers

    (tmp_path / "index.html").write_text("<p>studio</p>")
    (tmp_path / "studio.js").write_text("let x;")
    (tmp_path / "notes.txt").write_text("private")
    app = FastAPI()
    add_error_handlers(app)
    add_pages(app, tmp_path)
    (tmp_path / "late.js").write_text("late")
    return TestClient(app)


def test_only_the_pages_own_files_are_served(page) -> None:
    assert page.get("/").text == page.get("/static/index.html").text == "<p>studio</p>"
    assert page.get("/static/studio.js").headers["content-type"].startswith("text/javascript")
    for name in ("notes.txt", "late.js", "../settings.py", "..%2fsettings.py", "%2e%2e%2fsettings.py", ""):
        assert page.get(f"/static/{name}").status_code == 404


def test_without_the_page_the_api_is_described(tmp_path) -> None:
    from starlette.testclient import TestClient

    app = FastAPI()
    add_pages(app, tmp_path)
    assert TestClient(app, follow_redirects=False).get("/").headers["location"] == "/docs"
