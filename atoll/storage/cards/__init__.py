"""Cards: the JSON that describes an artifact, one class per kind, each value within `atoll.storage.bounds`.

    ExpertCard, RouterCard    card.json of an artifact, beside its weights
    LoraCard                  the same of a low-rank update of an expert
    EnsembleCard              ensemble.json, which names its parts and their hashes
    EncodedCard               encoded/index.json: what the images were encoded with
    ClusterShardsCard         index.json of shards whose clusters are known: one cluster's, the router's, or drawn ones
    ReportRowsCard            index.json of the rows that the cluster report shows
    ShardsIndex               index.json itself, around one of these three cards
    ClustersCard              clusters.json of clustered data
    DrawnClustersCard         clusters.json of data that experts drew
    EncodingPlan, DrawingPlan plan.json of an encoding or a synthesis in the making
    CheckpointRecord          the numbers of a training's checkpoint

Configurations of networks, objectives and encoders are bounded plain values here; their owners check the content.
"""

from atoll.storage.cards.artifacts import (
    CONVERTED,
    ArtifactCard,
    ArtifactT,
    CalibrationRecord,
    ConversionRecord,
    DenoiserCard,
    EarlierPlan,
    EmaRecord,
    ExpertCard,
    InitRecord,
    LoraCard,
    LoraRecord,
    MergeRecord,
    RouterCard,
    SkipRecord,
    TeacherRecord,
    TrainingRecord,
    WeightsEntry,
)
from atoll.storage.cards.data import (
    ClusteringCard,
    ClusterQuality,
    ClustersCard,
    ClusterShardsCard,
    ClusterWords,
    ColumnEntry,
    CutRecord,
    DrawingExpert,
    DrawingPlan,
    DrawnCaptions,
    DrawnCard,
    DrawnClustersCard,
    DrawnSource,
    EncodedCard,
    EncodedCounts,
    EncodingPlan,
    FileEntry,
    ImagesRecord,
    LatentStatistics,
    ReportRowsCard,
    ShardEntry,
    ShardsIndex,
    SplitCounts,
    TargetsRecord,
    clusters_kind,
)
from atoll.storage.cards.ensemble import (
    EnsembleCard,
    ExpertEntry,
    LoraEntry,
    RouterEntry,
    SamplingDefaults,
    StackingRecord,
    StackingsEntry,
)
from atoll.storage.cards.lineage import AncestorRecord, Lineage
from atoll.storage.cards.record import FORMAT, Card, CardRecord, CardT, RecordT, parse_card, parse_record

__all__ = [
    "CONVERTED",
    "FORMAT",
    "AncestorRecord",
    "ArtifactCard",
    "ArtifactT",
    "CalibrationRecord",
    "Card",
    "CardRecord",
    "CardT",
    "ClusterQuality",
    "ClusterShardsCard",
    "ClusterWords",
    "ClusteringCard",
    "ClustersCard",
    "ColumnEntry",
    "ConversionRecord",
    "CutRecord",
    "DenoiserCard",
    "DrawingExpert",
    "DrawingPlan",
    "DrawnCaptions",
    "DrawnCard",
    "DrawnClustersCard",
    "DrawnSource",
    "EarlierPlan",
    "EmaRecord",
    "EncodedCard",
    "EncodedCounts",
    "EncodingPlan",
    "EnsembleCard",
    "ExpertCard",
    "ExpertEntry",
    "FileEntry",
    "ImagesRecord",
    "InitRecord",
    "LatentStatistics",
    "Lineage",
    "LoraCard",
    "LoraEntry",
    "LoraRecord",
    "MergeRecord",
    "RecordT",
    "ReportRowsCard",
    "RouterCard",
    "RouterEntry",
    "SamplingDefaults",
    "ShardEntry",
    "ShardsIndex",
    "SkipRecord",
    "SplitCounts",
    "StackingRecord",
    "StackingsEntry",
    "TargetsRecord",
    "TeacherRecord",
    "TrainingRecord",
    "WeightsEntry",
    "clusters_kind",
    "parse_card",
    "parse_record",
]
