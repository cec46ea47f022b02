"""Read untrusted PyTorch files: tensors and plain values of `torch.save`, without executing anything in them.

A file of tensors and plain containers is read with `weights_only=True`. Training scripts also save their arguments (an
argparse.Namespace), numpy scalars, configurations and schedulers. Such a file is read a second time by an unpickler
that imports nothing the file names: it builds tensors, numpy arrays and plain values, an `Opaque` stand-in for each
object of any other class, and refuses the file if it calls a function that is not on the lists below.
"""

import collections
import itertools
import pickle
import warnings
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from atoll.errors import AtollError
from atoll.storage.content import advice, content_of
from atoll.storage.memory import refuse_out_of_memory
from atoll.storage.pickled_arrays import PickledType, array_of_buffer, empty_array, number
from atoll.storage.unpacking import TIMES_STORED, refuse_bomb

_DEPTH = 20  # levels of nested configurations that `plain` follows
_VALUES = 100_000  # that it converts; training arguments have some hundreds


class _Refused(Exception):
    """The pickle names or calls what could run code."""


class _StandIn(type):
    """The metaclass of stand-in classes. Calling one would run a function chosen by the file, so it is refused."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        # The class name that the file gives, which the lists below name.
        name = f"{cls.__module__}.{cls.__qualname__}"
        # Harmless constructors leave an object that records its arguments.
        if name in _RECORDED or cls.__module__.startswith(_RECORDED_MODULES):
            return Opaque.__new__(cls, *args, **kwargs)  # type: ignore[arg-type]  # every class of this kind is one
        raise _Refused(f"it calls {name}")


class Opaque(metaclass=_StandIn):
    """An object of a class that was not loaded: its state as the file gives it, and no behaviour.

    Attributes:
        arguments: what it was created with, and the items of a list or set.
        fields: its attributes and entries by name.
    """

    arguments: tuple[Any, ...]
    fields: dict[Any, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> "Opaque":
        self = object.__new__(cls)
        # Arguments and fields are recorded, nothing is interpreted.
        self.arguments, self.fields = args, dict(kwargs)
        return self

    @property
    def type_name(self) -> str:
        """The full name of the class that this object replaces."""
        return f"{type(self).__module__}.{type(self).__qualname__}"

    # The four methods through which an unpickler fills an object.

    def __setstate__(self, state: Any) -> None:
        # A state is a dict of attributes, or a tuple (attributes, slots).
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.fields.update(part)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.fields[key] = value

    def append(self, value: Any) -> None:
        # An unpickler fills a subclass of list by appending.
        self.arguments = (*self.arguments, value)

    def extend(self, values: Any) -> None:
        self.arguments = (*self.arguments, *values)


def _text_bytes(text: str, encoding: str = "latin-1") -> bytes:
    """Replace `_codecs.encode`, limited to the two encodings in which protocol 2 writes bytes."""
    # Other codecs, such as zip or rot13, would run more code than a checkpoint needs.
    if encoding.lower().replace("-", "").replace("_", "") not in ("latin1", "utf8"):
        raise _Refused(f"it asks for the codec {encoding!r}")
    return text.encode(encoding)


def _byte_array(data: bytes | str = b"", *encoding: str) -> bytearray:
    """Replace `bytearray` for data in the file."""
    # bytearray(n) would allocate any number of bytes that the file names; memoryview refuses an int.
    return bytearray(_text_bytes(data, *encoding) if isinstance(data, str) else bytes(memoryview(data)))


# Types and functions that are really used, by their name in the pickle. None of them runs code from the file.
_BUILT: dict[str, Any] = {
    **{f"collections.{kind.__name__}": kind for kind in (collections.OrderedDict, collections.Counter)},
    **{f"collections.{kind.__name__}": kind for kind in (collections.defaultdict, collections.deque)},
    **{f"builtins.{kind.__name__}": kind for kind in (set, frozenset, complex)},
    "builtins.bytearray": _byte_array,
    "_codecs.encode": _text_bytes,
    "torch.Size": torch.Size,
    "torch.device": torch.device,
    "torch.Tensor": torch.Tensor,
    "torch.nn.parameter.Parameter": nn.Parameter,
    "torch._tensor._rebuild_from_type_v2": torch._tensor._rebuild_from_type_v2,
    **{
        f"torch._utils.{function.__name__}": function
        for function in (
            torch._utils._rebuild_tensor,
            torch._utils._rebuild_tensor_v2,
            torch._utils._rebuild_parameter,
            torch._utils._rebuild_parameter_with_state,
        )
    },
    "numpy.dtype": PickledType,
    **{
        f"numpy.{package}.{name}": function
        for package in ("core", "_core")  # before and after numpy 2
        for name, function in (
            ("multiarray.scalar", number),
            ("multiarray._reconstruct", empty_array),
            ("numeric._frombuffer", array_of_buffer),
        )
    },
}
# Callables that are replaced by a record of their arguments.
_RECORDED = {
    *(f"builtins.{name}" for name in ("list", "dict", "tuple", "int", "float", "bool", "str", "bytes", "slice")),
    *("builtins.range", "builtins.object", "builtins.type", "builtins.NoneType", "copyreg._reconstructor"),
    *("functools.partial", "types.SimpleNamespace", "decimal.Decimal", "fractions.Fraction", "uuid.UUID"),
}
_RECORDED_MODULES = ("pathlib", "datetime", "numpy.random")
# Modules that no checkpoint has a reason to name.
_NEVER = {
    *("os", "posix", "nt", "subprocess", "sys", "shutil", "socket", "importlib", "runpy", "ctypes", "pty"),
    *("builtins", "pickle", "_pickle", "marshal", "code", "webbrowser", "multiprocessing"),
}


class _Unpickler(pickle._Unpickler):
    """Build the types in `_BUILT`, and record or refuse the rest."""

    # Python's own unpickler: its memo is a dict, so a large index in the file allocates nothing. C's is an array.

    proto: int
    stack: list[Any]

    def find_class(self, module: str, name: str) -> Any:
        # Pickles before protocol 3 call modules by their names in Python 2.
        if self.proto < 3:
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        # What is known is built, what could run code is refused, and the rest becomes a stand-in.
        full = f"{module}.{name}"
        if full in _BUILT:
            return _BUILT[full]
        if module == "torch" and isinstance(value := getattr(torch, name, None), torch.dtype):
            return value
        if full not in _RECORDED and module.partition(".")[0] in _NEVER:
            raise _Refused(f"it names {full}")
        return _StandIn(name, (Opaque,), {"__module__": module, "__qualname__": name})

    def load_build(self) -> None:
        """Set the state of an object, as the pickle says; never that of a class or a function."""
        # These are the process's own: an attribute of one would change every later use of it.
        if callable(target := self.stack[-2]):
            raise _Refused(f"it changes {getattr(target, '__qualname__', type(target).__name__)}")
        super().load_build()  # type: ignore[misc]

    def load_binpersid(self) -> None:
        """Load what torch keeps outside of the pickle: the data of tensors."""
        # Before version 1.6 a class came with its source, and torch writes the differences to a file.
        saved = self.stack[-1]
        if isinstance(saved, tuple) and saved[:1] in (("module",), (b"module",)) and len(saved) > 1:
            self.stack[-1] = saved[1]
        else:
            super().load_binpersid()  # type: ignore[misc]

    # Python's unpickler calls its opcodes by this table.
    dispatch: ClassVar[dict[int, Any]] = {
        **pickle._Unpickler.dispatch,
        pickle.BUILD[0]: load_build,
        pickle.BINPERSID[0]: load_binpersid,
    }


def read_torch(file: Path) -> Any:
    """Read a PyTorch file or a bare pickle.

    Returns:
        Its content. Tensors are on the CPU, memory-mapped if the format allows it.

    Raises:
        AtollError: not a PyTorch file, a damaged one, or a pickle that could run code. No code of it was run.
    """
    # A reader of damaged or hostile bytes can raise anything; all of it becomes one line.
    try:
        content = content_of(file)
        if content == "torch":
            refuse_bomb(file, TIMES_STORED, "torch.save, which stores tensors as they are")
        # A bare pickle holds the data itself; torch.save before version 1.6 wrote a magic number first.
        if content == "pickle":
            with file.open("rb") as stream:
                first = _unpickle(stream)
            if not (isinstance(first, int) and first == torch.serialization.MAGIC_NUMBER):
                return first
        # The strict reader of torch first, ours only if the file holds more than tensors.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remarks on old formats and on other pickle protocols
            try:
                return _load(file, content, weights_only=True)
            except pickle.UnpicklingError:
                if content not in ("torch", "pickle"):
                    raise
                # More than tensors. `weights_only` cannot be combined with an unpickler; ours takes its place.
                ours = SimpleNamespace(Unpickler=_Unpickler, load=_unpickle, __name__=__name__)
                return _load(file, content, weights_only=False, pickle_module=ours)
    except _Refused as refused:
        raise AtollError(
            f"{file}: a pickle that holds more than tensors: {refused}, which could run code; nothing of it was run. "
            "Expected tensors, numbers, text and training arguments: take the weights as safetensors"
        ) from None
    except AtollError:
        raise
    except Exception as error:  # damaged bytes lead torch's readers into errors of every kind
        refuse_out_of_memory(error, file)
        raise AtollError(f"{file}: no PyTorch file: it {advice(file, error)}") from None


def _load(file: Path, content: str, **options: Any) -> Any:
    """Call torch.load, memory-mapped for files of the zip format."""
    # With the suffix .safetensors torch.load would read another format, so it gets a stream instead of the path.
    if content == "torch" and file.suffix != ".safetensors":
        return torch.load(file, map_location="cpu", mmap=True, **options)
    with file.open("rb") as stream:
        return torch.load(stream, map_location="cpu", **options)


def _unpickle(stream: Any, **options: Any) -> Any:
    """Read one pickle from a stream with the restricted unpickler."""
    # Only the restricted unpickler reads bytes of the file.
    return _Unpickler(stream, **options).load()


def plain(value: Any) -> Any:
    """Convert a value of a pickle to dictionaries, lists, numbers and text.

    An argparse.Namespace becomes {name: value}. Any other object becomes the name of its type. Deeper than 20 levels,
    and beyond 100,000 values, the result is "...".
    """
    return _plain(value, 0, itertools.count())


def _plain(value: Any, depth: int, count: Iterator[int]) -> Any:
    """`plain` at a level of nesting. count: the values so far."""
    # A deep nesting would exhaust the stack, and lists that hold one list many times take no space in the file.
    if depth > _DEPTH or next(count) > _VALUES:
        return "..."
    # Stand-ins first: objects of classes that were not loaded.
    deeper = partial(_plain, depth=depth + 1, count=count)
    if isinstance(value, Opaque):
        if value.type_name.startswith("pathlib"):
            return "/".join(map(str, value.arguments))
        for inner in ("_content", "_val"):  # OmegaConf's containers and leaves
            if inner in value.fields:
                return deeper(value.fields[inner])
        return {str(key): deeper(entry) for key, entry in value.fields.items()} or value.type_name
    # Then containers, and numbers of numpy as numbers of Python.
    if isinstance(value, Mapping):
        return {str(key): deeper(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [deeper(entry) for entry in value]
    if isinstance(value, np.generic):
        return value.item()
    return value if isinstance(value, bool | int | float | str | None) else type(value).__name__
