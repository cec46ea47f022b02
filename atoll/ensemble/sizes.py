"""The sizes of images that an ensemble samples: which its experts were trained for, and what shift belongs to each."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from atoll.errors import AtollError
from atoll.image_size import ImageSize
from atoll.nn import patch_of
from atoll.objective import Objective
from atoll.storage import bounds
from atoll.storage.cards import ExpertCard, RouterCard


@dataclass(frozen=True)
class ImageSizes:
    """The sizes of an ensemble's images.

    Attributes:
        main: what is sampled unless another size is requested.
        trained: every size that an expert was trained for, the main one first.
        factor: image side / latent side.
        step: the number that divides every side of an image.
        patches: of each expert, the side of a token in latent pixels.
    """

    main: ImageSize
    trained: tuple[ImageSize, ...]
    factor: int
    step: int
    patches: tuple[int, ...]

    @classmethod
    def of(
        cls, experts: Sequence[ExpertCard], router: RouterCard | None, latent_shape: Sequence[int], factor: int
    ) -> "ImageSizes":
        """Return the sizes of an ensemble.

        Args:
            experts: the cards of its experts.
            router: the card of its router; None without one.
            latent_shape: (C, H, W) of the main size.
            factor: image side / latent side.
        """
        main = ImageSize.of_latent(latent_shape, factor)
        shapes = {shape for card in experts for shape in (card.shapes or (card.latent_shape,))}
        others = sorted({ImageSize.of_latent(shape, factor) for shape in shapes} - {main})
        patches = tuple(patch_of(card.network) for card in experts)
        # A latent must be a whole number of tokens for every network.
        every = [*patches, *([] if router is None else [patch_of(router.network)])]
        return cls(main, (main, *others), factor, factor * math.lcm(*every), patches)

    def choose(self, height: int | None = None, width: int | None = None) -> ImageSize:
        """Return the size of a request; a side that is None is the main size's.

        Raises:
            AtollError: a side that the step does not divide, or a latent that is too large.
        """
        size = ImageSize(self.main.height if height is None else height, self.main.width if width is None else width)
        if not all(type(side) is int and side > 0 for side in size):
            raise AtollError(
                f"size: height {size.height!r:.40}, width {size.width!r:.40}; expected whole numbers of pixels"
            )
        if size != self.main:
            size.require_multiple(self.step)
        if max(size.latent(self.factor)) > bounds.MAX_SIDE:
            raise AtollError(f"size: {size}, expected sides of at most {bounds.MAX_SIDE * self.factor:,} pixels")
        return size

    def note(self, size: ImageSize) -> str:
        """Return a line on a size that no expert was trained for; "" if one was."""
        if size in self.trained:
            return ""
        return (
            f"no expert was trained for images of {size}; the nearest size that one was trained for is "
            f"{size.nearest(self.trained)}"
        )

    def shift(self, objectives: Sequence[Objective], size: ImageSize) -> float:
        """Return the shift of the solver's times that belongs to images of a size.

        The geometric mean of the shifts that the experts were trained with, 1 where there was none; so it is theirs
        where they agree.

        Args:
            objectives: of the experts, in the order of `patches`.
            size: of the images.
        """
        height, width = size.latent(self.factor)
        logs = [
            0.0 if objective.shift is None else math.log(objective.shift.at(height * width // patch**2))
            for objective, patch in zip(objectives, self.patches, strict=True)
        ]
        # Rounded, since exp(log 3) is not 3, and images state their shift.
        return float(f"{math.exp(sum(logs) / len(logs)):.12g}") if any(logs) else 1.0
