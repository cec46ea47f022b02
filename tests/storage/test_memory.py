"""Out of memory is reported as that, never as damage: a file that does not fit into memory is intact."""

import ast
import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

import atoll
from atoll.errors import AtollError
from atoll.storage.memory import is_out_of_memory, refuse_out_of_memory
from atoll.storage.shards import Shards

ROOT = Path(atoll.__file__).parent
# Exceptions by which memory running out arrives, or a base class of them.
BROAD = {"Exception", "BaseException", "MemoryError", "RuntimeError", "ArrowException", "OutOfMemoryError"}
# A handler that calls one of these, or raises what it caught, does not report damage.
HONEST = {"refuse_out_of_memory", "is_out_of_memory", "one_line", "_damaged", "_broken", "advice"}
# Handlers that catch broad exceptions and read no data, by file and function.
OTHERS = {
    ("cli/app.py", "main"),  # one line for lack of memory, a traceback for all else
    ("collective/heartbeat.py", "run"),  # training goes on; the warning names the memory
    ("data/image.py", "_unusable"),  # the reason in the list of skipped images is the memory
    ("serve/decoder.py", "_preview"),  # previews may be left out; the log names the reason
    ("serve/engine.py", "_encode"),  # as _preview
    ("serve/engine.py", "_step_loop"),  # the jobs' last event names the memory, by `_fail`
    ("serve/guard.py", "__call__"),  # the log names the reason
    ("serve/jobs.py", "_handle_events"),  # as __call__
    ("serve/unit.py", "tell"),  # as __call__
    ("train/workers.py", "reporting"),  # as main
    ("launch/ray.py", "ray_backend"),  # connecting to a cluster
    ("launch/slurm.py", "submit"),  # an answer of Slurm
    ("runtime/process.py", "serve"),  # the message begins with the exception's type
    ("runtime/process.py", "_outcome"),  # the exception itself travels
    ("storage/shards/writer.py", "close"),  # raises again after cleaning up
}


def errors() -> list[BaseException]:
    wrapped = OSError("cannot load the weights")
    wrapped.__cause__ = MemoryError()
    return [
        MemoryError(),
        np._core._exceptions._ArrayMemoryError((9,), np.dtype("float32")),
        pa.ArrowMemoryError("malloc of size 64 failed"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] . DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
        OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
        wrapped,
    ]


@pytest.mark.parametrize("error", errors(), ids=lambda error: type(error).__name__)
def test_every_kind_is_recognised_and_named_with_the_size(tmp_path, error) -> None:
    file = tmp_path / "x.parquet"
    file.write_bytes(b"1234")
    assert is_out_of_memory(error)
    with pytest.raises(AtollError, match=r"x\.parquet \(4 bytes\): out of memory while loading it; free some memory"):
        refuse_out_of_memory(error, file)


def test_other_errors_pass() -> None:
    circular = ValueError("a")
    circular.__cause__ = KeyError("b")
    circular.__cause__.__cause__ = circular
    for error in (circular, OSError(errno.ENOENT, "No such file"), RuntimeError("shape mismatch")):
        assert not is_out_of_memory(error)
        refuse_out_of_memory(error, "x")


def handlers() -> list[tuple[str, str, ast.ExceptHandler]]:
    """(file, function, handler) of every broad handler in the package that no handler for MemoryError precedes."""
    broad = []
    for file in sorted(ROOT.rglob("*.py")):
        tree = ast.parse(file.read_text())
        for function in ast.walk(tree):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for block in ast.walk(function):
                if not isinstance(block, ast.Try):
                    continue
                for handler in block.handlers:
                    names = {n.id if isinstance(n, ast.Name) else n.attr
                             for n in ast.walk(handler.type) if isinstance(n, ast.Name | ast.Attribute)}  # fmt: skip
                    if names & BROAD:
                        broad.append((str(file.relative_to(ROOT)), function.name, handler))
                    if "MemoryError" in names:
                        break
    return broad


def test_no_handler_in_the_package_turns_it_into_damage() -> None:
    wrong = []
    for file, function, handler in handlers():
        calls = {
            node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            for node in ast.walk(handler)
            if isinstance(node, ast.Call)
        }
        raises = any(isinstance(node, ast.Raise) and node.exc is None for node in handler.body)
        if not (calls & HONEST or raises or (file, function) in OTHERS):
            wrong.append(f"{file}:{handler.lineno} in {function}")
    assert not wrong, "\n".join(wrong)


def test_a_manifest_that_does_not_fit_is_not_called_corrupt(trained_run, monkeypatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise pa.ArrowMemoryError("malloc of size 4194304 failed")

    monkeypatch.setattr("pyarrow.parquet.ParquetFile.read", full)
    shards = Shards(trained_run / "encoded")
    with pytest.raises(
        AtollError, match=r"manifest\.parquet \([\d,]+ bytes\): out of memory while loading it"
    ) as raised:
        shards.keys  # noqa: B018
    assert "corrupt" not in str(raised.value)


def test_lack_of_memory_anywhere_is_one_line_and_exit_code_2() -> None:
    code = """
import sys
import atoll.cli.app
module = sys.modules["atoll.cli.app"]
module.app = lambda: bytearray(2**62)
module.main()
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.startswith("atoll: out of memory (MemoryError); free some memory")
    assert len(ended.stderr.splitlines()) == 1
