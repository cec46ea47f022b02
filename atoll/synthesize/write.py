"""Unfinished draws: synthesized.partial/ holds a file per shard until encoded/ and clusters/ are made from them.

plan.json               what is drawn; a resumed run must request the same
000-00000.safetensors   latents of the first rows of cluster 0; complete if it exists
000-00000.sha256        the hash of that file, in the format of sha256sum
"""

import hashlib
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from atoll.encoders.weights import same
from atoll.errors import AtollError
from atoll.storage.artifact import (
    CARD,
    WEIGHTS,
    load_card,
    load_clusters,
    sha256_file,
    whole_directory,
    write_bytes,
    write_card,
)
from atoll.storage.cards import ClusterShardsCard, DrawingPlan, DrawnCard, DrawnClustersCard, ShardsIndex
from atoll.storage.layout import ASSIGNMENT, CLUSTERS_CARD, RunLayout, cluster_path
from atoll.storage.lock import hold
from atoll.storage.shards import INDEX, SPLITS, Shards, ShardWriter
from atoll.storage.verified import sha256_once
from atoll.synthesize.captions import CaptionOrder
from atoll.synthesize.rows import Keys

PLAN = "plan.json"
_HASH = ".sha256"  # the suffix of a shard's hash


@dataclass(frozen=True)
class SynthesisPlan:
    """Everything that the drawn bytes depend on.

    Attributes:
        card: common to all directories of shards.
    """

    card: DrawnCard

    @property
    def clusters(self) -> int:
        return self.card.clusters

    @property
    def images(self) -> int:
        """Rows per cluster."""
        return self.card.source.images

    @property
    def shard_rows(self) -> int:
        """Rows per shard, at most."""
        return self.card.source.shard_rows

    def shards_card(self, cluster: int | None = None) -> ClusterShardsCard:
        """The card of one cluster's shards; None: of all rows."""
        # The field is absent, rather than None, in the card of all rows.
        only = {} if cluster is None else {"cluster": cluster}
        return ClusterShardsCard(**only, **self.card.plain())

    def shards(self, cluster: int) -> Iterator[tuple[int, range]]:
        """Yield (number of the shard, its rows) of a cluster."""
        for number in range(math.ceil(self.images / self.shard_rows)):
            # The last shard may have fewer rows.
            start = number * self.shard_rows
            yield number, range(start, min(start + self.shard_rows, self.images))


def is_there(out: Path, plan: SynthesisPlan, force: bool) -> bool:
    """Return whether `out` holds exactly what the plan would write.

    Args:
        out: the run's directory.
        plan: what is drawn.
        force: other draws are to be replaced, so only data are refused.

    Raises:
        AtollError: encoded/ or clusters/ was made otherwise, or drawn with another plan and force is False.
    """
    layout = RunLayout(out)
    encoded, clusters = layout.encoded, layout.clusters
    cards = {
        encoded: _drawn_shards(encoded) if (encoded / INDEX).is_file() else None,
        clusters: _drawn_clusters(layout.clusters_card) if layout.clusters_card.is_file() else None,
    }
    # Data that were not drawn are never replaced.
    for path, card in cards.items():
        if path.exists() and card is None:
            raise AtollError(f"{path}: exists and was not made by `atoll synthesize`; name another directory")
        if card is not None and not force:
            _compare(card, plan.card.plain(), path)
    return not force and None not in cards.values() and len(Shards(encoded)) > 0  # Shards checks its files


def _drawn_shards(path: Path) -> dict[str, Any] | None:
    """The card of shards that experts drew; None of others."""
    index = load_card(path / INDEX, ShardsIndex)
    return index.card if index.is_drawn else None


def _drawn_clusters(file: Path) -> dict[str, Any] | None:
    """The card of clusters that experts drew; None of others."""
    card = load_clusters(file)
    return card.plain() if isinstance(card, DrawnClustersCard) else None


