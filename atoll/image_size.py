"""The size of an image in pixels: "1024x768" is 1024 wide and 768 high, as OpenAI and every camera write it."""

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

from atoll.errors import AtollError


class ImageSize(NamedTuple):
    """Height and width in pixels, in the order of a tensor's axes; as text "WIDTHxHEIGHT".

    Attributes:
        height: H times the codec's factor.
        width: W times the codec's factor.
    """

    height: int
    width: int

    @classmethod
    def parse(cls, text: str, where: str = "size") -> "ImageSize":
        """Read "1024x768", which is 1024 wide and 768 high.

        Args:
            text: the size.
            where: the option or key, for the message.

        Raises:
            AtollError: anything else, or a side of 0.
        """
        match = re.fullmatch(r"([1-9][0-9]{0,5})[xX×]([1-9][0-9]{0,5})", text.strip())
        if match is None:
            raise AtollError(f"{where}: got {text!r:.40}, expected width and height in pixels, such as 1024x768")
        return cls(height=int(match[2]), width=int(match[1]))

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def aspect(self) -> float:
        """Width over height."""
        return self.width / self.height

    def latent(self, factor: int) -> tuple[int, int]:
        """Return (H, W) of the latent by a codec of this factor; the factor must divide both sides."""
        return self.height // factor, self.width // factor

    @classmethod
    def of_latent(cls, shape: Iterable[int], factor: int) -> "ImageSize":
        """Return the size of the images of latents of a shape (..., H, W)."""
        *_, height, width = shape
        return cls(height * factor, width * factor)

    def require_multiple(self, step: int, where: str = "size") -> None:
        """Raise AtollError, with the nearest size that fits, unless `step` divides both sides."""
        if self.height % step or self.width % step:
            fitting = ImageSize(*(max(step, round(side / step) * step) for side in self))
            raise AtollError(f"{where}: {self}, expected sides that are multiples of {step}; the nearest is {fitting}")

    def nearest(self, sizes: Iterable["ImageSize"]) -> "ImageSize":
        """Return the size of the nearest aspect, by the ratio of the aspects; of several, the nearest area."""
        return min(
            sizes,
            key=lambda size: (
                round(abs(math.log(size.aspect / self.aspect)), 9),
                abs(math.log(size.height * size.width / (self.height * self.width))),
            ),
        )
