"""`atoll plan` as a user meets it, and islands that can be checked by hand."""

import json
import shutil
from pathlib import Path

import pytest

from atoll.errors import AtollError
from atoll.plan import compare_run, measure_machine
from atoll.plan.measure_machine import Speed
from atoll.plan.recipe import Text, parse_text
from atoll.storage.artifact import read_json, write_json

DAY_MISMATCH = 0.01  # the recipe's steps are rounded: 71.95 A100-days, not 72


def test_hddm_on_the_command_line(atoll, tmp_path) -> None:
    out = tmp_path / "plan.json"
    code, text, _ = atoll("plan", "hddm-xl2-laion", "--gpu", "a100", "--images", 11_000_000, "--json", out)
    assert code == 0
    assert read_json(out)["machines"][0]["total_gpu_days"] == pytest.approx(72, rel=DAY_MISMATCH)
    (row,) = [line.split() for line in text.splitlines() if line.startswith("a100 ")]
    assert row[:7] == ["a100", "80", "GB", "312", "0.40", "144", "9"]
    assert "605.7 M" in text
    assert "11.4 GB" in text


@pytest.mark.parametrize("recipe", ["hddm-xl2-laion", "demo", "eurosat"])
def test_it_fits_80_columns(atoll, tmp_path, recipe) -> None:
    """Nothing is cut off, and no word or number is broken."""
    islands = tmp_path / "islands.yaml"
    islands.write_text("- {name: anna-in-the-attic, gpu: 4090, hours_per_day: 12}\n- {name: lab, gpu: a100, gpus: 4}\n")
    code, text, error = atoll("plan", recipe, "--islands", islands, "--trials", 3)
    assert code == 0, error
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    assert "…" not in text
    assert "anna-in-the-attic " in text
    batches = text.partition("Largest batch")[2].partition("Time and price")[0]
    assert "compile, full checkpointing, 8bit state, EMA on CPU " in batches


def test_experts_of_many_kinds_stand_in_several_tables(atoll, tmp_path) -> None:
    kinds = "\n".join(
        f"  - {{cluster: {k}, objective: {{prediction: flow, schedule: linear}}, train: {{steps: {100 + k}}}}}"
        for k in range(5)
    )
    recipe = tmp_path / "many.yaml"
    recipe.write_text(f"name: many\nclusters: {{k: 5}}\nexperts:\n{kinds}\n")
    code, text, _ = atoll("plan", recipe)
    assert code == 0
    assert text.count("many: the networks") == 2
    assert text.count("router") == 2  # the last networks' table, and the table of times
    assert all(f"{k}-flow-linear" in text and str(100 + k) in text for k in range(5))


@pytest.mark.parametrize(
    ("islands", "days"),
    [
        ("- {name: a, gpu: a100}", 72.0),  # one after the other
        ("- {name: a, gpu: a100}\n- {name: b, gpu: a100}", 36.0),  # four each
        ("- {name: a, gpu: a100, gpus: 8}", 9.0),
        ("- {name: a, gpu: a100, mfu: 0.2}", 144.0),
        # A 4090 does 165.2 x 0.45 where an A100 does 312 x 0.40: an expert takes it 15.1 days, the A100 nine. The fifth
        # and last one of the A100 ends on day 45, the third of the 4090 on day 45.3.
        ("- {name: a, gpu: a100}\n- {name: b, gpu: 4090}", 9 * 3 * 312 * 0.40 / (165.2 * 0.45)),
    ],
)
def test_islands_by_hand(atoll, tmp_path, islands, days) -> None:
    """Eight experts of nine A100-days each, machines that never fail."""
    file, out = tmp_path / "islands.yaml", tmp_path / "plan.json"
    file.write_text(islands)
    code, _, error = atoll("plan", "hddm-xl2-laion", "--islands", file, "--trials", 2, "--json", out)
    assert code == 0, error
    simulation = json.loads(out.read_text())["simulation"]
    assert simulation["median_days"] == pytest.approx(days, rel=DAY_MISMATCH)
    assert simulation["median_days"] == simulation["p90_days"]
    assert simulation["lost"] == simulation["failures"] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], "no recipe 'nothing'"),
        (["demo", "--gpu", "a41"], "no GPU 'a41'"),
        (["demo", "--mfu", "2"], "--mfu 2"),
        (["demo", "--images", "0"], "--images 0"),
        (["demo", "--islands", "none.yaml"], "none.yaml"),
        (["demo", "--text", "wide"], "--text 'wide'"),
        (["demo", "--compare"], "no trained expert"),
        (["demo", "--compare", "--gpu", "a100"], "--compare measures this machine"),
        (["hddm-xl2-laion", "--gpu", "4GB"], "more than 4GB has"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(atoll, tmp_path, monkeypatch, arguments, words) -> None:
    monkeypatch.chdir(tmp_path)
    code, text, error = atoll("plan", *arguments, "--json", "plan.json")
    assert code == 2
    assert text == ""
    assert len(error.strip().splitlines()) == 1
    assert error.startswith("atoll: ")
    assert words in error
    assert not list(tmp_path.iterdir())


def test_a_runs_experts_against_their_plan(atoll, trained_run, monkeypatch, tmp_path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained_run / "experts", run / "experts")
    for file in run.glob("experts/*/card.json"):  # trained in too little time to be told
        card = read_json(file)
        card["training"]["seconds"] = 2.0
        write_json(file, card)
    measured: list[tuple[object, ...]] = []

    def speed(*arguments: object) -> Speed:
        measured.append(arguments)
        return Speed(flops=1e9, mfu=0.5)

    monkeypatch.setattr(measure_machine, "speed_here", speed)
    found = compare_run(run)
    assert [c.name for c in found] == ["0-eps-cosine", "1-flow-linear", "2-x0-linear-beta"]
    assert [arguments[1:] for arguments in measured] == [(6, 1, "fp32")]  # three equal ones: measured once
    assert all(c.images == 8 * 6 and c.measured_seconds == 2 for c in found)
    code, text, _ = atoll("plan", run, "--compare", "--json", tmp_path / "c.json")
    assert code == 0
    assert text.count("measured / predicted") == 3
    assert read_json(tmp_path / "c.json")[0]["ratio"] == pytest.approx(found[0].ratio)


def test_what_a_caption_is_told_to_be() -> None:
    assert parse_text("77x768") == Text(77, 768, None)
    assert parse_text("77x768x512") == Text(77, 768, 512)
    for wrong in ("77", "x768", "77x0", "77x768x", "-1x2", "77 x 768"):
        with pytest.raises(AtollError, match="--text"):
            parse_text(wrong)


def test_a_run_as_a_path(atoll, trained_run) -> None:
    assert Path(trained_run).is_dir()
    code, text, _ = atoll("plan", trained_run, "--gpu", "24GB")
    assert code == 0
    assert "Data: 60 images" in text


def test_short_trainings_are_told_in_hours_or_minutes(atoll, tmp_path) -> None:
    assert "in GPU-days" in atoll("plan", "hddm-xl2-laion", "--gpu", "a100")[1]
    small = atoll("plan", "demo", "--gpu", "a100")[1]
    assert "in GPU-minutes" in small
    assert "e+" not in small
    assert "e-0" not in small
    assert "narrower than 512" in small
