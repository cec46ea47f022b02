"""Two launches of one run at once: they share its parts, say who trains what, and both end well."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from atoll.launch.job import Process, holder_of
from atoll.launch.local import Local
from atoll.launch.loop import TrackedJob, run_jobs
from tests.launch.stub import DONE, UNTIL_STOPPED, job
from tests.waiting import communicate, wait_until

# Waits for the file `go` beside its directory, then makes the result.
UNTIL_GO = """
    import pathlib, sys, time
    result = pathlib.Path(sys.argv[1])
    print("ready", flush=True)
    while not (result.parents[1] / "go").exists():
        time.sleep(0.02)
    result.touch()
"""
_LAUNCH = f"""
import pathlib, sys
from rich.console import Console
from atoll.launch.local import Local
from atoll.launch.loop import run_jobs
from atoll.launch.progress import LaunchView
from tests.launch.stub import job
code = '''{UNTIL_GO}'''
jobs = [job(pathlib.Path(sys.argv[1]), name, code) for name in "ab"]
with LaunchView("stubs", 1, Console(width=200)) as view:
    parts = run_jobs(jobs, Local(1), view.update, interval=0.05)
sys.exit(any(part.state != "done" for part in parts))
"""


def launch(directory: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", _LAUNCH, str(directory)], stdout=subprocess.PIPE, text=True)


def ready(directory: Path, name: str) -> bool:
    output = directory / name / "output.log"
    return output.exists() and "ready" in output.read_text()


def test_two_launches_share_the_parts_and_both_end_well(tmp_path) -> None:
    first = launch(tmp_path)
    wait_until(lambda: ready(tmp_path, "a"), process=first)
    second = launch(tmp_path)
    # The second one takes the part that nobody trains.
    wait_until(lambda: ready(tmp_path, "b"), process=second)
    (tmp_path / "go").touch()
    for process in (first, second):
        output, _ = communicate(process)
        assert process.returncode == 0, output
        assert "stubs: 2 of 2 done" in output
    assert re.search(r"^a is trained by another launch \(process \d+ on \S+\)$", output, re.MULTILINE), output


def test_a_part_is_taken_over_when_the_other_launch_stops(tmp_path) -> None:
    other = Process(job(tmp_path, "a", UNTIL_STOPPED))
    wait_until(lambda: ready(tmp_path, "a"))
    mine, states = job(tmp_path, "a", DONE), []
    assert re.fullmatch(r"process \d+ on \S+", holder_of(mine))

    def update(parts: list[TrackedJob]) -> None:
        states.append(parts[0].state)
        if parts[0].state == "elsewhere":
            other.stop()
            other.poll()

    (part,) = run_jobs([mine], Local(1), update, interval=0.02)
    assert (part.state, part.restarts, part.error) == ("done", 0, "")
    assert "elsewhere" in states
    assert holder_of(mine) == ""


@pytest.mark.slow
def test_two_real_launches_train_a_run_once(run) -> None:
    command = [sys.executable, "-m", "atoll", "launch", str(run), "--jobs", "1"]
    launches = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [communicate(process)[1] for process in launches]
    assert [process.returncode for process in launches] == [0, 0], errors
    assert all("5 of 5 done" in error for error in errors)
    assert "is trained by another launch (process" in "".join(errors)
