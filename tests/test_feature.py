import math

import pytest
import torch

from atoll.errors import AtollError
from atoll.feature import Hog, build_feature


def reference(image: torch.Tensor, bins: int, grid: int) -> torch.Tensor:
    """The same, pixel by pixel, for a side that the grid divides."""
    height, width = image.shape
    histogram = torch.zeros(bins, grid, grid)
    at = lambda y, x: image[min(max(y, 0), height - 1), min(max(x, 0), width - 1)]  # noqa: E731
    for y in range(height):
        for x in range(width):
            dx, dy = at(y, x + 1) - at(y, x - 1), at(y + 1, x) - at(y - 1, x)
            place = (math.atan2(dy, dx) / math.pi * bins) % bins
            cell = y * grid // height, x * grid // width
            low = math.floor(place)
            histogram[low % bins, *cell] += math.hypot(dx, dy) * (1 - place + low)
            histogram[(low + 1) % bins, *cell] += math.hypot(dx, dy) * (place - low)
    root = histogram.flatten().sqrt()
    return root / root.norm()


@pytest.mark.parametrize(("bins", "grid"), [(4, 2), (3, 4)])
def test_equals_the_histograms_written_out(bins, grid) -> None:
    images = torch.rand(3, 1, 8, 12, generator=torch.Generator().manual_seed(0))
    feature = Hog(bins, grid)
    found = feature(images)
    assert (found.shape, found.dtype) == ((3, feature.dim), torch.float32)
    expected = torch.stack([reference(image[0], bins, grid) for image in images])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_unit_length_and_blind_to_contrast_and_inversion() -> None:
    images = torch.rand(4, 3, 16, 20)
    found = Hog()(images)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(Hog()(0.3 * images + 0.2), found, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(Hog()(1 - images), found, rtol=1e-3, atol=1e-3)


def test_blank_images_give_zeros() -> None:
    assert torch.equal(Hog()(torch.ones(2, 1, 8, 16)), torch.zeros(2, 256))


def test_a_thin_shape_is_near_its_bold_and_far_from_another() -> None:
    thin, bold, lying = torch.ones(3, 1, 16, 18)
    thin[0, 2:14, 8:10], bold[0, 2:14, 7:11], lying[0, 7:9, 2:14] = 0, 0, 0
    a, b, c = Hog()(torch.stack([thin, bold, lying]))
    assert (a - b).norm() < 0.8 * (a - c).norm()


def test_rows_do_not_depend_on_the_batch() -> None:
    images = torch.rand(5, 1, 16, 18)
    torch.testing.assert_close(Hog()(images)[2:4], Hog()(images[2:4]))


def test_build_feature_round_trip() -> None:
    assert build_feature(Hog(6, 3).config()).config() == {"name": "hog", "bins": 6, "grid": 3}
    assert build_feature({"name": "hog"}).dim == 256


@pytest.mark.parametrize(
    ("config", "said"),
    [({"name": "dino"}, "'dino'.*'hog'"), ({"name": "hog", "bins": 1}, "bins"), ({"name": "hog", "cells": 2}, "cells")],
)
def test_build_feature_refuses(config, said) -> None:
    with pytest.raises(AtollError, match=said):
        build_feature(config)
