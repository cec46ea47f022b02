"""The files around the code: the workflow, the citation, the changelog and the templates agree with the project."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import atoll

ROOT = Path(__file__).parents[1]


def read(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


def test_ci_runs_the_script_on_the_oldest_python_and_a_newer_one() -> None:
    job = read(".github/workflows/ci.yml")["jobs"]["ci"]
    oldest = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(">=")
    assert job["strategy"]["matrix"]["python"] == [oldest, "3.13"]
    assert job["steps"][-1] == {"run": "bash .ci/run"}


def test_the_citation_names_this_version_and_both_papers() -> None:
    citation = read("CITATION.cff")
    assert (citation["cff-version"], citation["version"]) == ("1.2.0", atoll.__version__)
    urls = [reference["url"] for reference in citation["references"]]
    assert urls == ["https://arxiv.org/abs/2603.06741", "https://arxiv.org/abs/2501.05450"]
    assert all(url in (ROOT / "README.md").read_text() for url in urls)


def test_the_changelog_has_its_sections_once_and_no_entry_twice() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    assert re.findall(r"^### (.*)$", text.split("## Unreleased")[1], re.MULTILINE) == ["Added", "Changed", "Fixed"]
    entries = re.findall(r"^- (.*)$", text, re.MULTILINE)
    assert len(entries) == len(set(entries))


@pytest.mark.parametrize("name", ["bug", "question"])
def test_issue_forms_ask_for_something_that_is_required(name) -> None:
    form = read(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert {"name", "description", "body"} <= form.keys()
    assert any(field.get("validations", {}).get("required") for field in form["body"])
