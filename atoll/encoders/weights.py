"""The weights of frozen networks: finding them, checking their hash, loading them.

A frozen network's config names its `weights` as the user did (a local path, or a repository of the hub) and their
`sha256`. Their place differs between machines; the rest of the config, their `identity`, does not.
"""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import safe_open
from torch import nn

from atoll.encoders.find import REPOSITORY
from atoll.encoders.find import WANTED as WANTED
from atoll.encoders.find import also_found_in as also_found_in
from atoll.encoders.find import find_weights as find_weights
from atoll.encoders.find import unset_variable as unset_variable
from atoll.encoders.trust import Trust
from atoll.encoders.weight_files import WeightFiles, weight_files
from atoll.errors import AtollError
from atoll.runtime.libraries import quiet
from atoll.storage.artifact import read_json, sha256_file
from atoll.storage.claims import require_fit
from atoll.storage.content import advice, content_of, is_cut_off
from atoll.storage.memory import refuse_out_of_memory

STEMS = {"transformers": "model", "diffusers": "diffusion_pytorch_model"}  # the names of the libraries' weight files
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "spiece.model", "tokenizer.model")
_LOCATION = ("weights", "revision", "subfolder", "tokenizer")  # the keys of a config that name places
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Keys of config.json that make transformers or diffusers load more than the hashed files: code from the hub
# ("kernels"), weights of another name, a package that reads quantised weights.
_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
_PLAIN_IMPLEMENTATIONS = ("eager", "sdpa")  # torch's own; any other may be code that is fetched
_OTHER_FILES = ("transformers_weights", "quantization_config", "kernel_config", "use_kernels")
_ADAPTER = "adapter_config.json"  # read by transformers wherever peft is installed; it names another network

Model = TypeVar("Model", bound=BaseModel)
NetworkT = TypeVar("NetworkT", bound=nn.Module)


class WeightsConfig(BaseModel):
    """The config of every network with weights.

    sha256: None is filled in when the weights are found. revision: the commit of the repository; None is filled in when
    the hub provides the weights.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    weights: str = Field(min_length=1)
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    revision: str | None = Field(None, pattern="^[0-9a-f]{40}$")

    def find(self, trust: Trust, subfolders: Sequence[str] = ("",)) -> Path:
        """Return where the weights are; arguments and errors as in `find_weights`."""
        # A card's weights are identified by their hash and their commit.
        return find_weights(self.weights, subfolders, trust, sha256=self.sha256, revision=self.revision)

    def pinned(self, sha256: str, root: Path, **changes: Any) -> Self:
        """Return the config with the hash of the weights at `root`, and their commit if the hub provided them."""
        # The hub's cache names a snapshot by its commit.
        cached = root.parent.name == "snapshots" and _COMMIT.fullmatch(root.name)
        revision = root.name if cached and REPOSITORY.fullmatch(self.weights) else self.revision
        return self.model_copy(update={"sha256": sha256, "revision": revision, **changes})

    def entry(self) -> dict[str, Any]:
        """Return the plain values that are stored in cards, without the name."""
        # Weights that were local have no commit.
        unset = {"revision"} if self.revision is None else set()
        return self.model_dump(mode="json", exclude={"name", *unset})


class PretrainedConfig(WeightsConfig):
    """A network in the layout of transformers or diffusers: config.json and safetensors."""

    subfolder: str = Field("", pattern=r"^[\w-]*$")  # of `weights`: "vae" in the repository of a whole pipeline


def parse_config(kind: str, known: Mapping[str, type[Model]], config: Mapping[str, Any]) -> Model:
    """Validate `config` by the model that belongs to its "name".

    Args:
        kind: of the configured object, for error texts: "codec".
        known: the models by name.
        config: from a manifest or a card.

    Raises:
        AtollError: an unknown name, key or value.
    """
    # The name selects the model.
    name = config.get("name")
    if name == "unknown":  # of a converted expert
        raise AtollError(f"the {kind} is not known: convert the expert again with --{kind.split()[0]}")
    if not isinstance(name, str) or name not in known:
        raise AtollError(f"unknown {kind} {name!r}; known: {', '.join(map(repr, known))}")
    # Pydantic's first complaint, in one line.
    try:
        return known[name].model_validate(dict(config))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        if first["type"] == "missing" and where == "weights":
            raise AtollError(
                f"{kind} {name!r}: weights: missing; set it to a local path or to a repository of the hub"
            ) from None
        raise AtollError(f"{kind} {name!r}: {where}: {first['msg']}") from None


def identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return `config` without the place of the weights: two networks are the same if their identities are equal."""
    # The same weights may be in different places on different machines.
    return {key: value for key, value in config.items() if key not in _LOCATION}


