"""Files that an artifact names stay inside its directory, unless the user says that the artifact is his own."""

import os
from pathlib import Path

from atoll.errors import AtollError
from atoll.storage.layout import MANIFEST

TRUST_PATHS = "--trust-paths (trust_paths=True)"  # how a user allows paths that lead out of an artifact's directory


def owning_directory(path: Path) -> Path:
    """Return the directory that an ensemble's parts may be in: its run if its parent holds atoll.yaml, else itself.

    Args:
        path: the ensemble's directory, as the user named it.
    """
    # `atoll assemble` writes RUN/ensemble, which names ../experts and ../router.
    parent = path.resolve().parent
    return parent if (parent / MANIFEST).is_file() else path.resolve()


def is_inside(path: Path, root: Path) -> bool:
    """Return whether `path` is in the directory `root` once links are followed.

    In a snapshot of the hub's cache every file is a link to the blobs of the same repository: these count as inside.
    """
    # Links are followed on both sides: the user may name a directory through a link.
    root, target = root.resolve(), path.resolve()
    if target.is_relative_to(root):
        return True
    # models--owner--name/snapshots/COMMIT/FILE -> models--owner--name/blobs/HASH. `blobs` itself must be no link.
    for snapshots in (place for place in (root, *root.parents) if place.name == "snapshots"):
        if target.parent == snapshots.parent / "blobs":
            return True
    return False


def require_inside(path: Path, root: Path, named_by: Path, trust: bool = False, *, links: bool = False) -> None:
    """Raise AtollError if `path` leads out of `root`, by `..`, as an absolute path, or through a link.

    Args:
        path: what is to be opened.
        root: the directory that holds the artifact.
        named_by: the file that names `path`, for the message.
        trust: whether the user allows paths outside.
        links: whether links may lead out of it.
    """
    # Checked before the file is touched, so that a message does not tell whether it exists.
    inside = Path(os.path.abspath(path)).is_relative_to(os.path.abspath(root)) if links else is_inside(path, root)
    if not trust and not inside:
        raise AtollError(
            f"{named_by}: names {path}, which leads out of {root}; if this artifact is yours, add {TRUST_PATHS}"
        )
