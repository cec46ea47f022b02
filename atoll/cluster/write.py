"""Writes a clusters/ directory shard by shard; each cluster's writer holds at most one shard in memory."""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor

from atoll.cluster.assign import Assigned
from atoll.cluster.report_rows import ReportRows
from atoll.cluster.sampling import below, draw, hash_keys
from atoll.errors import AtollError
from atoll.storage.cards import ClustersCard, ClusterShardsCard
from atoll.storage.layout import ASSIGNMENT, ROUTER, cluster_path
from atoll.storage.shards import LATENTS, SPLITS, TARGET, Shard, Shards, ShardWriter, Split

_BUFFERS = 1 << 30  # bytes in the buffers of all writers together, at most
_SHARD_ROWS = 4096


class WrittenClusters(Protocol):
    """What the card and the page need of written clusters; see `ClustersWriter`."""

    @property
    def counts(self) -> Sequence[dict[Split, int]]: ...
    @property
    def blank(self) -> int: ...
    @property
    def report_rows(self) -> ReportRows: ...


class ClustersWriter:
    """Writes the content of a clusters/ directory; a context manager, which removes the files after an error.

    Attributes:
        counts: rows of each split, for each cluster.
        blank: number of rows whose feature is a zero vector.
        report_rows: the rows that the report shows.

    Args:
        directory: to write to; the caller makes the write atomic.
        shards: the source; all columns but `feature` are copied.
        card: of every directory of shards; the cluster's number is set here.
        seed: of the samples.
        router_fraction: of all rows that is copied to router/; None for no such directory.
    """

    def __init__(
        self, directory: Path, shards: Shards, card: ClusterShardsCard, seed: int, router_fraction: float | None = None
    ):
        k, self._directory, self._seed, self._fraction = card.clusters, directory, seed, router_fraction
        # The router's shards hold rows of all clusters, so their card names none. It learns no targets.
        without = ("cluster", "targets")
        shared = ClusterShardsCard(**{key: value for key, value in card.plain().items() if key not in without})
        self._columns = [name for name in shards.columns if name != "feature"]
        self.counts: list[dict[Split, int]] = [dict.fromkeys(SPLITS, 0) for _ in range(k)]
        self.blank = 0
        self.report_rows = ReportRows(k, seed)
        # One open writer per cluster, and one for the router's sample.
        rows, shapes = shard_rows(shards, self._columns, k), latent_shapes(shards)
        paths = [cluster_path(directory, c) for c in range(k)]
        self._stack = ExitStack()
        with self._stack:  # if one cannot be opened, the others are closed
            self._writers = [
                self._stack.enter_context(ShardWriter(path, card.model_copy(update={"cluster": c}), rows, shapes))
                for c, path in enumerate(paths)
            ]
            self._router = None
            if router_fraction is not None:
                self._router = self._stack.enter_context(ShardWriter(directory / ROUTER, shared, rows, shapes))
            self._stack = self._stack.pop_all()
        self._routed = 0
        self._table: Any = None  # a pyarrow ParquetWriter, once there are rows

    def add(self, assigned: Assigned, rows: Tensor | None = None) -> None:
        """Write rows of a shard to their clusters.

        Args:
            assigned: the shard with its clusters.
            rows: [n] int64; None for all rows.
        """
        part, rows = assigned.part, torch.arange(len(assigned.part)) if rows is None else rows
        # All rows of this shard may be there already.
        if not len(rows):
            return
        # Each cluster's shards.
        clusters = assigned.clusters[rows]
        for number in clusters.unique().tolist():
            members = rows[clusters == number]
            splits = append_rows(
                self._writers[number], part, members, {name: part.columns[name][members] for name in self._columns}
            )
            for split in SPLITS:
                self.counts[number][split] += splits.count(split)
        self.blank += int((assigned.features[rows] == 0).all(1).sum())
        # The table of keys and clusters.
        keys, splits = keys_and_splits(part, rows)
        self._write_table(assignment_table(keys, clusters.tolist(), splits))
        # The samples for the router and the report.
        hashes = hash_keys(part.keys)
        if self._router is not None and self._fraction is not None:
            chosen = rows[torch.from_numpy(below(draw(hashes, self._seed, ROUTER), self._fraction))[rows]]
            latents = {name: part.columns[name][chosen] for name in self._columns if name != TARGET}
            append_rows(self._router, part, chosen, {**latents, "cluster": assigned.clusters[chosen]})
            self._routed += len(chosen)
        self.report_rows.offer(assigned, rows, hashes)

    def adopt(self, old: Path, card: ClustersCard) -> None:
        """Take over a finished clusters/ directory with this card, before anything is added.

        Its shards are linked if the file system supports it, else copied.
        """
        import pyarrow.parquet as pq

        for number, writer in enumerate(self._writers):
            adopt_shards(writer, cluster_path(old, number))
        if self._router is not None:
            self._routed += adopt_shards(self._router, old / ROUTER)
        # The table is copied row group by row group.
        with pq.ParquetFile(old / ASSIGNMENT) as file:
            for number in range(file.num_row_groups):
                self._write_table(file.read_row_group(number))
        # Go on counting where the old directory stopped.
        self.counts, self.blank = [{"train": count.train, "val": count.val} for count in card.counts], card.blank
        self.report_rows.adopt(old)

    def close(self) -> None:
        """Write the rows that are still buffered, and the report's rows.

        Raises:
            AtollError: a cluster without a training image, or router/ without an image.
        """
        for number, count in enumerate(self.counts):
            # An expert cannot be trained on nothing.
            if not count["train"]:
                raise AtollError(
                    f"cluster {number} of {len(self.counts)} got no training image; lower clusters.k, or raise "
                    "clusters.fine"
                )
        # A small fraction of few images may select none.
        if self._router is not None and not self._routed:
            raise AtollError(f"clusters.router_fraction {self._fraction} selects no image for the router; raise it")
        # Closing a writer writes its last shard and its index.
        self._stack.close()
        self._table.close()
        self.report_rows.write(self._directory)

    def __enter__(self) -> "ClustersWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            # The writers see the error, and remove their files.
            self._stack.__exit__(kind, error, trace)
            if self._table is not None:
                self._table.close()
        else:
            self.close()

    def _write_table(self, table: Any) -> None:
        import pyarrow.parquet as pq

        # The first table determines the schema.
        if self._table is None:
            self._table = pq.ParquetWriter(self._directory / ASSIGNMENT, table.schema, compression="zstd")
        self._table.write_table(table, row_group_size=len(table))


