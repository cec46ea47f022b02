"""`--on slurm`: by submitit's executor of local processes, and by commands that behave as Slurm's."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from atoll.errors import AtollError
from atoll.launch.backend import Status
from atoll.launch.job import ExitStatus
from atoll.launch.loop import TrackedJob, run_jobs
from atoll.launch.slurm import Slurm, SlurmJob, slurm_place
from tests.launch import slurm as fake
from tests.launch.parts import Once, long_run, part_of, weights, whole_weights
from tests.launch.stub import UNTIL_STOPPED, dies, job, starts
from tests.waiting import wait_until

pytest.importorskip("submitit", reason="submitit is not installed")
__all__ = ["whole_weights"]

# Tells its attendant what Slurm tells a job whose time is up, and goes on until that has it save.
PREEMPTED = "os.kill(os.getppid(), signal.SIGUSR2); signal.sigwait([signal.SIGTERM]); print('saved'); sys.exit(0)"


def preempted(directory: Path, name: str):  # type: ignore[no-untyped-def]
    return dies(directory, name, "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]); " + PREEMPTED)


@pytest.fixture
def queue(tmp_path, monkeypatch) -> Path:
    """The directory of a Slurm."""
    here = tmp_path / "slurm"
    monkeypatch.setenv("PATH", str(fake.install(here)), prepend=os.pathsep)
    monkeypatch.setenv("FAKE_SLURM", str(here))
    monkeypatch.setattr("atoll.launch.slurm._SACCT", 0.1)
    monkeypatch.setattr("atoll.launch.slurm._GRACE", 0.2)
    import submitit

    submitit.SlurmJob.watcher.clear()
    submitit.SlurmJob.watcher._registered.clear()  # of other tests, whose jobs had the same numbers
    return here


def submissions(queue: Path) -> int:
    return len(list(queue.glob("*.sh")))


def silent(parts: list[TrackedJob]) -> None:
    pass


@pytest.mark.slow
def test_local_executor_preempted_in_the_middle_ends_with_the_right_weights(tmp_path, whole_weights) -> None:
    run = long_run(tmp_path / "run")

    def preempt(part: TrackedJob) -> None:
        task = next(
            int(file.parent.name)
            for file in Path("/proc").glob("[0-9]*/cmdline")
            if b"submitit.core._submit" in file.read_bytes() and str(run).encode() in file.read_bytes()
        )
        os.kill(task, signal.SIGUSR2)

    once = Once(preempt)
    parts = run_jobs([part_of(run)], Slurm(run, 0, {}, cluster="local"), once, interval=0.05)
    assert (parts[0].state, parts[0].restarts) == ("done", 1)
    assert once.went_on()
    assert weights(run) == whole_weights


def test_local_executor_runs_requeues_and_tells_mistakes(tmp_path) -> None:
    jobs = [
        preempted(tmp_path, "preempted"),
        dies(tmp_path, "killed", "os.kill(os.getpid(), 9)"),
        job(tmp_path, "mistake", "import sys; print('atoll: no shards'); sys.exit(2)"),
    ]
    parts = run_jobs(jobs, Slurm(tmp_path, 0, {}, cluster="local"), silent, interval=0.05, pause=0.01)
    assert [part.state for part in parts] == ["done", "done", "failed"]
    assert [part.restarts for part in parts] == [1, 1, 0]
    assert [starts(tmp_path, name) for name in ("preempted", "killed")] == [2, 2]
    assert parts[2].error == "atoll: no shards"
    assert (tmp_path / "preempted" / "output-before.log").read_text() == "saved\n"


def test_a_job_is_described_to_sbatch(queue, tmp_path) -> None:
    place = Slurm(tmp_path, 2, {"partition": "gpu", "account": "sea", "cpus-per-task": "6", "time": "30"})
    run_jobs([job(tmp_path, "a", gpus=2)], place, silent, interval=0.05)
    script = (queue / "1.sh").read_text()
    for line in (
        "partition=gpu", "account=sea", "time=30", "cpus-per-task=6", "gpus-per-node=2", "job-name=atoll-a",
        "requeue", "signal=USR2@180", "nodes=1", "open-mode=append",
    ):  # fmt: skip
        assert f"#SBATCH --{line}\n" in script
    assert script.count("cpus-per-task") == 1
    assert (tmp_path / ".slurm").is_dir()


def test_preempted_killed_cancelled_refused(queue, tmp_path) -> None:
    jobs = [
        preempted(tmp_path, "preempted"),
        dies(tmp_path, "task", "os.kill(os.getppid(), signal.SIGKILL); time.sleep(3600)"),
    ]
    place = Slurm(tmp_path, 0, {})
    parts = run_jobs(jobs, place, silent, interval=0.05, pause=0.01)
    assert [(part.state, part.restarts) for part in parts] == [("done", 1), ("done", 1)]
    assert (tmp_path / "preempted" / "output-before.log").read_text() == "saved\n"
    assert submissions(queue) == 3  # what Slurm requeued was not submitted again
    cancelled = job(tmp_path, "cancelled", "import os, time; os.system('scancel 4'); time.sleep(3600)")
    parts = run_jobs([cancelled], place, silent, interval=0.05)
    assert parts[0].state == "failed"
    assert parts[0].error.startswith("Slurm job 4 is CANCELLED")
    (queue / "refuse").touch()
    parts = run_jobs([job(tmp_path, "refused")], place, silent, interval=0.05)
    assert parts[0].state == "failed"
    assert "QOSMaxSubmitJobPerUserLimit" in parts[0].error


def test_a_requeue_while_slurm_answers_is_counted(tmp_path) -> None:
    mine = job(tmp_path, "a")
    mine.directory.mkdir()
    (mine.directory / "starts").write_text("7\n")

    class Submitted:
        """Ends while `done` is answered, after a second start."""

        job_id, paths = "7", SimpleNamespace(result_pickle=tmp_path, stderr=tmp_path / "stderr")

        def done(self) -> bool:
            (mine.directory / "starts").write_text("7\n7\n")
            return True

        state, exception = "COMPLETED", staticmethod(lambda: None)
        result = staticmethod(lambda: ExitStatus(0, "saved"))

    status = SlurmJob(Slurm(tmp_path, 0, {}, cluster="local"), mine, Submitted()).poll()
    assert status == Status(True, ExitStatus(0, "saved"), restarts=1)


def test_a_second_launch_takes_over_what_the_first_left_in_the_queue(queue, tmp_path) -> None:
    wait = "import pathlib, sys, time\ngo = pathlib.Path(sys.argv[1]).with_name('go')\nprint('ready', flush=True)\n"
    wait += "while not go.exists(): time.sleep(0.02)\npathlib.Path(sys.argv[1]).touch()"
    code = "import pathlib, sys; from tests.launch.test_slurm import launch_and_wait; launch_and_wait(sys.argv[1:])"
    first = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), wait])
    log = tmp_path / "a" / "output.log"
    wait_until(lambda: log.exists() and "ready" in log.read_text(), process=first)
    first.kill()
    first.wait()
    assert log.read_text() == "ready\n"  # it goes on without the launch

    def update(parts: list[TrackedJob]) -> None:
        if parts[0].state == "running":
            (tmp_path / "a" / "go").touch()

    parts = run_jobs([job(tmp_path, "a", wait)], Slurm(tmp_path, 0, {}), update, interval=0.05)
    assert (parts[0].state, parts[0].restarts, submissions(queue)) == ("done", 0, 1)


def launch_and_wait(arguments: list[str]) -> None:
    """The first launch of the test above, which is killed."""
    place = Path(arguments[0])
    run_jobs([job(place, "a", arguments[1])], Slurm(place, 0, {}), silent, interval=0.05)


def test_ctrl_c_saves_what_runs_and_cancels_what_waits(queue, tmp_path) -> None:
    jobs = [job(tmp_path, name, UNTIL_STOPPED) for name in "ab"]
    log = tmp_path / "a" / "output.log"
    place = Slurm(tmp_path, 0, {})
    place.submit(jobs[0])
    wait_until(lambda: log.exists() and "ready" in log.read_text())
    (queue / "hold").touch()
    sent: list[bool] = []

    def update(parts: list[TrackedJob]) -> None:
        if not sent and submissions(queue) == 2:
            assert [part.state for part in parts] == ["running", "waiting"]
            sent.append(True)
            os.kill(os.getpid(), signal.SIGINT)

    parts = run_jobs(jobs, place, update, interval=0.05)
    assert [part.state for part in parts] == ["stopped", "waiting"]
    assert log.read_text() == "ready\nsaved\n"
    assert not (tmp_path / "b" / "output.log").exists()
    assert (queue / "2.cancel").exists()
    assert not (queue / "1.cancel").exists()


def test_mistakes_name_the_fix(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(AtollError, match="from a login node"), slurm_place(tmp_path, None, {}):
        pass
    with pytest.raises(AtollError, match="expected minutes"):
        Slurm(tmp_path, 0, {"time": "1-00:00"})
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(AtollError, match=r"pip install 'atoll\[slurm\]'"), slurm_place(tmp_path, None, {}):
        pass
