"""The drivers of docs/efficiency.md and docs/results.md, on glyphs of 8 x 8 pixels."""

import argparse
import sys
from pathlib import Path

import pytest
import torch

from atoll.manifest import TrainSettings
from atoll.objective import Objective

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
small = pytest.importorskip("small")
import efficiency_report  # noqa: E402
import map as map_  # noqa: E402
import map_report  # noqa: E402
import map_router  # noqa: E402
from efficiency_report import METRICS, to_target  # noqa: E402


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("small")


@pytest.fixture(autouse=True)
def demo_glyphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(small._SETS, "glyphs", {"source": "glyphs", "subset": "demo"})


def training(work: Path, steps: int, decay_from: float = 1.0) -> small.Training:
    data = small.load(work, "glyphs", 8, 2)
    settings = TrainSettings(optimizer="muon", steps=steps, batch=8, lr=1e-2, warmup=1, decay_from=decay_from)
    return small.Training(data, data.training(), small.network_config(data, 32, depth=1), settings, map_.FLOW, seed=3)


def test_a_branch_is_the_training_that_had_its_schedule_from_the_start(work: Path) -> None:
    whole = training(work, 6, decay_from=0.5)
    whole.run(6)
    trunk = training(work, 100)
    trunk.run(3)
    branch = trunk.branch(whole.settings)
    branch.run(6)
    trunk.run(5)  # the branch has left it as it was
    longer = training(work, 100)
    longer.run(5)
    for name, weight in whole.weights().items():
        assert torch.equal(weight, branch.weights()[name]), name
        assert torch.equal(longer.weights()[name], trunk.weights()[name]), name


def test_rows_of_training_are_never_measured(work: Path) -> None:
    data = small.load(work, "glyphs", 8, 2)
    trained, measured = set(data.training().tolist()), data.held_out().tolist()
    assert measured
    assert not trained & set(measured)
    assert sorted(data.held_out(0).tolist() + data.held_out(1).tolist()) == sorted(measured)
    # The same images for every clustering: a monolith and an ensemble are measured alike.
    one = small.load(work, "glyphs", 8, 1)
    assert torch.equal(one.x0[one.held_out()], data.x0[measured])


def test_the_error_is_that_of_the_velocity_for_every_objective(work: Path) -> None:
    """A zero output is the velocity 0 of a flow network, and the noise 0, so x/alpha as x0, of an eps network."""
    data = small.load(work, "glyphs", 8, 2)
    config = small.network_config(data, 32, depth=1)
    weights = {name: torch.zeros_like(w) for name, w in small.build_network(config).state_dict().items()}
    rows = data.held_out()[:20]
    for objective in (Objective("flow", "linear"), Objective("eps", "cosine")):
        for t, output, true in small.velocities(config, weights, objective, data, rows):
            x0 = data.x0[rows]
            eps = true + x0
            x = (1 - t) * x0 + t * eps
            expected = torch.zeros_like(x) if objective.prediction == "flow" else -x / (1 - t)
            torch.testing.assert_close(output, expected, atol=1e-3, rtol=1e-3)


def test_levels_are_drawn_by_their_density_and_weighed_back() -> None:
    density = (4.0, 0, 0, 0, 0, 1.0, 0, 0, 0, 0)
    plain, weighed = (small.Levelled(density, is_weighted=flag) for flag in (False, True))
    t = plain.sample_time(4000, torch.Generator().manual_seed(0))
    low = t < 0.1
    assert ((t >= 0.5) & (t < 0.6) | low).all()
    assert 0.75 < low.float().mean() < 0.85
    output, x0, eps = torch.ones(3, 4000, 1, 1, 1).unbind()
    total = weighed.loss(output * 2, x0, eps, t).mean() / plain.loss(output * 2, x0, eps, t).mean()
    # Two of ten levels, in equal parts, as uniform times would have drawn them.
    assert float(total) == pytest.approx(0.2, rel=0.05)


