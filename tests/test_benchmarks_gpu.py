"""benchmarks/gpu.py on a CPU: every part that can run there does, and what it writes is whole, finite and readable."""

import importlib
import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atoll.train.island import Island
from atoll.train.loop import train
from atoll.train.plans import TrainingMarks

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
NAMES = (
    "gpu",
    "networks",
    "step",
    "gpu_batch",
    "gpu_correct",
    "gpu_measure",
    "gpu_sampling",
    "gpu_table",
    "gpu_training",
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def modules() -> Iterator[SimpleNamespace]:
    """The benchmark's files, which find each other as scripts of one directory do."""
    pytest.importorskip("diffusers")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in NAMES})


@pytest.fixture(scope="module")
def told(modules, tmp_path_factory) -> dict[str, Any]:
    """The report of a whole tiny run."""
    file = tmp_path_factory.mktemp("gpu") / "gpu.json"
    assert modules.gpu.main(["--device", "cpu", "--tiny", "--rounds", "1", "--json", str(file)]) == 0
    return json.loads(file.read_text())


@pytest.fixture
def bench(modules, tmp_path):
    """A benchmark that has begun and has no results yet, of sizes for a GPU and with no time left."""
    return modules.gpu_measure.Evaluator(CPU, False, False, 1, time.monotonic(), tmp_path / "gpu.json")


def numbers_in(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from numbers_in(inner)
    elif isinstance(value, int | float):
        yield value


def test_every_part_reports_finite_numbers_under_its_keys(told, modules) -> None:
    assert list(told["parts"]) == list(modules.gpu.PARTS)
    assert {"date", "torch", "command", "device", "tiny", "rounds"} <= told.keys()
    assert all(map(math.isfinite, numbers_in(told)))
    assert not any("error" in part for part in told["parts"].values())
    ceiling = told["parts"]["ceiling"]
    assert ceiling["tflops"] == max(rate for name, rate in ceiling["products"].items() if "^3" in name)
    assert {name.split()[1] for name in ceiling["products"] if " " in name} == {"qkv", "out", "up", "down"}
    for network in ("tiny", "mmdit tiny", "dual tiny"):
        training = told["parts"]["training"][network]
        assert training["variants"].keys() == {"atoll", "diffusers"}
        for row in training["variants"].values():
            assert row["images_per_second"] == pytest.approx(training["batch"] / row["step_seconds"])
            assert row["tflops"] * 1e12 == pytest.approx(row["images_per_second"] * training["flops_per_image"])
            assert row["of_ceiling"] == pytest.approx(row["tflops"] / training["ceiling_tflops"])
            assert row["mfu"] is None  # a CPU has no data sheet here
        assert training["variants"]["diffusers"]["over_diffusers"] == 1
        assert training["variants"]["atoll"]["over_diffusers"] > 0
    sampling = told["parts"]["sampling"]
    rows = {name: row for name, row in sampling.items() if isinstance(row, dict)}
    kinds = ("top-1, batch 3", "top-2, batch 3", "full, batch 3", "top-1, batch 1")
    offloaded = {"top-1, batch 3, offloaded", "top-1, batch 1, offloaded"}
    assert rows.keys() == {f"{kind}, eager" for kind in kinds} | offloaded
    assert rows["full, batch 3, eager"]["images_per_second"] == pytest.approx(
        3 / rows["full, batch 3, eager"]["seconds"]
    )


def test_the_checks_hold_on_a_cpu_and_can_tell(told) -> None:
    checks = {name: found for name, found in told["parts"]["correct"].items() if isinstance(found, dict)}
    assert len(checks) == 4
    assert all(found["holds"] for found in checks.values())
    assert checks["bf16 against fp32 on the CPU"]["distance"] > 0  # bf16 was computed in
    assert checks["resumed training against unbroken"]["resumed_difference"] == 0


def test_what_needs_cuda_says_so_in_one_line(told, modules, capsys) -> None:
    needs = told["parts"]["batch"]["needs"]
    assert "CUDA" in needs
    assert "\n" not in needs
    assert needs in modules.gpu.table(told)
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit) as stopped:
            modules.gpu.main(["--parts", "batch"])
        assert stopped.value.code == 2
        assert "no CUDA device here; --device cpu --tiny" in capsys.readouterr().err.splitlines()[-1]


def test_the_table_is_markdown_and_says_that_tiny_numbers_mean_nothing(told, modules, tmp_path, capsys) -> None:
    (tmp_path / "told.json").write_text(json.dumps(told))
    assert modules.gpu.main(["--table", str(tmp_path / "told.json")]) == 0
    printed = capsys.readouterr().out
    assert "say nothing about a GPU" in printed
    rows = [line for line in printed.splitlines() if line.startswith("|")]
    assert [row for row in rows if row.startswith("| tiny, batch 3 | atoll |")]
    assert [row for row in rows if row.startswith("| top-2, batch 3, eager |")]
    for _, block in groupby(printed.splitlines(), key=lambda line: line.startswith("|") and line.count("|")):
        lines = list(block)
        assert not lines[0].startswith("|") or set(lines[1]) == set("|- ")  # of equal width from the head on
    assert "None" not in printed


