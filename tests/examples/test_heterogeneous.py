"""examples/heterogeneous.py runs: four unlike experts trained apart, assembled, measured and sampled."""

import json
import math
import sys

import pytest


@pytest.fixture(scope="module")
def directory(example, tmp_path_factory):
    pytest.importorskip("diffusers")
    path = tmp_path_factory.mktemp("heterogeneous") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["heterogeneous.py", str(path), "--small", "--seeds", "1"])
        example("heterogeneous").main()
    return path


def test_every_variant_has_a_distance_above_the_floor(directory) -> None:
    distances = json.loads((directory / "distances.json").read_text())["distances"]
    floors = {"floor", "cluster 0, floor"}
    assert floors < set(distances)
    assert len(distances) == 29
    for name in set(distances) - floors:
        [distance] = distances[name]
        floor = distances["cluster 0, floor" if name.startswith("cluster 0") else "floor"][0]
        assert math.isfinite(distance), name
        assert distance > floor, name


def test_the_experts_are_unlike(directory) -> None:
    cards = [json.loads(path.read_text()) for path in (directory / "experts").glob("[0-9]*/*.json")]
    objectives = {(card["objective"]["prediction"], card["objective"]["schedule"]["name"]) for card in cards}
    assert objectives == {("eps", "cosine"), ("flow", "linear"), ("x0", "table"), ("eps", "linear-beta")}


@pytest.mark.parametrize("routing", ["top-1", "full", "sample-1"])
def test_samples_are_written_for_a_routing(directory, routing) -> None:
    assert (directory / f"{routing}.png").stat().st_size > 0
