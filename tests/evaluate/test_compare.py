"""Two evaluations side by side: paired differences, their intervals, and what must not be compared."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from atoll.errors import AtollError
from atoll.evaluate import evaluate_run
from atoll.evaluate.compare import T_95, _next_of_prompt, differences, jackknife, likeness, open_measured, paired_half
from atoll.evaluate.pages.compare_page import compare_runs, lines, to_html
from atoll.manifest import SpaceSettings
from tests.evaluate.pages.test_report import Parsed
from tests.evaluate.test_run import SMALL, make_run

HOG = SpaceSettings(feature={"name": "hog", "bins": 2, "grid": 2})
SETTINGS = SMALL.model_copy(update={"spaces": (HOG,)})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_run(tmp_path_factory.mktemp("runs") / "<one>")
    evaluate_run(path, SETTINGS)
    return path


def test_a_model_does_not_differ_from_itself(run: Path) -> None:
    one = open_measured(str(run))
    assert one.title.endswith(":top-2")  # as the ensemble is routed
    for d in differences(one, open_measured(f"{run}:top-2")):
        assert d.difference == 0, d.name
        assert d.half in (0, None)
        assert not d.tells
    assert likeness(one, one)[0] == pytest.approx(1)


def test_the_denoising_error_is_paired_by_latent(run: Path) -> None:
    one, two = open_measured(f"{run}:top-1"), open_measured(f"{run}:monolith")
    found = {d.name: d for d in differences(one, two)}
    paired = (two.errors() - one.errors()).double().mean(1)
    error = found["denoising error"]
    assert error.difference == pytest.approx(float(paired.mean()))
    assert error.half == pytest.approx(1.96 * float(paired.std()) / math.sqrt(6))
    assert error.a == pytest.approx(one.score["denoising"]["mean"])
    backwards = {d.name: d for d in differences(two, one)}
    for name, d in found.items():
        if name != "images/s":
            assert backwards[name].difference == pytest.approx(-d.difference, abs=1e-9), name
            assert backwards[name].half == (None if d.half is None else pytest.approx(d.half, rel=1e-6)), name
    assert found[f"FD-HOG [{one.report['results']['spaces'][1]['sha256'][:8]}]"].half is not None


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    half = jackknife(lambda rows: {"mean": float(values[rows].mean())}, 40)["mean"]
    groups = values.reshape(2, 20).mean(0)  # image i is in group i % 20
    assert half == pytest.approx(T_95 * float(groups.std()) / math.sqrt(20))


def test_the_interval_of_paired_differences() -> None:
    assert paired_half(torch.ones(1)) is None
    assert paired_half(torch.tensor([1.0, 3.0])) == pytest.approx(1.96 * math.sqrt(2) / math.sqrt(2))


def test_other_noise_of_the_same_prompt() -> None:
    assert _next_of_prompt([0, 1, 0, 2, 0]).tolist() == [2, 2, 4, 4, 0]


def test_what_was_measured_on_other_things_is_refused(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    evaluate_run(other, SETTINGS.model_copy(update={"images": 11}))
    with pytest.raises(AtollError, match=r"measured on different things \(images 12 and 11\)"):
        differences(open_measured(str(run)), open_measured(str(other)))
    evaluate_run(other, SMALL)
    with pytest.raises(AtollError, match=r"measured on different things.*spaces"):
        differences(open_measured(str(run)), open_measured(str(other)))


def test_what_is_not_there_is_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(AtollError, match=r"report.json: not found; `atoll evaluate"):
        open_measured(str(tmp_path))
    with pytest.raises(AtollError, match="no variant 'best'; expected one of top-1, top-2"):
        open_measured(f"{run}:best")
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    shutil.rmtree(moved / "evaluation")
    with pytest.raises(AtollError, match="lacks what was measured of top-2"):
        open_measured(str(moved))
    (moved / "report.json").write_text(json.dumps({"results": {}}))
    with pytest.raises(AtollError, match="older version"):
        open_measured(str(moved))


def test_the_page_shows_both_and_escapes_their_names(run: Path, tmp_path: Path) -> None:
    found = compare_runs(f"{run}:top-1", f"{run}:monolith", tmp_path / "c.html")
    parsed = Parsed((tmp_path / "c.html").read_text())
    assert not parsed.all("script")
    assert [image["alt"] for image in parsed.all("img")].count("2 images of “red 3” by B") == 1
    assert len(parsed.all("img")) == 2 * 2
    assert "<one>:monolith" in parsed.text
    value = json.loads((tmp_path / "c.json").read_text())
    assert [d["name"] for d in value["differences"]] == [d.name for d in found]
    assert [line[0] for line in lines(found)] == [d.name for d in found]
    one = open_measured(f"{run}:0-eps-cosine")  # whose images the report does not show
    assert "no prompt in common" in to_html(one, one, found, (1.0, 0.0))
