"""Results on disk, cached batch by batch: a killed evaluation resumes, and memory does not grow.

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
from atoll.storage.memory import refuse_out_of_memory

TensorDict = dict[str, Tensor]


class ResultCache:
    """The cached parts of one measurement.

    Args:
        directory: parent of all measurements.
        about: plain values that the parts depend on; other values make another cache.

    Attributes:
        key: hash of `about`.
        path: `directory`/`key`.
    """

    def __init__(self, directory: Path, about: Mapping[str, Any]):
        # The key is a hash of the values; about.json shows them to a reader.
        text = json.dumps(about, sort_keys=True)
        self.key = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.path = directory / self.key
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "about.json", dict(about))

    def part(self, name: str, compute: Callable[[], TensorDict]) -> TensorDict:
        """Load the part of this name, or compute and cache it.

        Raises:
            AtollError: the file is damaged.
        """
        # Atomic writes: a part that exists is complete.
        file = self.path / f"{name}.safetensors"
        if file.is_file():
            return _load(file)
        # Stored contiguous and on the CPU, as safetensors requires.
        tensors = compute()
        write_bytes(file, save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}))
        return tensors

    def has(self, name: str) -> bool:
        """True if the part is cached."""
        return (self.path / f"{name}.safetensors").is_file()


def load_parts(path: Path, prefix: str) -> list[TensorDict]:
    """Load the parts in `path` that are named `prefix`, or `prefix` and a number, in order.

    Raises:
        AtollError: a file is damaged.
    """
    # Numbers have leading zeros, so names sort in order.
    return [_load(file) for file in sorted(path.glob(f"{prefix}*.safetensors"))]


def _load(file: Path) -> TensorDict:
    try:
        return load(file.read_bytes())
    except (OSError, SafetensorError, MemoryError) as error:
        refuse_out_of_memory(error, file)
        raise AtollError(f"{file}: cannot be read ({error}); remove it to measure it again") from None
