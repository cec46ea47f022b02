"""The table of buckets: within the budget, multiples of the step, and what is refused."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from atoll.errors import AtollError
from atoll.image_size import ImageSize
from atoll.manifest.buckets import BucketSettings


@given(st.integers(2, 24), st.integers(1, 32), st.floats(1, 4))
def test_generated_sizes_fill_the_budget(count, step, aspect) -> None:
    size = count * step
    assume(count <= 16 or aspect < 3)
    table = BucketSettings(max_aspect=aspect).table(size, step)
    assert table[0] == (size, size)
    assert len(set(table)) == len(table)
    for one in table:
        assert one.height % step == one.width % step == 0
        assert one.height * one.width <= size * size
        assert max(one) <= aspect * min(one)
        assert ImageSize(one.width, one.height) in table
        # The longer side is the longest that fits.
        assert min(one) * (max(one) + step) > size * size
    # No shorter side is left out before the aspect is reached.
    shortest = min(map(min, table)) - step
    assert shortest <= 0 or size * size // (shortest * step) * step > aspect * shortest


def test_sdxl_like_table() -> None:
    table = BucketSettings(max_aspect=2).table(1024, 64)
    assert " ".join(map(str, table)) == (
        "1024x1024 1088x960 960x1088 1152x896 896x1152 1216x832 832x1216 1344x768 768x1344"
    )


def test_listed_sizes_are_taken_as_they_are() -> None:
    table = BucketSettings(sizes=("96x64", " 64X96 ")).table(999, 32)
    assert table == (ImageSize(64, 96), ImageSize(96, 64))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sizes": ["64x64", "64X64"]}, "2 sizes; expected 1 to 64 different ones"),
        ({"sizes": []}, "0 sizes; expected 1 to 64"),
        ({"sizes": ["64"]}, "got '64', expected width and height in pixels, such as 1024x768"),
        ({"sizes": ["64x64"], "max_aspect": 2}, "max_aspect and sizes: both name a table; leave one out"),
        ({"max_aspect": 0.5}, "greater than or equal to 1"),
        ({"max_cut": 0}, "greater than 0"),
    ],
)
def test_what_is_no_table_is_refused(settings, said) -> None:
    with pytest.raises(ValidationError, match=said):
        BucketSettings(**settings)


@pytest.mark.parametrize(
    ("settings", "size", "said"),
    [
        ({"sizes": ["64x64", "72x48"]}, 64, "data.buckets.sizes: 72x48, expected .* multiples of 16; the nearest is 6"),
        ({}, 72, "data.size: 72x72, expected sides that are multiples of 16; the nearest is 64x64"),
        ({"max_aspect": 16}, 2048, "data.buckets: .* sizes up to an aspect of 16, expected at most 64; lower max_asp"),
    ],
)
def test_sides_that_the_step_does_not_divide_are_refused(settings, size, said) -> None:
    with pytest.raises(AtollError, match=said):
        BucketSettings(**settings).table(size, 16)
