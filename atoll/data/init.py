"""Create a run from a recipe, with its own data or the user's: `atoll init`."""

import os
from pathlib import Path
from typing import Literal

import yaml

from atoll.data.locate import IMAGES, Files, locate
from atoll.data.opening import is_local
from atoll.errors import AtollError
from atoll.manifest import parse_manifest, recipe_path
from atoll.storage.artifact import write_bytes
from atoll.storage.layout import RunLayout

FOR_DATA = "images"  # the recipe that is taken for the user's data where none is named
DEFAULT = "demo"

# What a source reads, by the files' suffixes. Parquet files beside images are a folder's captions: images win.
_SUFFIXES: dict[Literal["folder", "webdataset", "parquet"], tuple[str, ...]] = {
    "folder": tuple(f".{kind}" for kind in IMAGES),
    "webdataset": (".tar", ".tar.gz", ".tgz"),
    "parquet": (".parquet",),
}


def init_run(run: Path, recipe: str | None = None, data: str | None = None, again: bool = False) -> Path:
    """Write run/atoll.yaml, the text of the recipe, and return its path.

    Args:
        recipe: a built-in recipe's name or a yaml file; None: "demo", or "images" with data.
        data: a directory, file, glob or URL of images, tars or parquet files, for the recipe's data.path; a local
            one is written as an absolute path. data.source is what is found there.
        again: a manifest that is there already is fine, if it is what this call would write, or the call names nothing.

    Raises:
        AtollError: the run has a manifest already, or another one; there is no such recipe, or it is not valid; nothing
            is there that could be read.
    """
    file = RunLayout(run).manifest
    if file.exists() and not again:
        raise AtollError(f"{file} exists; edit it, or name another directory")
    if file.exists() and recipe is None and data is None:
        return file
    source = recipe_path(recipe or (FOR_DATA if data else DEFAULT))
    text = source.read_text(encoding="utf-8")
    if data is not None:
        place = os.path.abspath(os.path.expanduser(os.path.expandvars(data))) if is_local(data) else data
        text = _with_data(text, str(source), {"source": source_of(place), "path": place})
    # Validate before writing, so that a bad recipe leaves nothing behind.
    parse_manifest(text, str(source))
    if file.exists():
        if file.read_text(encoding="utf-8") != text:
            raise AtollError(f"{file}: is not what --recipe and --data ask for; leave them out to go on with it")
        return file
    run.mkdir(parents=True, exist_ok=True)
    write_bytes(file, text.encode())
    return file


def source_of(place: str) -> Literal["folder", "webdataset", "parquet"]:
    """Return the source that reads the files at a path. Raises AtollError if there are none."""
    suffixes = tuple(suffix for kind in _SUFFIXES.values() for suffix in kind)
    files: Files = locate(place, "images, tars or parquet files", suffixes)
    names = [name.lower() for name in files.sizes]
    for source, kinds in _SUFFIXES.items():
        if any(name.endswith(kinds) for name in names):
            return source
    raise AtollError(f"{place}: is neither an image, a tar nor a parquet file; name a directory that holds some")


def _with_data(text: str, where: str, values: dict[str, str]) -> str:
    """Replace values in the `data` section of a recipe; its comments stay."""
    try:
        # The node tree has the positions of values; dumping a parsed recipe would lose its comments.
        root = yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise AtollError(f"{where}: not YAML ({' '.join(str(error).split())})") from None
    sections = _entries(root)
    entries = _entries(sections.get("data"))
    if missing := values.keys() - entries.keys():
        raise AtollError(f"{where}: its data section has no {' and no '.join(sorted(missing))} to set; add it, or "
                         f"take --recipe {FOR_DATA}")  # fmt: skip
    for key in sorted(values, key=lambda key: -entries[key].start_mark.index):  # from the end: places stay true
        node = entries[key]
        written = yaml.safe_dump(values[key], default_style='"', width=10**6).strip()
        text = text[: node.start_mark.index] + written + text[node.end_mark.index :]
    return text


def _entries(node: yaml.Node | None) -> dict[str, yaml.Node]:
    if not isinstance(node, yaml.MappingNode):
        return {}
    return {key.value: value for key, value in node.value}
