"""The kind of a file by its first bytes, and advice on files that cannot be read."""

import json
import os
import zipfile
from pathlib import Path
from typing import Literal

from atoll.storage.memory import is_out_of_memory

FileContent = Literal["torch", "pickle", "npz", "npy", "safetensors", "pointer", "page", "archive", "empty", "unknown"]

_ARCHIVES = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"(\xb5/\xfd", b"7z\xbc\xaf", b"Rar!")
_LONGEST_HEADER = 10**8  # bytes of a safetensors file's header, the limit of its library
_POINTER = b"version https://git-lfs.github.com/spec/"
_TAR_MAGIC = slice(257, 262)


def content_of(file: Path) -> FileContent:
    """Detect the kind of a file by its content, not its name. Raises OSError if the file cannot be read.

    "torch": a zip file that torch.save wrote. "pickle": a bare pickle, such as torch.save wrote before version 1.6.
    "pointer": a Git LFS pointer. "page": HTML. "archive": a compressed file or a tar.
    """
    # 512 bytes reach the mark of a tar, the last of all signatures.
    with file.open("rb") as stream:
        head = stream.read(512)
    # Formats with a unique signature come first, then those that only look like one.
    text = head.lstrip().lower()
    if not head:
        return "empty"
    if head.startswith(b"PK\x03\x04"):
        return _content_of_zip(file)
    if head.startswith(b"\x93NUMPY"):
        return "npy"
    if head.startswith(_POINTER):
        return "pointer"
    if text.startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "page"
    if head.startswith(_ARCHIVES) or head[_TAR_MAGIC] == b"ustar":
        return "archive"
    # safetensors: 8 bytes of header length, then a JSON object.
    if len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _LONGEST_HEADER:
        return "safetensors"
    # Pickles from protocol 2 on begin with the opcode PROTO.
    return "pickle" if head[:1] == b"\x80" else "unknown"


def advice(file: Path, error: object) -> str:
    """Explain why a file cannot be read and how to fix it, as a sentence to follow "FILE: ".

    Args:
        file: the file.
        error: the exception that its reader raised.
    """
    try:
        content = content_of(file)
    except OSError as refused:
        return f"cannot be read ({refused.strerror}); check the path and its permissions"
    # Failed downloads: the file holds something else.
    if content == "empty":
        return "is empty; download or copy it again, and check that the disk is not full"
    if content == "pointer":
        return "is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository"
    if content == "page":
        return "is a web page, not the file itself; open it to see why, and download the file from its direct link"
    if content == "archive":
        return "is an archive; unpack it and name the file in it"
    # The format is right: memory, a truncated file or damage remain.
    if is_out_of_memory(error):
        return f"does not fit into memory ({os.path.getsize(file):,} bytes); use a machine with more, or free some"
    if content == "safetensors" and (missing := is_cut_off(file)):
        return f"is cut off: {missing}; get the whole file, by a download that can resume"
    # The reason in one line, short enough for a message.
    reason = " ".join(str(error).split())[:160] or type(error).__name__
    return f"cannot be read ({reason}); get a fresh copy and compare its size with the original's"


def _content_of_zip(file: Path) -> FileContent:
    """Detect the kind of a zip file by the names of its members."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        # The list of members is at the end, so a truncated file lacks it: use the first member's name.
        return "torch" if b"data.pkl" in _head(file) else "npz" if b".npy" in _head(file) else "unknown"
    if any(name.endswith("/data.pkl") or name == "data.pkl" for name in names):
        return "torch"
    return "npz" if names and all(name.endswith(".npy") for name in names) else "archive"


def _head(file: Path) -> bytes:
    # The first member's name is in the first bytes of a zip file.
    with file.open("rb") as stream:
        return stream.read(256)


def is_cut_off(file: Path) -> str:
    """Describe how much of a truncated safetensors file is present; "" if it is whole or its header is unreadable."""
    # The first 8 bytes are the length of the header.
    held = os.path.getsize(file)
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if held < 8 + length:
            return f"{held:,} of more than {8 + length:,} bytes"
        # The header says where each tensor ends.
        try:
            header = json.loads(stream.read(length))
            ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
            size = 8 + length + max(ends, default=0)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
            return ""
    return f"{held:,} of {size:,} bytes" if held < size else ""