def test_the_table_of_a_gpu_has_what_a_cpu_cannot_fill(modules) -> None:
    search = {"predicted": 24, "found": 25, "too_large": 26, "tries": [], "ended": ["stopped after 90 s"]}
    row = {
        "images_per_second": 2.0,
        "of_ceiling": 0.5,
        "mfu": 0.4,
        "over_diffusers": 1.5,
        "over_diffusers-compiled": 1.1,
    }
    check = {"resumed_difference": 1e-7, "repeated_difference": 1e-7, "holds": None}
    parts = {
        "training": {"XL/2": {"batch": 80, "variants": {"atoll-compiled": row}}, "left_out": ["XL/2 alone: why"]},
        "correct": {"resumed": check, "error": "RuntimeError: does not hold: bf16"},
        "batch": {"XL/2 in 24 GB": search, "part_seconds": 1.0},
    }
    about = {"device": "some GPU", "memory_gb": 80.0, "torch": "2", "date": "2026-11-21", "command": "c", "tiny": False}
    printed = modules.gpu.table({**about, "parts": parts})
    assert "| XL/2, batch 80 | atoll-compiled | 2 | 1.50 | 1.10 | 50% | 40% |" in printed
    assert "| XL/2 in 24 GB | 24 | 25 | 26 | stopped after 90 s |" in printed
    assert "cannot be told" in printed
    assert "Not done: XL/2 alone: why." in printed
    assert "Failed: RuntimeError: does not hold: bf16." in printed
    assert "some GPU, 80 GB" in printed


@pytest.mark.parametrize("network", ["dit", "mmdit", "dual"])
def test_a_step_is_the_loops_own(network, modules, tmp_path) -> None:
    """Two steps here leave the averaged weights that two of atoll.train's loop do, bit for bit."""
    training = modules.gpu_training

    class SameBatch(training.RandomBatch):
        def batch(self, index: int, local_rows: slice) -> Any:
            return super().batch(0, local_rows)

    def new() -> torch.nn.Module:
        torch.manual_seed(0)
        return training.build("atoll", "tiny", CPU, network)

    here = training.Training(new(), 3, CPU)
    for _ in range(2):
        here.step(compiled=False)
    task = SameBatch(new(), 3)
    options = {"steps": 2, "track": "none", "validate_every": 0, "threads": torch.get_num_threads()}
    settings = here.settings.model_copy(update=options)
    train(task, settings, tmp_path, TrainingMarks({"name": "mark"}, settings), Island(0, 1, CPU))
    trained = list(task.module.parameters())
    assert all(torch.equal(a, b) for a, b in zip(here.state.ema, trained, strict=True))
    before = new().parameters()
    assert any(not torch.equal(a, b) for a, b in zip(here.state.parameters, before, strict=True))


@pytest.mark.parametrize("kind", ["atoll", "diffusers"])
@pytest.mark.parametrize("network", ["dit", "mmdit", "dual"])
def test_the_eager_and_the_compiled_module_are_one_network(network, kind, modules) -> None:
    training = modules.gpu_training.Training(modules.gpu_training.build(kind, "tiny", CPU, network), 3, CPU)
    for a, b in zip(training.eager.parameters(), training.compiled.parameters(), strict=True):
        assert a is b
    blocks = list(zip(training.eager.blocks, training.compiled.blocks, strict=True))
    assert all(a is not b for a, b in blocks)
    assert all(a._compiled_call_impl is None and b._compiled_call_impl is not None for a, b in blocks)


def test_a_step_is_compared_for_every_network(modules, tmp_path) -> None:
    file = tmp_path / "step.json"
    options = ["--size", "tiny", "--rounds", "1", "--batch", "2", "--precisions", "bf16", "--modes", "forward"]
    modules.step.main([*options, "--networks", "dit,mmdit,dual", "--json", str(file)])
    rows = json.loads(file.read_text())["results"]
    assert [(row["network"], row["variant"]) for row in rows] == [
        (network, variant) for network in ("dit", "mmdit", "dual") for variant in ("atoll", "diffusers")
    ]
    assert all(math.isfinite(value) and value > 0 for value in numbers_in(rows))


def test_experts_under_a_budget_draw_the_same_and_do_not_all_fit(modules) -> None:
    sampling = modules.gpu_sampling
    torch.manual_seed(0)
    ensemble = sampling.build_ensemble("tiny", "tiny", CPU)
    x, t = torch.randn(16, *sampling.LATENT), torch.full((16,), 0.6)
    condition = sampling.prompts_of(16, CPU)
    expected = ensemble.velocity(x, t, condition, 7.5)
    held = sampling.under_budget(ensemble, sampling.TINY_BUDGET, CPU)
    assert torch.equal(held.velocity(x, t, condition, 7.5), expected)
    store = held.experts[0].network.cache
    assert len(store.resident) == 4
    assert store.loads == 8


