"""PyTorch files of strangers: data is read whatever its classes are, code is refused and does not run."""

import argparse
import collections
import dataclasses
import datetime
import decimal
import functools
import io
import os
import pickle
import random
import subprocess
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.errors import AtollError
from atoll.storage.torch_file import Opaque, plain, read_torch

W = torch.arange(6.0).reshape(2, 3)


class Call:
    """Calls a function when it is unpickled, unless that is refused."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


class Evil:
    """Runs code from its state, were it built."""

    def __setstate__(self, state: dict[str, str]) -> None:
        os.mkdir(state["target"])


@dataclasses.dataclass
class Config:
    lr: float = 0.1
    nested: Any = None


class Attributes(dict):
    """A dictionary with a class of its own, as EasyDict and ml_collections have them."""


def in_the_weights(payload: Any) -> Any:
    return {"ema": payload}


def beside_the_weights(payload: Any) -> Any:
    return {"ema": {"w": W}, "args": payload}


def among_the_weights(payload: Any) -> Any:
    return {"ema": {"w": W, "x": payload}}


def in_the_arguments(payload: Any) -> Any:
    return {"ema": {"w": W}, "args": argparse.Namespace(lr=1.0, hook=payload)}


PLACES = (in_the_weights, beside_the_weights, among_the_weights, in_the_arguments)


def payloads(target: Path) -> dict[str, Any]:
    """Each makes the directory `target`, if it runs."""
    code = f"__import__('os').mkdir({str(target)!r})"
    inner = io.BytesIO()
    torch.save(Call(eval, code), inner)
    return {
        "posix.mkdir": Call(os.mkdir, str(target)),
        "builtins.eval": Call(eval, code),
        "builtins.exec": Call(exec, code),
        "subprocess.Popen": Call(subprocess.Popen, ["mkdir", str(target)]),
        "builtins.getattr": Call(getattr, str(target), "upper"),
        "functools.partial": Call(functools.partial(os.mkdir, str(target))),
        "torch.storage._load_from_bytes": Call(torch.storage._load_from_bytes, inner.getvalue()),
        "numpy.load": Call(np.load, io.BytesIO(pickle.dumps(Call(eval, code)))),
        "pathlib.Path.mkdir": Call(Path.mkdir, target),
    }


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", list(payloads(Path())))
def test_code_is_refused_in_one_line_and_does_not_run(tmp_path, name, place) -> None:
    target, file = tmp_path / "boom", tmp_path / "x.pt"
    torch.save(place(payloads(target)[name]), file)
    with pytest.raises(AtollError, match=r"a pickle that holds more than tensors: it (calls|names) ") as raised:
        read_torch(file)
    assert "\n" not in str(raised.value)
    assert not target.exists()


def test_the_payloads_would_run(tmp_path) -> None:
    """The test above can fail: unpickled as usual, they make the directory."""
    for name in ("posix.mkdir", "builtins.eval", "functools.partial", "torch.storage._load_from_bytes"):
        target = tmp_path / name
        torch.save(beside_the_weights(payloads(target)[name]), tmp_path / "x.pt")
        torch.load(tmp_path / "x.pt", weights_only=False)
        assert target.exists(), name


def test_a_class_that_runs_code_when_built_is_only_recorded(tmp_path) -> None:
    evil = Evil()
    evil.__dict__["target"] = str(tmp_path / "boom")
    torch.save({"w": W, "x": evil}, tmp_path / "x.pt")
    read = read_torch(tmp_path / "x.pt")
    assert torch.equal(read["w"], W)
    assert isinstance(read["x"], Opaque)
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_data_is_read_whatever_its_classes_are(tmp_path, protocol) -> None:
    content = {
        "w": W,
        "half": W.bfloat16(),
        "parameter": torch.nn.Parameter(W),
        "view": W[1:],
        "args": argparse.Namespace(model="DiT-S/8", lr=1e-4, path=Path("a/b"), nested=Config(nested=[1, (2, None)])),
        "attributes": Attributes(lr=0.5),
        "scalar": np.float64(0.25),
        "array": np.arange(4, dtype=np.int16).reshape(2, 2),
        "bool": np.bool_(True),
        "random": (random.getstate(), np.random.default_rng(0), torch.get_rng_state()),
        "various": [datetime.datetime(2026, 1, 2), decimal.Decimal("1.5"), {1, 2}, b"bytes", 1j, 2**80, torch.float16],
        "counts": collections.defaultdict(list, a=[1]),
        "device": torch.device("cuda:1"),
    }
    torch.save(content, tmp_path / "x.pt", pickle_protocol=protocol)
    read = read_torch(tmp_path / "x.pt")
    for name in ("w", "half", "parameter", "view"):
        assert torch.equal(read[name], content[name])
    assert np.array_equal(read["array"], content["array"])
    assert (read["scalar"], read["bool"], read["counts"]) == (0.25, True, {"a": [1]})
    assert read["device"] == content["device"]
    assert plain(read["args"]) == {
        "model": "DiT-S/8",
        "lr": 1e-4,
        "path": "a/b",
        "nested": {"lr": 0.1, "nested": [1, [2, None]]},
    }
    assert plain(read["attributes"]) == {"lr": 0.5}
    assert read["various"][2:] == content["various"][2:]


def test_a_compressed_file_is_refused_by_its_sizes(tmp_path) -> None:
    torch.save({"w": torch.zeros(10**6)}, tmp_path / "x.pt")
    with (
        zipfile.ZipFile(tmp_path / "x.pt") as archive,
        zipfile.ZipFile(tmp_path / "y.pt", "w", zipfile.ZIP_DEFLATED) as out,
    ):
        for member in archive.namelist():
            out.writestr(member, archive.read(member))
    with pytest.raises(AtollError, match="unpacks to 4,0"):
        read_torch(tmp_path / "y.pt")


@settings(max_examples=80)
@given(st.data())
def test_damaged_files_are_an_error_of_one_line_or_read(tmp_path, data) -> None:
    """Bytes changed, cut off or added anywhere in a training file: no traceback, and nothing runs."""
    file = tmp_path / "x.pt"
    zipped = data.draw(st.booleans())
    torch.save(beside_the_weights(argparse.Namespace(lr=np.float64(1))), file, _use_new_zipfile_serialization=zipped)
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    file.write_bytes(bytes(content))
    with suppress(AtollError):  # the only exception that may come
        read_torch(file)


def rebuilt(shape: tuple[int, ...], dtype: Any, data: Any) -> Any:
    """An array as numpy pickles it, with any state."""
    reconstruct = np.zeros(1).__reduce__()[0]

    class Array:
        def __reduce__(self):
            return reconstruct, (np.ndarray, (0,), b"b"), (1, shape, np.dtype(dtype), False, data)

    return Array()


NUMBER = np.float64(0).__reduce__()[0]


@pytest.mark.parametrize(
    "value",
    [rebuilt((3,), "f8", b"x" * 8), rebuilt((10**9,), "f8", b"x"), Call(NUMBER, np.dtype("V900000"), b"x" * 900_000)],
    ids=["short", "huge", "number"],
)
def test_an_array_of_another_size_than_its_data_is_refused(tmp_path, value) -> None:
    torch.save({"w": W, "args": value}, tmp_path / "x.pt")
    with pytest.raises(AtollError, match=r"no PyTorch file: .*with [\d,]+ bytes"):
        read_torch(tmp_path / "x.pt")


def test_a_number_without_its_data_allocates_nothing(tmp_path) -> None:
    torch.save({"w": W, "args": Call(NUMBER, np.dtype("V900000000"))}, tmp_path / "x.pt")
    with pytest.raises(AtollError, match=r"a number of type \|V900000000 with 0 bytes"):
        read_torch(tmp_path / "x.pt")


def test_objects_in_an_array_are_not_rebuilt(tmp_path) -> None:
    # numpy reads as many objects as the shape says, beyond the list's end.
    torch.save({"w": W, "args": rebuilt((10**6,), "O", [])}, tmp_path / "x.pt")
    assert read_torch(tmp_path / "x.pt")["args"].size == 0
    fields = np.zeros(2, [("a", "f4"), ("b", "i8")])
    torch.save({"w": W, "args": [fields, np.datetime64("2026-01-01")]}, tmp_path / "y.pt")
    array, date = read_torch(tmp_path / "y.pt")["args"]
    assert (array.size, date) == (0, None)


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<i8", ">u2", "?", "<U5", "S3", "<c16", "|u1", "<f2"])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_arrays_of_plain_numbers_and_text_are_read_exactly(tmp_path, dtype, protocol) -> None:
    array = np.asfortranarray(np.arange(12).reshape(3, 4).astype(dtype))
    torch.save(
        {"w": W, "args": argparse.Namespace(a=array, b=array[1, 2])}, tmp_path / "x.pt", pickle_protocol=protocol
    )
    read = read_torch(tmp_path / "x.pt")["args"].fields
    # numpy may swap the bytes while it reads.
    assert read["a"].dtype.newbyteorder("=") == array.dtype.newbyteorder("=")
    assert np.array_equal(read["a"], array)
    assert read["b"] == array[1, 2]


def text(value: str) -> bytes:
    """The opcode that pushes a text."""
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


COUNTER = b"ccollections\nCounter\n"
CHANGE = COUNTER + b"N}(" + text("dump_patches") + b"\x88" + text("__name__") + text("MARK") + b"u\x86b0"
SOURCE = b"(" + text("module") + COUNTER + text("x.py") + text("other source") + b"tQ0"


def legacy(body: bytes) -> bytes:
    """A file as torch wrote it before version 1.6."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    head = (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, system)
    return b"".join(pickle.dumps(part, 2) for part in head) + b"\x80\x02" + body + b"}." + pickle.dumps([], 2)


