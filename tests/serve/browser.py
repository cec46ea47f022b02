"""Chromium, driven by Playwright, and the studio's page in it."""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from tests.waiting import SILENCE

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

_NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def chromium() -> "Iterator[Browser]":
    """Start a browser of this machine; without one, or without Playwright, skip."""
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("Playwright is not installed")
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=SILENCE * 1000)
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        path = next(filter(None, map(shutil.which, _NAMES)), own if os.path.exists(own) else None)
        if path is None:
            pytest.skip("there is no Chromium on this machine")
        browser = playwright.chromium.launch(executable_path=path)
        yield browser
        browser.close()


@contextmanager
def studio(
    browser: "Browser", url: str, *, refusals: tuple[object, ...] = (), ready: bool = True, **options: Any
) -> "Iterator[Page]":
    """Open the page in a fresh profile; at the end, the console must have no errors.

    Args:
        browser: the browser.
        url: of the server.
        refusals: the statuses of answers that this test provokes, or the network's error. Chromium reports them as
            errors of the page.
        ready: wait until the form can be used.
        options: of the profile, such as its color_scheme.
    """
    context = browser.new_context(**{"viewport": {"width": 1100, "height": 900}, **options})
    context.set_default_timeout(SILENCE * 1000)
    page = context.new_page()
    problems: list[str] = []

    def note(text: str) -> None:
        if not any(text.startswith("Failed to load resource") and str(refusal) in text for refusal in refusals):
            problems.append(text)

    page.on("console", lambda message: message.type in ("error", "warning") and note(message.text))
    page.on("pageerror", lambda error: note(str(error)))
    own = (f"{url}/", f"blob:{url}/", "data:")
    page.on("request", lambda request: request.url.startswith(own) or note(f"requested {request.url}"))
    page.goto(url)
    # The form is usable as soon as the models are known.
    if ready:
        page.locator("#routing option").first.wait_for(state="attached")
    yield page
    assert problems == []
    context.close()


def sample(page: "Page", **values: Any) -> None:
    """Fill in fields by their ids, and press Sample."""
    for name, value in values.items():
        page.locator(f"#{name}").fill(str(value))
    page.get_by_role("button", name="Sample").click()


def says(page: "Page", text: str) -> None:
    """Wait until the status line has a text; an error of the page fails at once."""
    page.locator("#status", has_text=text).or_(page.locator("#error")).locator("visible=true").first.wait_for()
    assert page.locator("#error").inner_text() == ""


def complains(page: "Page", text: str) -> None:
    """Wait until the error line has a text."""
    page.locator("#error", has_text=text).wait_for()


def bodies_of(page: "Page") -> list[dict[str, Any]]:
    """A list that receives the body of each job that the page starts."""
    bodies: list[dict[str, Any]] = []
    page.on(
        "request",
        lambda request: request.url.endswith("/v1/jobs") and bodies.append(request.post_data_json),
    )
    return bodies


def tiles(page: "Page") -> "Locator":
    """The images of the sheet."""
    return page.locator("#tiles img:visible")
