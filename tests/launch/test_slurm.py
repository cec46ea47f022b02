"""`--on slurm`, with submitit's local executor and with commands that behave like Slurm's."""

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
from atoll.launch.slurm import Slurm, SlurmJob, slurm_backend
from tests.launch import slurm as fake
from tests.launch.parts import Once, long_run, part_of, weights, whole_weights
from tests.launch.stub import UNTIL_STOPPED, crashes, job, starts
from tests.waiting import wait_until

pytest.importorskip("submitit", reason="submitit is not installed")
__all__ = ["whole_weights"]

# Sends its supervisor Slurm's time-limit signal, and goes on until the supervisor stops it.
PREEMPTED = "os.kill(os.getppid(), signal.SIGUSR2); signal.sigwait([signal.SIGTERM]); print('saved'); sys.exit(0)"


def preempted(directory: Path, name: str):  # type: ignore[no-untyped-def]
    return crashes(directory, name, "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]); " + PREEMPTED)


@pytest.fixture
def queue(tmp_path, monkeypatch) -> Path:
    """The directory of a fake Slurm."""
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
def test_preempted_training_resumes_with_identical_weights(tmp_path, whole_weights) -> None:
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
    assert once.resumed()
    assert weights(run) == whole_weights


def test_local_executor_runs_requeues_and_reports_user_errors(tmp_path) -> None:
    jobs = [
        preempted(tmp_path, "preempted"),
        crashes(tmp_path, "killed", "os.kill(os.getpid(), 9)"),
        job(tmp_path, "mistake", "import sys; print('atoll: no shards'); sys.exit(2)"),
    ]
    parts = run_jobs(jobs, Slurm(tmp_path, 0, {}, cluster="local"), silent, interval=0.05, pause=0.01)
    assert [part.state for part in parts] == ["done", "done", "failed"]
    assert [part.restarts for part in parts] == [1, 1, 0]
    assert [starts(tmp_path, name) for name in ("preempted", "killed")] == [2, 2]
    assert parts[2].error == "atoll: no shards"
    assert (tmp_path / "preempted" / "output-before.log").read_text() == "saved\n"


def test_sbatch_script_has_the_resources_and_options(queue, tmp_path) -> None:
    backend = Slurm(tmp_path, 2, {"partition": "gpu", "account": "sea", "cpus-per-task": "6", "time": "30"})
    run_jobs([job(tmp_path, "a", gpus=2)], backend, silent, interval=0.05)
    script = (queue / "1.sh").read_text()
    for line in (
        "partition=gpu", "account=sea", "time=30", "cpus-per-task=6", "gpus-per-node=2", "job-name=atoll-a",
        "requeue", "signal=USR2@180", "nodes=1", "open-mode=append",
    ):  # fmt: skip
        assert f"#SBATCH --{line}\n" in script
    assert script.count("cpus-per-task") == 1
    assert (tmp_path / ".slurm").is_dir()


def test_preempted_killed_cancelled_and_refused_jobs(queue, tmp_path) -> None:
    jobs = [
        preempted(tmp_path, "preempted"),
        crashes(tmp_path, "task", "os.kill(os.getppid(), signal.SIGKILL); time.sleep(3600)"),
    ]
    backend = Slurm(tmp_path, 0, {})
    parts = run_jobs(jobs, backend, silent, interval=0.05, pause=0.01)
    assert [(part.state, part.restarts) for part in parts] == [("done", 1), ("done", 1)]
    assert (tmp_path / "preempted" / "output-before.log").read_text() == "saved\n"
    assert submissions(queue) == 3  # a requeued job is not submitted again
    cancelled = job(tmp_path, "cancelled", "import os, time; os.system('scancel 4'); time.sleep(3600)")
    parts = run_jobs([cancelled], backend, silent, interval=0.05)
    assert parts[0].state == "failed"
    assert parts[0].error.startswith("Slurm job 4 is CANCELLED")
    (queue / "refuse").touch()
    parts = run_jobs([job(tmp_path, "refused")], backend, silent, interval=0.05)
    assert parts[0].state == "failed"
    assert "QOSMaxSubmitJobPerUserLimit" in parts[0].error


