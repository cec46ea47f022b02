"""What loading returns: an expert with its card, an ensemble with its frozen networks and the sizes of its images."""

from dataclasses import dataclass
from functools import cached_property

from atoll.encoders.codec import Codec
from atoll.encoders.text import PromptEncoder
from atoll.ensemble import Ensemble, Expert
from atoll.ensemble.sizes import ImageSizes
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
