"""The weight files in a directory that transformers or diffusers wrote: whole or in shards, plain or a variant.

    STEM.safetensors        STEM.safetensors.index.json          whole; in shards, which the index names
    STEM.fp16.safetensors   STEM.safetensors.index.fp16.json     the same of the variant "fp16"

With a whole file and an index side by side diffusers reads the index, transformers the whole file.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from atoll.errors import AtollError
from atoll.storage.artifact import read_json

Form = Literal["index", "whole"]
_VARIANTS = ("fp32", "bf16", "fp16")  # in the order of preference, after the plain files
_SHARD = re.compile(r"-\d+-of-\d+$")


@dataclass(frozen=True)
class WeightFiles:
    """The weights that a library reads from a directory.

    Attributes:
        files: one whole file, or all shards.
        index: the file that names the shards; None for a whole file.
        variant: "fp16", "bf16", ...; None for plain files.
        other: the form that lies beside and is not read: a whole file beside an index, or the reverse.
    """

    files: tuple[Path, ...]
    index: Path | None
    variant: str | None
    other: Path | None = None


def weight_files(
    directory: Path, stem: str, first: Form = "index", ends: Sequence[str] = (".safetensors",)
) -> WeightFiles | None:
    """Find the weights named `stem` in `directory`; None if there are none.

    Args:
        stem: "model" (transformers) or "diffusion_pytorch_model" (diffusers).
        first: which form is read if both are there.
        ends: the kinds of file to look for, preferred ones first.

    Raises:
        AtollError: several variants and no plain weights, a damaged index, or a shard that is missing or elsewhere.
    """
    # All files by kind, variant and form; then the first that is preferred.
    forms = {end: _forms(directory, stem, end) for end in ends}
    # A plain .bin is preferred to a half-precision .safetensors, as its values are exact.
    plain = next((by_variant[None] for by_variant in forms.values() if None in by_variant), None)
    if plain is not None:
        return _read(directory, plain, None, first)
    for by_variant in filter(None, forms.values()):
        known = [name for name in _VARIANTS if name in by_variant] or sorted(filter(None, by_variant))
        if known[0] not in _VARIANTS and len(known) > 1:
            raise AtollError(f"{directory}: holds the variants {', '.join(known)} of {stem}; keep the one to be read")
        return _read(directory, by_variant[known[0]], known[0], first)
    return None


def _forms(directory: Path, stem: str, end: str) -> dict[str | None, dict[Form, Path]]:
    """Variant -> form -> file, for the files of one kind."""
    # A shard of a variant, STEM.fp16-00001-of-00002, looks like a whole file of another variant.
    name, suffix = re.escape(stem), re.escape(end)
    patterns: dict[Form, re.Pattern[str]] = {
        "index": re.compile(rf"{name}{suffix}\.index(?:\.([\w-]+))?\.json"),
        "whole": re.compile(rf"{name}(?:\.([\w-]+))?{suffix}"),
    }
    forms: dict[str | None, dict[Form, Path]] = {}
    for file in sorted(directory.iterdir()) if directory.is_dir() else ():
        for form, pattern in patterns.items():
            match = pattern.fullmatch(file.name)
            if match and file.is_file() and not _SHARD.search(match[1] or ""):
                forms.setdefault(match[1], {})[form] = file
    return forms


def _read(directory: Path, forms: dict[Form, Path], variant: str | None, first: Form) -> WeightFiles:
    """The files of the form that is read."""
    # Each library prefers one of the forms.
    second: Form = "whole" if first == "index" else "index"
    form, other = (first, forms.get(second)) if first in forms else (second, None)
    if form == "whole":
        return WeightFiles((forms["whole"],), None, variant, other)
    # An index is somebody else's text: the names in it must be those of files beside it.
    index = forms["index"]
    content = read_json(index)
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise AtollError(f"{index}: its weight_map is no map of tensors to files; get the index of these shards again")
    files = tuple(directory / name for name in sorted(set(shards.values())))
    for file in files:
        if file.parent != directory or not file.is_file():
            instead = f"; if {other.name} beside it is the network, remove the index" if other else ""
            raise AtollError(f"{file}: not found, though {index.name} names it; get all shards that it names{instead}")
    return WeightFiles(files, index, variant, other)