def assignment_table(keys: list[str], clusters: list[int], splits: list[str]) -> Any:
    """Return rows of assignment.parquet as a pyarrow table."""
    import pyarrow as pa

    types = {"key": pa.string(), "cluster": pa.int32(), "split": pa.string()}
    columns = dict(zip(types, (keys, clusters, splits), strict=True))
    return pa.table({name: pa.array(columns[name], kind) for name, kind in types.items()})


def adopt_shards(writer: ShardWriter, old: Path) -> int:
    """Take over the shards of a directory with its card; return their number of rows."""
    shards = Shards(old)
    # Of clusters that grew, each directory keeps its own card: its experts stay those of their own assignment.
    writer.card = shards.card(ClusterShardsCard)
    for part in shards.parts():
        file = old / f"shard-{part.number:05d}.safetensors"
        writer.adopt(file, part.keys, part.captions, part.splits, part.others)
    return len(shards)


def append_rows(writer: ShardWriter, part: Shard, rows: Tensor, columns: Mapping[str, Tensor]) -> list[str]:
    """Append rows [n] int64 of a shard with all of their texts and these columns [n, ...]; return their splits."""
    chosen = rows.tolist()
    keys, captions, splits, others = (
        [texts[i] for i in chosen] for texts in (part.keys, part.captions, part.splits, part.others)
    )
    writer.append(keys, captions, splits, columns, others)
    return splits


def keys_and_splits(part: Shard, rows: Tensor) -> tuple[list[str], list[str]]:
    """Return keys and splits of rows [n] int64 of a shard."""
    chosen = rows.tolist()
    return [part.keys[i] for i in chosen], [part.splits[i] for i in chosen]


def shard_rows(shards: Shards, columns: list[str], k: int) -> int:
    """Return the rows per shard so that k + 1 writers, each with a shard twice in memory, stay within `_BUFFERS`.

    A writer has a shard of each shape of the latents.
    """
    row = sum(math.prod(shards.shape(name)) * 4 for name in columns)
    shapes = max(len(shards.shapes(name)) for name in columns)
    return max(1, min(_SHARD_ROWS, _BUFFERS // (2 * (k + 1) * shapes * row)))


def latent_shapes(shards: Shards) -> dict[str, tuple[int, ...]]:
    """Return the main shapes of the columns with latents, whose rows may have others; what a `ShardWriter` takes."""
    return {name: shards.shape(name) for name in LATENTS if name in shards.columns}
