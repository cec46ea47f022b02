"""Cards of data: shards of latents, clusters, and the plans of unfinished stages."""

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from atoll.storage import bounds
from atoll.storage.bounds import Count, Name, Plain, PositiveCount, Sha256
from atoll.storage.cards.lineage import Ancestors, DescendedRecord, Lineage
from atoll.storage.cards.record import Card, CardRecord


class FileEntry(CardRecord):
    """A file beside the index."""

    file: bounds.FileName
    bytes: Count
    sha256: Sha256


class ShardEntry(FileEntry):
    """A shard: its rows, and the shapes of those columns that have another one in it than in the index."""

    rows: PositiveCount
    shapes: dict[Name, bounds.RowShape] | None = None


class ColumnEntry(CardRecord):
    """One tensor per row: its dtype, and its shape without the rows."""

    dtype: Literal["float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool"]
    shape: bounds.RowShape


class SplitCounts(CardRecord):
    """Rows of each split."""

    train: Count
    val: Count


class ShardsIndex(Card):
    """index.json of a directory of shards. card: the writer's card, such as an EncodedCard."""

    many_files: ClassVar[bool] = True
    remedy: ClassVar[str] = "write the directory again"
    kind: Literal["shards"] = "shards"
    rows: PositiveCount
    splits: SplitCounts
    columns: dict[Name, ColumnEntry] = Field(min_length=1, max_length=64)  # Atoll writes five at most
    shards: tuple[ShardEntry, ...] = Field(min_length=1)
    manifest: FileEntry
    attached: tuple[FileEntry, ...]
    card: Plain

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        # Row numbers are computed from the shards, so a wrong total would shift them.
        if self.rows != sum(shard.rows for shard in self.shards):
            raise ValueError(f"the shards do not add up to {self.rows} rows")
        # A shape of no column would be ignored.
        unknown = {name for shard in self.shards for name in shard.shapes or ()} - self.columns.keys()
        if unknown:
            raise ValueError(f"a shard has a shape for {sorted(unknown)[0]!r:.60}, which is no column")
        return self

    @property
    def is_drawn(self) -> bool:
        """Whether experts drew the rows; see `DrawnSource`."""
        # A source is a plain value, whose name depends on the stage that wrote it.
        source = self.card.get("source")
        return isinstance(source, dict) and source.get("name") == "experts"


class ImagesRecord(CardRecord):
    """How images were framed.

    Attributes:
        size, smallest_side: pixels.
        sizes: the buckets, "WIDTHxHEIGHT", the main one first; None: every image is a square of `size`.
        max_cut: the largest fraction of an image that cropping to its bucket may cut off.
    """

    size: PositiveCount
    channels: Literal[1, 3]
    smallest_side: PositiveCount
    duplicates: Literal["skip", "keep"]
    flips: bool
    sizes: tuple[Name, ...] | None = Field(None, min_length=1, max_length=bounds.MAX_SIZES)
    max_cut: bounds.Fraction | None = None


class CutRecord(CardRecord):
    """The number of truncated captions, and the fraction of their text that is not read."""

    captions: PositiveCount
    fraction: bounds.Fraction


class EncodedCounts(CardRecord):
    """Samples of a source.

    Attributes:
        good: samples that are used. uncaptioned: the good samples without a caption.
        several: the good samples with several captions. others: their captions after the first one.
        skipped: the other samples, by reason. apart: the skipped samples that are not failures.
        notes: remarks on good samples, by kind.
        cut: captions that are longer than the text encoder reads.
        sizes: good samples by size, "WIDTHxHEIGHT"; None without buckets.
    """

    good: Count
    uncaptioned: Count
    skipped: dict[Name, Count]
    several: Count | None = None
    others: Count | None = None
    apart: dict[Name, Count] | None = None
    notes: dict[Name, Count] | None = None
    cut: CutRecord | None = None
    sizes: dict[Name, Count] | None = Field(None, max_length=bounds.MAX_SIZES)


