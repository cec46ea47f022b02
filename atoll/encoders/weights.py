"""The weights of frozen networks: where they lie, whether they are the right ones, how they are loaded.

A frozen network's config names its `weights` as they were given (a local path, or a repository of the hub) and their
`sha256`. Where they lie differs between machines; what they are does not: `identity`.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from atoll.encoders.weight_files import WeightFiles, weight_files
from atoll.errors import AtollError
from atoll.runtime.libraries import import_library, quiet
from atoll.storage.artifact import read_json, sha256_file
from atoll.storage.content import advice, content_of, is_cut_off, is_out_of_memory

STEMS = {"transformers": "model", "diffusers": "diffusion_pytorch_model"}  # how the libraries call their weights
VARIABLE = "ATOLL_WEIGHTS"  # the directory in which weights are looked for where their path does not exist
WANTED = ("*.json", "*.safetensors", "*.txt", "*.model")  # of a repository: no pickles, no copies for other frameworks
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "spiece.model", "tokenizer.model")
_ALSO_IN: ContextVar[Path | None] = ContextVar("also_found_in", default=None)
_LOCATION = ("weights", "subfolder", "tokenizer")  # the keys of a config that say where something lies
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

Model = TypeVar("Model", bound=BaseModel)
NetworkT = TypeVar("NetworkT", bound=nn.Module)


class WeightsConfig(BaseModel):
    """What every network with weights is configured by. sha256: None is filled in when they are found."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    weights: str = Field(min_length=1)
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")


class PretrainedConfig(WeightsConfig):
    """A network in the layout of transformers or diffusers: config.json and safetensors."""

    subfolder: str = Field("", pattern=r"^[\w-]*$")  # of `weights`: "vae" in the repository of a whole pipeline


def parse_config(kind: str, known: Mapping[str, type[Model]], config: Mapping[str, Any]) -> Model:
    """`config` as the model that its "name" asks for.

    Raises:
        AtollError: an unknown name, key or value; `kind` ("codec") says of what.
    """
    name = config.get("name")
    if name == "unknown":  # of a converted expert
        raise AtollError(f"the {kind} is not known: convert the expert again with --{kind.split()[0]}")
    if not isinstance(name, str) or name not in known:
        raise AtollError(f"unknown {kind} {name!r}; known: {', '.join(map(repr, known))}")
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
    """`config` without where the weights lie: two networks are the same if their identities are equal."""
    return {key: value for key, value in config.items() if key not in _LOCATION}


