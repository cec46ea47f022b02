"""examples/tour.py runs, and its numbers are what the text beside its images claims."""

import json

import pytest
from PIL import Image


@pytest.fixture(scope="module")
def directory(example, tmp_path_factory):
    path = tmp_path_factory.mktemp("tour")
    tour = example("tour")
    tour.tour(path, tour.SMALL)
    return path


@pytest.fixture(scope="module")
def numbers(directory) -> dict[str, float]:
    return json.loads((directory / "numbers.json").read_text())


def named(numbers: dict[str, float], start: str) -> dict[str, float]:
    chosen = {name.removeprefix(start): value for name, value in numbers.items() if name.startswith(start)}
    assert chosen, f"no number begins with {start!r}: {sorted(numbers)}"
    return chosen


@pytest.mark.parametrize(
    "name", ["schedules", "alignment", "calibration", "fusion-1", "fusion-2", "fusion-3", "samples"]
)
def test_every_image_shows_something(directory, name) -> None:
    with Image.open(directory / f"{name}.png") as image:
        colours = image.convert("RGB").getcolors(1 << 20)
    assert len(colours) > 20


def test_the_fused_velocity_is_the_exact_one(numbers) -> None:
    errors = named(numbers, "fusion: largest error")
    assert len(errors) == 3
    assert max(errors.values()) < 1e-6


def test_snr_alignment_is_exact_for_every_objective(numbers) -> None:
    errors = named(numbers, "snr: largest relative error of ")
    assert len(errors) == 4
    assert max(errors.values()) < 1e-6


def test_native_alignment_is_exact_for_linear_flow_alone(numbers) -> None:
    errors = named(numbers, "native: largest relative error of ")
    assert errors.pop("flow, linear") == 0
    assert min(errors.values()) > 0.5


def test_the_linear_path_is_aligned_with_itself(numbers) -> None:
    taus = named(numbers, "tau of ")
    assert taus["linear at t = 0.35"] == pytest.approx(0.35)
    assert taus["linear-beta at t = 0.35"] < taus["cosine at t = 0.35"] < 0.35


def test_calibration_repairs_noisy_eps_experts(numbers) -> None:
    distances = named(numbers, "calibration: ")
    assert distances["distance after"] < 0.1 * distances["distance before"]
    assert distances["distance after"] < 3 * distances["floor"]


def test_samples_by_exact_alignment_reach_the_floor(numbers) -> None:
    distances = named(numbers, "samples: ")
    assert distances["distance of fused, snr"] < 1.5 * distances["floor"]
    assert distances["distance of fused, snr"] < distances["distance of fused, native"]
