"""What `train.init: common` means: which weights a training starts from, and which sections may say so."""

from collections.abc import Mapping
from pathlib import PurePosixPath

from atoll.storage.layout import COMMON


def names_common(init: object) -> bool:
    """Return whether a value of train.init is the place of the run's common model: common, or that as a path."""
    # Its directory has this name in every run, so that the word is a path as well.
    return isinstance(init, str) and PurePosixPath(init) == PurePosixPath(COMMON)


def check_starts(inits: Mapping[str, object], has_common: bool) -> None:
    """Raise ValueError if a section starts from a common model that the run has not, or that it cannot start from.

    Args:
        inits: train.init of every section that sets it itself, by the section's name; "train" is the run's.
        has_common: whether the run has a `common` section.
    """
    for section, init in inits.items():
        where = "train.init" if section == "train" else f"{section}: train.init"
        # Only the word is refused: a run without the section may have a directory of that name.
        if init == COMMON and not has_common:
            raise ValueError(
                f"{where}: common, but there is no `common:` section; add one with its objective, or write ./common "
                "for a directory of that name"
            )
        if has_common and section == COMMON and names_common(init):
            raise ValueError(f"{where}: common, but it cannot start from itself; leave it out, or name another expert")
        if has_common and section == "router" and names_common(init):
            raise ValueError(f"{where}: common, but a router starts from no expert; leave it out")
