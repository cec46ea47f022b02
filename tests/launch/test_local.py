"""`atoll launch` on this machine: slots, GPUs, Ctrl-C and user errors."""

import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from atoll.errors import AtollError
from atoll.launch import run as run_module
from atoll.launch.local import Local, local_backend
from atoll.launch.loop import run_jobs
from atoll.launch.run import launch_run, open_backend
from tests.launch.stub import UNTIL_STOPPED, job
from tests.waiting import communicate, wait_until

SHOW = "import os, sys\nprint(os.environ.get('CUDA_VISIBLE_DEVICES', 'none'))\nopen(sys.argv[1], 'w')"


def shown(directory: Path, name: str) -> str:
    return (directory / name / "output.log").read_text().strip()


def test_each_part_gets_its_own_gpus_and_returns_them(tmp_path) -> None:
    backend = Local(2, ["4", "5", "6", "7"], gpus=2)
    names = "abcdef"
    jobs = [job(tmp_path, name, SHOW, gpus=2) for name in names]
    jobs.append(job(tmp_path, "cpu", SHOW))
    parts = run_jobs(jobs, backend, lambda parts: None, interval=0.02)
    assert {part.state for part in parts} == {"done"}
    assert {shown(tmp_path, name) for name in names} == {"4,5", "6,7"}
    assert shown(tmp_path, "cpu") == ""  # a part that trains on the CPU sees none
    assert sorted(backend.free_devices) == ["4", "5", "6", "7"]


def test_concurrent_parts_never_share_a_gpu(tmp_path) -> None:
    backend = Local(2, ["0", "1"], gpus=1)
    first, second = (backend.submit(job(tmp_path, name, UNTIL_STOPPED, gpus=1)) for name in "ab")
    assert (first.devices, second.devices, backend.free_devices) == (["0"], ["1"], [])
    for one in (first, second):
        one.stop()
        wait_until(lambda job=one: job.poll().exit_status is not None)
    assert backend.free_devices == ["0", "1"]


def test_without_gpus_slots_are_cores_over_threads(monkeypatch) -> None:
    monkeypatch.setattr("atoll.launch.local._devices", lambda: [])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    for jobs, threads, slots in ((None, 1, 12), (None, 4, 3), (None, 16, 1), (5, 4, 5)):
        with local_backend(jobs, None, threads) as backend:
            assert (backend.slots, backend.gpus) == (slots, 0)
    with pytest.raises(AtollError, match="this machine has 0"), local_backend(None, 1):
        pass


def test_with_gpus_each_part_gets_one_unless_requested(monkeypatch) -> None:
    monkeypatch.setattr("atoll.launch.local._devices", lambda: ["0", "1", "2", "3"])
    for jobs, gpus, slots, each in ((None, None, 4, 1), (2, None, 2, 1), (None, 2, 2, 2), (9, 1, 4, 1)):
        with local_backend(jobs, gpus) as backend:
            assert (backend.slots, backend.gpus) == (slots, each)


def test_ctrl_c_saves_and_stops_all_parts(run) -> None:
    text = (run / "atoll.yaml").read_text().replace("steps: 8", "steps: 100000").replace("every: 3", "every: 100000")
    (run / "atoll.yaml").write_text(text)
    command = [sys.executable, "-m", "atoll", "launch", str(run / "atoll.yaml"), "--jobs", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    running = [run / "experts" / f".train-{name}" for name in ("0-eps-cosine", "1-flow-linear")]
    metrics = [directory / "metrics.jsonl" for directory in running]
    wait_until(lambda: all(file.exists() and file.stat().st_size for file in metrics), process=process)
    process.send_signal(signal.SIGINT)
    _, stderr = communicate(process)
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == "stopped; all progress is saved; run the same command to resume"
    assert all((d / "checkpoint.safetensors").is_file() for d in running)
    for directory in running:
        assert "continue with --resume" in (directory / "output.log").read_text()
    left = subprocess.run(["pgrep", "-f", f"--run {run}"], capture_output=True, text=True).stdout.split()
    assert [pid for pid in left if int(pid) != os.getpid()] == []


def test_user_errors_name_the_fix(run, tmp_path) -> None:
    (tmp_path / "other.yaml").write_text("")
    with pytest.raises(AtollError, match=r"expected a file called atoll\.yaml"):
        launch_run(tmp_path / "other.yaml")
    with pytest.raises(AtollError, match="expected local, ray or slurm"):
        launch_run(run, on="moon")
    with pytest.raises(AtollError, match="only with --on slurm"):
        launch_run(run, options=["partition=gpu"])
    with pytest.raises(AtollError, match=r"no part rooter; expected some of .*router"):
        launch_run(run, only=["router", "rooter"])
    for option in ("partition", "=gpu", "partition="):
        with pytest.raises(AtollError, match="expected an option of sbatch and its value"):
            launch_run(run, on="slurm", options=[option])
    with pytest.raises(AtollError, match=r"no sbatch and srun|needs submitit"):
        open_backend("slurm", run, jobs=None, gpus=None, threads=1, options={}).__enter__()


def test_a_failed_launch_names_what_did_not_start(run, monkeypatch) -> None:
    """The experts of a common model that failed are no failures of their own."""
    text = (run / "atoll.yaml").read_text().replace("steps: 8", "steps: 8\n  init: common")
    (run / "atoll.yaml").write_text(text + "\ncommon: {objective: {prediction: flow, schedule: linear}}\n")
    started = []

    class Refusing:
        slots, gpus, survives_launch = None, 0, False

        def submit(self, job):
            started.append(job.name)
            raise AtollError("no room")

    monkeypatch.setattr(run_module, "open_backend", lambda *_, **__: nullcontext(Refusing()))
    names = "0-eps-cosine, 1-flow-linear, 2-x0-linear-beta"
    with pytest.raises(AtollError, match=rf"3 of 6 parts failed \(common, .*\), so {names} did not start: see above"):
        launch_run(run)
    assert sorted(started) == ["common", "monolith", "router"]
