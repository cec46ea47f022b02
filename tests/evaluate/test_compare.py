"""Two evaluations side by side: paired differences, their intervals, and refused comparisons."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from atoll.errors import AtollError
from atoll.evaluate import evaluate_run
from atoll.evaluate.compare import (
    T_95,
    _next_of_prompt,
    differences,
    jackknife,
    likeness,
    open_evaluated,
    paired_half_width,
)
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
    one = open_evaluated(str(run))
    assert one.title.endswith(":top-2")  # the ensemble's own routing
    for d in differences(one, open_evaluated(f"{run}:top-2")):
        assert d.difference == 0, d.name
        assert d.half_width in (0, None)
        assert not d.significant
    assert likeness(one, one)[0] == pytest.approx(1)


def test_the_denoising_error_is_paired_by_latent(run: Path) -> None:
    one, two = open_evaluated(f"{run}:top-1"), open_evaluated(f"{run}:monolith")
    by_name = {d.name: d for d in differences(one, two)}
    paired = (two.errors() - one.errors()).double().mean(1)
    error = by_name["denoising error"]
    assert error.difference == pytest.approx(float(paired.mean()))
    assert error.half_width == pytest.approx(1.96 * float(paired.std()) / math.sqrt(6))
    assert error.a == pytest.approx(one.score["denoising"]["mean"])
    backwards = {d.name: d for d in differences(two, one)}
    for name, d in by_name.items():
        if name != "images/s":
            assert backwards[name].difference == pytest.approx(-d.difference, abs=1e-9), name
            assert backwards[name].half_width == (
                None if d.half_width is None else pytest.approx(d.half_width, rel=1e-6)
            ), name
    assert by_name[f"FD-HOG [{one.report['results']['spaces'][1]['sha256'][:8]}]"].half_width is not None


def test_the_jackknife_of_a_mean_gives_its_standard_error() -> None:
    values = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    half = jackknife(lambda rows: {"mean": float(values[rows].mean())}, 40)["mean"]
    groups = values.reshape(2, 20).mean(0)  # image i is in group i % 20
    assert half == pytest.approx(T_95 * float(groups.std()) / math.sqrt(20))


def test_the_interval_of_paired_differences_in_closed_form() -> None:
    assert paired_half_width(torch.ones(1)) is None
    assert paired_half_width(torch.tensor([1.0, 3.0])) == pytest.approx(1.96 * math.sqrt(2) / math.sqrt(2))


def test_an_image_is_paired_with_the_next_of_its_prompt() -> None:
    assert _next_of_prompt([0, 1, 0, 2, 0]).tolist() == [2, 2, 4, 4, 0]


def test_variants_measured_on_different_data_are_refused(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    evaluate_run(other, SETTINGS.model_copy(update={"images": 11}))
    with pytest.raises(AtollError, match=r"measured on different data \(images 12 and 11\)"):
        differences(open_evaluated(str(run)), open_evaluated(str(other)))
    evaluate_run(other, SMALL)
    with pytest.raises(AtollError, match=r"measured on different data.*spaces"):
        differences(open_evaluated(str(run)), open_evaluated(str(other)))


def test_a_missing_report_variant_or_cache_is_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(AtollError, match=r"report.json: not found; run `atoll evaluate"):
        open_evaluated(str(tmp_path))
    with pytest.raises(AtollError, match="no variant 'best'; expected one of top-1, top-2"):
        open_evaluated(f"{run}:best")
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    shutil.rmtree(moved / "evaluation")
    with pytest.raises(AtollError, match="no cached results for top-2"):
        open_evaluated(str(moved))
    (moved / "report.json").write_text(json.dumps({"results": {}}))
    with pytest.raises(AtollError, match="older version"):
        open_evaluated(str(moved))


def test_the_page_shows_both_variants_and_escapes_their_names(run: Path, tmp_path: Path) -> None:
    numbers = compare_runs(f"{run}:top-1", f"{run}:monolith", tmp_path / "c.html")
    parsed = Parsed((tmp_path / "c.html").read_text())
    assert not parsed.all("script")
    assert [image["alt"] for image in parsed.all("img")].count("2 images of “red 3” by B") == 1
    assert len(parsed.all("img")) == 2 * 2
    assert "<one>:monolith" in parsed.text
    value = json.loads((tmp_path / "c.json").read_text())
    assert [d["name"] for d in value["differences"]] == [d.name for d in numbers]
    assert [line[0] for line in lines(numbers)] == [d.name for d in numbers]
    one = open_evaluated(f"{run}:0-eps-cosine")  # the report does not show its images
    assert "no prompt in common" in to_html(one, one, numbers, (1.0, 0.0))


@pytest.mark.parametrize(
    "report",
    [[], 1, "x", {"results": []}, {"results": {"bench": 1}}, {"results": {"bench": "a", "scores": [1]}, "store": 1}],
)
def test_a_file_that_is_no_report_is_one_line(tmp_path, report) -> None:
    (tmp_path / "report.json").write_text(json.dumps(report))
    with pytest.raises(AtollError, match=r"report\.json: (is no report|written by an older version)"):
        open_evaluated(str(tmp_path))


@pytest.mark.parametrize("key", ["../../elsewhere", "/tmp", "0" * 15, "0" * 16 + "/.."])
def test_a_report_does_not_lead_out_of_the_cache(run: Path, tmp_path: Path, key: str) -> None:
    report = json.loads((run / "report.json").read_text())
    report["results"]["scores"][0]["key"] = key
    (tmp_path / "report.json").write_text(json.dumps(report))
    name = report["results"]["scores"][0]["name"]
    with pytest.raises(AtollError, match="is no key of a cached result"):
        open_evaluated(f"{tmp_path}:{name}")
