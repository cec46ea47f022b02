"""Artifacts: a directory with a card (JSON) and a safetensors file. Nothing in it executes.

experts/3-moss/card.json              what it is, how it was made, the sha256 of the weights
experts/3-moss/weights.safetensors    tensors under flat names
"""

import hashlib
import json
import math
import os
import re
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from atoll.errors import AtollError
from atoll.storage.layout import CARD as CARD
from atoll.storage.layout import WEIGHTS as WEIGHTS

FORMAT = 1


def sha256_file(path: Path) -> str:
    """The hex digest of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file so that it is there whole or not at all, also when the disk fills or the plug is pulled.

    Raises:
        AtollError: the disk is full or the directory not writable; what stood at `path` is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise AtollError(f"{path}: cannot be written ({error.strerror}); what was there is untouched") from error


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` of readable JSON; NaN and infinity are refused."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def finite(value: Any) -> Any:
    """Plain values with null for every number that is NaN or infinite, as JSON has neither; tuples become lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return value


def read_json(path: Path) -> Any:
    """Raises AtollError where the file is missing or no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AtollError(f"{path}: not found") from None
    except (ValueError, OSError) as error:
        raise AtollError(f"{path}: not readable JSON ({error}); get a fresh copy of it") from None


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """A temporary directory that becomes `path` if the block succeeds and vanishes if it does not.

    An existing `path` is replaced only at the end. What a killed process of this machine left behind is removed.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        host = socket.gethostname()
        ours = re.compile(rf"{re.escape(f'.{path.name}.{host}-')}(\d+)\..*\.(tmp|old)")
        for left in path.parent.iterdir():
            if (found := ours.fullmatch(left.name)) is None or _is_alive(int(found.group(1))):
                continue
            if found.group(2) == "tmp" or path.exists():  # else what was to be replaced is all that there is
                shutil.rmtree(left, ignore_errors=True)
        prefix = f".{path.name}.{host}-{os.getpid()}."
        temporary = Path(tempfile.mkdtemp(prefix=prefix, suffix=".tmp", dir=path.parent))
        temporary.chmod(0o755)  # mkdtemp's are their owner's alone
        yield temporary
        if path.exists():
            old = temporary.with_suffix(".old")
            os.replace(path, old)
            os.replace(temporary, path)
            shutil.rmtree(old)
        else:
            os.replace(temporary, path)
    except OSError as error:
        raise AtollError(f"{path}: cannot be written ({error.strerror}); nothing was changed") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's process
        return True
    return True


def save_artifact(path: Path, kind: str, card: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Writes the artifact as a whole or not at all. `card` gains the format, the kind and the weights' hash."""
    from safetensors.torch import save

    with whole_directory(path) as directory:
        data = save({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()})
        write_bytes(directory / WEIGHTS, data)
        weights = {"file": WEIGHTS, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        write_json(directory / CARD, {"format": FORMAT, "kind": kind, **card, "weights": weights})


def check_card(card: Any, kind: str, where: Path) -> dict[str, Any]:
    """Raises AtollError unless `card` is one of this format and kind."""
    if not isinstance(card, dict) or "format" not in card or "kind" not in card:
        raise AtollError(f"{where}: not a card of Atoll; expected a JSON object with format and kind")
    if card["format"] != FORMAT:
        raise AtollError(
            f"{where}: format {card['format']}, this version of atoll reads format {FORMAT}; "
            f"{'update atoll' if isinstance(card['format'], int) and card['format'] > FORMAT else 'export it again'}"
        )
    if card["kind"] != kind:
        raise AtollError(f"{where}: this is a card of kind {card['kind']!r}; expected {kind!r}")
    return card


def read_card(path: Path, kind: str) -> dict[str, Any]:
    """The card of the artifact at `path`, its format and kind checked."""
    return check_card(read_json(path / CARD), kind, path / CARD)


def read_tensors(path: Path, card: dict[str, Any]) -> dict[str, Tensor]:
    """The artifact's tensors, memory-mapped, after its sha256 was found to be the card's.

    Raises:
        AtollError: the file is missing, altered or unreadable.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    weights = card.get("weights")
    # The name is fixed, so that no card can point outside its own directory.
    if not isinstance(weights, dict) or weights.get("file") != WEIGHTS or not isinstance(weights.get("sha256"), str):
        raise AtollError(f"{path / CARD}: its weights entry is {weights}; expected the sha256 of {WEIGHTS}")
    file = path / WEIGHTS
    if not file.is_file():
        raise AtollError(f"{file}: not found, though {path / CARD} names it; get a whole copy of the artifact")
    found = sha256_file(file)
    if found != weights["sha256"]:
        raise AtollError(
            f"{file}: sha256 is {found[:12]}..., the card says {card['weights']['sha256'][:12]}...; "
            "the file was altered or damaged, get a fresh copy"
        )
    try:
        return load_file(file)
    except SafetensorError as error:
        raise AtollError(f"{file}: no safetensors file ({error}); get a fresh copy") from None
