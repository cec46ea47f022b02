"""`--on ray`, on a local Ray cluster of two workers."""

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from atoll.errors import AtollError
from atoll.launch.loop import TrackedJob, run_jobs
from atoll.launch.ray import Ray, ray_backend
from tests.launch.parts import Once, long_run, part_of, weights, whole_weights
from tests.launch.stub import UNTIL_STOPPED, crashes, job, starts

ray = pytest.importorskip("ray", reason="Ray is not installed")
__all__ = ["whole_weights"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Ray]:
    ray.init(num_cpus=2, logging_level=logging.ERROR, log_to_driver=False)
    with ray_backend(None) as backend:
        yield backend
    assert ray.is_initialized()  # the launch did not start it
    ray.shutdown()


def worker_of(part: TrackedJob) -> int:
    """The Ray process that supervises the part's training."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes().decode().split("\0")
            stat = file.with_name("stat").read_text()
        except OSError:  # it ended meanwhile
            continue
        if part.job.arguments[-1] in words and set(part.job.arguments) <= set(words):
            return int(stat.rsplit(")", 1)[1].split()[1])
    raise AssertionError("no process trains it")


@pytest.mark.slow
def test_killed_worker_resumes_with_identical_weights(cluster, tmp_path, whole_weights) -> None:
    run = long_run(tmp_path / "run")
    kill = Once(lambda part: os.kill(worker_of(part), signal.SIGKILL))
    parts = run_jobs([part_of(run)], cluster, kill, interval=0.05, pause=0.1)
    assert (parts[0].state, parts[0].restarts) == ("done", 1)
    assert kill.resumed()
    assert weights(run) == whole_weights


def test_crashed_tasks_are_restarted_and_the_rest_finish(cluster, tmp_path) -> None:
    jobs = [
        crashes(tmp_path, "worker", "os.kill(os.getppid(), signal.SIGKILL); time.sleep(3600)"),
        crashes(tmp_path, "process", "os.kill(os.getpid(), signal.SIGSEGV)", times=9),
        job(tmp_path, "mistake", "import sys; print('atoll: no shards'); sys.exit(2)"),
        job(tmp_path, "good"),
    ]
    parts = run_jobs(jobs, cluster, lambda parts: None, retries=1, interval=0.05, pause=0.01)
    assert [part.state for part in parts] == ["done", "failed", "failed", "done"]
    assert [part.restarts for part in parts] == [1, 1, 0, 0]
    assert [starts(tmp_path, name) for name in ("worker", "process")] == [2, 2]
    assert parts[1].error == "killed by SIGSEGV, after 1 restart"
    assert parts[2].error == "atoll: no shards"


def test_ctrl_c_saves_running_tasks_and_cancels_queued_ones(cluster, tmp_path) -> None:
    jobs = [job(tmp_path, name, UNTIL_STOPPED) for name in "abc"]
    logs = [tmp_path / name / "output.log" for name in "abc"]

    def update(parts: list[TrackedJob]) -> None:
        if sum(log.exists() and "ready" in log.read_text() for log in logs) == 2 and not sent:
            assert [part.state for part in parts].count("waiting") >= 1
            sent.append(True)
            os.kill(os.getpid(), signal.SIGINT)

    sent: list[bool] = []
    parts = run_jobs(jobs, cluster, update, interval=0.05)
    assert sorted(part.state for part in parts) == ["stopped", "stopped", "waiting"]
    assert sorted(log.read_text() if log.exists() else "" for log in logs) == ["", "ready\nsaved\n", "ready\nsaved\n"]


def test_part_too_large_for_the_cluster_waits_and_can_be_stopped(cluster, tmp_path) -> None:
    def update(parts: list[TrackedJob]) -> None:
        assert parts[0].state in ("waiting", "stopping")
        if parts[1].state == "done" and not sent:
            sent.append(True)
            os.kill(os.getpid(), signal.SIGTERM)

    sent: list[bool] = []
    jobs = [job(tmp_path, "huge", gpus=99), job(tmp_path, "small")]
    assert [part.state for part in run_jobs(jobs, cluster, update, interval=0.05)] == ["waiting", "done"]


def test_missing_ray_names_the_extra(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(AtollError, match=r"pip install 'atoll\[ray\]'"), ray_backend(None):
        pass
