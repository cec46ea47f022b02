"""What loading returns: an expert with its card, an ensemble with its frozen networks and the sizes of its images."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from atoll.encoders.codec import Codec
from atoll.encoders.codec.statistics import refuse_other_statistics
from atoll.encoders.text import PromptEncoder
from atoll.encoders.weights import same
from atoll.ensemble import Ensemble, Expert
from atoll.ensemble.sizes import ImageSizes
from atoll.errors import AtollError
from atoll.image_size import ImageSize
from atoll.storage.cards import EnsembleCard, ExpertCard, RouterCard, SamplingDefaults


@dataclass(frozen=True)
class LoadedExpert:
    """An expert with its card."""

    expert: Expert
    card: ExpertCard


@dataclass(frozen=True)
class LoadedEnsemble:
    """An ensemble ready to sample, with its frozen networks.

    Attributes:
        ensemble: experts and router.
        encoder: the text encoders that the experts read; `Expert.encoder` is an index of them.
        codec: latents to images.
        latent_shape: (C, H, W) of the main size.
        card: the ensemble's card, or the expert's if a single expert was loaded as an ensemble.
        experts: the cards of the experts that are there, in their order.
        router: the router's card; None without a router.
    """

    ensemble: Ensemble
    encoder: PromptEncoder
    codec: Codec
    latent_shape: tuple[int, ...]
    card: EnsembleCard | ExpertCard
    experts: tuple[ExpertCard, ...] = ()
    router: RouterCard | None = None

    @cached_property
    def sizes(self) -> ImageSizes:
        """The sizes of its images."""
        return ImageSizes.of(self.experts, self.router, self.latent_shape, self.codec.factor)

    def shift(self, size: ImageSize) -> float:
        """Return the shift of the solver's times for images of a size: the card's, or what the experts' cards say."""
        if self.sampling.shift is not None:
            return self.sampling.shift
        experts = self.ensemble.experts if self.experts else ()
        return self.sizes.shift([expert.objective for expert in experts], size)

    @property
    def sampling(self) -> SamplingDefaults:
        """The defaults of sampling."""
        return self.card.sampling if isinstance(self.card, EnsembleCard) else SamplingDefaults()

    @property
    def clusters(self) -> int:
        """The number of clusters of its assignment."""
        return self.card.clusters if isinstance(self.card, EnsembleCard) else self.card.k

    def with_weak(self, weak: "LoadedEnsemble", where: Path) -> "LoadedEnsemble":
        """Return it with a weak ensemble, from which guidance leads away (`atoll.ensemble.weak`).

        Args:
            weak: the weak ensemble, or one expert of all clusters.
            where: its directory, for messages.

        Raises:
            AtollError: it has another latent shape, codec, number or assignment of clusters, reads another text
                encoder, or lacks an expert of some cluster.
        """
        # Velocities of other latents have nothing in common.
        refuse_other_statistics(where, weak.card.codec, "the ensemble", self.card.codec)
        facts = [
            ("latent_shape", list(weak.latent_shape), list(self.latent_shape)),
            ("codec", weak.card.codec, self.card.codec),
            ("number of clusters", weak.clusters, self.clusters),
        ]
        # The clusters of another assignment are others; an expert of all of them has no need of one.
        if len(weak.ensemble.experts) > 1:
            facts.append(("assignment", weak.card.assignment, self.card.assignment))
        for name, got, expected in facts:
            if not same(got, expected):
                raise AtollError(
                    f"{where}: its {name} is {got}, the ensemble's is {expected}; expected a weaker ensemble of the "
                    "same clusters, such as one of earlier snapshots (`atoll ema`)"
                )

        # Its experts read the prompts as this ensemble's text encoders encode them.
        kinds, index_of = self.encoder.configs(), dict[int, int]()
        for number, config in enumerate(weak.encoder.configs()):
            matches = [index for index, kind in enumerate(kinds) if same(kind, config)]
            if not matches:
                raise AtollError(
                    f"{where}: its experts read prompts by the condition {config}, the ensemble's by {kinds}; expected "
                    "the same condition"
                )
            index_of[number] = matches[0]
        experts = [replace(expert, encoder=index_of[expert.encoder]) for expert in weak.ensemble.experts]
        return replace(self, ensemble=replace(self.ensemble, weak=replace(weak.ensemble, experts=experts)))
