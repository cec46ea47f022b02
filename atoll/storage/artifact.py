"""Artifacts: a directory with a card (JSON) and a safetensors file. Nothing in it executes.

experts/3-moss/card.json              its kind, its training, the sha256 of the weights
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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from atoll.errors import AtollError
from atoll.storage.bounds import CARD_BYTES, JSON_BYTES
from atoll.storage.cards import (
    ArtifactCard,
    ArtifactT,
    Card,
    CardT,
    ClustersCard,
    DrawnClustersCard,
    WeightsEntry,
    clusters_kind,
    parse_card,
)
from atoll.storage.layout import CARD as CARD
from atoll.storage.layout import WEIGHTS as WEIGHTS


def sha256_file(path: Path) -> str:
    """Compute the hex digest of a file, without loading it whole."""
    with path.open("rb") as file:
        # In chunks, so that memory does not grow with the file.
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically: a full disk or a power failure leaves either the old content or the new.

    Raises:
        AtollError: the disk is full or the directory is not writable. An earlier file at `path` is untouched.
    """
    # The name is unique per process and thread, so that two writers of one file cannot mix their bytes.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            # Without fsync, a power failure after the rename can leave an empty file.
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise AtollError(f"{path}: cannot be written ({error.strerror}); what was there is untouched") from error


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically, as `write_bytes` does. Raises ValueError for NaN and infinity."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def finite(value: Any) -> Any:
    """Replace every NaN or infinite number by None, since JSON has neither. Tuples become lists."""
    # Containers are walked, everything else stays as it is.
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return value


def read_json(path: Path, most: int = JSON_BYTES) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        most: the largest size accepted, in bytes.

    Raises:
        AtollError: the file is missing, too large, not a regular file, not JSON, or holds NaN or infinity.
    """
    try:
        # Check the type and size first: a pipe would never end, and a huge file would fill the memory.
        if path.exists() and not path.is_file():
            raise AtollError(f"{path}: is no regular file; expected a JSON file")
        if (size := path.stat().st_size) > most:
            raise AtollError(f"{path}: has {size:,} bytes; expected JSON of at most {most:,}")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise AtollError(f"{path}: not found") from None
    except OSError as error:
        raise AtollError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise AtollError(f"{path}: not readable JSON ({error}); get a fresh copy of it") from None
    return parse_json(text, str(path))


def parse_json(text: str | bytes, where: str) -> Any:
    """Parse JSON whose size was checked.

    Args:
        text: the content; bytes are UTF-8.
        where: its place, for messages.

    Raises:
        AtollError: not JSON, or it holds NaN or infinity.
    """
    try:
        return json.loads(text, parse_float=_finite_float, parse_constant=_no_constant)
    except RecursionError:
        raise AtollError(f"{where}: not readable JSON (lists and objects are nested too deeply)") from None
    except ValueError as error:
        raise AtollError(f"{where}: not readable JSON ({error}); get a fresh copy of it") from None


def _finite_float(text: str) -> float:
    # JSON numbers such as 1e999 overflow to infinity.
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text:.20} is not finite")
    return value


def _no_constant(text: str) -> float:
    # Python's parser would accept NaN and Infinity.
    raise ValueError(f"{text} is no JSON")


def load_card(file: Path, kind: type[CardT]) -> CardT:
    """Read a card's file. Raises AtollError as `read_json` and `parse_card` do."""
    # Cards that list files may be larger than those of artifacts.
    return parse_card(kind, read_json(file, JSON_BYTES if kind.many_files else CARD_BYTES), str(file))


def load_clusters(file: Path) -> ClustersCard | DrawnClustersCard:
    """Read a clusters.json, whichever stage wrote it. Raises AtollError as `load_card` does."""
    # The content shows which stage wrote it.
    content = read_json(file, CARD_BYTES)
    return parse_card(clusters_kind(content), content, str(file))


def write_card(file: Path, card: Card) -> None:
    """Write a card's file atomically.

    Raises:
        AtollError: a value is out of bounds, or the disk is full.
    """
    # Cards hold plain values only.
    values = card.plain()
    # Validate before writing, so that every written card can be read back.
    parse_card(type(card), values, f"the card for {file}")
    write_json(file, values)


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory that replaces `path` if the block succeeds and is removed if it fails.

    An existing `path` is replaced only at the end. Directories left by killed processes of this machine are removed.

    Raises:
        AtollError: the disk is full or the parent directory is not writable.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Remove leftovers of dead processes. The host is part of the name, since a pid means nothing elsewhere.
        host = socket.gethostname()
        ours = re.compile(rf"{re.escape(f'.{path.name}.{host}-')}(\d+)\..*\.(tmp|old)")
        for left in path.parent.iterdir():
            if (match := ours.fullmatch(left.name)) is None or _is_alive(int(match.group(1))):
                continue
            # Without `path`, an .old directory is the only copy left: keep it.
            if match.group(2) == "tmp" or path.exists():
                shutil.rmtree(left, ignore_errors=True)
        # Create it beside `path`: a rename is atomic only within one file system.
        prefix = f".{path.name}.{host}-{os.getpid()}."
        temporary = Path(tempfile.mkdtemp(prefix=prefix, suffix=".tmp", dir=path.parent))
        temporary.chmod(0o755)  # mkdtemp allows only the owner
        yield temporary
        # A directory with content cannot be replaced in one step: move the old one aside first.
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
    """Return whether a process with this id runs on this machine."""
    try:
        # Signal 0 only checks that the process exists.
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's process
        return True
    return True


def save_artifact(path: Path, card: ArtifactCard, tensors: Mapping[str, Tensor]) -> None:
    """Write an artifact atomically.

    Args:
        path: the artifact's directory; an existing one is replaced.
        card: its card; the `weights` entry is filled in here.
        tensors: its tensors by flat name, any shapes.

    Raises:
        AtollError: a value of the card is out of bounds, or the disk is full.
    """
    from safetensors.torch import save

    with whole_directory(path) as directory:
        # Hash the bytes in memory rather than read the file back.
        data = save({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()})
        write_bytes(directory / WEIGHTS, data)
        weights = WeightsEntry(file=WEIGHTS, sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
        write_card(directory / CARD, card.model_copy(update={"weights": weights}))


def read_card(path: Path, kind: type[ArtifactT]) -> ArtifactT:
    """Read the card of the artifact at `path`. Raises AtollError as `load_card` does."""
    card = load_card(path / CARD, kind)
    # A card without weights is of an artifact that was never completed.
    if card.weights is None:
        raise AtollError(f"{path / CARD}: lacks weights, the sha256 of {WEIGHTS}; {card.remedy}")
    return card


def read_tensors(path: Path, card: ArtifactCard) -> dict[str, Tensor]:
    """Check the hash of an artifact's tensors and map them into memory.

    Args:
        path: the artifact's directory.
        card: its card.

    Returns:
        The tensors by flat name, on the CPU.

    Raises:
        AtollError: the file is missing, altered or unreadable.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = path / WEIGHTS
    if not file.is_file():
        raise AtollError(f"{file}: not found, though {path / CARD} names it; get a whole copy of the artifact")
    # The hash covers the whole file, so an altered header is noticed before it is parsed.
    actual = sha256_file(file)
    if actual != card.weights_sha256:
        raise AtollError(
            f"{file}: sha256 is {actual[:12]}..., the card says {card.weights_sha256[:12]}...; "
            "the file was altered or damaged, get a fresh copy"
        )
    try:
        return load_file(file)
    # A card of a stranger may hold the hash of any file.
    except SafetensorError as error:
        raise AtollError(f"{file}: no safetensors file ({error}); get a fresh copy") from None
