"""Read a sharded checkpoint without running what its table of tensors names.

torch.distributed.checkpoint pickles the table (`.metadata`) and reads it with Python's own unpickler, which runs any
function that the file names. A checkpoint may be somebody else's.
"""

import collections
import pickle
import re
from typing import Any, ClassVar

import torch
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata

_PART = re.compile(r"__\d+_\d+\.distcp")  # a file of one process, in the checkpoint's own directory


def _path(*parts: str) -> str:
    """Replace the class of the path under which a checkpoint was written, which nothing reads."""
    return "/".join(parts)


# All that torch writes into a table of tensors. An entry that is no tensor (BytesStorageMetadata) is left out: torch
# would unpickle it without limits.
_BUILT: dict[str, Any] = {
    **{
        f"torch.distributed.checkpoint.metadata.{kind.__name__}": kind
        for kind in (
            *(Metadata, metadata.MetadataIndex, metadata.StorageMeta, metadata.ChunkStorageMetadata),
            *(metadata.TensorStorageMetadata, metadata.TensorProperties, metadata._MEM_FORMAT_ENCODING),
        )
    },
    "torch.distributed.checkpoint.filesystem._StorageInfo": _StorageInfo,
    "torch.serialization._get_layout": torch.serialization._get_layout,
    "torch.Size": torch.Size,
    "collections.OrderedDict": collections.OrderedDict,
    **dict.fromkeys(("pathlib.PosixPath", "pathlib.WindowsPath", "pathlib._local.PosixPath"), _path),
}


class _Unpickler(pickle._Unpickler):
    """Build the types of `_BUILT` alone."""

    stack: list[Any]

    def find_class(self, module: str, name: str) -> Any:
        if (full := f"{module}.{name}") in _BUILT:
            return _BUILT[full]
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"it names {full}, which could run code; nothing of it was run")

    def load_build(self) -> None:
        """Set the state of an object, never that of a class or a function of this process."""
        if callable(self.stack[-2]):
            raise pickle.UnpicklingError("it changes a class or a function; nothing of it was run")
        super().load_build()  # type: ignore[misc]

    dispatch: ClassVar[dict[int, Any]] = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}


class ShardedReader(FileSystemReader):
    """A reader for `torch.distributed.checkpoint.load`. Raises pickle.UnpicklingError for a table of another kind."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the table of the checkpoint's tensors."""
        with self.fs.create_stream(self._get_metadata_path(kwargs.get("rank")), "rb") as stream:
            table = _Unpickler(stream).load()
        if not isinstance(table, Metadata):
            raise pickle.UnpicklingError(f"it holds {type(table).__name__}, no table of tensors")
        # Where a tensor's bytes are: a path could lead anywhere.
        places = table.storage_data.values()
        if not all(isinstance(place, _StorageInfo) and _PART.fullmatch(str(place.relative_path)) for place in places):
            raise pickle.UnpicklingError("it names files that are no parts of a checkpoint")
        return table
