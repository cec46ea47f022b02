"""What mkdocs.yml adds to the build: pages made from the repository's own files, and formulas without a script."""

import html
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))
from manifest_page import manifest_page

ROOT = Path(__file__).parents[1]
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the references of the command line and of atoll.yaml, and the pages at the root of the repository."""
    command = [sys.executable, "-m", "typer", "atoll.cli", "utils", "docs", "--name", "atoll"]
    command += ["--title", "Command line"]
    reference = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    pages = {
        "api/cli.md": reference,
        "api/manifest.md": manifest_page(ROOT / "atoll" / "manifest"),
        "contributing.md": (ROOT / "CONTRIBUTING.md").read_text(),
        "changes.md": (ROOT / "CHANGELOG.md").read_text(),
    }
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_content(content: str, **_: Any) -> str:
    """Turn the formulas that arithmatex marks into MathML, which browsers draw without a script."""

    def formula(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        return convert(html.unescape(match[2]), display=display)

    return FORMULA.sub(formula, content)
