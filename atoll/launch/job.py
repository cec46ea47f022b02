"""One part's training as a command line, and as a process that ends with whoever started it.

Beside a part's checkpoint and metrics.jsonl its directory holds, of a launch:
    output.log   what its process said since the last start; output-before.log: until then
    lock         held by the process while it lives: no second one trains the same part
    starts       one line per start of a job in a queue; `stop`, while it exists, asks such a job to save and end
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atoll.manifest import Manifest
from atoll.storage.layout import (
    CARD,
    EXIT_KILLED,
    EXIT_USER_ERROR,
    MONOLITH,
    ROUTER,
    STUDENT,
    RunLayout,
    TrainingLayout,
)
from atoll.storage.lock import try_lock

# Seconds after which a file server takes the lock from a machine that is gone (NFS: 90).
PATIENCE = 120.0
_OF_A_STEP = {"step", "loss", "images_per_s", "eta_s"}
_TAIL = 8192  # bytes of a file's end that are looked at

# Runs a command in place of this process, which the kernel kills when its parent is gone, also by force. Whoever starts
# the part again, perhaps on another machine, must not find the old process still writing.
_WITH_PARENT = f"""
import os, sys
if sys.platform == "linux":
    import ctypes, signal
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):  # gone before that
    os._exit({EXIT_KILLED})
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


@dataclass(frozen=True)
class Job:
    """One part's training, which any machine that sees its directory can run.

    arguments: after `python`. directory: of its checkpoint, metrics.jsonl and output.log. result: a file that is there
    once it is done. steps and work: optimizer steps, and images in all. threads and gpus: what it is given.
    """

    name: str
    arguments: tuple[str, ...]
    directory: Path
    result: Path
    steps: int
    work: float
    threads: int = 1
    gpus: int = 0

    @property
    def files(self) -> TrainingLayout:
        """The files in its directory."""
        return TrainingLayout(self.directory)


@dataclass(frozen=True)
class ExitStatus:
    """How a job ended: its exit code (negative: the signal; None: nobody saw it, as its machine is gone), and its last
    words."""

    code: int | None
    words: str


def jobs_of(run: Path, manifest: Manifest, gpus: int = 0, student: bool = False) -> list[Job]:
    """Every training that the manifest names, the longest first; the student's, which needs what the others made, only
    where asked. gpus: of a part that may train on GPUs."""
    run = run.resolve()  # another machine has another working directory
    layout = RunLayout(run)
    parts: list[tuple[Path, list[str], Any]] = [
        (layout.expert(e.full_name), ["train", "expert", e.full_name], e) for e in manifest.experts
    ]
    parts.append((layout.router, ["train", ROUTER], manifest.router))
    if manifest.monolith is not None:
        parts.append((layout.monolith, ["train", MONOLITH], manifest.monolith))
    if student and manifest.student is not None:
        parts.append((layout.student, ["distil"], manifest.student))
    jobs = []
    for artifact, words, part in parts:
        name = artifact.name
        settings = manifest.train_of(part)
        arguments = ("-m", "atoll", *words, "--run", str(run), "--resume", "--quiet")
        mine = 0 if settings.device == "cpu" else min(gpus, 1) if name == STUDENT else gpus
        if mine > 1:
            arguments += ("--nproc", str(mine))
        work = float(settings.steps * settings.batch)
        job = Job(
            name, arguments, TrainingLayout.of(artifact).root, artifact / CARD, settings.steps, work,
            settings.threads, mine,
        )  # fmt: skip
        jobs.append(job)
    return sorted(jobs, key=lambda job: -job.work)


class Process:
    """A job's process, a child of this one, started by `Process(job)`.

    environment: beside what this process has. patience: seconds to wait for the lock, where another may hold it still.
    """

    def __init__(self, job: Job, environment: Mapping[str, str] | None = None, patience: float = 0.0):
        self.job = job
        job.directory.mkdir(parents=True, exist_ok=True)
        with job.files.lock.open("w") as lock:
            self._held_elsewhere = not try_lock(lock.fileno(), patience)
            if self._held_elsewhere:
                return
            with suppress(FileNotFoundError):
                os.replace(job.files.output, job.files.output_before)
            with job.files.output.open("wb") as output:
                self._child = subprocess.Popen(
                    [sys.executable, "-ISc", _WITH_PARENT, str(os.getpid()), *job.arguments],
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    env={**os.environ, "OMP_NUM_THREADS": str(job.threads), **(environment or {})},
                    pass_fds=[lock.fileno()],  # so the lock is the child's, until it ends
                    start_new_session=True,  # what is sent to this process (Ctrl-C, Slurm's USR2) is not sent to it too
                )

    def poll(self) -> ExitStatus | None:
        """None while it runs."""
        if self._held_elsewhere:
            lock = self.job.files.lock
            return ExitStatus(
                EXIT_USER_ERROR, f"another process trains it: end that, or wait for it; is there none, remove {lock}"
            )
        code = self._child.poll()
        return None if code is None else ExitStatus(code, last_words(self.job))

    def stop(self) -> None:
        """Asks it to save its state and to end."""
        if not self._held_elsewhere:
            self._child.terminate()

    def wait(self) -> None:
        """Until it has ended; for a signal's handler, which must not wait as the code that it interrupted does."""
        if not self._held_elsewhere and self._child.returncode is None:
            with suppress(ChildProcessError):  # somebody has asked already how it ended
                os.waitid(os.P_PID, self._child.pid, os.WEXITED | os.WNOWAIT)


def attend(process: Process, token: str, rest: Callable[[float], None] = time.sleep) -> ExitStatus:
    """Waits for a job's process, on whatever machine, and stops it when its `stop` file is there."""
    job, stopped = process.job, False
    with job.files.starts.open("a") as starts:
        starts.write(f"{token}\n")
    while (ended := process.poll()) is None:
        if not stopped and job.files.stop.exists():
            process.stop()
            stopped = True
        rest(0.2)
    return ended


def starts_of(job: Job, token: str) -> int:
    """How often a job in a queue was started under this token."""
    try:
        return job.files.starts.read_text().split().count(token)
    except FileNotFoundError:
        return 0


def ask_to_stop(job: Job) -> None:
    """Asks a job that runs elsewhere; see `attend`."""
    job.directory.mkdir(parents=True, exist_ok=True)
    job.files.stop.touch()


def clear_stop(job: Job) -> None:
    job.files.stop.unlink(missing_ok=True)


def last_words(job: Job) -> str:
    """The last line of output.log that says something."""
    lines = [text.strip() for text in _tail(job.files.output) if text.strip()]
    return lines[-1] if lines else ""


def last_metrics(job: Job) -> dict[str, Any]:
    """The last whole line of metrics.jsonl that tells of a step; empty where there is none."""
    for text in reversed(_tail(job.files.metrics)):
        try:
            line = json.loads(text)
        except ValueError:  # cut, by a crash or by this reading
            continue
        if isinstance(line, dict) and line.keys() >= _OF_A_STEP:  # others tell of a validation, or of an event
            return line
    return {}


def name_of_signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _tail(file: Path) -> list[str]:
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - _TAIL))
            return stream.read().decode(errors="replace").splitlines()
    except OSError:
        return []
