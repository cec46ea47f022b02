"""The documentation: links that work on GitHub too, a complete glossary, a small diagram, every key of atoll.yaml."""

import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from atoll.manifest import Manifest, Section

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
GENERATED = {"cli.md", "manifest.md", "contributing.md", "changes.md"}  # made by docs/hooks.py when the site is built
LINK = re.compile(r"\]\(([^)\s]+)\)")
# DESIGN's vocabulary: one word for one thing.
WORDS = (
    "run", "latent", "condition", "feature", "cluster", "schedule", "prediction", "objective", "expert", "replica",
    "router", "routing", "ensemble", "card", "island",
)  # fmt: skip


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in LINK.findall(text):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if target.name in GENERATED and not target.exists():
            continue
        assert target.exists(), f"{page.name}: {link}: no such file"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}: no such heading"


@pytest.mark.parametrize("word", WORDS)
def test_the_glossary_has_every_word_of_the_vocabulary(word) -> None:
    assert re.search(rf"^\| {word} \|", (ROOT / "docs" / "glossary.md").read_text(), re.MULTILINE)


def test_the_diagram_is_small_and_plain() -> None:
    file = ROOT / "docs" / "dataflow.svg"
    assert file.stat().st_size < 20_000
    tree = ElementTree.parse(file)
    labels = {text.text for text in tree.iter("{http://www.w3.org/2000/svg}text")}
    assert {"atoll encode", "atoll cluster", "router", "atoll assemble", "atoll sample"} <= labels
    assert not list(tree.iter("{http://www.w3.org/2000/svg}script"))


def test_the_reference_of_atoll_yaml_has_every_key(monkeypatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "docs")
    from manifest_page import manifest_page

    page = manifest_page(ROOT / "atoll" / "manifest")
    sys.modules.pop("manifest_page")
    sections = [section for section in Section.__subclasses__() if section.__module__.startswith("atoll.manifest")]
    for section in (Manifest, *sections):
        for key in vars(section).get("__annotations__", {}):
            if not key.startswith(("model_", "renamed")):
                assert f"| `{key}` |" in page, f"{section.__name__}.{key}"
    assert "| `steps` | int > 0 | `1000` |" in page
    assert "| `name` | str | required |" in page


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    """A directory with runs/demo/ensemble: tiny, with latents of the demo's shape."""
    from atoll.assemble import assemble_run
    from atoll.manifest import load_manifest
    from atoll.train.expert import train_expert
    from atoll.train.router import train_router
    from tests.conftest import K, write_run

    run = write_run(tmp_path_factory.mktemp("readme") / "runs" / "demo", shape=(1, 16, 16))
    manifest = load_manifest(run)
    for cluster in range(K):
        train_expert(run, manifest, str(cluster))
    train_router(run, manifest)
    assemble_run(run, manifest)
    return run.parents[1]


def test_the_readme_python_runs_as_it_stands(demo, monkeypatch) -> None:
    [code] = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(demo)
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert (demo / "seven.png").stat().st_size > 0
    assert names["x0"].shape == (1, 1, 16, 16)
    assert names["x0"].isfinite().all()
    assert len(names["ensemble"].experts) == len(names["demo"].experts) + 1
