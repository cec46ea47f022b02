"""The Ray Serve deployment file, on local Ray."""

import importlib.util
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

import atoll
from atoll.serve.server import bind

FILE = Path(atoll.__file__).parents[1] / "integrations" / "ray_serve" / "deployment.py"


@pytest.fixture
def url(trained_run, monkeypatch) -> Iterator[str]:
    import ray
    from ray import serve

    spec = importlib.util.spec_from_file_location("deployment", FILE)
    assert spec is not None
    assert spec.loader is not None
    deployment = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(deployment)
    environment = {"env_vars": {"PYTHONPATH": str(FILE.parents[2]), "OMP_NUM_THREADS": "1"}}
    ray.init(num_cpus=2, include_dashboard=False, runtime_env=environment, log_to_driver=False)
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    arguments = {"ensemble": str(trained_run / "ensemble"), "replicas": "2", "cpus": "0.1", "token": "correct-horse"}
    serve.run(deployment.build(arguments))
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


@pytest.mark.slow
def test_replicas_answer_openais_client(url, pipeline) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="correct-horse")
    with ThreadPoolExecutor(4) as pool:
        answers = list(
            pool.map(lambda seed: client.images.generate(prompt="moss", extra_body={"seed": seed}), range(4))
        )
    assert [answer.data[0].seed for answer in answers] == [0, 1, 2, 3]
    assert all(answer.data[0].b64_json for answer in answers)
    assert httpx.get(f"{url}/v1/models").status_code == 401
    headers = {"Authorization": "Bearer correct-horse"}
    response = httpx.post(f"{url}/v1/images/generations", json={"prompt": "moss", "steps": "x"}, headers=headers)
    assert response.json()["error"]["param"] == "steps"