class PartialSynthesis:
    """The directory of unfinished draws, `out`/synthesized.partial; a context manager, locked from `prepare` on."""

    def __init__(self, out: Path, plan: SynthesisPlan):
        self.layout, self.plan = RunLayout(out), plan
        self.path = self.layout.synthesized_partial
        self._lock: IO[str] | None = None

    def __enter__(self) -> "PartialSynthesis":
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.close()

    @property
    def exists(self) -> bool:
        """Whether there are unfinished draws."""
        return (self.path / PLAN).is_file()

    def prepare(self, resume: bool, force: bool) -> None:
        """Create the directory, or open that of interrupted draws, and lock it.

        Args:
            resume: continue interrupted draws.
            force: discard interrupted draws.

        Raises:
            AtollError: another process is drawing; there are unfinished draws and both resume and force are False, or
                they have another plan.
        """
        self._refuse_other()
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = hold(self.path, "drawing")
        # Continue only what has the same plan.
        if self.exists and (resume or not force):
            if not resume:
                raise AtollError(f"{self.path}: unfinished draws; continue with --resume, or start again with --force")
            # Shards of another plan would mix with those of this one.
            begun = load_card(self.path / PLAN, DrawingPlan)
            _compare(begun.plain(), self.plan.card.plain(), self.path)
            return
        self._empty()
        # The plan comes first: it identifies the directory if the run is killed.
        write_card(self.path / PLAN, DrawingPlan(**self.plan.card.plain()))

    def discard(self) -> None:
        """Remove the directory. Raises AtollError if it holds something else."""
        self._refuse_other()
        if self.path.exists():
            self._empty()
            shutil.rmtree(self.path)

    def _refuse_other(self) -> None:
        # Hidden files do not count; without a plan, other files were not drawn.
        if not self.exists and any(self.path.glob("[!.]*")):
            raise AtollError(f"{self.path}: exists and holds no unfinished draws (it has no {PLAN}); move it away")

    def _empty(self) -> None:
        """Remove all files, the plan last: it identifies the directory."""
        for file in self.path.glob("[!.]*"):
            if file.name != PLAN:
                file.unlink()
        (self.path / PLAN).unlink(missing_ok=True)

    def is_done(self, cluster: int, number: int) -> bool:
        """Return whether a shard is written."""
        return self._file(cluster, number).is_file()

    def write(self, cluster: int, number: int, latents: Tensor) -> None:
        """Write a shard's latents [n, C, H, W] and their hash, each atomically."""
        from safetensors.torch import save

        file, content = self._file(cluster, number), save({"latent": latents.contiguous()})
        # The hash comes first: a shard that exists is complete. It is compared at sealing, perhaps days later.
        digest = hashlib.sha256(content).hexdigest()
        write_bytes(file.with_suffix(_HASH), f"{digest}  {file.name}\n".encode())
        write_bytes(file, content)

    def seal(self, keys: Sequence[Keys], captions: Sequence[CaptionOrder]) -> None:
        """Move the finished shards into clusters/ and encoded/, linked if the file system supports it, else copied.

        If it is interrupted, the next run repeats it.

        Args:
            keys: of each cluster.
            captions: of each cluster.

        Raises:
            AtollError: a shard is not the one that was written.
        """
        # clusters/ first: encoded/ marks the run as finished.
        with whole_directory(self.layout.clusters) as directory:
            self._write_clusters(directory, keys, captions)
        # encoded/ holds the rows of all clusters.
        with ShardWriter(self.layout.encoded, self.plan.shards_card()) as writer:
            for cluster in range(self.plan.clusters):
                self._adopt(writer, cluster, keys[cluster], captions[cluster])
        self.discard()

    def _write_clusters(self, directory: Path, keys: Sequence[Keys], captions: Sequence[CaptionOrder]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        # Every cluster's shards, and the table of all keys.
        counts = []
        schema = pa.schema({"key": pa.string(), "cluster": pa.int32(), "split": pa.string()})
        with pq.ParquetWriter(directory / ASSIGNMENT, schema, compression="zstd") as table:
            for cluster in range(self.plan.clusters):
                path = cluster_path(directory, cluster)
                with ShardWriter(path, self.plan.shards_card(cluster)) as writer:
                    self._adopt(writer, cluster, keys[cluster], captions[cluster])
                for part in (shards := Shards(path)).parts():
                    rows = {"key": part.keys, "cluster": [cluster] * len(part), "split": part.splits}
                    table.write_table(pa.table(rows, schema=schema), row_group_size=len(part))
                # The counts come from the finished shards.
                counts.append({split: len(shards.rows(split)) for split in SPLITS})
        card = DrawnClustersCard(**self.plan.card.plain(), k=self.plan.clusters, counts=counts)
        write_card(directory / CLUSTERS_CARD, card)

    def _adopt(self, writer: ShardWriter, cluster: int, keys: Keys, captions: CaptionOrder) -> None:
        """Hand all shards of a cluster to a writer."""
        for number, rows in self.plan.shards(cluster):
            file = self._file(cluster, number)
            _require_unchanged(file)
            # Keys, captions and splits follow from the row numbers; only latents were drawn.
            names = keys(rows)
            writer.adopt(file, names, captions(rows), [keys.split(name) for name in names])

    def _file(self, cluster: int, number: int) -> Path:
        return self.path / f"{cluster:03d}-{number:05d}.safetensors"


def _require_unchanged(file: Path) -> None:
    """Raise AtollError if a drawn shard is not the one that was written."""
    # Shards of a time before hashes have none.
    try:
        expected = file.with_suffix(_HASH).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return
    if expected.split()[:1] != [sha256_once(file)]:
        raise AtollError(f"{file}: its contents are not those that were written; remove it and --resume")


def link_expert(source: Path, target: Path, force: bool) -> None:
    """Link an expert's artifact to where the later stages read it, or copy it if the file system has no links.

    Raises:
        AtollError: another expert is there, and force is False.
    """
    # The same expert from an earlier call.
    if (target / CARD).is_file():
        if sha256_file(target / CARD) == sha256_file(source / CARD):
            return
        if not force:
            raise AtollError(
                f"{target}: is another expert than {source}; name a new directory, or replace it with --force"
            )
    # Written as a whole: an interrupted call leaves no incomplete expert.
    with whole_directory(target) as directory:
        # A link costs no space; the artifact is never changed in place.
        for name in (CARD, WEIGHTS):
            try:
                (directory / name).hardlink_to(source / name)
            except OSError:  # another file system, or no hard links
                shutil.copyfile(source / name, directory / name)


def _compare(existing: Mapping[str, Any], requested: Mapping[str, Any], path: Path) -> None:
    """Raise AtollError with the first entry that differs."""
    for key, value in requested.items():
        if isinstance(value, Mapping) and key == "source":
            # Compare the source entry by entry, so that the message names the one that differs.
            _compare(existing.get(key, {}), value, path)
        elif not same(got := existing.get(key), value):
            # Long values are not printed.
            plain = isinstance(value, str | int | float)
            difference = f"{key} {got}, requested is {value}" if plain else f"different {key} than requested"
            raise AtollError(f"{path}: was drawn with {difference}; replace it with --force, or name another directory")
