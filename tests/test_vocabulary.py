"""One word for one thing: public type names have one home, and the package says "image"."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import atoll

PACKAGE = Path(atoll.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


def type_names(file: Path) -> Iterator[str]:
    """The public types that a file defines at its top level: classes, and aliases written like classes."""
    for node in ast.parse(file.read_text()).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        names = [target.id for target in targets if isinstance(target, ast.Name)]
        names = [node.name] if isinstance(node, ast.ClassDef) else names
        yield from (name for name in names if re.match(r"[A-Z]\w*[a-z]", name))


def test_every_public_type_name_has_one_home() -> None:
    homes = defaultdict(list)
    for file in FILES:
        for name in type_names(file):
            homes[name].append(str(file.relative_to(PACKAGE)))
    assert {name: files for name, files in homes.items() if len(files) > 1} == {}


def test_an_image_is_called_an_image() -> None:
    renamed = re.compile(r"^    renamed: .*$", re.MULTILINE)  # what names the keys of earlier formats
    texts = {str(file): renamed.sub("", file.read_text()) for file in FILES}
    assert [file for file, text in texts.items() if re.search("picture", text, re.IGNORECASE)] == []
