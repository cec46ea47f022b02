"""Foreign checkpoints from the disk: tensors by name, perhaps a configuration. Nothing in them is executed.

Read are: a `.safetensors` file, a PyTorch file (`.pt`, `.pth`, `.bin`, `.ckpt`; with `weights_only=True`, always), and
a directory as diffusers writes it: `config.json` beside one such file, or beside the shards that an index names; a
whole pipeline's directory is entered at `transformer/`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atoll.errors import AtollError
from atoll.storage.artifact import read_json, sha256_file

PICKLES = (".pt", ".pth", ".bin", ".ckpt")
STEM = "diffusion_pytorch_model"
NESTED = ("ema", "model", "state_dict")  # keys under which training scripts keep the weights; the first found is read
WRAPPERS = ("module.", "_orig_mod.")  # what DDP and torch.compile put before every name


@dataclass(frozen=True)
class Checkpoint:
    """What was read.

    Attributes:
        tensors: by their own names.
        config: config.json, where there is one.
        files: sha256 by file name, of the weights.
        where: the path, for messages.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any] | None
    files: dict[str, str]
    where: str


def read_checkpoint(source: Path) -> Checkpoint:
    """The checkpoint at `source`, a file or a directory.

    Raises:
        AtollError: nothing there, an unknown kind of file, a damaged one, a pickle that holds more than tensors.
    """
    if source.is_dir():
        directory = source / "transformer" if (source / "transformer").is_dir() else source
        files = _files_of(directory)
    elif source.is_file():
        directory, files = source.parent, [source]
    else:
        raise AtollError(f"{source}: not found; expected a checkpoint, a file or a directory")
    tensors: dict[str, Tensor] = {}
    for file in files:
        part = _read_file(file)
        if twice := sorted(part.keys() & tensors.keys()):
            raise AtollError(f"{file}: {twice[0]} stands in another shard too; get a fresh copy of all of them")
        tensors |= part
    config = directory / "config.json"
    return Checkpoint(
        tensors,
        _config(config) if config.is_file() else None,
        {file.name: sha256_file(file) for file in files},
        str(source),
    )


def _config(file: Path) -> dict[str, Any]:
    config = read_json(file)
    if not isinstance(config, dict):
        raise AtollError(f"{file}: holds {type(config).__name__}; expected a JSON object")
    return config


def _files_of(directory: Path) -> list[Path]:
    """The weights in a diffusers directory, in order."""
    index = directory / f"{STEM}.safetensors.index.json"
    if index.is_file():
        shards = _config(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise AtollError(f"{index}: its weight_map is no map of names to files; get a fresh copy of it")
        files = [directory / name for name in sorted(set(shards.values()))]
        for file in files:
            if file.parent != directory or not file.is_file():
                raise AtollError(f"{file}: not found, though {index.name} names it; get all shards")
        return files
    names = [f"{STEM}{variant}{end}" for end in (".safetensors", ".bin") for variant in ("", ".fp16")]
    for name in names:
        if (directory / name).is_file():
            return [directory / name]
    found = ", ".join(sorted(path.name for path in directory.iterdir())[:6]) or "nothing"
    raise AtollError(
        f"{directory}: holds {found}; expected {names[0]} (or its shards and their index), or name the file"
    )


def _read_file(file: Path) -> dict[str, Tensor]:
    """The tensors of one file."""
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise AtollError(f"{file}: no safetensors file ({error}); get a fresh copy") from None
    if file.suffix in PICKLES:
        return _read_pickle(file)
    known = ", ".join((".safetensors", *PICKLES))
    raise AtollError(f"{file}: unknown kind of file; expected one of {known}, or a directory of diffusers")


def _read_pickle(file: Path) -> dict[str, Tensor]:
    """The tensors of a PyTorch file. torch refuses to build anything but tensors and plain containers from it."""
    import pickle

    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).partition("WeightsUnpickler error: ")[2] or str(error)
        reason = " ".join(reason.split("\n")[0].split())[:160]
        raise AtollError(
            f"{file}: a pickle that holds more than tensors, which could run code ({reason}); "
            "let its author save the weights alone, best as safetensors"
        ) from None
    except Exception as error:  # damaged bytes lead torch's reader into errors of every kind
        raise AtollError(f"{file}: no PyTorch file ({' '.join(str(error).split())[:160]}); get a fresh copy") from None
    for key in NESTED:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        held = f"keys {', '.join(map(str, list(content)[:4]))}" if isinstance(content, dict) else type(content).__name__
        raise AtollError(f"{file}: holds {held}; expected tensors by name, or such under {', '.join(NESTED)}")
    return _unwrapped({str(name): value for name, value in content.items()})


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    for wrapper in WRAPPERS:
        if all(name.startswith(wrapper) for name in tensors):
            tensors = {name.removeprefix(wrapper): value for name, value in tensors.items()}
    return tensors


class Taker:
    """Hands out a checkpoint's tensors one by one and notes what is missing, misshapen or left over.

    A conversion takes all that it needs and calls `done` at the end: one message then names all that is wrong.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.where = checkpoint.where
        self._left = dict(checkpoint.tensors)
        self._wrong: list[str] = []

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor `name` in float32; zeros of `shape` where it is not there or of another shape."""
        tensor = self._left.pop(name, None)
        if tensor is not None and tensor.shape == shape and tensor.is_floating_point():
            return tensor.float()
        found = "missing" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        self._wrong.append(f"{name}: {found}, expected {list(shape)}")
        return torch.zeros(()).expand(shape)  # takes no memory, whatever a stranger's config asks for

    def shape(self, name: str, dimensions: int) -> torch.Size:
        """The shape of a tensor that tells sizes. Raises AtollError where it is not there, or has not `dimensions`."""
        tensor = self._left.get(name)
        if tensor is None or tensor.ndim != dimensions or 0 in tensor.shape:
            found = "missing" if tensor is None else f"of shape {list(tensor.shape)}"
            raise AtollError(
                f"{self.where}: {name} is {found}; expected {dimensions} dimensions: get a whole checkpoint"
            )
        return tensor.shape

    def count(self, prefix: str) -> int:
        """How many blocks `prefix.0.`, `prefix.1.`, ... there are."""
        return len({name.split(".")[1] for name in self._left if name.startswith(f"{prefix}.") and name.count(".") > 1})

    def linear(self, name: str, out: int, into: int, bias: bool = True) -> tuple[Tensor, Tensor]:
        """A linear layer's weight [out,into] and bias [out]; the bias is zero where there is none to take."""
        weight = self.take(f"{name}.weight", out, into)
        return weight, self.take(f"{name}.bias", out) if bias else torch.zeros(out)

    def drop(self, *names: str) -> None:
        """Leaves these out, where they are there at all."""
        for name in names:
            self._left.pop(name, None)

    def done(self) -> None:
        """Raises AtollError unless all that was taken was there, and nothing else is."""
        problems = self._wrong + [f"{name}: unknown" for name in sorted(self._left)]
        if problems:
            more = f" and {len(problems) - 6} more" if len(problems) > 6 else ""
            raise AtollError(
                f"{self.where}: {len(problems)} tensors do not fit ({'; '.join(problems[:6])}{more}); "
                "expected the weights of one whole network of this layout"
            )
