"""The launch loop, with a scripted backend and with real processes that train nothing."""

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from atoll.errors import AtollError
from atoll.launch.backend import Status
from atoll.launch.job import ExitStatus, Job
from atoll.launch.local import Local
from atoll.launch.loop import TrackedJob, run_jobs
from tests.launch.stub import DONE, UNTIL_STOPPED, crashes, job, starts


class ScriptedBackend:
    """A backend whose jobs end, at each start, as `ends` says; "result" makes the result and exits with 0."""

    slots: int | None = None
    gpus = 0
    survives_launch = False

    def __init__(self, ends: dict[str, list[ExitStatus | str]], requeued: int = 0):
        self.requeued = requeued  # restarts of each job by the backend
        self.ends: dict[str, Iterator[ExitStatus | str]] = {name: iter(each) for name, each in ends.items()}
        self.submitted: list[str] = []

    def submit(self, job: Job) -> "ScriptedBackend.One":
        self.submitted.append(job.name)
        end = next(self.ends[job.name])
        if end == "refused":
            raise AtollError("the queue is full")
        return ScriptedBackend.One(job, end, self.requeued)

    class One:
        def __init__(self, job: Job, end: ExitStatus | str, requeued: int):
            self.job, self.end, self.requeued = job, end, requeued

        def poll(self) -> Status:
            if isinstance(self.end, ExitStatus):
                return Status(True, self.end, restarts=self.requeued)
            self.job.result.parent.mkdir(parents=True, exist_ok=True)
            self.job.result.touch()
            return Status(True, ExitStatus(0, ""), restarts=self.requeued)

        def stop(self) -> None:
            raise AssertionError("nothing is to be stopped")


def run_scripted(
    tmp_path: Path, ends: dict[str, list[ExitStatus | str]], retries: int = 3
) -> tuple[dict[str, TrackedJob], list[str]]:
    backend = ScriptedBackend(ends)
    jobs = [job(tmp_path, name) for name in ends]
    parts = run_jobs(jobs, backend, lambda parts: None, retries=retries, interval=0.0, pause=0.0)
    return {part.job.name: part for part in parts}, backend.submitted


def test_user_error_is_not_retried_and_others_finish(tmp_path) -> None:
    user_error = ExitStatus(2, "atoll: no shards")
    parts, submitted = run_scripted(tmp_path, {"a": [user_error], "b": ["result"], "c": ["refused"]})
    assert (parts["a"].state, parts["a"].error, parts["a"].restarts) == ("failed", "atoll: no shards", 0)
    assert (parts["c"].state, parts["c"].error) == ("failed", "the queue is full")
    assert parts["b"].state == "done"
    assert submitted == ["a", "b", "c"]


@pytest.mark.parametrize(
    "crash",
    [
        ExitStatus(-9, ""),
        ExitStatus(-11, ""),
        ExitStatus(None, "its machine is gone"),
        ExitStatus(1, "Error"),
        ExitStatus(4, "atoll: out of memory"),
        ExitStatus(0, "stopped"),
    ],
)
def test_crashed_job_is_restarted_and_counted(tmp_path, crash) -> None:
    parts, submitted = run_scripted(tmp_path, {"a": [crash, crash, "result"]})
    assert (parts["a"].state, parts["a"].restarts, submitted) == ("done", 2, ["a"] * 3)


def test_job_that_always_crashes_fails_with_the_reason(tmp_path) -> None:
    parts, submitted = run_scripted(tmp_path, {"a": [ExitStatus(-9, "step 7")] * 9, "b": ["result"]}, retries=2)
    assert submitted.count("a") == 3
    assert parts["a"].state == "failed"
    assert parts["a"].error == "killed by SIGKILL (out of memory?), after 2 restarts: step 7"
    assert parts["b"].state == "done"


