"""Read foreign checkpoints: tensors by name, with the configuration or training arguments beside them.

Reads a safetensors file, a PyTorch file (`.pt`, `.pth`, `.pth.tar`, `.bin`, `.ckpt`) or a directory that diffusers
wrote: `config.json` beside one such file, or beside shards and their index. A pipeline's directory is entered at
`transformer/`. Nothing in any of them is executed (`atoll.storage.torch_file`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atoll.convert.names import one_network, unwrapped
from atoll.encoders.weight_files import weight_files
from atoll.errors import AtollError
from atoll.storage.artifact import read_json, sha256_file
from atoll.storage.content import advice, content_of
from atoll.storage.memory import refuse_out_of_memory
from atoll.storage.torch_file import Opaque, plain, read_torch

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".tar")
STEM = "diffusion_pytorch_model"
# The keys under which training scripts save weights, averaged ones first. The first one that holds tensors is read.
AVERAGED = ("ema", "state_dict_ema", "ema_state_dict", "model_ema", "ema_model", "params_ema")
NESTED = (
    *(*AVERAGED, "model", "state_dict", "model_state_dict", "module", "net", "network", "params"),
    *("denoiser", "diffusion_model", "dit", "transformer"),
)
ARGUMENTS = ("args", "config", "cfg", "hparams", "hyper_parameters")  # under which they save their arguments

_TIED = 4  # times the file's size that its tensors may have in all; tied weights are stored once


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory.

    Attributes:
        tensors: tensors by name, without the prefixes of wrappers.
        config: the content of config.json; None if there is none.
        files: sha256 of the weights, by file name.
        where: the path, for messages.
        args: the training arguments saved with the weights, as plain values; {} if there are none.
        key: the entry of a PyTorch file that the tensors were read from, such as "ema"; "" if at its top.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any] | None
    files: dict[str, str]
    where: str
    args: dict[str, Any] = field(default_factory=dict)
    key: str = ""


def read_checkpoint(source: Path) -> Checkpoint:
    """Read the checkpoint at `source`, a file or a directory.

    Raises:
        AtollError: `source` does not exist, is of an unknown kind or damaged, or is a pickle that could run code.
    """
    # The files: `source` itself, or those that diffusers would read.
    if source.is_dir():
        directory = source / "transformer" if (source / "transformer").is_dir() else source
        files = _files_of(directory)
    elif source.is_file():
        directory, files = source.parent, [source]
    else:
        raise AtollError(f"{source}: not found; expected a checkpoint, a file or a directory")
    # Their tensors. Prefixes are removed after all shards are read, since a prefix must be shared by all names.
    tensors: dict[str, Tensor] = {}
    args: dict[str, Any] = {}
    key = ""
    for file in files:
        part, args, key = _read_file(file)
        _refuse_non_finite(file, part)
        if twice := sorted(part.keys() & tensors.keys()):
            raise AtollError(f"{file}: {twice[0]} is in another shard too; get all shards from one place")
        tensors |= part
    config = directory / "config.json"
    return Checkpoint(
        one_network(unwrapped(tensors, str(source)), str(source)),
        _config(config) if config.is_file() else None,
        {file.name: sha256_file(file) for file in files},
        str(source),
        args,
        key,
    )


def _config(file: Path) -> dict[str, Any]:
    config = read_json(file)
    # A list or a string has no keys.
    if not isinstance(config, dict):
        raise AtollError(f"{file}: holds {type(config).__name__}; expected a JSON object")
    return config


def _files_of(directory: Path) -> list[Path]:
    """List the weight files in a diffusers directory, in order."""
    # diffusers prefers the index, so the same file is read here.
    weights = weight_files(directory, STEM, "index", (".safetensors", ".bin"))
    if weights is None:
        names = ", ".join(sorted(path.name for path in directory.iterdir())[:6]) or "nothing"
        raise AtollError(
            f"{directory}: holds {names}; expected {STEM}.safetensors (or its shards and their index), or name the file"
        )
    # Two saves into one directory leave both forms, perhaps of two networks, and diffusers reads a stale index.
    if weights.other is not None and weights.index is not None:
        raise AtollError(
            f"{directory}: holds {weights.index.name} with its shards, and {weights.other.name}: two saves, perhaps of "
            "two networks; remove the one that is not the network"
        )
    return list(weights.files)


def _read_file(file: Path) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Read one file: its tensors, its training arguments, and the key of the tensors."""
    try:
        content = content_of(file)
    except OSError as error:
        raise AtollError(f"{file}: {advice(file, error)}") from None
    # The content decides the format. The suffix decides only if the content is unknown.
    if content == "safetensors" or (content not in ("torch", "pickle") and file.suffix == ".safetensors"):
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(file), {}, ""
        except (SafetensorError, OSError, ValueError, MemoryError) as error:
            refuse_out_of_memory(error, file)
            raise AtollError(f"{file}: no safetensors file: it {advice(file, error)}") from None
    if content in ("torch", "pickle") or file.suffix in PICKLES:
        return _weights(file, read_torch(file))
    known = ", ".join((".safetensors", *PICKLES[:-1], ".pth.tar"))
    raise AtollError(f"{file}: unknown kind of file; expected one of {known}, or a directory of diffusers")


