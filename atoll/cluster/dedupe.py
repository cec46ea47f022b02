"""Finds the rows of new shards that are in the clusters already, in bounded memory."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from atoll.cluster.sampling import hash_keys
from atoll.errors import AtollError
from atoll.storage.layout import ASSIGNMENT, cluster_path
from atoll.storage.shards import Shard, Shards

_PASS = 1 << 25  # hashes in memory at a time: 256 MiB

Hashes = Callable[[], Iterable[np.ndarray]]


def already_there(new: Shards, out: Path, k: int) -> np.ndarray:
    """Return which rows of `new` are in the clusters/ directory `out`, [n] bool.

    Args:
        new: shards to add.
        out: a finished clusters/ directory.
        k: its number of clusters.

    Raises:
        AtollError: a key is there with another caption, split or latent.
    """
    # Compare the keys, then the contents of those with equal keys.
    known = _among(lambda: _assigned_hashes(out / ASSIGNMENT), lambda: (hash_keys(p.keys) for p in new.parts()))
    # No common key: the contents need no comparison.
    if not known.any():
        return known
    # Features are not stored in the clusters.
    columns = [name for name in new.columns if name != "feature"]
    clusters = [Shards(cluster_path(out, number)) for number in range(k)]
    same = _among(
        lambda: (_content(part, columns) for shards in clusters for part in shards.parts()),
        lambda: (_content(part, columns) for part in new.parts()),
    )
    # Name the first image whose key is known but whose content is not.
    if (known & ~same).any():
        row = int(np.flatnonzero(known & ~same)[0])
        key = next(part.keys[row - part.start] for part in new.parts() if row < part.start + len(part))
        raise AtollError(
            f"{new.path}: image {key!r} is in {out} already with another caption, split or latent; give it another "
            "key, or cluster again with --force"
        )
    return known


def _among(old: Hashes, new: Hashes) -> np.ndarray:
    """Which of the new hashes are among the old ones, [n] bool; each pass reads both and compares a part of them."""
    # As many passes as keep `_PASS` hashes in memory.
    passes = max(1, -(-sum(map(len, old())) // _PASS))
    is_old = np.zeros(sum(map(len, new())), bool)
    for number in range(passes):
        # Each pass takes the hashes of one residue class.
        chosen = [hashes[hashes % np.uint64(passes) == number] for hashes in old()]
        known, start = np.unique(np.concatenate(chosen)), 0
        for hashes in new():
            # Binary search; clipped, since a hash above all known ones has no position among them.
            position = np.searchsorted(known, hashes).clip(max=max(0, len(known) - 1))
            is_old[start : start + len(hashes)] |= known[position] == hashes if len(known) else False
            start += len(hashes)
    return is_old


def _assigned_hashes(file: Path) -> Iterator[np.ndarray]:
    import pyarrow.parquet as pq

    # One row group at a time: the table may exceed the memory.
    with pq.ParquetFile(file) as opened:
        for number in range(opened.num_row_groups):
            yield hash_keys(opened.read_row_group(number, columns=["key"])["key"].to_pylist())


def _content(part: Shard, columns: Sequence[str]) -> np.ndarray:
    """Hashes [n] uint64 of the rows' contents: key, caption, split and the given columns."""
    # The bytes of each row, whatever the dtype of the column.
    values = [part.columns[name].contiguous().view(torch.uint8).flatten(1).numpy() for name in columns]
    digests = []
    for row, text in enumerate(zip(part.keys, part.captions, part.splits, strict=True)):
        # Separated, so that two texts cannot run into each other.
        digest = hashlib.blake2b("\0".join(text).encode(), digest_size=8)
        for value in values:
            digest.update(value[row].tobytes())
        digests.append(digest.digest())
    return np.frombuffer(b"".join(digests), "<u8")
