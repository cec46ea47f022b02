"""Fills a clusters/ directory part by part, by all its writers at once; each has at most a shard in memory."""

import math
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from atoll.cluster.assign import Assigned
from atoll.cluster.report_rows import ReportRows
from atoll.cluster.sampling import below, draw, hash_keys
from atoll.errors import AtollError
from atoll.storage.cards import ClustersCard, ClusterShardsCard
from atoll.storage.layout import ASSIGNMENT, ROUTER, cluster_path
from atoll.storage.shards import SPLITS, Shard, Shards, ShardWriter

_BUFFERS = 1 << 30  # bytes that wait in all writers together for their shards, at most
_SHARD_ROWS = 4096


class ClustersWriter:
    """The content of a clusters/ directory in the making; a context manager, and gone after an error.

    Attributes:
        counts: of each cluster, the rows of each split. blank: rows whose feature is a zero vector.
        kept: the rows that the report shows.
    """

    def __init__(
        self, directory: Path, shards: Shards, card: ClusterShardsCard, seed: int, router_fraction: float | None = None
    ):
        """
        directory: where it is written; that it appears as a whole is the caller's affair.
        shards: whose columns, all but `feature`, are carried over.
        card: of every directory of shards; a cluster's number is set here.
        router_fraction: the share of all rows in router/; None: no such directory.
        """
        k, self._directory, self._seed, self._fraction = card.clusters, directory, seed, router_fraction
        shared = ClusterShardsCard(**{key: value for key, value in card.plain().items() if key != "cluster"})
        self._columns = [name for name in shards.columns if name != "feature"]
        self.counts = [dict.fromkeys(SPLITS, 0) for _ in range(k)]
        self.blank = 0
        self.kept = ReportRows(k, seed)
        rows = _shard_rows(shards, self._columns, k)
        paths = [cluster_path(directory, c) for c in range(k)]
        self._stack = ExitStack()
        with self._stack:  # closes those opened if one cannot be
            self._writers = [
                self._stack.enter_context(ShardWriter(path, card.model_copy(update={"cluster": c}), rows))
                for c, path in enumerate(paths)
            ]
            self._router = None
            if router_fraction is not None:
                self._router = self._stack.enter_context(ShardWriter(directory / ROUTER, shared, rows))
            self._stack = self._stack.pop_all()
        self._routed = 0
        self._table: Any = None  # a pyarrow ParquetWriter, from the first rows on

    def add(self, assigned: Assigned, rows: Tensor | None = None) -> None:
        """Puts the given rows [n] of a part (None: all) where they belong."""
        import pyarrow as pa

        part, rows = assigned.part, torch.arange(len(assigned.part)) if rows is None else rows
        if not len(rows):
            return
        clusters = assigned.clusters[rows]
        for number in clusters.unique().tolist():
            mine = rows[clusters == number]
            _, _, splits = text = _text(part, mine)
            self._writers[number].append(*text, {name: part.columns[name][mine] for name in self._columns})
            for split in SPLITS:
                self.counts[number][split] += splits.count(split)
        self.blank += int((assigned.features[rows] == 0).all(1).sum())
        keys, _, splits = _text(part, rows)
        types = {"key": pa.string(), "cluster": pa.int32(), "split": pa.string()}
        columns = dict(zip(types, (keys, clusters.tolist(), splits), strict=True))
        self._write_table(pa.table({name: pa.array(columns[name], kind) for name, kind in types.items()}))
        hashes = hash_keys(part.keys)
        if self._router is not None and self._fraction is not None:
            chosen = rows[torch.from_numpy(below(draw(hashes, self._seed, ROUTER), self._fraction))[rows]]
            latents = {name: part.columns[name][chosen] for name in self._columns}
            self._router.append(*_text(part, chosen), {**latents, "cluster": assigned.clusters[chosen]})
            self._routed += len(chosen)
        self.kept.offer(assigned, rows, hashes)

    def adopt(self, old: Path, card: ClustersCard) -> None:
        """Takes over all of a finished clusters/ directory with this card before anything is added.

        Its shards are linked, not written again, where the file system can.
        """
        import pyarrow.parquet as pq

        for number, writer in enumerate(self._writers):
            _adopt(writer, cluster_path(old, number))
        if self._router is not None:
            self._routed += _adopt(self._router, old / ROUTER)
        with pq.ParquetFile(old / ASSIGNMENT) as file:
            for number in range(file.num_row_groups):
                self._write_table(file.read_row_group(number))
        self.counts, self.blank = [{"train": count.train, "val": count.val} for count in card.counts], card.blank
        self.kept.adopt(old)

    def close(self) -> None:
        """Writes what is left.

        Raises:
            AtollError: a cluster without a training image, or a router without any.
        """
        for number, count in enumerate(self.counts):
            if not count["train"]:
                raise AtollError(
                    f"cluster {number} of {len(self.counts)} got no training image; lower clusters.k, or raise "
                    "clusters.fine"
                )
        if self._router is not None and not self._routed:
            raise AtollError(f"clusters.router_fraction {self._fraction} leaves the router no image; raise it")
        self._stack.close()
        self._table.close()
        self.kept.write(self._directory)

    def __enter__(self) -> "ClustersWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._stack.__exit__(kind, error, trace)
            if self._table is not None:
                self._table.close()
        else:
            self.close()

    def _write_table(self, table: Any) -> None:
        import pyarrow.parquet as pq

        if self._table is None:
            self._table = pq.ParquetWriter(self._directory / ASSIGNMENT, table.schema, compression="zstd")
        self._table.write_table(table, row_group_size=len(table))


def _adopt(writer: ShardWriter, old: Path) -> int:
    """Takes over the shards of a directory; returns how many rows they hold."""
    shards = Shards(old)
    for part in shards.parts():
        writer.adopt(old / f"shard-{part.number:05d}.safetensors", part.keys, part.captions, part.splits)
    return len(shards)


def _text(part: Shard, rows: Tensor) -> tuple[list[str], list[str], list[str]]:
    chosen = rows.tolist()
    return [part.keys[i] for i in chosen], [part.captions[i] for i in chosen], [part.splits[i] for i in chosen]


def _shard_rows(shards: Shards, columns: list[str], k: int) -> int:
    """Rows per shard, such that k + 1 writers, which hold a shard twice while they write it, stay within `_BUFFERS`."""
    row = sum(math.prod(shards.shape(name)) * 4 for name in columns)
    return max(1, min(_SHARD_ROWS, _BUFFERS // (2 * (k + 1) * row)))