def _refuse_non_finite(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise AtollError if a tensor holds NaN or infinity: an expert of it would be left out of every ensemble."""
    for name, tensor in tensors.items():
        # Integers, such as a counter of steps, are always finite.
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise AtollError(
                f"{file}: the tensor {name!r} holds NaN or infinity; expected finite weights: convert an earlier "
                "checkpoint of the training, or compare the file's hash with its source"
            )


def _weights(file: Path, content: Any) -> tuple[dict[str, Tensor], dict[str, Any], str]:
    """Extract from a PyTorch file's content the tensors, the training arguments, and the key of the tensors."""
    # Descend through the keys that hold weights. The outermost training arguments are used.
    args: dict[str, Any] = {}
    keys: list[str] = []
    visited: set[int] = set()  # an entry may hold itself
    while isinstance(content, Mapping) and id(content) not in visited:
        visited.add(id(content))
        for name in ARGUMENTS:
            saved = plain(content.get(name))
            args = args or (saved if isinstance(saved, dict) else {})
        key = next((key for key in NESTED if _holds_weights(file, key, content.get(key), set())), None)
        if key is None:
            break
        keys.append(key)
        content = content[key]
    # Skip numbers and text beside the tensors.
    tensors = {}
    if isinstance(content, Mapping):
        tensors = {str(name): _dense(file, str(name), v) for name, v in content.items() if isinstance(v, Tensor)}
    if not tensors:
        held = _keys_of(content) if isinstance(content, Mapping) else _type_of(content)
        raise AtollError(f"{file}: holds {held}; expected tensors by name, or such under {', '.join(NESTED)}")
    _refuse_shared(file, tensors)
    return tensors, args, ".".join(keys)


def _refuse_shared(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise AtollError if the tensors take much more memory than the file: they share its bytes."""
    # Each is a tensor of its own after the conversion. Tied weights count two or three times.
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if total > _TIED * file.stat().st_size + 2**20:
        raise AtollError(
            f"{file}: its {len(tensors):,} tensors have {total:,} bytes in a file of {file.stat().st_size:,}, so they "
            "share memory; save each tensor's own values (clone() them first)"
        )


def _holds_weights(file: Path, key: str, value: Any, seen: set[int]) -> bool:
    """Return whether the entry `key` holds tensors by name, at any depth.

    Args:
        file: for messages.
        key: the entry's.
        value: the entry.
        seen: ids of entries that were searched; an entry may hold itself, or one entry many times.

    Raises:
        AtollError: it holds averaged weights without names, or a whole module. Another entry would be other weights.
    """
    if isinstance(value, Mapping):
        if id(value) in seen:
            return False
        seen.add(id(value))
        # Tensors here, or at a deeper level.
        if _has_tensors(value):
            return True
        if any(_holds_weights(file, inner, value.get(inner), seen) for inner in NESTED):
            return True
        # diffusers' and torch-ema's averages, in the order of a module's parameters.
        if key in AVERAGED and "shadow_params" in value:
            raise AtollError(
                f"{file}: {key} holds shadow_params, tensors without names; save the averaged network's state_dict()"
            )
    if key in NESTED and isinstance(value, Opaque) and "_modules" in value.fields:
        raise AtollError(f"{file}: {key} is a whole {value.type_name}; save its state_dict() instead of the module")
    return False


def _keys_of(content: Mapping[Any, Any]) -> str:
    # Keys that hold tensors by name come first: one of them may be the network.
    inner = [key for key, value in content.items() if isinstance(value, Mapping) and _has_tensors(value)]
    return f"tensors under {', '.join(map(str, inner[:4]))}" if inner else f"keys {', '.join(map(str, [*content][:4]))}"


def _has_tensors(content: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in content.values())


def _type_of(content: Any) -> str:
    # A whole module would have to be rebuilt from its code.
    if isinstance(content, Opaque):
        return f"a whole {content.type_name} (save its state_dict() instead)"
    return type(content).__name__


def _dense(file: Path, name: str, value: Tensor) -> Tensor:
    """Detach a tensor. Raises AtollError unless it is dense and no larger than its file."""
    # An expanded tensor takes no space in the file and could fill the memory once it is copied.
    sparse = value.layout != torch.strided or value.is_quantized or value.is_meta or hasattr(value, "device_mesh")
    if sparse or value.numel() * value.element_size() > max(file.stat().st_size, 2**20):
        kind = "not dense" if sparse else f"larger than the file ({list(value.shape)})"
        raise AtollError(
            f"{file}: the tensor {name} is {kind}; expected whole, dense tensors: save a full state_dict()"
        )
    return value.detach()


class Taker:
    """Return a checkpoint's tensors one by one and record which are missing, misshapen or unused.

    A conversion takes all tensors that it needs and calls `done` at the end, which reports all problems in one message.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.where = checkpoint.where
        # What is left at the end is unknown to the conversion.
        self._left = dict(checkpoint.tensors)
        self._wrong: list[str] = []

    def take(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Take the tensor `name` in `dtype`; zeros of `shape` if it is missing or of another shape."""
        # Each tensor is taken once.
        tensor = self._left.pop(name, None)
        if tensor is not None and tensor.shape == shape and tensor.is_floating_point():
            return tensor.to(dtype)
        got = "missing" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        self._wrong.append(f"{name}: {got}, expected {list(shape)}")
        # Expanded zeros take no memory, whatever sizes an untrusted config names.
        return torch.zeros(()).expand(shape)

    def shape(self, name: str, dimensions: int) -> torch.Size:
        """Return the shape of a tensor that determines sizes.

        Raises:
            AtollError: it is missing, or has another number of dimensions.
        """
        # Sizes must be known before anything else can be checked.
        tensor = self._left.get(name)
        if tensor is None or tensor.ndim != dimensions or 0 in tensor.shape:
            got = "missing" if tensor is None else f"of shape {list(tensor.shape)}"
            raise AtollError(
                f"{self.where}: {name} is {got}; expected {dimensions} dimensions: name a whole network's checkpoint"
            )
        return tensor.shape

    def count(self, prefix: str) -> int:
        """Count the blocks `prefix.0.`, `prefix.1.`, ..."""
        # The blocks have consecutive numbers.
        return len({name.split(".")[1] for name in self._left if name.startswith(f"{prefix}.") and name.count(".") > 1})

    def linear(self, name: str, out: int, into: int, bias: bool = True) -> tuple[Tensor, Tensor]:
        """Take a linear layer's weight [out, into] and bias [out]; without `bias` the bias is zero."""
        # A layer without bias adds nothing.
        weight = self.take(f"{name}.weight", out, into)
        return weight, self.take(f"{name}.bias", out) if bias else torch.zeros(out)

    def drop(self, *names: str) -> None:
        """Ignore these tensors if they exist."""
        for name in names:
            self._left.pop(name, None)

    def drop_prefix(self, prefix: str) -> None:
        """Ignore all tensors whose names begin with `prefix`."""
        self._left = {name: value for name, value in self._left.items() if not name.startswith(prefix)}

    def done(self) -> None:
        """Raise AtollError if a taken tensor did not fit or a tensor is unused."""
        # Unused tensors would mean a network with more parts.
        problems = self._wrong + [f"{name}: unknown" for name in sorted(self._left)]
        if problems:
            more = f" and {len(problems) - 6} more" if len(problems) > 6 else ""
            raise AtollError(
                f"{self.where}: {len(problems)} tensors do not fit ({'; '.join(problems[:6])}{more}); "
                "expected the weights of one whole network of this layout"
            )
