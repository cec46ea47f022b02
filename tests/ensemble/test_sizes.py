"""The sizes of an ensemble, from the cards of its parts."""

import pytest

from atoll.ensemble.sizes import ImageSizes
from atoll.image_size import ImageSize
from atoll.nn import patch_of
from atoll.objective import Objective
from atoll.storage.cards import ExpertCard, RouterCard
from tests.cards import expert_card, router_card


def sizes(*experts, router=None, factor=8):
    return ImageSizes.of(experts, router, (1, 4, 8), factor)


def card(patch=2, shapes=None):
    values = expert_card()
    values["network"] = {**values["network"], "patch": patch}
    return ExpertCard.model_validate(values | ({"shapes": shapes} if shapes else {}))


def test_trained_sizes_are_those_of_any_expert() -> None:
    two = sizes(card(), card(shapes=[[1, 4, 8], [1, 6, 6]]))
    assert list(map(str, two.trained)) == ["64x32", "48x48"]
    assert two.note(ImageSize(48, 48)) == ""
    assert "64x48; the nearest size that one was trained for is 48x48" in two.note(ImageSize(48, 64))
    # An ensemble whose cards are not known has its main size.
    assert sizes().trained == (ImageSize(32, 64),)


def test_every_network_must_see_whole_tokens() -> None:
    assert sizes(card(2), card(4)).step == 32
    values = router_card()
    values["network"] = {**values["network"], "patch": 1}
    router = RouterCard.model_validate(values)
    assert sizes(card(2), router=router).step == 16
    foreign = {"name": "diffusers", "class": "FluxTransformer2DModel", "config": {"patch_size": 1}}
    assert patch_of(foreign) == 2
    assert patch_of({"name": "diffusers", "class": "PRXTransformer2DModel", "config": {"patch_size": 4}}) == 4
    assert patch_of({"name": "paris", "patch": 2}) == 2


def test_the_shift_is_the_geometric_mean() -> None:
    two = sizes(card(), card())
    objectives = [Objective("flow", "linear", shift=shift) for shift in (2.0, 8.0)]
    assert two.shift(objectives, two.main) == pytest.approx(4.0)
    assert two.shift([Objective("flow", "linear", shift=3)] * 2, two.main) == 3.0
    assert two.shift([Objective("flow", "linear")] * 2, two.main) == 1.0
