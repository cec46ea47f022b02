"""Sizes of images: width first as text, height first as an axis."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.errors import AtollError
from atoll.image_size import ImageSize

SIDES = st.integers(1, 9999)


@given(SIDES, SIDES)
def test_text_is_width_by_height(height, width) -> None:
    size = ImageSize.parse(f"{width}x{height}")
    assert (size.height, size.width) == tuple(size) == (height, width)
    assert str(size) == f"{width}x{height}"
    assert ImageSize.parse(f" {width}X{height} ") == size
    assert size.latent(1) == (height, width)
    assert ImageSize.of_latent((4, height, width), 8) == (8 * height, 8 * width)


@pytest.mark.parametrize("text", ["", "512", "0x8", "8x0", "8x8x8", "-8x8", "8.5x8", "wide", "1234567x8"])
def test_other_text_is_refused(text) -> None:
    with pytest.raises(AtollError, match=r"--size: got .*expected width and height in pixels, such as 1024x768"):
        ImageSize.parse(text, "--size")


@given(SIDES, SIDES, st.integers(1, 64))
def test_the_nearest_size_that_fits_is_named(height, width, step) -> None:
    size = ImageSize(height, width)
    if height % step == 0 and width % step == 0:
        size.require_multiple(step)
        return
    with pytest.raises(AtollError, match=f"multiples of {step}; the nearest is ") as error:
        size.require_multiple(step)
    named = ImageSize.parse(str(error.value).rpartition(" ")[2])
    named.require_multiple(step)
    assert all(abs(a - b) <= max(step / 2, step - b) for a, b in zip(named, size, strict=True))


def test_the_nearest_aspect_is_by_ratio() -> None:
    sizes = [ImageSize.parse(text) for text in ("16x16", "32x8", "8x32", "32x32")]
    nearest = {text: str(ImageSize.parse(text).nearest(sizes)) for text in ("9x8", "31x16", "33x16", "5x20", "300x300")}
    # 31x16 is 1.94 from the square and 2.06 from 4:1; area decides between equal aspects.
    assert nearest == {"9x8": "16x16", "31x16": "16x16", "33x16": "32x8", "5x20": "8x32", "300x300": "32x32"}