def test_requeue_while_slurm_answers_is_counted(tmp_path) -> None:
    mine = job(tmp_path, "a")
    mine.directory.mkdir()
    (mine.directory / "starts").write_text("7\n")

    class Submission:
        """Ends while `done` is answered, after a second start."""

        job_id, paths = "7", SimpleNamespace(result_pickle=tmp_path, stderr=tmp_path / "stderr")

        def done(self) -> bool:
            (mine.directory / "starts").write_text("7\n7\n")
            return True

        state, exception = "COMPLETED", staticmethod(lambda: None)
        result = staticmethod(lambda: ExitStatus(0, "saved"))

    status = SlurmJob(Slurm(tmp_path, 0, {}, cluster="local"), mine, Submission()).poll()
    assert status == Status(True, ExitStatus(0, "saved"), restarts=1)


def test_second_launch_adopts_jobs_left_in_the_queue(queue, tmp_path) -> None:
    wait = "import pathlib, sys, time\ngo = pathlib.Path(sys.argv[1]).with_name('go')\nprint('ready', flush=True)\n"
    wait += "while not go.exists(): time.sleep(0.02)\npathlib.Path(sys.argv[1]).touch()"
    code = "import pathlib, sys; from tests.launch.test_slurm import launch_and_wait; launch_and_wait(sys.argv[1:])"
    first = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), wait])
    log = tmp_path / "a" / "output.log"
    wait_until(lambda: log.exists() and "ready" in log.read_text(), process=first)
    first.kill()
    first.wait()
    assert log.read_text() == "ready\n"  # the job continues without the launch

    def update(parts: list[TrackedJob]) -> None:
        if parts[0].state == "running":
            (tmp_path / "a" / "go").touch()

    parts = run_jobs([job(tmp_path, "a", wait)], Slurm(tmp_path, 0, {}), update, interval=0.05)
    assert (parts[0].state, parts[0].restarts, submissions(queue)) == ("done", 0, 1)


def launch_and_wait(arguments: list[str]) -> None:
    """Run the first launch of the test above, which that test kills."""
    directory = Path(arguments[0])
    run_jobs([job(directory, "a", arguments[1])], Slurm(directory, 0, {}), silent, interval=0.05)


def test_ctrl_c_saves_running_jobs_and_cancels_queued_ones(queue, tmp_path) -> None:
    jobs = [job(tmp_path, name, UNTIL_STOPPED) for name in "ab"]
    log = tmp_path / "a" / "output.log"
    backend = Slurm(tmp_path, 0, {})
    backend.submit(jobs[0])
    wait_until(lambda: log.exists() and "ready" in log.read_text())
    (queue / "hold").touch()
    sent: list[bool] = []

    def update(parts: list[TrackedJob]) -> None:
        if not sent and submissions(queue) == 2:
            assert [part.state for part in parts] == ["running", "waiting"]
            sent.append(True)
            os.kill(os.getpid(), signal.SIGINT)

    parts = run_jobs(jobs, backend, update, interval=0.05)
    assert [part.state for part in parts] == ["stopped", "waiting"]
    assert log.read_text() == "ready\nsaved\n"
    assert not (tmp_path / "b" / "output.log").exists()
    assert (queue / "2.cancel").exists()
    assert not (queue / "1.cancel").exists()


def test_user_errors_name_the_fix(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(AtollError, match="from a login node"), slurm_backend(tmp_path, None, {}):
        pass
    with pytest.raises(AtollError, match="expected minutes"):
        Slurm(tmp_path, 0, {"time": "1-00:00"})
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(AtollError, match=r"pip install 'atoll\[slurm\]'"), slurm_backend(tmp_path, None, {}):
        pass