def same(one: object, other: object) -> bool:
    """Whether two entries of cards are equal; configs of networks are compared by their identities."""
    # Other entries, such as shapes, are compared as they are.
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return identity(one) == identity(other)
    return one == other


def sha256_weights(path: Path, files: Sequence[str] | None = None) -> str:
    """Return the hash of a file, or of a directory's sorted (relative name, sha256).

    Args:
        path: the file or directory.
        files: the files in the directory that the network reads; None: every file.

    Raises:
        AtollError: a file is missing or cannot be read.
    """
    # A single file has the hash that its publisher states.
    try:
        if path.is_file():
            return sha256_file(path)
        if files is None:
            files = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
        return sha256_files({name: path / name for name in files})
    except OSError as error:
        raise AtollError(
            f"{error.filename or path}: cannot be read ({error.strerror}); check that it is there, and its permissions"
        ) from None


def sha256_files(files: Mapping[str, Path]) -> str:
    """Return the hash of the sorted (name, sha256 of the file), which does not depend on the files' directory."""
    lines = "".join(f"{sha256_file(files[name])}  {name}\n" for name in sorted(files))  # as `sha256sum` writes them
    return hashlib.sha256(lines.encode()).hexdigest()


def require_sha256(name: str, path: Path, actual: str, expected: str | None) -> None:
    """Raise AtollError unless the hash of the weights is that of the config, if it has one."""
    # A config without a hash accepts any weights.
    if expected is not None and actual != expected:
        raise AtollError(
            f"{name}: the weights at {path} have sha256 {actual[:16]}..., the config expects {expected[:16]}...; "
            "get the weights that were used, or remove sha256 from the config to use these"
        )


def pretrained_files(directory: Path, stem: str) -> dict[str, Path]:
    """Return the files that transformers ("model") or diffusers ("diffusion_pytorch_model") reads, by name.

    With a whole file and an index side by side, transformers reads the whole file and diffusers the index.

    Raises:
        AtollError: no config.json, or no safetensors; pickles are not read, as they can execute.
    """
    # An index belongs to what is hashed: it decides which shards are read.
    weights = _weights_in(directory, stem)
    names = [file.name for file in ((weights.index,) if weights.index else ()) + weights.files]
    if not (directory / "config.json").is_file():
        raise AtollError(f"{directory / 'config.json'}: not found; get a whole copy of {directory}")
    return {name: directory / name for name in ("config.json", *names)}


def _weights_in(directory: Path, stem: str) -> WeightFiles:
    """Return the weight files in a directory that its library would choose. Raises AtollError if there are none."""
    weights = weight_files(directory, stem, "whole" if stem == STEMS["transformers"] else "index")
    # Say what is there instead, if it is a pickle.
    if weights is None:
        pickles = sorted(file.name for file in directory.glob("*") if file.suffix in (".bin", ".pt", ".ckpt", ".h5"))
        instead = f", only {pickles[0]}, which is never read; convert it to safetensors" if pickles else ""
        raise AtollError(
            f"{directory}: no {stem}.safetensors{instead or '; name a directory (or its subfolder) that holds it'}"
        )
    return weights


