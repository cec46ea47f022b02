"""What a file holds by its bytes, and the advice that helps where it cannot be read."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from atoll.storage.content import advice, content_of, is_cut_off

W = {"w": torch.arange(9.0)}
WRITERS: dict[str, Callable[[Path], object]] = {
    "torch": lambda file: torch.save(W, file),
    "pickle": lambda file: torch.save(W, file, _use_new_zipfile_serialization=False),
    "safetensors": lambda file: save_file(W, file),
    "npz": lambda file: file.write_bytes(npz()),
    "npy": lambda file: np.save(file.open("wb"), np.zeros(3)),
    "pointer": lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"),
    "page": lambda file: file.write_text("\n<!DOCTYPE html>\n<html></html>"),
    "archive": lambda file: tarfile.open(file, "w:gz").close(),
    "empty": lambda file: file.write_bytes(b""),
    "unknown": lambda file: file.write_bytes(b"something else"),
}


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, mu=np.zeros(3))
    return buffer.getvalue()


@pytest.mark.parametrize("content", WRITERS)
@pytest.mark.parametrize("name", ["x.bin", "x"])
def test_content_is_told_by_the_bytes(tmp_path, content, name) -> None:
    WRITERS[content](tmp_path / name)
    assert content_of(tmp_path / name) == content


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("pointer", "run `git lfs pull`"),
        ("page", "is a web page"),
        ("archive", "unpack it"),
        ("empty", "is empty"),
        ("unknown", "cannot be read (why); get a fresh copy"),
    ],
)
def test_advice_fits_the_content(tmp_path, content, words) -> None:
    WRITERS[content](tmp_path / "x")
    assert words in advice(tmp_path / "x", "why")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: not enough memory: you tried")])
def test_lack_of_memory_is_not_a_damaged_file(tmp_path, error) -> None:
    WRITERS["torch"](tmp_path / "x")
    assert advice(tmp_path / "x", error).startswith("does not fit into memory")


def test_a_missing_file_is_named_as_such(tmp_path) -> None:
    assert "No such file" in advice(tmp_path / "gone", "why")


@given(st.data())
def test_every_cut_of_a_safetensors_file_is_told(tmp_path, data) -> None:
    save_file(W, tmp_path / "x")
    whole = (tmp_path / "x").read_bytes()
    assert is_cut_off(tmp_path / "x") == ""
    kept = data.draw(st.integers(9, len(whole) - 1))
    (tmp_path / "x").write_bytes(whole[:kept])
    assert is_cut_off(tmp_path / "x").startswith(f"{kept:,} of ")
    assert "is cut off" in advice(tmp_path / "x", "why")


@given(st.binary(max_size=300))
def test_any_bytes_have_a_content_and_an_advice_of_one_line(tmp_path, data) -> None:
    (tmp_path / "x").write_bytes(data)
    content_of(tmp_path / "x")
    assert "\n" not in advice(tmp_path / "x", "two\nlines")
