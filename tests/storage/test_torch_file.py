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
