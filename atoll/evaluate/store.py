"""What was measured, kept on the disk as it comes: a killed evaluation goes on, and memory does not grow.

evaluation/<key>/about.json           what the numbers depend on; the key is its hash
evaluation/<key>/<part>.safetensors   one batch's features, or errors
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from atoll.errors import AtollError
from atoll.storage.artifact import write_bytes, write_json

TensorDict = dict[str, Tensor]


class ResultCache:
    """The parts of one measurement.

    Args:
        directory: of all measurements.
        about: plain values that say all that the parts depend on; of other values, other parts.
    """

    def __init__(self, directory: Path, about: Mapping[str, Any]):
        text = json.dumps(about, sort_keys=True)
        self.key = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.path = directory / self.key
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "about.json", dict(about))

    def part(self, name: str, make: Callable[[], TensorDict]) -> TensorDict:
        """The part of this name: what is there, or else what `make` gives, which is then there.

        Raises:
            AtollError: the file is damaged.
        """
        file = self.path / f"{name}.safetensors"
        if file.is_file():
            return _load(file)
        made = make()
        write_bytes(file, save({key: tensor.detach().cpu().contiguous() for key, tensor in made.items()}))
        return made

    def has(self, name: str) -> bool:
        return (self.path / f"{name}.safetensors").is_file()


def load_parts(path: Path, prefix: str) -> list[TensorDict]:
    """The parts below `path` whose names are `prefix`, or it and a number; in their order. Raises AtollError for a
    damaged file."""
    return [_load(file) for file in sorted(path.glob(f"{prefix}*.safetensors"))]


def _load(file: Path) -> TensorDict:
    try:
        return load(file.read_bytes())
    except (OSError, SafetensorError) as error:
        raise AtollError(f"{file}: cannot be read ({error}); remove it, and it is measured again") from None
