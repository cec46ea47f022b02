"""The card of an ensemble, which names its parts and their hashes."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from atoll.storage import bounds
from atoll.storage.bounds import Name, Plain, Sha256
from atoll.storage.cards.lineage import Ancestors, DescendedRecord, Lineage
from atoll.storage.cards.record import Card, CardRecord


class RouterEntry(CardRecord):
    """Where an ensemble's router is, relative to the ensemble, and the hash of its card."""

    url: bounds.FreeText
    sha256: Sha256


class LoraEntry(CardRecord):
    """Where an expert's low-rank update is, relative to the ensemble, the hash of its card, and its scale."""

    url: bounds.FreeText
    sha256: Sha256
    scale: bounds.LoraScale = 1.0


class ExpertEntry(CardRecord):
    """Where one of an ensemble's experts is, relative to the ensemble, and the hash of its card.

    Attributes:
        lora: the low-rank update that is added to its weights; None for none.
    """

    name: bounds.PartName
    clusters: bounds.Clusters
    url: bounds.FreeText
    sha256: Sha256
    lora: LoraEntry | None = None


class StackingRecord(CardRecord):
    """The weights [M][R] of R replicas at M increasing log-SNR nodes."""

    names: tuple[Name, ...] = Field(min_length=2, max_length=bounds.MAX_EXPERTS)
    log_snr: bounds.Nodes
    weights: tuple[tuple[bounds.StackingWeight, ...], ...]
    x0_mse: tuple[bounds.SquaredError, ...]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        # One row of weights per node, one weight per replica.
        nodes, names = len(self.log_snr), len(self.names)
        if len(self.weights) != nodes or len(self.x0_mse) != nodes or any(len(row) != names for row in self.weights):
            raise ValueError(f"expected a weight of each of {names} replicas, and an error, at each of {nodes} nodes")
        return self


class StackingsEntry(CardRecord):
    """The file with the replicas' mean latents, and their weights."""

    file: bounds.FileName
    sha256: Sha256
    weights: tuple[StackingRecord, ...] = Field(max_length=bounds.MAX_EXPERTS)


class SamplingDefaults(CardRecord):
    """The sampling settings of an ensemble, used unless the caller sets others.

    Attributes:
        shift: of the solver's times (`atoll.time_shift`); None: what the experts were trained with.
    """

    steps: bounds.Steps | None = None
    guidance_scale: bounds.Guidance | None = None
    method: Name | None = None
    routing: Name | None = None
    replicas: Name | None = None
    shift: bounds.Shift | None = None

    def steps_or(self, steps: int) -> int:
        """The default number of steps, or `steps` if there is none."""
        # The card leaves out what the author did not choose.
        return steps if self.steps is None else self.steps

    def guidance_or(self, scale: float) -> float:
        """The default guidance scale, or `scale` if there is none."""
        # A scale of 0 is a choice, so only None is replaced.
        return scale if self.guidance_scale is None else self.guidance_scale


class EnsembleCard(Card, DescendedRecord):
    """ensemble.json.

    Attributes:
        router: None if the ensemble is a single expert.
        lineage: older assignments, whose experts fit too; None if the clusters never grew.
    """

    remedy: ClassVar[str] = "run `atoll assemble` again, or get the ensemble from its author again"
    kind: Literal["ensemble"] = "ensemble"
    experts: tuple[ExpertEntry, ...] = Field(min_length=1, max_length=bounds.MAX_EXPERTS)
    router: RouterEntry | None
    clusters: bounds.ClusterCount
    assignment: Name | None
    lineage: Ancestors | None = None
    latent_shape: bounds.LatentShape
    codec: Plain
    stackings: StackingsEntry | None = None
    sampling: SamplingDefaults

    @property
    def descent(self) -> Lineage:
        """The assignment with its ancestors."""
        return Lineage(self.assignment, self.clusters, self.lineage or ())
