import re
import tomllib
from pathlib import Path

import atoll

ROOT = Path(__file__).parents[1]


def test_the_changelog_is_headed_by_the_version_or_what_is_unreleased() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert atoll.__version__ == version
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first is not None
    assert first.group(1) in (version, "Unreleased")


def test_every_dependency_has_its_line_of_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    reasons = (ROOT / "docs" / "dependencies.md").read_text()
    wanted = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    names = {re.split(r"[><=\[]", requirement)[0] for requirement in wanted} - {"atoll"}
    assert [name for name in sorted(names) if name not in reasons] == []
    assert len(project["dependencies"]) < 10