def test_the_map_trains_every_cell_once(work: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(map_, "IMAGES", {(32, 1): (1,)})
    argv = ["map.py", "run", str(work), "--sets", "glyphs", "--size", "8", "--seeds", "0", "--clusters", "2"]
    monkeypatch.setattr(sys, "argv", argv)
    map_.main()
    rows = small.Lines(work / "cells.jsonl").rows
    kinds = [(row["k"], row["share"], row["by_level"]) for row in rows.values()]
    assert kinds == [(1, 0.0, False), (2, 0.0, False), (2, 0.5, False), (2, 0.5, True)]
    assert len({row["flops"] for row in rows.values()}) == 1  # equal total FLOPs
    assert all(0 < row["error"] < 3 and len(row["levels"]) == 10 for row in rows.values())
    capsys.readouterr()
    map_.main()
    assert capsys.readouterr().out == ""  # nothing was left to do
    # Other batches and rates have as many FLOPs; the same ones have the same result.
    tried = {1: ((64, 8e-3), (32, 5e-3, 0.2)), 2: ((32, 8e-3),)}
    monkeypatch.setattr(map_, "TRIED", tried)
    monkeypatch.setattr(map_, "MONOLITH", {"batch": 64, "lr": 8e-3})
    monkeypatch.setattr(map_, "EXPERT", {"batch": 32, "lr": 8e-3})
    (work / "cells.jsonl").unlink()
    map_.main()
    rows = small.Lines(work / "cells.jsonl").rows
    monkeypatch.setattr(sys, "argv", ["map.py", "tune", *argv[2:], "1"])
    map_.main()
    experts, same, other = small.Lines(work / "tuning.jsonl").rows.values()
    assert (experts["error"], same["error"]) == (row_of(rows, 2, 0.5)["error"], row_of(rows, 1)["error"])
    assert (other["k"], other["flops"], other["decay_from"]) == (1, same["flops"], 0.2)
    assert other["error"] != same["error"]


def test_a_router_that_knows_the_cluster_gives_the_oracles_error(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the cells of the test before."""
    monkeypatch.setattr(sys, "argv", ["map_router.py", str(work)])
    data = small.load(work, "glyphs", 8, 2)
    known = torch.nn.functional.one_hot(data.cluster[data.held_out()], 2).float().log()
    monkeypatch.setattr(map_router, "trained_router", lambda *_: lambda x, t, pooled: known)
    map_router.main()
    cells, routed = (small.Lines(work / name).rows for name in ("cells.jsonl", "routed.jsonl"))
    assert sum(row["by_level"] for row in routed.values()) == 1
    assert len(routed) == 3
    for key, row in routed.items():
        assert row["accuracy"] == [1.0] * 10
        assert row["error"] == pytest.approx(cells[key]["error"], rel=1e-3)
        assert row["error_full"] == pytest.approx(row["error"], rel=1e-4)


def test_a_router_learns_the_clusters(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(map_router, "IMAGES", 4800)
    data = small.load(work, "glyphs", 8, 2)
    router = map_router.trained_router(data, 2, 32, 0)
    rows = data.held_out()
    with torch.no_grad():
        p = router(data.x0[rows], torch.full((len(rows),), 0.05), data.encoder.encode(data.tokens.index(rows)).pooled)
    labels = data.cluster[rows]
    largest = labels.bincount().max() / len(rows)
    assert (p.argmax(1) == labels).float().mean() > largest + 0.1


def row_of(rows: dict, k: int, share: float = 0.0) -> dict:
    """The cell of so many clusters that is not divided by level."""
    (row,) = [row for row in rows.values() if (row["k"], row["share"], row["by_level"]) == (k, share, False)]
    return row


def test_the_cost_of_a_target_lies_between_the_points_of_a_curve() -> None:
    points = [
        {"fraction": f, "error": e, "flops": c} for f, e, c in ((1 / 4, 3.0, 100.0), (1 / 2, 2.0, 200.0), (1, 1.0, 400))
    ]
    assert to_target(points, "error", 1.5, "flops") == pytest.approx(200 * 2**0.5)
    assert to_target(points, "error", 3.5, "flops") == 100  # an upper bound
    assert to_target(points, "error", 0.5, "flops") is None


def test_the_reports_of_the_curves(work: Path, capsys) -> None:
    lines = small.Lines(work / "curves.jsonl")
    for seed in (0, 1):
        for recipe, fractions in efficiency_report.LENGTHS.items():
            for fraction in fractions:
                value = (2.0 if recipe == "fast" else 6.0) * fraction**-0.5 + 0.01 * seed
                row = {"set": "emoji-32, monolith", "recipe": recipe, "fraction": fraction, "seed": seed}
                costs = {"flops": 1e12 * fraction, "seconds": 100 * fraction}
                lines.add(f"{recipe} {fraction} {seed}", {**row, **costs, **dict.fromkeys(METRICS, value)})
    capsys.readouterr()
    options = argparse.Namespace(out=work, file=work / "curves.svg")
    efficiency_report.curves(options)
    # At a sixth, 2 sqrt(6) = 4.9 is below the baseline's 6: the first point, an upper bound of the cost.
    cell = "6.00 (6.00 to 6.00); 6.00 (6.00 to 6.00)"
    assert capsys.readouterr().out.splitlines()[-1] == f"| emoji-32, monolith | {cell} | {cell} | {cell} |"
    efficiency_report.points(options)
    assert "| emoji-32, monolith | baseline | 1.00 | 2 | 6.005 (6 to 6.01) |" in capsys.readouterr().out
    efficiency_report.plot(options)
    assert (work / "curves.svg").read_text().count("<use ") >= 10


def test_the_reports_of_the_map(work: Path, capsys) -> None:
    lines, routed = (small.Lines(work / name) for name in ("cells.jsonl", "routed.jsonl"))
    distances = small.Lines(work / "distances.jsonl", "FD-MNv2")
    for seed, change in ((0, 0.97), (1, 0.99), (2, 0.98)):
        for cell, factor in (
            (map_.Cell("emoji", 16, 64, 2, seed, 1000, 1), 1.0),
            (map_.Cell("emoji", 16, 64, 2, seed, 1000, 4, 0.5, True), change),
        ):
            levels = [0.1 * factor] * 10
            lines.add(cell.key, map_.result(cell, levels, 1e12, 1.0))
            distances.add(cell.key, {"FD-MNv2": 10.0 / factor, "FD-Squeeze": 100.0})
            if cell.k > 1:
                routed.add(cell.key, {"error": 0.1, "error_full": 0.1 * factor, "levels_full": levels})
    capsys.readouterr()
    options = argparse.Namespace(out=work, file=work / "levels.svg")
    map_report.table(options)
    # Student's t of three seeds: 4.30 times the deviation over the root of three.
    text = capsys.readouterr().out
    label = "K = 4, common start, 50%, generalist at the fine end"
    better, same, worse = "0.098 (-2.0 ± 2.5 %)", "0.1 (+0.0 ± 0.0 %)", "10.2 (+2.0 ± 2.6 %)"
    assert f"| {label} | {better} | {same} | {better} | {worse} |" in text
    assert "3 seeds" in text
    map_report.plot(options)
    assert "generalist at the fine end" in (work / "levels.svg").read_text()
