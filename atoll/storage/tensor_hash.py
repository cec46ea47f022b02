"""A hash of named tensors that travels in the header of their own safetensors file.

A hash in a second file could belong to an older or a newer one after a crash between the two writes.
"""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

SHA256 = "sha256"  # the key in the file's metadata


class TensorHash:
    """The sha256 over metadata and tensors, in the order in which they are added.

    Args:
        metadata: of the file, without the hash itself.
    """

    def __init__(self, metadata: Mapping[str, str]):
        self._hash = hashlib.sha256(repr(sorted(metadata.items())).encode())

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor of any shape, on the CPU."""
        # Name, dtype and shape come from the file's header, which can be damaged as well.
        self._hash.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        self._hash.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def hexdigest(self) -> str:
        """Return the hash of all that was added."""
        return self._hash.hexdigest()


def with_hash(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata with the hash of itself and of the tensors, for `safetensors.torch.save`."""
    content = TensorHash(metadata)
    # A fixed order, whatever the order in the file.
    for name in sorted(tensors):
        content.add(name, tensors[name])
    return {**metadata, SHA256: content.hexdigest()}


def split_hash(metadata: Mapping[str, str], keys: set[str]) -> tuple[dict[str, str], str | None]:
    """Return the metadata of a file without the hash, and the hash; None for a file of a time before hashes.

    Args:
        metadata: of the file.
        keys: that its writer sets, without the hash.

    Raises:
        ValueError: the hash is missing, and other keys are there: the header is damaged.
    """
    rest = {key: value for key, value in metadata.items() if key != SHA256}
    # A damaged name of the hash's key must not look like a file without a hash.
    if set(rest) != keys:
        raise ValueError(f"its header names {', '.join(sorted(rest)) or 'nothing'}; expected {', '.join(sorted(keys))}")
    return rest, metadata.get(SHA256)
