"""Writes the clusters/ directory of clusters that grew: linked, copied with new numbers, or anew."""

import os
import shutil
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from atoll.cluster.assign import Assigned
from atoll.cluster.report_rows import ReportRows
from atoll.cluster.sampling import below, draw, hash_keys
from atoll.cluster.write import (
    adopt_shards,
    append_rows,
    assignment_table,
    keys_and_splits,
    latent_shapes,
)
from atoll.storage.cards import ClusteringCard, ClustersCard, ClusterShardsCard
from atoll.storage.layout import ASSIGNMENT, ROUTER, cluster_path
from atoll.storage.shards import SPLITS, TARGET, Shards, ShardWriter, Split


class GrownClusters:
    """The parts of a grown clusters/ directory that hold rows of all clusters; a context manager.

    Attributes:
        counts: rows of each split, for each cluster.
        blank: number of rows whose feature is a zero vector.
        report_rows: the rows that the report shows.

    Args:
        directory: to write to; the caller makes the write atomic.
        out: the old clusters/.
        card: its card.
        clustering: of the new one, with one cluster more.
        parent: the cluster that is split; None for a cluster of new data.
        moved: keys of the parent's rows that belong to the new cluster.
    """

    def __init__(
        self,
        directory: Path,
        out: Path,
        card: ClustersCard,
        clustering: ClusteringCard,
        parent: int | None = None,
        moved: Collection[str] = (),
    ):
        self._directory, self._out, self._card, self._clustering = directory, out, card, clustering
        self._parent, self._moved = parent, moved
        self.counts: list[dict[Split, int]] = [{"train": one.train, "val": one.val} for one in card.counts]
        self.counts.append(dict.fromkeys(SPLITS, 0))
        self.blank = card.blank
        self.report_rows = ReportRows(clustering.k, card.seed)
        self._table: Any = None  # a pyarrow ParquetWriter
        self._router: ShardWriter | None = None

    def __enter__(self) -> "GrownClusters":
        # What no row of the step touches is linked as it is.
        for number in range(self._card.k):
            if number != self._parent:
                _link(cluster_path(self._out, number), cluster_path(self._directory, number))
        # The old rows of table, router's sample and report; those of a split parent are offered to the report anew.
        self._copy_table()
        if (self._out / ROUTER).is_dir():
            self._router = self._copy_router()
        self.report_rows.adopt(self._out, without=self._parent)
        return self

    def add(self, assigned: Assigned, rows: Tensor) -> None:
        """Add new rows [n] int64 of a shard to table, router's sample, report and counts."""
        part, hashes = assigned.part, hash_keys(assigned.part.keys)
        if not len(rows):
            return
        keys, splits = keys_and_splits(part, rows)
        clusters = assigned.clusters[rows].tolist()
        self._table.write_table(assignment_table(keys, clusters, splits), row_group_size=len(keys))
        self.blank += int((assigned.features[rows] == 0).all(1).sum())
        for cluster, split in zip(clusters, splits, strict=True):
            self.counts[cluster][split] += 1
        # The router's sample grows by the same fraction.
        if self._router is not None and self._card.router_fraction is not None:
            chosen = rows[
                torch.from_numpy(below(draw(hashes, self._card.seed, ROUTER), self._card.router_fraction))[rows]
            ]
            columns = {name: part.columns[name][chosen] for name in part.columns if name not in ("feature", TARGET)}
            append_rows(self._router, part, chosen, {**columns, "cluster": assigned.clusters[chosen]})
        self.report_rows.offer(assigned, rows, hashes)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._table.close()
        if self._router is not None:
            # After an error the writer removes its files.
            self._router.__exit__(kind, error, trace)
        if error is None:
            self.report_rows.write(self._directory)

    def _copy_table(self) -> None:
        """Copy assignment.parquet row group by row group, with the new number of the rows that moved."""
        import pyarrow.parquet as pq

        with pq.ParquetFile(self._out / ASSIGNMENT) as file:
            self._table = pq.ParquetWriter(self._directory / ASSIGNMENT, file.schema_arrow, compression="zstd")
            for number in range(file.num_row_groups):
                table = file.read_row_group(number)
                if self._moved:
                    keys, clusters, splits = (table[name].to_pylist() for name in ("key", "cluster", "split"))
                    renumbered = [self._card.k if k in self._moved else c for k, c in zip(keys, clusters, strict=True)]
                    table = assignment_table(keys, renumbered, splits).cast(file.schema_arrow)
                self._table.write_table(table, row_group_size=len(table))

    def _copy_router(self) -> ShardWriter:
        """Copy the router's sample; its rows keep their order."""
        old = Shards(self._out / ROUTER)
        # Whoever has the sample alone needs the lineage, too.
        card = old.card(ClusterShardsCard).model_copy(
            update={
                "clusters": self._clustering.k,
                "assignment": self._clustering.assignment,
                "lineage": self._clustering.lineage,
            }
        )
        writer = ShardWriter(self._directory / ROUTER, card, shapes=latent_shapes(old))
        try:
            if not self._moved:
                adopt_shards(writer, old.path)
                writer.card = card
                return writer
            # The numbers of the rows that moved are written anew.
            for part in old.parts():
                moved = torch.tensor([key in self._moved for key in part.keys])
                clusters = part.columns["cluster"].masked_fill(moved, self._card.k)
                columns = {**part.columns, "cluster": clusters}
                writer.append(part.keys, part.captions, part.splits, columns, part.others)
        except BaseException as error:
            writer.__exit__(type(error), error, error.__traceback__)
            raise
        return writer


def _link(old: Path, new: Path) -> None:
    """Link all files of a directory, or copy them where the file system has no links."""
    # The first look at the directory checks that it is complete.
    Shards(old)
    new.mkdir()
    for file in old.iterdir():
        try:
            os.link(file, new / file.name)
        except OSError:
            shutil.copy2(file, new / file.name)