class LatentStatistics(CardRecord):
    """Mean and standard deviation of the latents of all training rows, per channel.

    Attributes:
        mean, std: one number per channel. Mirrored latents count too.
        values: the number of values in each channel.
    """

    mean: tuple[bounds.Number, ...] = Field(min_length=1, max_length=bounds.MAX_CHANNELS)
    std: tuple[bounds.Deviation, ...] = Field(min_length=1, max_length=bounds.MAX_CHANNELS)
    values: PositiveCount

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if len(self.mean) != len(self.std):
            raise ValueError(f"{len(self.mean)} means and {len(self.std)} deviations, expected one for each channel")
        return self


class TargetsRecord(CardRecord):
    """Targets of representation, the column "target" of shards: see `atoll.encoders.targets`.

    Attributes:
        feature: the config of the frozen network, without the place of its weights.
        dims: components per place.
        grid: places per side of an image.
        sha256: of the file of the components; None until they are fitted.
    """

    feature: Plain
    dims: bounds.TargetDims
    grid: bounds.TargetGrid
    sha256: Sha256 | None = None


class EncodedCard(CardRecord):
    """The source of encoded/ and the frozen networks that encoded it.

    Attributes:
        targets: None if none are stored.
        counts, statistics: None until encoding ends.
    """

    renamed: ClassVar[dict[str, str]] = {"pictures": "images"}

    source: Plain
    images: ImagesRecord
    codec: Plain
    condition: bounds.ConditionConfig
    feature: Plain
    targets: TargetsRecord | None = None
    precision: Name
    counts: EncodedCounts | None = None
    statistics: LatentStatistics | None = None


class ClusterShardsCard(DescendedRecord):
    """Shards with known clusters.

    Attributes:
        cluster: the cluster of all rows; None if the shards hold all clusters.
        clusters: the number of clusters.
        assignment: the hash of the rule that assigns images to clusters.
        lineage: older assignments; None if the clusters never grew.
        targets: those stored beside the latents; None if there are none.
    """

    cluster: bounds.ClusterNumber | None = None
    clusters: bounds.ClusterCount
    assignment: Name
    latent_shape: bounds.LatentShape
    codec: Plain
    condition: bounds.ConditionConfig
    source: Plain
    lineage: Ancestors | None = None
    targets: TargetsRecord | None = None

    @property
    def descent(self) -> Lineage:
        """The assignment with its ancestors."""
        return Lineage(self.assignment, self.clusters, self.lineage or ())


class ReportRowsCard(CardRecord):
    kept: Literal["sample", "images"]


class EncodingPlan(Card):
    """plan.json of encoded.partial/: the card, the number of blocks, and the hash of the blocks' names."""

    remedy: ClassVar[str] = "start anew with --force"
    kind: Literal["partial"] = "partial"
    card: EncodedCard
    blocks: Count
    names_sha256: Sha256


class ClusterWords(CardRecord):
    """A cluster's silhouette and words: (word, fraction of its captions, fraction of all captions)."""

    silhouette: bounds.Number | None
    words: tuple[tuple[bounds.FreeText, bounds.Fraction, bounds.Fraction], ...]


class ClusterQuality(CardRecord):
    """Quality scores of clusters, measured on a sample of `rows` rows; None if a score is undefined."""

    rows: Count
    silhouette: bounds.Number | None
    silhouette_rows: Count
    davies_bouldin: bounds.Number | None
    clusters: tuple[ClusterWords, ...] = Field(max_length=bounds.MAX_CLUSTERS)


class ClusteringCard(Card, DescendedRecord):
    """The settings that determine clusters, before any row is assigned.

    Attributes:
        k: the number of clusters.
        fine: the number of fine centroids; None for random clusters.
        router_fraction: the fraction of all rows in router/; None if there is no router/.
        assignment: the hash of the rule that assigns images to clusters.
        encoded: the hashes of the clustered encoded/ directories, in the order of clustering.
        lineage: older assignments; None if the clusters never grew.
    """

    remedy: ClassVar[str] = "run `atoll cluster` again"
    kind: Literal["clusters"] = "clusters"
    k: bounds.ClusterCount
    method: Literal["balanced", "free", "random"]
    fine: PositiveCount | None
    seed: bounds.Seed
    router_fraction: bounds.Fraction | None
    feature: Plain
    codec: Plain
    assignment: Name
    encoded: tuple[Sha256, ...] = Field(min_length=1)
    lineage: Ancestors | None = None

    @property
    def descent(self) -> Lineage:
        """The assignment with its ancestors."""
        return Lineage(self.assignment, self.k, self.lineage or ())


