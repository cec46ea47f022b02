"""`atoll train expert 1 --nproc 2`: one line per mistake, signals, and kills."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from atoll.manifest import load_manifest
from atoll.storage.artifact import CARD, WEIGHTS
from atoll.train.expert import train_expert
from atoll.train.workers import _raise_failure
from tests.conftest import write_run
from tests.waiting import communicate, run_to_end, wait_until

NAME = "1-flow-linear"


def make(path: Path, steps: int, every: int = 3) -> Path:
    run = write_run(path)
    text = (run / "atoll.yaml").read_text().replace("steps: 8", f"steps: {steps}")
    (run / "atoll.yaml").write_text(text.replace("checkpoint_every: 3", f"checkpoint_every: {every}"))
    return run


def state(run: Path) -> Path:
    return run / f"experts/.train-{NAME}"


def command(run: Path, *flags: object) -> list[str]:
    return [sys.executable, "-m", "atoll", "train", "expert", "1", "--run", str(run), *map(str, flags)]


def call(run: Path, *flags: object) -> "subprocess.CompletedProcess[str]":
    return run_to_end(command(run, *flags))


def start(run: Path, *flags: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command(run, *flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def wait_for_steps(run: Path, process: "subprocess.Popen[str]") -> None:
    file = state(run) / "metrics.jsonl"
    wait_until(lambda: file.exists() and file.stat().st_size, process=process)


def workers_of(process: "subprocess.Popen[str]") -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def assert_equal(a: Path, b: Path) -> None:
    mine, other = (load_file(run / "experts" / NAME / WEIGHTS) for run in (a, b))
    assert mine.keys() == other.keys()
    for name in mine:
        assert torch.equal(mine[name], other[name]), name


def test_a_mistake_is_reported_in_one_line(run) -> None:
    (run / "atoll.yaml").write_text((run / "atoll.yaml").read_text().replace("batch: 6", "batch: 6\n  accumulate: 2"))
    done = call(run, "--nproc", 2)
    assert done.returncode == 2
    assert done.stderr == (
        "atoll: a batch of 6 cannot be divided among 2 processes in 2 parts each (train.accumulate); "
        "choose a multiple of 4\n"
    )
    assert done.stdout == ""
    assert not list(state(run).glob("*check*"))


def test_lack_of_memory_in_one_process_explains_the_others(tmp_path, capsys) -> None:
    (tmp_path / "0.txt").write_text("ConnectionError: the peer is gone\n")
    # The second process, as it is started: it reports in one line, and has an exit code of its own.
    code = "from atoll.train.workers import reporting\nwith reporting(): bytearray(2**62)"
    report = {"ATOLL_REPORT": str(tmp_path / "1.txt"), "ATOLL_PARENT": str(os.getpid())}
    ended = subprocess.run([sys.executable, "-c", code], env={**os.environ, **report}, check=False)
    assert ended.returncode == 4
    with pytest.raises(SystemExit) as end:
        _raise_failure([1, ended.returncode], tmp_path, stopped=False)
    assert end.value.code == 4
    assert capsys.readouterr().err.startswith("atoll: process 1 of 2: out of memory (MemoryError); free some memory")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_a_killed_worker_is_reported(tmp_path, number) -> None:
    run = make(tmp_path / "run", 100_000, every=100_000)
    process = start(run, "--nproc", 2)
    wait_for_steps(run, process)
    process.send_signal(number)
    out, err = communicate(process)
    assert process.returncode == 0, err
    assert re.fullmatch(r"stopped at step \d+ of 100000; continue with --resume\n", out)
    assert err == ""
    if number == signal.SIGINT:
        return
    (state(run) / "metrics.jsonl").unlink()
    process = start(run, "--nproc", 2, "--resume")
    wait_for_steps(run, process)
    os.kill(workers_of(process)[1], signal.SIGKILL)
    out, err = communicate(process)
    assert process.returncode == 1  # a crash, not a mistake: `atoll launch` tries again
    assert err == "atoll: process 1 of 2 was killed by signal 9; --resume continues from the last checkpoint\n"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
def test_workers_exit_when_their_parent_is_killed(tmp_path) -> None:
    run = make(tmp_path / "run", 100_000, every=100_000)
    process = start(run, "--nproc", 2)
    wait_for_steps(run, process)
    workers = workers_of(process)
    assert len(workers) == 2
    process.kill()
    communicate(process)  # the pipes close when the last of them exits
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))


def run_killed(run: Path, kills: int, flags: list[object], lines: int, seed: int) -> int:
    """Start the training and kill its process group `kills` times; return how many died writing a checkpoint.

    Every other one is killed after a random number of log lines (at most `lines`), the others while a checkpoint is
    being written. A training that ends before its moment comes is not killed.
    """
    moments, writing, killed = random.Random(seed), 0, 0
    for kill in range(kills):
        before, already = time.time(), logged(run)
        process = start(run, *flags, "--resume", "--quiet")
        moment = already + moments.randint(1, lines)
        wait_until(
            lambda since=before, ended=process.poll, moment=moment, number=kill: (
                ended() is not None or (partly_written(run, since) if number % 2 else logged(run) >= moment)
            ),
            progress=lambda: sizes(state(run)),
        )
        if process.poll() is None:  # not reaped, so the group exists even if its processes end this moment
            os.killpg(process.pid, signal.SIGKILL)
            killed += 1
        process.communicate()
        writing += bool(partly_written(run))
    assert killed > 0, "every training ended before it was killed: give it more steps"
    return writing


def logged(run: Path) -> int:
    """The lines of the training log; a line that is being written counts when it ends."""
    metrics = state(run) / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.glob("*.jsonl")}


def partly_written(run: Path, since: float = 0.0) -> list[Path]:
    """The checkpoints that are being written, or that a kill left incomplete, started after `since`."""
    incomplete = []
    for path in state(run).glob(".checkpoint*.tmp"):
        try:
            if path.stat().st_mtime > since:
                incomplete.append(path)
        except FileNotFoundError:  # it is complete by now
            continue
    return incomplete


def test_resume_is_bit_exact_after_two_kills(tmp_path) -> None:
    run, whole = (make(tmp_path / name, 60, every=1) for name in ("killed", "whole"))
    train_expert(whole, load_manifest(whole), "1")
    run_killed(run, 2, [], 20, seed=0)
    train_expert(run, load_manifest(run), "1", resume=True)
    assert_equal(run, whole)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--nproc", 2], ["--nproc", 2, "shard"]], ids=["one", "two", "two-sharded"])
def test_resume_is_bit_exact_after_twenty_kills(tmp_path, flags) -> None:
    run, whole = (make(tmp_path / name, 4000, every=20) for name in ("killed", "whole"))
    if "shard" in flags:
        flags = flags[:-1]
        for path in (run, whole):
            text = (path / "atoll.yaml").read_text()
            (path / "atoll.yaml").write_text(text.replace("steps: 4000", "steps: 1000\n  sharding: shard"))
    assert call(whole, *flags, "--quiet").returncode == 0
    writing = run_killed(run, 20, flags, 100, seed=1)
    assert writing > 0
    assert call(run, *flags, "--resume", "--quiet").returncode == 0
    assert_equal(run, whole)
    assert (run / "experts" / NAME / CARD).is_file()