@pytest.mark.parametrize("body", [CHANGE, COUNTER + b"}b0"], ids=["attributes", "state"])
def test_a_pickle_does_not_change_classes_of_this_process(tmp_path, body) -> None:
    (tmp_path / "x.pt").write_bytes(legacy(body))
    with pytest.raises(AtollError, match="it changes Counter, which could run code"):
        read_torch(tmp_path / "x.pt")
    assert collections.Counter.__name__ == "Counter"
    assert not hasattr(collections.Counter, "dump_patches")


def test_the_source_that_an_old_file_holds_is_not_written(tmp_path, monkeypatch) -> None:
    # torch writes CLASS.patch into the working directory, if the class says so.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(collections.Counter, "dump_patches", True, raising=False)
    (tmp_path / "x.pt").write_bytes(legacy(SOURCE))
    assert read_torch(tmp_path / "x.pt") == {}
    assert [file.name for file in tmp_path.iterdir()] == ["x.pt"]


def test_a_list_that_is_repeated_in_itself_is_converted_in_bounded_time() -> None:
    value: Any = 1
    for _ in range(18):
        value = [value] * 4
    assert str(plain(value)).count("1") < 100_000
    cycle: dict[str, Any] = {}
    cycle |= {"a": cycle, "b": [cycle, cycle]}
    assert "..." in str(plain(cycle))