class ClustersCard(ClusteringCard):
    """clusters.json of clustered data.

    Attributes:
        counts: rows of each cluster. blank: the number of rows whose feature is a zero vector.
        largest_over_mean: training rows of the largest cluster divided by the mean.
        cut: captions that are longer than the text encoder reads; None if there are none.
    """

    counts: tuple[SplitCounts, ...]
    blank: Count
    largest_over_mean: bounds.Ratio
    quality: ClusterQuality
    cut: CutRecord | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        # One entry per cluster: in the order of their numbers.
        for name, values in (("counts", self.counts), ("quality.clusters", self.quality.clusters)):
            if len(values) != self.k:
                raise ValueError(f"{name} has {len(values)} entries, expected k = {self.k}, one for each cluster")
        return self


class DrawingExpert(CardRecord):
    """An expert that draws, the clusters that it draws, and the hash of its card."""

    name: Name
    draws: tuple[bounds.ClusterNumber, ...] = Field(max_length=bounds.MAX_CLUSTERS)
    sha256: Sha256


class DrawnCaptions(CardRecord):
    """The captions of drawn rows: their origin in words, their number per cluster, and the hashes of their files."""

    # `from` is a keyword of Python, so only the JSON key has that name.
    origin: Name = Field(alias="from")
    counts: tuple[Count, ...] = Field(max_length=bounds.MAX_CLUSTERS)
    sha256: tuple[Sha256, ...] = Field(max_length=bounds.MAX_CLUSTERS)


class DrawnSource(CardRecord):
    """The source of rows drawn by experts.

    Attributes:
        images: rows per cluster.
        steps, method, guidance_scale, seed: the sampling settings.
        validation: the fraction of rows in the val split.
        shard_rows: the largest number of rows per shard.
    """

    name: Literal["experts"] = "experts"
    experts: tuple[DrawingExpert, ...] = Field(min_length=1, max_length=bounds.MAX_EXPERTS)
    captions: DrawnCaptions
    images: PositiveCount
    steps: bounds.Steps
    method: Name
    guidance_scale: bounds.Guidance
    seed: bounds.Seed
    validation: bounds.Fraction
    shard_rows: PositiveCount


class DrawnCard(CardRecord):
    """The fields shared by all cards of drawn rows. clusters: the number of clusters."""

    codec: Plain
    latent_shape: bounds.LatentShape
    assignment: Name
    condition: bounds.ConditionConfig
    clusters: bounds.ClusterCount
    source: DrawnSource


class DrawingPlan(DrawnCard, Card):
    """plan.json of synthesized.partial/: the rows to draw."""

    remedy: ClassVar[str] = "start anew with --force"
    kind: Literal["partial"] = "partial"


class DrawnClustersCard(DrawnCard, Card):
    """clusters.json of rows drawn by experts."""

    remedy: ClassVar[str] = "run `atoll synthesize` again"
    kind: Literal["clusters"] = "clusters"
    k: bounds.ClusterCount
    counts: tuple[SplitCounts, ...] = Field(max_length=bounds.MAX_CLUSTERS)

    @property
    def descent(self) -> Lineage:
        """The assignment; drawn clusters do not grow."""
        return Lineage(self.assignment, self.k)


def clusters_kind(content: Any) -> type[ClustersCard | DrawnClustersCard]:
    """Return the class of a clusters.json with this content."""
    # Both have the kind "clusters"; only drawn rows name a source.
    return DrawnClustersCard if isinstance(content, dict) and "source" in content else ClustersCard