def test_prompts_are_spread_two_per_expert(modules) -> None:
    sampling = modules.gpu_sampling
    chosen = sampling.spread(sampling.PROMPTS).argmax(1)
    assert torch.bincount(chosen, minlength=sampling.EXPERTS).tolist() == [2] * sampling.EXPERTS


@given(limit=st.integers(0, 500), start=st.integers(1, 500), grain=st.integers(1, 16))
def test_the_search_finds_the_largest_batch_to_its_grain(modules, limit, start, grain) -> None:
    asked: list[int] = []

    def fits(batch: int) -> bool:
        asked.append(batch)
        return batch <= limit

    low, high = modules.gpu_batch.search(fits, start, grain)
    assert low <= limit < high
    assert high - low <= grain
    assert min(asked) >= 1
    assert len(asked) < 40
    assert asked[0] == start


def test_the_search_begins_at_what_the_plan_says(modules) -> None:
    assert modules.gpu_batch.predicted("XL/2", 24, "none") == 24  # as measured elsewhere: see atoll/plan/fit.py
    assert modules.gpu_batch.predicted("XL/2", 48, "none") == 84


def test_a_search_that_is_cut_short_keeps_its_tries(modules, monkeypatch) -> None:
    lines = [{"batch": 24, "fits": True, "peak_gb": 23.0}, {"batch": 28, "fits": False, "peak_gb": 23.4}]
    output = "a warning\n" + "".join(json.dumps(line) + "\n" for line in lines) + '{"batch": 2'

    def slow(*arguments: Any, **options: Any) -> None:
        raise subprocess.TimeoutExpired("python", 5, output=output.encode())

    monkeypatch.setattr(modules.gpu_batch.subprocess, "run", slow)
    found = modules.gpu_batch.searched(24, "none", 5)
    assert (found["found"], found["too_large"], found["predicted"]) == (24, 28, 24)
    assert found["ended"] == ["stopped after 5 s"]
    assert found["tries"] == lines


def test_a_result_is_on_the_disk_before_the_next_one_is_begun(modules, bench, monkeypatch) -> None:
    def stopped(bench: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(modules.gpu.PARTS, "ceiling", lambda bench: bench.keep("ceiling", {"tflops": 1.0}))
    monkeypatch.setitem(modules.gpu.PARTS, "training", stopped)
    with pytest.raises(KeyboardInterrupt):
        modules.gpu.run(bench, ["ceiling", "training"])
    assert json.loads(bench.file.read_text())["parts"]["ceiling"]["tflops"] == 1.0


def test_a_part_that_fails_is_noted_and_the_others_go_on(modules, bench, monkeypatch) -> None:
    def broken(bench: Any) -> None:
        raise ValueError("no such kernel\nand more")

    monkeypatch.setitem(modules.gpu.PARTS, "ceiling", broken)
    assert modules.gpu.run(bench, ["ceiling", "batch"]) == 1
    parts = json.loads(bench.file.read_text())["parts"]
    assert parts["ceiling"]["error"] == "ValueError: no such kernel"
    assert "needs" in parts["batch"]


def test_what_there_is_no_time_for_is_left_out_and_named(modules, bench) -> None:
    assert not bench.has_time(60, "training", "B/2")
    assert not bench.has_time(120, "training", "XL/2")
    notes = bench.report["parts"]["training"]["left_out"]
    assert [note.split(":")[0] for note in notes] == ["B/2", "XL/2"]
    assert "--minutes" in notes[0]
    modules.gpu_sampling.sampling(bench)  # builds nothing
    assert not any(isinstance(row, dict) for row in bench.report["parts"]["sampling"].values())
    assert len(bench.report["parts"]["sampling"]["left_out"]) == 6


def test_a_check_that_does_not_hold_fails_its_part(modules, monkeypatch, bench) -> None:
    monkeypatch.setattr(modules.gpu_correct, "BF16", 0.0)
    with pytest.raises(RuntimeError, match="bf16 against fp32"):
        modules.gpu_correct.correct(bench)
    assert bench.report["parts"]["correct"]["bf16 against fp32 on the CPU"]["holds"] is False


def test_the_time_of_a_call_is_the_mean_of_its_repeats(modules) -> None:
    calls: list[int] = []
    seconds, first = modules.gpu_measure.interleaved({"a": lambda: calls.append(1)}, CPU, rounds=3, repeats=4)
    assert len(calls) == 2 + 3 * 4
    assert len(seconds["a"]) == 3
    assert first["a"] >= 0


def test_parts_run_in_the_order_of_their_value(modules) -> None:
    assert modules.gpu.listed("batch,ceiling") == ["ceiling", "batch"]
    with pytest.raises(modules.gpu.argparse.ArgumentTypeError, match="unknown: speed"):
        modules.gpu.listed("speed,ceiling")


def test_the_files_are_scripts_beside_each_other(modules) -> None:
    assert all(sys.modules[name].__file__ == str(BENCHMARKS / f"{name}.py") for name in NAMES)