@pytest.mark.parametrize(
    ("exit_status", "message"),
    [
        (ExitStatus(0, "stopped at step 3"), "exited before it was done, after 1 restart: stopped at step 3"),
        (ExitStatus(-11, ""), "killed by SIGSEGV, after 1 restart"),
        (ExitStatus(-99, ""), "killed by signal 99, after 1 restart"),
        (ExitStatus(1, "KeyError: 'a'"), "exited with code 1, after 1 restart: KeyError: 'a'"),
        (ExitStatus(None, "its machine is gone"), "after 1 restart: its machine is gone"),
        (ExitStatus(4, "atoll: out of memory (CUDA)"), "after 1 restart: atoll: out of memory (CUDA)"),
        (ExitStatus(2, "atoll: no shards"), "atoll: no shards"),
    ],
)
def test_exit_is_described_in_one_line(tmp_path, exit_status, message) -> None:
    parts, _ = run_scripted(tmp_path, {"a": [exit_status, exit_status]}, retries=1)
    assert parts["a"].error == message


def test_backend_restarts_are_counted_but_use_no_retries(tmp_path) -> None:
    backend = ScriptedBackend({"a": [ExitStatus(-9, ""), ExitStatus(-9, ""), "result"]}, requeued=5)
    parts = run_jobs([job(tmp_path, "a")], backend, lambda parts: None, retries=2, interval=0.0, pause=0.0)
    assert (parts[0].state, parts[0].restarts) == ("done", 17)


