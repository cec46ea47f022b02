"""Aspect-ratio buckets: the sizes to which images of any aspect are cropped."""

from pydantic import Field, field_validator, model_validator

from atoll.errors import AtollError
from atoll.image_size import ImageSize
from atoll.manifest.base import Section
from atoll.storage.bounds import MAX_SIZES


class BucketSettings(Section):
    """The table of sizes that images are cropped to, each to the one of the nearest aspect (NovelAI 2022, SDXL).

    Generated from a budget, `data.size` squared pixels, and `max_aspect`; or listed as `sizes`. Every side is a
    multiple of the codec's factor times the networks' patches.
    """

    # The longer side over the shorter one, at most, of the generated sizes.
    max_aspect: float = Field(2.0, ge=1, le=16)
    sizes: tuple[str, ...] | None = None  # "WIDTHxHEIGHT" each, the main size first; in place of `max_aspect`
    # Images of which more than this fraction would be cut off are skipped; 1: none is.
    max_cut: float = Field(0.5, gt=0, le=1)

    @field_validator("sizes")
    @classmethod
    def _listed(cls, sizes: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if sizes is None:
            return None
        try:
            parsed = [ImageSize.parse(size, "buckets.sizes") for size in sizes]
        except AtollError as error:
            raise ValueError(str(error)) from None
        if not 0 < len(parsed) <= MAX_SIZES or len(set(parsed)) < len(parsed):
            raise ValueError(f"{len(parsed)} sizes; expected 1 to {MAX_SIZES} different ones")
        # One spelling, since cards compare it.
        return tuple(map(str, parsed))

    @model_validator(mode="after")
    def _one_table(self) -> "BucketSettings":
        if self.sizes is not None and "max_aspect" in self.model_fields_set:
            raise ValueError("max_aspect and sizes: both name a table; leave one out")
        return self

    def table(self, size: int, step: int) -> tuple[ImageSize, ...]:
        """Return the sizes, the main one first.

        Generated, these are for every shorter side the largest size within `size` squared pixels, upright and across,
        from the square to `max_aspect`; the square of `size` is the main one.

        Args:
            size: `data.size`.
            step: the number that must divide every side.

        Raises:
            AtollError: a side that `step` does not divide, or too many sizes.
        """
        if self.sizes is not None:
            listed = tuple(ImageSize.parse(text) for text in self.sizes)
            for one in listed:
                one.require_multiple(step, "data.buckets.sizes")
            return listed
        ImageSize(size, size).require_multiple(step, "data.size")
        table = [ImageSize(size, size)]
        for short in range(size - step, 0, -step):
            long = size * size // (short * step) * step
            if long > self.max_aspect * short:
                break
            table += [ImageSize(short, long), ImageSize(long, short)]
        if len(table) > MAX_SIZES:
            raise AtollError(
                f"data.buckets: {len(table)} sizes up to an aspect of {self.max_aspect:g}, expected at most "
                f"{MAX_SIZES}; lower max_aspect, or list the sizes"
            )
        return tuple(table)
