"""Arrays and numbers of numpy in a pickle, rebuilt with every size and type checked.

numpy's own functions for this trust the pickle: a dtype's state can name any size and flags, and an array of objects
may have fewer objects than its shape says. The first allocates any amount of memory, the second reads beyond it.
"""

import math
import re
from typing import Any

import numpy as np

# Numbers, booleans, bytes, text and raw memory; no objects, no fields, no dates.
_PLAIN = re.compile(r"[<>=|]?[?biufcSUV]\d{0,9}")
_LARGEST_NUMBER = 1 << 16  # bytes of one number or text


class PickledType:
    """Replace numpy's dtype. value: the dtype; None for a kind that is not rebuilt."""

    value: np.dtype[Any] | None = None

    def __init__(self, name: Any, *_: Any):
        if isinstance(name, str) and _PLAIN.fullmatch(name):
            self.value = np.dtype(name)

    def __setstate__(self, state: Any) -> None:
        # (version, byte order, subarray, names, fields, size, alignment, flags, ...): only the order is taken.
        order, *parts = state[1:5] if isinstance(state, tuple) and len(state) >= 5 else (None, True)
        if any(part is not None for part in parts):
            self.value = None
        elif self.value is not None and order in ("<", ">"):
            self.value = self.value.newbyteorder(order)


class PickledArray(np.ndarray):
    """Replace numpy's `_reconstruct`: an empty array, which the state that follows in the pickle replaces.

    It stays empty if its dtype is not rebuilt.
    """

    def __setstate__(self, state: Any) -> None:
        """Take the state (version, shape, dtype, whether in Fortran's order, data).

        Raises:
            ValueError: data of another length than shape and dtype say.
        """
        _, shape, kind, fortran, data = state
        if (dtype := _dtype(kind)) is None:
            return
        data = data.encode("latin-1") if isinstance(data, str) else bytes(memoryview(data))
        if len(data) != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"an array of shape {shape!s:.60} and type {dtype} with {len(data):,} bytes")
        super().__setstate__((1, tuple(shape), dtype, bool(fortran), data))  # type: ignore[arg-type]


def empty_array(*_: Any) -> PickledArray:
    """Return an array without elements. The arguments are ignored: a shape could allocate any amount of memory."""
    return np.empty(0).view(PickledArray)


def array_of_buffer(data: Any, kind: Any, shape: Any, order: str, *_: Any) -> np.ndarray:
    """Replace numpy's `_frombuffer`. Raises ValueError if the data do not fill the shape."""
    if (dtype := _dtype(kind)) is None:
        return empty_array()
    return np.frombuffer(memoryview(data), dtype).reshape(shape, order="F" if order == "F" else "C")


def number(kind: Any, data: Any = b"") -> Any:
    """Replace numpy's `scalar`; None for a type that is not rebuilt.

    Raises:
        ValueError: data of another length than the type's.
    """
    if (dtype := _dtype(kind)) is None:
        return None
    data = data.encode("latin-1") if isinstance(data, str) else bytes(memoryview(data))
    if not 0 < dtype.itemsize <= _LARGEST_NUMBER or len(data) != dtype.itemsize:
        raise ValueError(f"a number of type {dtype} with {len(data):,} bytes")
    return np.frombuffer(data, dtype)[0]


def _dtype(kind: Any) -> np.dtype[Any] | None:
    # What the pickle hands over need not be a dtype.
    return kind.value if isinstance(kind, PickledType) else None
