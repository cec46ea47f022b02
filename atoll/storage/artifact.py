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


def read_json(path: Path, most: int = JSON_BYTES) -> Any:
    """Read a JSON file; NaN and infinity are refused.

    Args:
        most: bytes that the file may have.

    Raises:
        AtollError: the file is missing, too large, no regular file or no JSON.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would never end
            raise AtollError(f"{path}: is no regular file; expected a JSON file")
        if (size := path.stat().st_size) > most:
            raise AtollError(f"{path}: has {size:,} bytes; expected JSON of at most {most:,}")
        return json.loads(path.read_text(encoding="utf-8"), parse_float=_finite_float, parse_constant=_no_constant)
    except FileNotFoundError:
        raise AtollError(f"{path}: not found") from None
    except RecursionError:
        raise AtollError(f"{path}: not readable JSON (lists and objects are nested too deeply)") from None
    except OSError as error:
        raise AtollError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise AtollError(f"{path}: not readable JSON ({error}); get a fresh copy of it") from None


def _finite_float(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text:.20} is not finite")
    return value


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON")


def load_card(file: Path, kind: type[CardT]) -> CardT:
    """Read a card's file. Raises AtollError as `read_json` and `parse_card` do."""
    return parse_card(kind, read_json(file, JSON_BYTES if kind.many_files else CARD_BYTES), str(file))


def load_clusters(file: Path) -> ClustersCard | DrawnClustersCard:
    """Read a clusters.json, whichever stage wrote it. Raises AtollError as `load_card` does."""
    content = read_json(file, CARD_BYTES)
    return parse_card(clusters_kind(content), content, str(file))


def write_card(file: Path, card: Card) -> None:
    """Write a card's file, whole or not at all.

    Raises:
        AtollError: a value out of bounds, a full disk.
    """
    values = card.plain()
    parse_card(type(card), values, f"the card for {file}")  # what is written can be read
    write_json(file, values)


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


def save_artifact(path: Path, card: ArtifactCard, tensors: Mapping[str, Tensor]) -> None:
    """Write an artifact, whole or not at all.

    Args:
        path: its directory; one that exists is replaced.
        card: what it is; the entry of the weights is filled in.
        tensors: by flat names.

    Raises:
        AtollError: a value of the card is out of bounds, or the disk is full.
    """
    from safetensors.torch import save

    with whole_directory(path) as directory:
        data = save({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()})
        write_bytes(directory / WEIGHTS, data)
        weights = WeightsEntry(file=WEIGHTS, sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
        write_card(directory / CARD, card.model_copy(update={"weights": weights}))


def read_card(path: Path, kind: type[ArtifactT]) -> ArtifactT:
    """Read the card of the artifact at `path`. Raises AtollError as `load_card` does."""
    card = load_card(path / CARD, kind)
    if card.weights is None:
        raise AtollError(f"{path / CARD}: lacks weights, the sha256 of {WEIGHTS}; {card.remedy}")
    return card


def read_tensors(path: Path, card: ArtifactCard) -> dict[str, Tensor]:
    """Map an artifact's tensors into memory, after a check of their hash.

    Args:
        path: the artifact's directory.
        card: its card.

    Raises:
        AtollError: the file is missing, altered or unreadable.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = path / WEIGHTS
    if not file.is_file():
        raise AtollError(f"{file}: not found, though {path / CARD} names it; get a whole copy of the artifact")
    actual = sha256_file(file)
    if actual != card.weights_sha256:
        raise AtollError(
            f"{file}: sha256 is {actual[:12]}..., the card says {card.weights_sha256[:12]}...; "
            "the file was altered or damaged, get a fresh copy"
        )
    try:
        return load_file(file)
    except SafetensorError as error:
        raise AtollError(f"{file}: no safetensors file ({error}); get a fresh copy") from None
