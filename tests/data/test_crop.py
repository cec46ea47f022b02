"""Crops of any aspect: what is covered, where the window lies, and what must stay inside it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from atoll.data.containers import Unusable
from atoll.data.crop import Box, Framing, crop, frame_image
from atoll.image_size import ImageSize


def ruler(width, height):
    """An image whose red is the column and whose green is the row, both from 0 to 255."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 0 * x], axis=2).round().astype(np.uint8))


def window(image):
    """The part of the ruler that a crop shows: (left, top, right, bottom) as fractions."""
    pixels = np.asarray(image).astype(float) / 255
    return pixels[:, 0, 0].mean(), pixels[0, :, 1].mean(), pixels[:, -1, 0].mean(), pixels[-1, :, 1].mean()


@given(*[st.integers(40, 160)] * 2, *[st.integers(16, 48)] * 2)
def test_the_whole_of_one_axis_stays_and_the_centre_of_the_other(width, height, w, h) -> None:
    image = crop(ruler(width, height), ImageSize(h, w))
    assert image.size == (w, h)
    left, top, right, bottom = window(image)
    tolerance = 3 / min(w, h)
    # Nothing is distorted: the shown part has the crop's aspect.
    shown = ((right - left) * width) / ((bottom - top) * height)
    assert shown == pytest.approx((w - 1) / (h - 1), rel=4 * tolerance)
    whole = (left, right) if width / height <= w / h else (top, bottom)
    part = (top, bottom) if width / height <= w / h else (left, right)
    assert whole == pytest.approx((0, 1), abs=tolerance)
    assert sum(part) == pytest.approx(1, abs=2 * tolerance)


def test_a_portrait_loses_less_at_its_top() -> None:
    left, top, right, bottom = window(crop(ruler(60, 120), ImageSize(60, 60), raised=True))
    assert (left, right) == pytest.approx((0, 1), abs=0.01)
    assert (top, bottom) == pytest.approx((1 / 6, 4 / 6), abs=0.02)
    # What is cut in its width, or is no portrait, is cropped at the centre.
    across = window(crop(ruler(120, 60), ImageSize(60, 60), raised=True))
    assert across == pytest.approx((1 / 4, 0, 3 / 4, 1), abs=0.02)
    flat = window(crop(ruler(120, 100), ImageSize(50, 120), raised=True))
    assert (flat[1], flat[3]) == pytest.approx((1 / 4, 3 / 4), abs=0.02)


fractions = st.floats(0, 1)


@given(*[st.integers(20, 90)] * 2, *[st.sampled_from((16, 24, 32))] * 2, *[fractions] * 4)
def test_a_box_stays_inside_if_it_fits(width, height, w, h, a, b, c, d) -> None:
    box = Box(min(a, b), min(c, d), max(a, b), max(c, d))
    size = ImageSize(h, w)
    scale = max(w / width, h / height)
    whole = (round(width * scale), round(height * scale))
    plain = window(crop(ruler(width, height), size))
    found = window(crop(ruler(width, height), size, box))
    for low, high, first, last, side, length in (
        (box.x0, box.x1, found[0], found[2], whole[0], w),
        (box.y0, box.y1, found[1], found[3], whole[1], h),
    ):
        pixel = 1.5 / min(side, length) + 0.01
        assert -0.01 <= first < last <= 1.01
        if (high - low) * side + 2 <= length:
            assert first - pixel <= low
            assert high <= last + pixel
        elif (high - low) * side > length:
            # It does not fit: the window shows its middle, as far as the image reaches.
            middle = min(max((low + high) / 2, length / side / 2), 1 - length / side / 2)
            assert (first + last) / 2 == pytest.approx(middle, abs=2 * pixel)
    # A box that the usual crop shows moves nothing.
    if plain[0] + 0.1 <= box.x0 and box.x1 <= plain[2] - 0.1 and plain[1] + 0.1 <= box.y0 and box.y1 <= plain[3] - 0.1:
        assert found == plain


TABLE = tuple(ImageSize.parse(text) for text in ("16x16", "20x12", "12x20"))


@given(*[st.integers(8, 400)] * 2)
def test_the_bucket_is_that_of_the_nearest_aspect(width, height) -> None:
    framing = Framing(16, 3, 1, TABLE, max_cut=0.5)
    ratios = {size: (width / height) / (size.width / size.height) for size in TABLE}
    cut = {size: 1 - min(ratio, 1 / ratio) for size, ratio in ratios.items()}
    least = min(cut.values())
    if least > 0.501:
        with pytest.raises(Unusable, match=rf"extreme aspect: {width} x {height} pixels lose .*at most 50% is allowed"):
            framing.bucket(width, height)
    elif least < 0.499:
        assert cut[framing.bucket(width, height)] == pytest.approx(least)


def test_the_square_for_the_feature_does_not_depend_on_the_bucket() -> None:
    image = ruler(40, 22)
    pixels, square = frame_image(image, Framing(16, 3, 1, TABLE))
    assert pixels.shape == (3, 12, 20)
    alone = frame_image(image, Framing(16, 3, 1))
    assert alone.square is None
    assert np.array_equal(square, alone.pixels)
