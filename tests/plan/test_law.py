"""How a plan compares with one model of equal FLOPs, by a law that can be evaluated by hand."""

import json

import pytest
import yaml

from atoll.plan import law
from atoll.storage.artifact import read_json

ROUTINGS = ("full", "top-1")
FITTED = {
    "centre": {law.SEEN: 0.1, "clusters": 4, "share": 0.5},
    "range": {"parameters": [5e5, 4e6], law.SEEN: [0.025, 0.8], "clusters": [2, 16], "share": [0.25, 0.75]},
    "ways": {
        law.SCRATCH: {r: {"constant": 8.0, "slopes": [-2, 5, 1, 0], "half_width": 3.0} for r in ROUTINGS},
        law.COMMON: {r: {"constant": 0.5, "slopes": [0, 0, 0, -1], "half_width": 2.0} for r in ROUTINGS},
        law.LEVELS: {r: {"constant": -2.0, "slopes": [0, 0, 0, 0], "half_width": 1.0} for r in ROUTINGS},
    },
}
COMMON = {"objective": {"prediction": "flow", "schedule": "linear"}, "train": {"steps": 2000, "batch": 64}}
GENERALIST = {"objective": {"prediction": "flow", "schedule": "linear", "levels": [0, 0.2]}}


def recipe(k: int, init: str | None = None, levels: tuple[float, float] = (0, 1), **sections) -> str:
    """K experts that see 32,000 images each."""
    objective = {"prediction": "flow", "schedule": "linear", "levels": list(levels)}
    return yaml.safe_dump(
        {
            "name": "r",
            "clusters": {"k": k},
            "network": {"width": 128, "depth": 4, "heads": 4},
            "train": {"steps": 1000, "batch": 32, "init": init},
            "experts": [{"cluster": number, "objective": objective} for number in range(k)],
            **sections,
        }
    )


@pytest.fixture
def fitted(monkeypatch):
    monkeypatch.setattr(law, "_law", lambda: FITTED)


@pytest.fixture
def planned(atoll, tmp_path, fitted):
    """The screen and the JSON of a plan."""

    def planned(content: str):
        file, out = tmp_path / "r.yaml", tmp_path / "plan.json"
        file.write_text(content)
        code, text, error = atoll("plan", file, "--json", out)
        assert code == 0, error
        return " ".join(text.split()), read_json(out)["one_model"]

    return planned


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        ((1e6, 1e5, 4, 0), 8.0),
        ((2e6, 1e5, 4, 0), 10.0),  # twice the parameters
        ((1e6, 4e5, 4, 0), 4.0),  # two doublings of the images
        ((1e6, 1e5, 16, 0), 8 + 2 * 5 + 4),
        ((1e6, 1e5, 2, 0), 8 - 5 + 1),
        ((1e9, 1e5, 4, 0), 12.0),  # as at 0.025 images per parameter, the fewest measured
        ((1e9, 1e8, 4, 0), 8.0),
        ((1e6, 1e5, 1000, 0), 22.0),
    ],
)
def test_by_hand(fitted, at, expected) -> None:
    found = law.difference(law.SCRATCH, "full", *at)
    assert (found.low, found.mean, found.high) == pytest.approx((expected - 3, expected, expected + 3))


def test_the_share_counts_in_quarters_and_within_its_range(fitted) -> None:
    shares = [law.difference(law.COMMON, "full", 1e6, 1e5, 4, share).mean for share in (0.25, 0.5, 0.75, 0.9)]
    assert shares == pytest.approx([1.5, 0.5, -0.5, -0.5])


def test_a_plan_from_scratch_is_told_what_would_be_better(planned) -> None:
    text, found = planned(recipe(4))
    assert (found["way"], found["clusters"], found["share"], found["outside"]) == (law.SCRATCH, 4, 0.0, [])
    assert found["full"]["low"] > 0
    seen = found["seen"]
    assert 0.025 < seen < 0.8
    assert f"What moves it: each doubling of the images seen per parameter (here {seen:.2g}) by -2.0 points." in text
    assert "One model is better, if it can be trained." in text
    assert f"Lowest: K = 2, {law.LEVELS}: -2.0 (-3.0 to -1.0) %. The experts are better." in text


def test_a_common_start_and_a_generalist_are_recognised(planned) -> None:
    text, found = planned(recipe(4, "common", common=COMMON))
    # Half of all images are the common model's.
    assert (found["way"], round(found["share"], 6)) == (law.COMMON, 0.5)
    assert "50% of the FLOPs in the common model: +0.5 (-1.5 to +2.5) %" in text
    assert "Which is better is not known: the interval includes 0." in text
    assert "What moves it" not in text  # by this law, only the share does
    text, found = planned(recipe(4, "common", (0.2, 1), common=COMMON, generalist=GENERALIST))
    assert found["way"] == law.LEVELS
    assert "by top-1. The experts are better." in text
    assert "Lowest" not in text  # the plan is as good as the best


def test_a_common_model_that_no_expert_starts_from_is_no_common_start(planned) -> None:
    assert planned(recipe(4, common=COMMON))[1]["way"] == law.SCRATCH


def test_outside_of_what_was_measured_there_is_no_verdict(atoll, fitted) -> None:
    code, text, _ = atoll("plan", "hddm-xl2-laion")
    text = " ".join(text.split())
    assert code == 0
    assert "Nobody has measured it there." in text
    assert "parameters: 605.7 M, measured 500.0 k to 4.0 M" in text
    assert "is better" not in text
    assert "are better" not in text


def test_one_expert_is_compared_with_nothing(planned) -> None:
    text, found = planned(recipe(1))
    assert found is None
    assert "one model" not in text


def test_the_law_that_is_shipped_is_complete() -> None:
    shipped = law._law()
    assert shipped["ways"].keys() == FITTED["ways"].keys()
    for way in shipped["ways"].values():
        assert way.keys() == set(ROUTINGS)
        assert all(len(of_way["slopes"]) == 4 and of_way["half_width"] > 0 for of_way in way.values())
    assert shipped["centre"].keys() == FITTED["centre"].keys()
    assert shipped["range"].keys() == FITTED["range"].keys()
    json.dumps(shipped, allow_nan=False)
