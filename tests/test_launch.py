import io
import os
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from atoll.launch.local import Job, jobs_of, run_jobs
from atoll.launch.progress import LaunchView, seconds_left


def job(name, work=100.0, state="waiting", **metrics) -> Job:
    return Job(name, [], None, steps=10, work=work, state=state, metrics=metrics)  # type: ignore[arg-type]


def test_every_part_is_a_job_the_longest_first(run, manifest) -> None:
    jobs = jobs_of(run, manifest)
    assert {j.name for j in jobs} == {"0-eps-cosine", "1-flow-linear", "2-x0-linear-beta", "router", "monolith"}
    assert [j.work for j in jobs] == sorted((j.work for j in jobs), reverse=True)
    assert all("--resume" in j.arguments for j in jobs)


def test_never_more_than_the_slots_run(run, manifest) -> None:
    most = []
    done = run_jobs(jobs_of(run, manifest), 2, lambda jobs: most.append(sum(j.state == "running" for j in jobs)))
    assert {j.state for j in done} == {"done"}
    assert max(most) == 2


def test_ctrl_c_saves_and_stops_all_and_the_next_launch_goes_on(run) -> None:
    text = (run / "atoll.yaml").read_text().replace("steps: 8", "steps: 100000").replace("every: 3", "every: 100000")
    (run / "atoll.yaml").write_text(text)
    command = [sys.executable, "-m", "atoll", "launch", "--run", str(run), "--jobs", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    running = [run / "experts" / f".train-{name}" for name in ("0-eps-cosine", "1-flow-linear")]
    deadline = time.monotonic() + 60
    while not all((d / "metrics.jsonl").exists() and (d / "metrics.jsonl").stat().st_size for d in running):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    assert process.returncode != 0
    assert all((d / "checkpoint.safetensors").is_file() for d in running)
    for directory in running:
        assert "--resume goes on from there" in (directory / "output.log").read_text()
    left = subprocess.run(["pgrep", "-f", f"--run {run}"], capture_output=True, text=True).stdout.split()
    assert [pid for pid in left if int(pid) != os.getpid()] == []


def test_time_left_counts_what_waits() -> None:
    running = job("a", state="running", images_per_s=10.0, eta_s=4.0)
    assert seconds_left([running, job("b")], slots=1) == 14.0
    assert seconds_left([running, job("b")], slots=2) == 7.0
    assert seconds_left([job("b")], slots=1) is None
    assert seconds_left([job("a", state="done")], slots=1) == 0.0


@pytest.mark.parametrize("terminal", [True, False])
def test_the_view_tells_stage_step_loss_rate_and_time(terminal) -> None:
    text = io.StringIO()
    line = {"step": 4, "loss": 0.25, "images_per_s": 12.0, "eta_s": 65.0}
    jobs = [job("one", state="running", **line), job("two"), job("three", state="done", **line)]
    with LaunchView("training", 2, Console(file=text, force_terminal=terminal, width=120)) as view:
        view.update(jobs)
    shown = text.getvalue()
    for word in ("training", "one", "4/10", "0.2500", "12", "1:"):
        assert word in shown
