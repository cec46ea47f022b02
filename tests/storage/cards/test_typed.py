"""Cards are read by attribute: nothing outside storage/ knows their keys."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import atoll

PACKAGE = Path(atoll.__file__).parent
FILES = [file for file in sorted(PACKAGE.rglob("*.py")) if "storage" not in file.parts]


def name_of(node: ast.expr) -> str:
    """The last name of an expression: "card" of `loaded.card`, "cards" of `cards[path]`."""
    while isinstance(node, ast.Subscript):
        node = node.value
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def keys_of_cards(text: str) -> Iterator[int]:
    """The lines that read a card by a key: `card["k"]`, `cards[path]["k"]`, `loaded.card.get("k")`."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Subscript):
            owner, key = node.value, node.slice
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
            owner, key = node.func.value, node.args[0] if node.args else node
        else:
            continue
        is_key = isinstance(key, ast.Constant) and isinstance(key.value, str)
        if is_key and re.search(r"cards?$", name_of(owner), re.IGNORECASE):
            yield node.lineno


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_card_is_read_by_a_key(file) -> None:
    assert list(keys_of_cards(file.read_text())) == [], "give the key to its class in atoll.storage.cards"


@pytest.mark.parametrize("text", ['card["k"]', 'cards[path]["k"]', 'loaded.card.get("k", 0)', '{**own_card["a"]}'])
def test_a_read_by_key_is_found(text) -> None:
    assert list(keys_of_cards(text)) == [1]