def same(one: object, other: object) -> bool:
    """Whether two entries of cards are equal; of networks' configurations, whether their identities are."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return identity(one) == identity(other)
    return one == other


def unset_variable(path: str) -> str | None:
    """The first environment variable in an expanded path, "$NAME", that was not expanded because it is not set."""
    found = re.search(r"\$\w+|\$\{\w+\}", path)
    return found.group() if found else None


@contextmanager
def also_found_in(directory: Path) -> Iterator[None]:
    """While the block runs, `find_weights` looks into this directory too, if there is one, before $ATOLL_WEIGHTS."""
    token = _ALSO_IN.set(directory if directory.is_dir() else None)
    try:
        yield
    finally:
        _ALSO_IN.reset(token)


def find_weights(given: str, subfolders: Sequence[str] = ("",)) -> Path:
    """The local file or directory of the weights `given`; downloaded only where nothing local is called so.

    Looked for as a path (`~` and `$VAR` expanded), then below the directories of `also_found_in` and $ATOLL_WEIGHTS by
    its whole and by its last name, then, if it looks like "organisation/name", on the hub (or in the hub's cache,
    without a network).

    Args:
        subfolders: of a repository, what is downloaded; "" are the files at its top.

    Raises:
        AtollError: nothing is found; it says where it was looked for.
    """
    path = Path(os.path.expanduser(os.path.expandvars(given)))
    roots = [root for root in (_ALSO_IN.get(),) if root is not None]
    if os.environ.get(VARIABLE):
        roots.append(Path(os.path.expanduser(os.environ[VARIABLE])))
    tried = list(dict.fromkeys((path, *(place for root in roots for place in (root / given, root / path.name)))))
    for place in tried:
        if place.exists():
            return place
    if unset := unset_variable(str(path)):
        raise AtollError(f"weights {given!r}: {unset} is not set in the environment; set it, or correct the path")
    places = ", ".join(map(str, tried))
    if not _REPOSITORY.fullmatch(given):
        raise AtollError(f"weights {given!r}: not found (tried {places}); correct the path, or set ${VARIABLE}")
    try:
        return _download(given, subfolders)
    except AtollError:
        raise
    # The hub's client raises its own errors, those of its HTTP library, and the system's: all mean the same here.
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise AtollError(
            f"weights {given!r}: not found (tried {places}), nor can they be had from the hub ({reason:.200}); "
            f"put them into a local directory and name that, or set ${VARIABLE}"
        ) from None


def _download(repository: str, subfolders: Sequence[str]) -> Path:
    """The repository's files of those subfolders, in the hub's cache."""
    hub = import_library("huggingface_hub")
    wanted = [f"{folder}/{pattern}" if folder else pattern for folder in subfolders for pattern in WANTED]
    # A pattern's * matches slashes too: without this, the top of a pipeline's repository would be all of it.
    unwanted = ["*/*"] if all(folder == "" for folder in subfolders) else None
    return Path(hub.snapshot_download(repository, allow_patterns=wanted, ignore_patterns=unwanted))


def sha256_weights(path: Path, files: Sequence[str] | None = None) -> str:
    """The hash of a file; or, of a directory, that of its sorted (relative name, sha256).

    Args:
        files: of the directory, what the network reads; None: every file.

    Raises:
        AtollError: a file that is not there, or cannot be read.
    """
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
    """The hash of the sorted (name, sha256 of the file), wherever the files lie."""
    lines = "".join(f"{sha256_file(files[name])}  {name}\n" for name in sorted(files))  # as `sha256sum` writes them
    return hashlib.sha256(lines.encode()).hexdigest()


def require_sha256(name: str, path: Path, found: str, expected: str | None) -> None:
    """Raises AtollError unless the weights found are those that the config (of a card) asks for."""
    if expected is not None and found != expected:
        raise AtollError(
            f"{name}: the weights at {path} have sha256 {found[:16]}..., the config asks for {expected[:16]}...; "
            "get the very weights that were used, or remove sha256 from the config to use these"
        )


def pretrained_files(directory: Path, stem: str) -> dict[str, Path]:
    """The files that transformers ("model") or diffusers ("diffusion_pytorch_model") reads of a directory, by name.

    With a whole file and an index side by side, transformers reads the whole file and diffusers the index.

    Raises:
        AtollError: no config.json, or no safetensors; pickles are not read, as they can execute.
    """
    weights = _weights_in(directory, stem)
    names = [file.name for file in ((weights.index,) if weights.index else ()) + weights.files]
    if not (directory / "config.json").is_file():
        raise AtollError(f"{directory / 'config.json'}: not found; get a whole copy of {directory}")
    return {name: directory / name for name in ("config.json", *names)}


def _weights_in(directory: Path, stem: str) -> WeightFiles:
    """The weight files in a directory, as its library would choose them. Raises AtollError if there are none."""
    weights = weight_files(directory, stem, "whole" if stem == STEMS["transformers"] else "index")
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
    """The network in a local directory, frozen; neither the hub nor a pickle is touched.

    Args:
        library: "transformers" or "diffusers".
        classes: what its config.json may call itself (model_type or _class_name) -> the class to load.

    Raises:
        AtollError: another kind of network, weights that are damaged or not all there, a missing library.
    """
    key = "model_type" if library == "transformers" else "_class_name"
    kind = str(_read_object(directory / "config.json").get(key))
    if kind not in classes:
        raise AtollError(f"{directory}: its config.json says {kind!r}; expected one of {', '.join(classes)}")
    dtype_key = "dtype" if library == "transformers" else "torch_dtype"
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, dtype_key: dtype}
    with quiet(library) as module:
        weights = _weights_in(directory, STEMS[library])
        if weights.variant is not None:
            options["variant"] = weights.variant  # half-precision values, computed with in `dtype`
        try:
            cls = getattr(module, classes[kind])
            network, info = cls.from_pretrained(str(directory), output_loading_info=True, **options)
        except Exception as error:  # safetensors, JSON, shapes, unknown keys: the libraries raise whatever they meet
            raise AtollError(_not_loaded(directory, weights, library, error)) from None
    # The libraries fill what is missing with random numbers, and say so in a log at most.
    if absent := sorted(map(str, info["missing_keys"])):
        raise AtollError(
            f"{directory}: {len(absent)} of the network's tensors are not in its weights (first: {absent[0]}); "
            f"name the weights of a {classes[kind]}"
        )
    value: nn.Module = freeze(network)
    return value


def _not_loaded(directory: Path, weights: WeightFiles, library: str, error: Exception) -> str:
    """Why a library could not load a network, and what helps."""
    for file in weights.files:
        if content_of(file) != "safetensors" or is_cut_off(file):
            return f"{file}: {advice(file, error)}"
    reason = f"{directory}: cannot be loaded by {library} ({_line(error)})"
    if isinstance(error, ImportError):
        return f"{reason}; install what it names"
    if is_out_of_memory(error):
        return f"{reason}; free some memory, or use a machine with more"
    return f"{reason}; get config.json and weights from one place, and a {library} that knows this network"


def freeze(network: NetworkT) -> NetworkT:
    """In evaluation mode and without gradients; convolutions in channels_last, which is faster on CPUs too."""
    network.eval().requires_grad_(False)
    for parameter in network.parameters():
        if parameter.ndim == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return network


def _read_object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise AtollError(
            f"{path}: holds {type(content).__name__}, expected a JSON object; get it from where its weights come from"
        )
    return content


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
