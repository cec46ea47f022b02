"""Rows that a training leaves out: `train.skip`."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atoll.errors import AtollError
from atoll.manifest import TrainSettings
from atoll.storage.cards import SkipRecord
from atoll.storage.shards import Shards, SkipList, hash_of_keys
from atoll.train.workers import is_first_process

_SHOWN = 3  # keys in a message


def without_skipped(
    run: Path, settings: TrainSettings, shards: Sequence[Shards]
) -> tuple[list[Shards], dict[str, Any]]:
    """Leave out the rows that the settings' list names.

    A warning counts and names the keys that no row has. For an expert, which reads its own cluster only, these may be
    in other clusters.

    Args:
        run: the run's directory.
        settings: of the training.
        shards: all of its data.

    Returns:
        The directories without these rows, and what the mark and the card say of them; nothing if there are none.

    Raises:
        AtollError: as `SkipList`; or the list leaves no row to train on.
    """
    if settings.skip is None:
        return list(shards), {}
    skip = SkipList(run / settings.skip)
    parts = [part.without(skip.keys) for part in shards]
    if not any(len(part.rows("train")) for part in parts):
        total = sum(len(part.rows("train")) for part in shards)
        raise AtollError(f"{skip.path}: names all {total:,} training rows of {parts[0].path}; none is left to train on")
    keys = [key for part in parts for key in part.left_out_keys]
    if (unknown := sorted(skip.keys.difference(keys))) and is_first_process():
        warnings.warn(_unknown(skip, unknown, shards), stacklevel=3)
    record = left_out(keys)
    # By the rows that are left out, not by the list: one that grows by keys of other clusters changes nothing here.
    return parts, {} if record is None else {"skip": record.plain()}


def left_out(keys: Sequence[str]) -> SkipRecord | None:
    """Return the card's record of rows with these keys; None if there are none."""
    return SkipRecord(keys=len(keys), sha256=hash_of_keys(keys)) if keys else None


def _unknown(skip: SkipList, unknown: Sequence[str], shards: Sequence[Shards]) -> str:
    more = f" and {len(unknown) - _SHOWN:,} more" if len(unknown) > _SHOWN else ""
    shown = ", ".join(f"{key:.200}" for key in unknown[:_SHOWN])
    where = f"{shards[0].path}" if len(shards) == 1 else f"{len(shards)} directories of shards"
    return f"{skip.path}: {len(unknown):,} of {len(skip.keys):,} keys are in no row of {where}: {shown}{more}"
