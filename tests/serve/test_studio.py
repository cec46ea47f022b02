"""A walk through the studio in a real Chromium, with the real engine: every control does what it says."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from atoll.image_settings import KEY, read_settings
from atoll.pipeline import Pipeline
from atoll.serve.app import create_app
from atoll.serve.engine import Engine
from atoll.serve.settings import ServerSettings
from atoll.storage.layout import RunLayout
from tests.serve.browser import bodies_of, sample, says, studio, tiles
from tests.serve.conftest import RunningServer

FORM = {"prompt": "moss sand", "negative_prompt": "rust", "seed": "41", "n": "2", "steps": "5", "guidance_scale": "1.5"}


@pytest.fixture(scope="module")
def url(trained_run) -> Iterator[str]:
    run = RunLayout(trained_run)
    paths = {"tiny": run.ensemble, "monolith": run.monolith}
    engines = {name: Engine(Pipeline.from_pretrained(path)) for name, path in paths.items()}
    server = RunningServer(create_app(engines, ServerSettings(rate=0)))
    yield server.url
    server.stop()
    for engine in engines.values():
        engine.close()


@pytest.fixture
def page(browser, url):
    with studio(browser, url) as page:
        yield page


def fill(page) -> None:
    """Fill in every field of the form."""
    for name, value in FORM.items():
        page.locator(f"#{name}").fill(value)
    page.locator("#lock").check()
    page.locator("#more summary").click()
    page.locator("#range_low").fill("0.1")
    page.locator("#range_high").fill("0.9")
    page.locator("#method").select_option("heun")
    page.locator("#alignment").select_option("native")
    page.locator("#shift").fill("2")
    page.locator("#previews").select_option("every step")


def test_every_setting_reaches_the_server(page) -> None:
    bodies = bodies_of(page)
    fill(page)
    for name, words in (("method", "Second order"), ("alignment", "HDDM's formulas"), ("routing", "most probable")):
        assert words in page.locator(f"#{name}-hint").inner_text()
    page.locator("#routing").select_option("oracle")
    page.locator("#cluster").fill("2")
    page.locator("#prompt").press("Control+Enter")
    says(page, "2 images are ready")
    numbers = {"seed": 41, "n": 2, "steps": 5, "guidance_scale": 1.5, "guidance_range": [0.1, 0.9], "cluster": 2}
    numbers["shift"] = 2
    choices = {"model": "tiny", "size": "8x4", "method": "heun", "alignment": "native", "routing": "oracle"}
    texts = {"prompt": "moss sand", "negative_prompt": "rust", "preview_format": "png"}
    assert bodies == [{**numbers, **choices, **texts, "preview_every": 1}]
    # Another model has other choices, and its own defaults.
    page.locator("#model").select_option("monolith")
    assert page.locator("#by-expert").is_disabled()
    page.locator("#previews").select_option("none")
    sample(page, n=1, negative_prompt="")
    says(page, "The image is ready")
    assert (bodies[1]["model"], bodies[1]["steps"], bodies[1]["preview_every"]) == ("monolith", 50, 0)


def test_a_seed_that_is_not_locked_changes_with_each_run(page) -> None:
    bodies = bodies_of(page)
    sample(page, prompt="moss", n=1, seed=5)
    says(page, "The image is ready")
    assert bodies[0]["seed"] == int(page.locator("#seed").input_value()) != 5
    page.locator("#lock").check()
    sample(page, seed=6)
    page.locator("#tiles", has_text="seed 6").wait_for()
    says(page, "The image is ready")
    assert bodies[1]["seed"] == 6


def test_strips_and_a_table_show_who_draws_what(page) -> None:
    sample(page, prompt="moss", n=2, steps=4)
    says(page, "2 images are ready")
    # Two of three experts, in words, as areas and as a table.
    assert page.locator(".strip").count() == 2
    words = page.locator(".strip").first.get_attribute("aria-label")
    assert words.startswith("Mean weights: ")
    assert words.count("%") in (2, 3)
    assert page.locator(".strip").first.locator("path").count() >= 2
    assert page.locator("#legend-list li").all_inner_texts()[0].startswith("0-eps-cosine ")
    tiles(page).first.click()
    page.locator("#weights summary").click()
    rows = page.locator("#weights-table tbody tr")
    assert rows.count() == 4
    assert sum(map(float, rows.first.locator("td").all_inner_texts()[1:])) == pytest.approx(1, abs=0.01)


def test_a_download_has_its_settings_and_restores_them(page, tmp_path) -> None:
    fill(page)
    sample(page)
    says(page, "2 images are ready")
    assert page.locator("#detail").is_hidden()
    tiles(page).nth(1).click()
    assert page.get_by_role("button", pressed=True).count() == 1
    with page.expect_download() as download:
        page.get_by_role("link", name="Download PNG").click()
    assert download.value.suggested_filename == "moss-sand-seed-42.png"
    download.value.save_as(tmp_path / "image.png")
    settings = read_settings(tmp_path / "image.png", whole=True)
    assert (settings.prompt, settings.seed, settings.routing) == ("moss sand", 42, "top-2")
    assert "moss sand" in page.locator("#settings").inner_text()
    # By a button, from the file, and by dropping the file.
    restore = {
        "button": lambda: page.get_by_role("button", name="Use these settings").click(),
        "file": lambda: page.locator("#file").set_input_files(tmp_path / "image.png"),
        "drop": lambda: drop(page, tmp_path / "image.png"),
    }
    for way in restore.values():
        page.reload()
        if way is restore["button"]:
            page.locator("#thumbs button").first.click()
        else:
            page.locator("#thumbs button").first.wait_for()
        way()
        says(page, "restored.")
        values = {name: page.locator(f"#{name}").input_value() for name in FORM}
        assert values == {**FORM, "seed": "42", "n": "1"}
        assert page.locator("#lock").is_checked()
        names = ("method", "alignment", "routing", "range_low", "range_high")
        assert [page.locator(f"#{name}").input_value() for name in names] == ["heun", "native", "top-2", "0.1", "0.9"]
    # The same settings give the same image.
    sample(page)
    says(page, "The image is ready")
    with page.expect_download() as again:
        page.get_by_role("link", name="Download PNG").click()
    again.value.save_as(tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "image.png").read_bytes()


def drop(page, path: Path) -> None:
    """Drop a file onto the page."""
    script = """bytes => {
        const transfer = new DataTransfer();
        transfer.items.add(new File([new Uint8Array(bytes)], "dropped.png", {type: "image/png"}));
        return transfer;
    }"""
    transfer = page.evaluate_handle(script, list(path.read_bytes()))
    for event in ("dragenter", "dragover"):
        page.dispatch_event("body", event, {"dataTransfer": transfer})
    assert page.locator("#drop").is_visible()
    page.dispatch_event("body", "drop", {"dataTransfer": transfer})
    assert page.locator("#drop").is_hidden()


def test_settings_of_another_model_say_so(page, tmp_path, url) -> None:
    import httpx

    answer = httpx.post(f"{url}/v1/images/generations", json={"prompt": "moss", "routing": "oracle", "cluster": 1})
    content = httpx.get(answer.json()["data"][0]["url"]).content
    (tmp_path / "own.png").write_bytes(content)
    page.locator("#file").set_input_files(tmp_path / "own.png")
    says(page, "The settings of own.png are restored.")
    assert "another model" not in page.locator("#status").inner_text()
    assert (page.locator("#routing").input_value(), page.locator("#cluster").input_value()) == ("oracle", "1")
    (tmp_path / "other.png").write_bytes(with_settings(content, ensemble="reef", ensemble_sha256="0" * 64))
    page.locator("#file").set_input_files(tmp_path / "other.png")
    says(page, "They are of another model (reef), so the image will differ.")


def with_settings(content: bytes, **changes: object) -> bytes:
    """A PNG file with other settings."""
    import io
    import json

    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    image = Image.open(io.BytesIO(content))
    info = PngInfo()
    info.add_text(KEY, json.dumps({**json.loads(image.info[KEY]), **changes}))
    file = io.BytesIO()
    image.save(file, "PNG", pnginfo=info)
    return file.getvalue()


def captions(page) -> list[str]:
    return page.locator("#tiles .caption").all_inner_texts()


def test_side_by_side_each_expert_alone_draws_alone(page) -> None:
    page.locator("#prompt").fill("moss")
    page.get_by_role("button", name="Each expert alone").click()
    says(page, "4 images are ready")
    experts = ["0-eps-cosine", "1-flow-linear", "2-x0-linear-beta"]
    assert captions(page) == ["together: top-2", *(f"{name} alone" for name in experts)]
    words = [strip.get_attribute("aria-label") for strip in page.locator(".strip").all()]
    assert words[1:] == [f"Mean weights: {name} 100 %" for name in experts]
    assert page.locator("#thumbs button").count() == 4


def test_side_by_side_each_routing_and_each_model(page, url) -> None:
    bodies = bodies_of(page)
    page.locator("#prompt").fill("moss")
    page.locator("#seed").fill("3")
    page.locator("#routing").select_option("0-eps-cosine")
    assert "all the weight" in page.locator("#routing-hint").inner_text()
    page.get_by_role("button", name="Each routing").click()
    routings = ["top-2", "top-1", "full", "threshold-0.1", "nucleus-0.9", "sample-1", "oracle, cluster 0"]
    says(page, f"{len(routings)} images are ready")
    assert captions(page) == routings
    assert {body["seed"] for body in bodies} == {3}
    page.get_by_role("button", name="Each model").click()
    says(page, "2 images are ready")
    assert captions(page) == ["tiny", "monolith"]
    assert "monolith 100 %" in page.locator(".strip").nth(1).get_attribute("aria-label")
    assert [body["model"] for body in bodies[-2:]] == ["tiny", "monolith"]
