"""Where the weights of frozen networks are: beside the artifact, in a directory of the user, or in the hub."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from atoll.encoders.trust import ALLOW_HUB, USER, Trust
from atoll.errors import AtollError
from atoll.runtime.libraries import import_library
from atoll.storage.containment import TRUST_PATHS, require_inside
from atoll.storage.memory import refuse_out_of_memory

VARIABLE = "ATOLL_WEIGHTS"  # names a directory that is searched for weights whose path does not exist
WANTED = ("*.json", "*.safetensors", "*.txt", "*.model")  # of a repository: no pickles, no other frameworks
_ALSO_IN: ContextVar[Path | None] = ContextVar("also_found_in", default=None)
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def unset_variable(path: str) -> str | None:
    """Return the first "$NAME" in an expanded path, whose environment variable is not set; None if there is none."""
    # Variables that are set were expanded before, so a remaining one is not set.
    match = re.search(r"\$\w+|\$\{\w+\}", path)
    return match.group() if match else None


@contextmanager
def also_found_in(directory: Path) -> Iterator[None]:
    """Let `find_weights` also search this directory, if it exists, before $ATOLL_WEIGHTS, while the block runs."""
    # A context variable: concurrent threads have their own directory.
    token = _ALSO_IN.set(directory if directory.is_dir() else None)
    try:
        yield
    finally:
        _ALSO_IN.reset(token)


def is_beside_card(path: Path) -> bool:
    """Return whether weights were found in a directory of `also_found_in`, so that they came with an artifact."""
    directory = _ALSO_IN.get()
    return directory is not None and path.is_relative_to(directory)


def find_weights(
    name: str,
    subfolders: Sequence[str] = ("",),
    trust: Trust = USER,
    *,
    sha256: str | None = None,
    revision: str | None = None,
) -> Path:
    """Return the local file or directory of weights; download them only if nothing local has their name.

    The places, in this order: the name as a path (`~` and `$VAR` expanded); the directories of `also_found_in` and
    $ATOLL_WEIGHTS, by the whole name and by its last part; and, if the name looks like "organisation/name", the hub
    (or the hub's cache, without a network). A card's name is no path, and reaches only the hub's cache, see `Trust`.

    Args:
        name: the path or repository.
        subfolders: of a repository, those to download; "" is its top.
        trust: what the name may reach.
        sha256: the hash that the config states, which a card needs outside its own directory.
        revision: the commit of the repository; None: the newest.

    Raises:
        AtollError: nothing is found, or what is found may not be used; the text names the places.
    """
    if not trust.owns(name):
        return _find_for_card(name, subfolders, trust, sha256, revision)
    # Local places first.
    path = Path(os.path.expanduser(os.path.expandvars(name)))
    roots = [root for root in (_ALSO_IN.get(), _directory_of_user()) if root is not None]
    tried = list(dict.fromkeys((path, *(place for root in roots for place in (root / name, root / path.name)))))
    for place in tried:
        if place.exists():
            return place

    # Then the hub, if the name can be a repository.
    if unset := unset_variable(str(path)):
        raise AtollError(f"weights {name!r}: {unset} is not set in the environment; set it, or correct the path")
    places = ", ".join(map(str, tried))
    if not REPOSITORY.fullmatch(name):
        raise AtollError(f"weights {name!r}: not found (tried {places}); correct the path, or set ${VARIABLE}")
    return _download(name, subfolders, places, revision)


def _directory_of_user() -> Path | None:
    """Return the directory that $ATOLL_WEIGHTS names."""
    return Path(os.path.expanduser(os.environ[VARIABLE])) if os.environ.get(VARIABLE) else None


def _find_for_card(
    name: str, subfolders: Sequence[str], trust: Trust, sha256: str | None, revision: str | None
) -> Path:
    """Return the weights that a card names. Raises AtollError as `find_weights` does."""
    # Beside the card, where nothing may lead out of its directory.
    within = [part for part in (name, Path(name).name) if _is_plain(part)]
    if (frozen := _ALSO_IN.get()) is not None:
        for place in (frozen / part for part in within):
            if place.exists():
                for file in (place, *place.rglob("*")):
                    require_inside(file, frozen.parent, frozen, trust.paths)
                return place

    # Elsewhere the hash decides whether these are the card's weights.
    if sha256 is None and not trust.paths:
        raise AtollError(f"weights {name!r}: the card states no sha256 of them; write the card again with this version")
    user = _directory_of_user()
    places = [user / part for part in within] if user is not None else []
    if trust.paths:
        places.append(Path(name))
    for place in places:
        if place.exists():
            return place

    # The hub's cache on this machine, or the hub itself if the user allows it.
    tried = f"not found (tried {', '.join(map(str, places))})" if places else "not found"
    remedy = f"set ${VARIABLE} to a directory that holds them"
    if not REPOSITORY.fullmatch(name):
        raise AtollError(
            f"weights {name!r}: {tried}; {remedy}, or add {TRUST_PATHS} if the card is yours and this is their path"
        )
    if trust.hub and revision is not None and sha256 is not None:
        return _download(name, subfolders, tried, revision, remedy=remedy)
    if not trust.hub:
        remedy = f"{remedy}, or add {ALLOW_HUB}"
    else:
        # Cards of earlier versions, and of weights that were local when the card was written.
        missing = "revision (a commit)" if revision is None else "sha256"
        remedy = (
            f"the card states no {missing} of them, so {ALLOW_HUB} does not fetch them: put them into the hub's cache "
            f"with `hf download {name}`, or {remedy}"
        )
    return _download(name, subfolders, tried, revision, remedy=remedy, cached=True)


def _is_plain(name: str) -> bool:
    """Return whether a name stays inside the directory that it is joined to."""
    # An absolute path would replace the directory.
    return bool(Path(name).name) and not Path(name).is_absolute() and ".." not in Path(name).parts


def _download(
    repository: str,
    subfolders: Sequence[str],
    tried: str,
    revision: str | None,
    *,
    remedy: str = f"put them into a local directory and name that, or set ${VARIABLE}",
    cached: bool = False,
) -> Path:
    """Return the directory of a repository's subfolders in the hub's cache, downloaded unless `cached`.

    Raises:
        AtollError: the hub's package is missing, or there is no such repository.
    """
    # Only files that are read: a repository may hold the same weights in several formats.
    try:
        hub = import_library("huggingface_hub")
    except AtollError:
        # Without the package there is no cache either, and a card must not make anybody install one.
        if cached:
            raise AtollError(f"weights {repository!r}: {tried}; {remedy}") from None
        raise
    wanted = [f"{folder}/{pattern}" if folder else pattern for folder in subfolders for pattern in WANTED]
    # A pattern's * also matches slashes: without this, the top of a pipeline's repository would be all of it.
    unwanted = ["*/*"] if all(folder == "" for folder in subfolders) else None
    options: dict[str, Any] = {
        **({} if revision is None else {"revision": revision}),
        **({"local_files_only": True} if cached else {}),
    }
    try:
        return Path(hub.snapshot_download(repository, allow_patterns=wanted, ignore_patterns=unwanted, **options))
    # The hub's client raises its own errors, those of its HTTP library, and the system's: all have the same remedy.
    except Exception as error:
        refuse_out_of_memory(error, f"weights {repository!r}")
        if cached:
            raise AtollError(f"weights {repository!r}: {tried}; {remedy}") from None
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        places = tried if tried.startswith("not found") else f"not found (tried {tried})"
        raise AtollError(
            f"weights {repository!r}: {places}, and the hub does not provide them ({reason:.200}); {remedy}"
        ) from None
