"""Cards of trained parts: experts and routers."""

from typing import Annotated, Any, ClassVar, Final, Literal, Self, TypeVar

from pydantic import AfterValidator, Field, model_validator

from atoll.storage import bounds
from atoll.storage.bounds import Count, Name, Plain, PositiveCount, Sha256
from atoll.storage.cards.data import TargetsRecord
from atoll.storage.cards.lineage import Ancestors, DescendedRecord, Lineage
from atoll.storage.cards.record import Card, CardRecord, refuse_renamed
from atoll.storage.layout import WEIGHTS

CONVERTED: Final = "converted"  # the mark of a training that was a conversion


def _weights(name: str) -> str:
    # A free name could point to any file of the reader's machine.
    if name != WEIGHTS:
        raise ValueError(f"got {name!r:.60}, expected {WEIGHTS}")
    return name


class WeightsEntry(CardRecord):
    """The file with an artifact's tensors. Its name is fixed, so that no card can point outside its directory."""

    file: Annotated[str, AfterValidator(_weights)]
    sha256: Sha256
    bytes: Count


class CalibrationRecord(CardRecord):
    """An expert's calibration curves at increasing log-SNR nodes, and the latents that they were measured on."""

    log_snr: bounds.Nodes
    slope: tuple[bounds.Fraction, ...]
    x0_mse: tuple[bounds.SquaredError, ...]
    x0_mse_raw: tuple[bounds.SquaredError, ...]
    velocity_mse: tuple[bounds.SquaredError, ...]
    measured_on: Literal["held back", "val", "train", "all"] | None = None
    rows: Count | None = None
    seed: bounds.Seed | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        # All curves share the nodes.
        for name in ("slope", "x0_mse", "x0_mse_raw", "velocity_mse"):
            if (count := len(getattr(self, name))) != len(self.log_snr):
                raise ValueError(f"{name} has {count} values, expected one for each of {len(self.log_snr)} nodes")
        return self


class InitRecord(CardRecord):
    """The expert whose weights a training started from."""

    name: Name
    sha256: Sha256


class TeacherRecord(CardRecord):
    """The ensemble that a student learned from. by: targets of the cluster's own expert, or of the whole ensemble."""

    ensemble: Sha256
    by: Literal["owner", "ensemble"]


class SkipRecord(CardRecord):
    """The rows that a list of keys left out of a training: their number, and the hash of their keys."""

    keys: PositiveCount
    sha256: Sha256


class EmaRecord(CardRecord):
    """A post-hoc EMA of the weights, of width `sigma_rel`.

    Attributes:
        of: the hash of the weights that training wrote.
        step: the training's step at which the average ends; None: the last one.
    """

    sigma_rel: bounds.Fraction
    snapshots: PositiveCount
    widths: tuple[bounds.Fraction, ...]
    of: Sha256
    step: PositiveCount | None = None


class EarlierPlan(CardRecord):
    """A plan that a training followed before its last one, see `atoll.train.plans`.

    Attributes:
        mark: of the training under this plan.
        steps: planned.
        until: the step from which the next plan counts.
        exact: all steps until then are the same under the next plan.
    """

    mark: Name
    steps: PositiveCount
    until: Count
    exact: bool


class TrainingRecord(CardRecord):
    """How an artifact was trained. A converted artifact has steps 0 and the mark "converted".

    Attributes:
        mark: the hash of everything that the result depends on; see `atoll.train.plans.training_mark`.
        settings: the `train` section of atoll.yaml, whole.
        plans: earlier plans of steps, the oldest first; None if the training was never extended.
        loss: the last logged loss. validation: losses by name.
        skipped_batches, rollbacks: counts, after losses that were not finite or jumped.
        rows: the number of latents in the training set.
        calibration_holdout: the fraction of the training rows held out for calibration.
        skip: the rows of its data that it left out; None if there are none.
        targets: the targets of representation that it predicted; None without them.
    """

    renamed: ClassVar[dict[str, str]] = {"hold_back": "calibration_holdout"}

    mark: Name
    settings: Plain | None = None
    steps: Count
    plans: tuple[EarlierPlan, ...] | None = Field(None, max_length=bounds.MAX_ANCESTORS)
    loss: bounds.Number | None = None
    validation: dict[Name, bounds.Number] | None = None
    seconds: bounds.Seconds | None = None
    rollbacks: Count | None = None
    skipped_batches: Count | None = None
    init: InitRecord | None = None
    teacher: TeacherRecord | None = None
    rows: Count | None = None
    calibration_holdout: bounds.Fraction = 0.0
    skip: SkipRecord | None = None
    targets: TargetsRecord | None = None
    seed: bounds.Seed = 0
    torch: Name | None = None
    ema: EmaRecord | None = None

    @model_validator(mode="after")
    def _refuse_old_settings(self) -> Self:
        # `settings` is a plain value, so the check of the record's own keys does not reach it.
        refuse_renamed(self.settings, self.renamed)
        return self