def test_each_pause_doubles(tmp_path, monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    backend = ScriptedBackend({"a": [ExitStatus(-9, "")] * 3 + ["result"]})
    at = []
    submit = backend.submit
    backend.submit = lambda job: at.append(now[0]) or submit(job)  # type: ignore[method-assign]
    run_jobs([job(tmp_path, "a")], backend, lambda parts: None, interval=1.0, pause=8.0)
    assert [later - earlier for earlier, later in pairwise(at)] == [8.0, 16.0, 32.0]


def test_killed_process_is_restarted(tmp_path) -> None:
    jobs = [crashes(tmp_path, "a", "os.kill(os.getpid(), 9)", times=2), job(tmp_path, "b")]
    parts = run_jobs(jobs, Local(2), lambda parts: None, interval=0.02, pause=0.01)
    assert [part.state for part in parts] == ["done", "done"]
    assert [part.restarts for part in parts] == [2, 0]
    assert starts(tmp_path, "a") == 3


def test_no_more_jobs_run_than_slots(tmp_path) -> None:
    running_counts = []
    jobs = [
        job(tmp_path, name, "import time; time.sleep(0.1)\nopen(__import__('sys').argv[1], 'w')") for name in "abcd"
    ]

    def update(parts: list[TrackedJob]) -> None:
        running_counts.append(sum(part.handle is not None for part in parts))

    assert {part.state for part in run_jobs(jobs, Local(3), update, interval=0.02)} == {"done"}
    assert max(running_counts) == 3
    running_counts.clear()
    again = [replace(one, directory=one.directory / "again") for one in jobs]
    run_jobs(again, Local(3), update, limit=2, interval=0.02)
    assert max(running_counts) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_stops_all_jobs_and_all_save(tmp_path, number) -> None:
    # A shell that runs the tests in the background makes them ignore Ctrl-C.
    heard = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    previous = signal.signal(number, heard)
    jobs = [job(tmp_path, name, UNTIL_STOPPED) for name in "abc"]
    before = signal.getsignal(number)

    def update(parts: list[TrackedJob]) -> None:
        ready = [(tmp_path / name / "output.log") for name in "ab"]
        if all(file.exists() and "ready" in file.read_text() for file in ready) and not sent:
            sent.append(True)
            os.kill(os.getpid(), number)

    sent: list[bool] = []
    parts = run_jobs(jobs, Local(2), update, interval=0.02)
    assert [part.state for part in parts] == ["stopped", "stopped", "waiting"]
    assert [(tmp_path / name / "output.log").read_text() for name in "ab"] == ["ready\nsaved\n"] * 2
    assert signal.getsignal(number) is before
    signal.signal(number, previous)


@pytest.mark.parametrize("survives_launch", [True, False])
def test_closed_terminal_stops_only_jobs_that_need_the_launch(tmp_path, survives_launch) -> None:
    # Under nohup the tests ignore SIGHUP.
    previous = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    handlers = []
    backend = ScriptedBackend({"a": ["result"]})
    backend.survives_launch = survives_launch
    run_jobs(
        [job(tmp_path, "a")], backend, lambda parts: handlers.append(signal.getsignal(signal.SIGHUP)), interval=0.0
    )
    assert (handlers[0] is signal.SIG_DFL) == survives_launch
    signal.signal(signal.SIGHUP, previous)


def test_error_in_the_launch_stops_all_jobs(tmp_path) -> None:
    broken: list[bool] = []

    def once(parts: list[TrackedJob]) -> None:
        log = tmp_path / "a" / "output.log"
        if not broken and log.exists() and "ready" in log.read_text():
            broken.append(True)
            raise RuntimeError("the view broke")

    with pytest.raises(RuntimeError, match="the view broke"):
        run_jobs([job(tmp_path, "a", UNTIL_STOPPED)], Local(1), once, interval=0.02)
    assert (tmp_path / "a" / "output.log").read_text() == "ready\nsaved\n"


def after(tmp_path: Path, name: str, first: str, code: str = DONE) -> Job:
    return replace(job(tmp_path, name, code), after=first)


def test_a_job_starts_once_the_one_before_it_is_done(tmp_path) -> None:
    """Whatever their order, and however often the one before it crashes; others do not wait."""
    backend = ScriptedBackend(
        {"x": ["result"], "y": ["result"], "common": [ExitStatus(-9, "")] * 2 + ["result"], "router": ["result"]}
    )
    jobs = [after(tmp_path, "x", "common"), after(tmp_path, "y", "common"), job(tmp_path, "common")]
    parts = run_jobs([*jobs, job(tmp_path, "router")], backend, lambda parts: None, interval=0.0, pause=0.0)
    assert [part.state for part in parts] == ["done"] * 4
    assert backend.submitted[:2] == ["common", "router"]
    assert backend.submitted[2:] == ["common", "common", "x", "y"]


def test_a_real_process_sees_the_result_of_the_one_before_it(tmp_path) -> None:
    result = tmp_path / "common" / "result"
    look = f"import pathlib, sys; pathlib.Path({str(result)!r}).stat(); pathlib.Path(sys.argv[1]).touch()"
    jobs = [after(tmp_path, "x", "common", look), crashes(tmp_path, "common", "os.kill(os.getpid(), 9)")]
    parts = run_jobs(jobs, Local(2), lambda parts: None, interval=0.02, pause=0.01)
    assert [(part.state, part.restarts) for part in parts] == [("done", 0), ("done", 1)]


def test_what_comes_after_a_failure_is_not_started_and_says_so(tmp_path) -> None:
    backend = ScriptedBackend({"common": [ExitStatus(2, "atoll: no shards")], "router": ["result"]})
    jobs = [after(tmp_path, "x", "common"), job(tmp_path, "common"), job(tmp_path, "router")]
    parts = run_jobs(jobs, backend, lambda parts: None, interval=0.0, pause=0.0)
    assert [part.state for part in parts] == ["not started", "failed", "done"]
    assert parts[0].error == "common, from which it starts, failed"
    assert backend.submitted == ["common", "router"]


def test_a_job_whose_predecessor_is_not_launched_does_not_wait(tmp_path) -> None:
    backend = ScriptedBackend({"x": ["result"]})
    (part,) = run_jobs([after(tmp_path, "x", "common")], backend, lambda parts: None, interval=0.0, pause=0.0)
    assert part.state == "done"
