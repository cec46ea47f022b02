"""Resize and crop images of any aspect: to a square, or to the bucket of the nearest aspect.

Imports numpy and Pillow alone, like `atoll.data.image`.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from atoll.data.containers import MAX_PIXELS, Unusable
from atoll.image_size import ImageSize

_RAISED = 3  # a portrait loses one part in this many of its excess above, the rest below: heads are at the top


class Box(NamedTuple):
    """What must stay inside the crop, as fractions of the upright image's width and height."""

    x0: float
    y0: float
    x1: float
    y1: float


class Frames(NamedTuple):
    """A decoded image.

    Attributes:
        pixels: [C, h, w] uint8, what the codec encodes.
        square: [C, size, size] uint8, what the feature network reads; None if that is `pixels`.
    """

    pixels: np.ndarray
    square: np.ndarray | None = None


Focused = tuple[bytes, Box | None]  # an image file, and what must stay inside its crop


@dataclass(frozen=True)
class Framing:
    """Format of every decoded image.

    Attributes:
        size: side of the square in pixels.
        channels: 3 (RGB) or 1 (grey: ITU-R 601-2 luma).
        smallest_side: pixels; images with a shorter side are refused, those between it and `size` are enlarged.
        sizes: the buckets; empty: every image becomes the square.
        max_cut: the largest fraction of an image that cropping to its bucket may cut off.
    """

    size: int
    channels: int
    smallest_side: int
    sizes: tuple[ImageSize, ...] = ()
    max_cut: float = 1.0

    def __post_init__(self) -> None:
        if self.size < 1 or self.smallest_side < 1 or self.channels not in (1, 3):
            raise ValueError(f"a framing has a size and a smallest side of at least 1, and 1 or 3 channels; got {self}")

    @property
    def shapes(self) -> set[tuple[int, int, int]]:
        """The shapes (C, h, w) of framed images."""
        sizes = self.sizes or (ImageSize(self.size, self.size),)
        return {(self.channels, *size) for size in sizes}

    def bucket(self, width: int, height: int) -> ImageSize:
        """Return the bucket of the nearest aspect. Raises Unusable if cropping to it would cut off too much."""
        image = ImageSize(height, width)
        size = image.nearest(self.sizes)
        cut = 1 - math.exp(-abs(math.log(image.aspect / size.aspect)))
        if cut > self.max_cut:
            raise Unusable(
                f"extreme aspect: {width} x {height} pixels lose {cut:.0%} in the nearest bucket, {size}; at most "
                f"{self.max_cut:.0%} is allowed (data.buckets.max_cut)"
            )
        return size


class Decode(Protocol):
    """A decoder like `atoll.data.image.frames`: the bytes of a file to pixels. Raises Unusable."""

    def __call__(self, data: bytes, framing: Framing, focus: Box | None = None) -> Frames: ...


def decoded(decode: Decode, framing: Framing, file: Focused) -> Frames:
    """Decode one file; what a worker process calls, so it must not be in a file that imports torch."""
    data, focus = file
    return decode(data, framing) if focus is None else decode(data, framing, focus)


def frame_image(image: Image.Image, framing: Framing, focus: Box | None = None) -> Frames:
    """Crop and resize an image as the framing says.

    Raises:
        Unusable: too narrow to be enlarged, or of an extreme aspect.
    """
    square = ImageSize(framing.size, framing.size)
    if not framing.sizes:
        return Frames(_array(crop(image, square, focus), framing.channels))
    size = framing.bucket(image.width, image.height)
    # The feature of an image does not depend on its bucket.
    pixels, own = (
        _array(crop(image, one, focus, raised=raised), framing.channels)
        for one, raised in ((size, True), (square, False))
    )
    return Frames(pixels, own)


def crop(image: Image.Image, size: ImageSize, focus: Box | None = None, raised: bool = False) -> Image.Image:
    """Resize an image until it covers `size`, and cut off the rest: ADM's crop, for any aspect.

    Halve by averaging (box filter) while both sides are at least twice those of `size`, resize bicubically until `size`
    is just covered, then crop. Source for squares: the description in Dhariwal & Nichol, 2021 (arXiv 2105.05233) and
    Peebles & Xie, 2023 (arXiv 2212.09748).

    Args:
        image: upright, in 8 bits.
        size: of the result.
        focus: stays inside the crop if it fits, else the crop is centred on it.
        raised: cut less off the top of a portrait than off its bottom.

    Raises:
        Unusable: the enlarged image would have more than `MAX_PIXELS` pixels.
    """
    raised = raised and image.height > image.width
    # The box filter averages out detail that bicubic resizing would alias.
    while image.width >= 2 * size.width and image.height >= 2 * size.height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    # Resize until one side is exact and the other is covered.
    scale = max(size.width / image.width, size.height / image.height)
    width, height = round(image.width * scale), round(image.height * scale)
    # Only enlarging can get here: a narrow strip grows with the square of the scale.
    if width * height > MAX_PIXELS:
        to = size.width if size.width == size.height else size
        raise Unusable(f"too narrow: {image.width} x {image.height} pixels cannot be enlarged to {to}")
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    # Crop the longer side around the centre, or where the focus is.
    left, top = (width - size.width) // 2, (height - size.height) // (_RAISED if raised else 2)
    if focus is not None:
        left = _moved(left, size.width, width, focus.x0, focus.x1)
        top = _moved(top, size.height, height, focus.y0, focus.y1)
    return image.crop((left, top, left + size.width, top + size.height))


def _moved(start: int, length: int, whole: int, low: float, high: float) -> int:
    """Return the start of a crop along one axis, moved no further than the box needs.

    Args:
        start: where the crop begins without a box.
        length: of the crop, in pixels.
        whole: of the image.
        low, high: the ends of the box, as fractions of the whole.
    """
    first, last = math.floor(low * whole), math.ceil(high * whole)
    inside = min(max(start, last - length), first)
    start = inside if last - first <= length else (first + last - length) // 2
    return min(max(start, 0), whole - length)


def _array(image: Image.Image, channels: int) -> np.ndarray:
    """The pixels [C, h, w] uint8 of an image."""
    pixels = np.asarray(image).reshape(image.height, image.width, channels)  # [H,W,C]
    return pixels.transpose(2, 0, 1).copy()  # [C,H,W]