class ConversionRecord(CardRecord):
    """What a foreign checkpoint was, and how it was converted.

    Attributes:
        source: sha256 by file name.
        classes: labels of a class-conditional network. null: what stands in for a null class that it lacks.
        positions: where the positions come from. resolution: (height, width) in pixels that they are made for.
        weights: which of a training file's weights were taken.
        residual: the relative error of each block's modulation.
    """

    kind: Name
    modulation: Name
    source: dict[Name, Sha256]
    seed: bounds.Seed | None = None
    classes: Count | None = None
    positions: Name | None = None
    null: Name | None = None
    resolution: tuple[PositiveCount, PositiveCount] | None = None
    weights: Name | None = None
    residual: tuple[bounds.Number, ...] | None = Field(None, max_length=bounds.MAX_DEPTH)


class ArtifactCard(Card):
    """card.json. weights: None until the artifact is written."""

    weights: WeightsEntry | None = None

    @property
    def weights_sha256(self) -> str:
        """The hash of the weights, which names the artifact."""
        # A card in memory gets its weights when it is written.
        assert self.weights is not None, "the card is not written yet"
        return self.weights.sha256

    def plain(self) -> dict[str, Any]:
        """Return JSON values, with the weights last."""
        # pydantic lists the fields of the base class first, which would put the weights before the name.
        values = super().plain()
        weights = values.pop("weights", None)
        return values if weights is None else {**values, "weights": weights}


class LoraRecord(CardRecord):
    """The shape of a low-rank update, see `atoll.nn.lora`.

    Attributes:
        rank: r, of every updated layer.
        alpha: the update is multiplied by alpha / rank.
        targets: ends of the updated layers' names; empty: every linear layer in a block.
    """

    rank: Annotated[int, Field(strict=True, ge=1, le=bounds.MAX_DIM)]
    alpha: Annotated[float, Field(gt=0, le=bounds.MAX_DIM, allow_inf_nan=False)]
    targets: tuple[Name, ...] = Field((), max_length=bounds.MAX_DEPTH)


class MergeRecord(CardRecord):
    """The low-rank update that was added to an expert's weights: the hashes of both, and the scale."""

    base: InitRecord
    lora: InitRecord
    scale: bounds.LoraScale


class DenoiserCard(ArtifactCard):
    """What the cards of a whole expert and of a low-rank update have in common.

    Attributes:
        k: the number of clusters.
        clusters: the clusters covered. Several make a generalist, all of them a monolith.
        assignment: the hash of the rule that assigns images to clusters; None if unknown, as for foreign checkpoints.
        latent_shape: (C, H, W) of the main size.
        shapes: those of all sizes that it was trained on; None: the main one alone.
        calibration: the measured curves; None if not measured.
    """

    name: bounds.PartName
    k: bounds.ClusterCount
    clusters: bounds.Clusters
    objective: Plain
    network: Plain
    assignment: Name | None = None
    latent_shape: bounds.LatentShape
    shapes: tuple[bounds.LatentShape, ...] | None = Field(None, min_length=1, max_length=bounds.MAX_SIZES)
    codec: Plain
    condition: bounds.ConditionConfig
    calibration: CalibrationRecord | None = None
    training: TrainingRecord | None = None

    @model_validator(mode="after")
    def _numbered(self) -> Self:
        # Router outputs are indexed by these numbers.
        if max(self.clusters) >= self.k or len(set(self.clusters)) < len(self.clusters):
            raise ValueError(f"clusters {list(self.clusters)}, expected different ones from 0 to k - 1 = {self.k - 1}")
        return self


class ExpertCard(DenoiserCard):
    """An expert's card.json. merged: the low-rank update in its weights; None if there is none."""

    kind: Literal["expert"] = "expert"
    conversion: ConversionRecord | None = None
    merged: MergeRecord | None = None


class LoraCard(DenoiserCard):
    """The card.json of a low-rank update of an expert.

    Attributes:
        network: of the expert that it updates.
        base: that expert, by the hash of its weights.
        lora: the shape of the update.
    """

    kind: Literal["lora"] = "lora"
    base: InitRecord
    lora: LoraRecord


class RouterCard(ArtifactCard, DescendedRecord):
    """A router's card.json.

    Attributes:
        clusters: the number of clusters that it distinguishes.
        lineage: older assignments, whose experts fit too; None if the clusters never grew.
        path: (schedule, clusters noised by it), if training did not follow the linear path.
        accuracy_at_t: top-1 accuracy on held-out latents, by the time.
    """

    kind: Literal["router"] = "router"
    network: Plain
    clusters: bounds.ClusterCount
    latent_shape: bounds.LatentShape
    codec: Plain
    condition: bounds.ConditionConfig
    assignment: Name | None = None
    lineage: Ancestors | None = None
    path: tuple[tuple[Plain, bounds.Clusters], ...] | None = Field(None, max_length=bounds.MAX_CLUSTERS)
    accuracy_at_t: dict[Name, bounds.Fraction] | None = None
    training: TrainingRecord | None = None
    conversion: ConversionRecord | None = None

    @property
    def descent(self) -> Lineage:
        """The assignment with its ancestors."""
        return Lineage(self.assignment, self.clusters, self.lineage or ())


ArtifactT = TypeVar("ArtifactT", bound=ArtifactCard)
