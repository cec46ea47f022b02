"""Examples are scripts beside the package: a test imports them by name."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="package")
def example() -> Iterator[Callable[[str], ModuleType]]:
    """Import a script of examples/ by its name."""
    sys.path.insert(0, str(EXAMPLES))
    before = set(sys.modules)
    yield importlib.import_module
    sys.path.remove(str(EXAMPLES))
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and Path(str(sys.modules[name].__file__)).parent == EXAMPLES:
            del sys.modules[name]