def load_pretrained(
    library: str, classes: Mapping[str, str], directory: Path, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Load a frozen network from a local directory, without the hub and without pickles.

    Args:
        library: "transformers" or "diffusers".
        classes: the accepted kinds (model_type or _class_name in config.json), each with the class to load.
        directory: with config.json and safetensors.
        dtype: of the network.

    Raises:
        AtollError: another kind of network, weights that are damaged or incomplete, a missing library.
    """
    config = _read_object(directory / "config.json")
    _require_only_these_files(directory, config)
    # The kind of network decides the class.
    key = "model_type" if library == "transformers" else "_class_name"
    kind = str(config.get(key))
    if kind not in classes:
        raise AtollError(f"{directory}: its config.json says {kind!r}; expected one of {', '.join(classes)}")
    # Load it.
    dtype_key = "dtype" if library == "transformers" else "torch_dtype"
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, dtype_key: dtype}
    with quiet(library) as module:
        weights = _weights_in(directory, STEMS[library])
        if weights.variant is not None:
            options["variant"] = weights.variant  # half-precision values, which are computed in `dtype`
        try:
            require_fit(config, *_extent(weights.files), str(directory))
            cls = attrgetter(classes[kind])(module)  # a class that the library does not export has dots
            network, info = cls.from_pretrained(str(directory), output_loading_info=True, **options)
        except AtollError:
            raise
        except Exception as error:  # anything: safetensors, JSON, shapes, unknown keys
            size = sum(file.stat().st_size for file in pretrained_files(directory, STEMS[library]).values())
            refuse_out_of_memory(error, directory, size)
            raise AtollError(_not_loaded(directory, weights, library, error)) from None
    # The libraries fill missing tensors with random numbers, and at most log it.
    if absent := sorted(map(str, info["missing_keys"])):
        raise AtollError(
            f"{directory}: {len(absent)} of the network's tensors are not in its weights (first: {absent[0]}); "
            f"name the weights of a {classes[kind]}"
        )
    value: nn.Module = freeze(network)
    return value


def _require_only_these_files(directory: Path, config: dict[str, Any]) -> None:
    """Raise AtollError if a network's files make its library load code or weights that are not among them."""
    if (directory / _ADAPTER).exists():
        raise AtollError(
            f"{directory / _ADAPTER}: an adapter, which is not applied; merge it into the weights, or remove the file"
        )
    # Networks within networks have their own configurations.
    waiting: list[Any] = [config]
    while waiting:
        value = waiting.pop()
        waiting += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        for key, one in value.items() if isinstance(value, dict) else ():
            name = key.lstrip("_")
            # transformers' marks beside an implementation are true or false.
            replaced = name.startswith(_IMPLEMENTATIONS) and one not in _PLAIN_IMPLEMENTATIONS and one is not True
            if (replaced or name in _OTHER_FILES) and one not in (None, False):
                raise AtollError(
                    f"{directory / 'config.json'}: sets {key:.60} to {one!r:.80}, which loads code or weights from "
                    "elsewhere; remove the key, or get unquantised weights in fp32, bf16 or fp16"
                )


def _extent(files: Sequence[Path]) -> tuple[int, int]:
    """Return the number of tensors in safetensors files, and of their elements, without loading them."""
    # The header holds the shapes.
    shapes = list[list[int]]()
    for file in files:
        with safe_open(file, "pt") as content:
            shapes += [content.get_slice(name).get_shape() for name in content.keys()]  # noqa: SIM118  # no mapping
    return len(shapes), sum(map(math.prod, shapes))


def _not_loaded(directory: Path, weights: WeightFiles, library: str, error: Exception) -> str:
    """Return why a library could not load a network, and the remedy."""
    # A file that is no safetensors, or cut off, explains it best.
    for file in weights.files:
        if content_of(file) != "safetensors" or is_cut_off(file):
            return f"{file}: {advice(file, error)}"
    reason = f"{directory}: cannot be loaded by {library} ({_line(error)})"
    # An error of an import names the package that is absent.
    if isinstance(error, ImportError):
        return f"{reason}; install what it names"
    return f"{reason}; get config.json and weights from one place, and a {library} that knows this network"


def freeze(network: NetworkT) -> NetworkT:
    """Put the network into evaluation mode without gradients, convolutions in channels_last, faster also on CPUs."""
    # Evaluation mode turns off dropout; no gradients are stored.
    network.eval().requires_grad_(False)
    for parameter in network.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return network


def _read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises AtollError if the file holds anything else."""
    content = read_json(path)
    # Other JSON has no keys to read.
    if not isinstance(content, dict):
        raise AtollError(
            f"{path}: holds {type(content).__name__}, expected a JSON object; get it from where its weights come from"
        )
    return content


def _line(error: Exception) -> str:
    """Return an error as one short line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
