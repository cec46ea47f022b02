"""One part's training as a command line, and as a process that ends together with the process that started it.

In the training's directory a launch writes, beside the checkpoint and the metrics (`atoll.storage.layout`):
    output.log   what the process printed since its last start; output-before.log: since the start before that
    lock         held by the process while it lives, so that no second process trains the same part; names the process
    starts       one line per start of a queued job
    stop         while it exists, a queued job saves its state and exits
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from atoll.manifest import Manifest
from atoll.storage.layout import (
    CARD,
    COMMON,
    EXIT_KILLED,
    EXIT_USER_ERROR,
    GENERALIST,
    MONOLITH,
    ROUTER,
    STUDENT,
    RunLayout,
    TrainingLayout,
)
from atoll.storage.lock import try_lock

# Seconds to wait for a lock that a lost machine may still hold: a file server releases it after a while (NFS: 90).
LOCK_TIMEOUT = 120.0
_STEP_KEYS = {"step", "loss", "images_per_s", "eta_s"}  # a line of metrics.jsonl with these describes a training step
_TAIL = 8192  # bytes read from the end of a file
_NAME = 200  # characters of a lock file: the process that holds it

# Replaces itself by the command, after asking the kernel to kill it when its parent is gone, even if that was killed.
# Otherwise a restarted part, perhaps on another machine, would find the old process still writing.
_WITH_PARENT = f"""
import os, sys
if sys.platform == "linux":
    import ctypes, signal
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):  # the parent ended before the line above
    os._exit({EXIT_KILLED})
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


@dataclass(frozen=True)
class Job:
    """One part's training; any machine that sees its directory can run it.

    arguments: what follows `python`. directory: where the training keeps its state. result: exists once the training is
    complete. steps: optimizer steps. images: images seen in all of them. threads, gpus: resources of the process.
    after: the name of the job whose result it starts from; empty: none.
    """

    name: str
    arguments: tuple[str, ...]
    directory: Path
    result: Path
    steps: int
    images: float
    threads: int = 1
    gpus: int = 0
    after: str = ""

    @property
    def files(self) -> TrainingLayout:
        """The files in its directory."""
        return TrainingLayout(self.directory)


@dataclass(frozen=True)
class ExitStatus:
    """How a job ended.

    code: the exit code; negative: the signal that killed it; None: unknown, because its machine is gone. message: the
    last line of its output, or the reason. held_by: not empty if it was not started, because this process of another
    launch trains the part.
    """

    code: int | None
    message: str
    held_by: str = ""


def jobs_of(run: Path, manifest: Manifest, gpus: int = 0, student: bool = False) -> list[Job]:
    """List every training that the manifest names, the common model first, then the longest first.

    Args:
        run: the run's directory.
        manifest: its atoll.yaml.
        gpus: GPUs of each part that may train on GPUs.
        student: include the student, which needs the ensemble that the other parts make.
    """
    layout = RunLayout(run.resolve())  # absolute, because another machine has another working directory
    # Every part with its artifact, its command and its settings.
    parts: list[tuple[Path, list[str], Any]] = [
        (layout.expert(e.full_name), ["train", "expert", e.full_name], e) for e in manifest.experts
    ]
    parts.append((layout.router, ["train", ROUTER], manifest.router))
    if manifest.common is not None:
        parts.append((layout.common, ["train", COMMON], manifest.common))
    if manifest.generalist is not None:
        parts.append((layout.generalist, ["train", GENERALIST], manifest.generalist))
    if manifest.monolith is not None:
        parts.append((layout.monolith, ["train", MONOLITH], manifest.monolith))
    if student and manifest.student is not None:
        parts.append((layout.student, ["distil"], manifest.student))

    # Each becomes a command line that resumes, so that a restart needs no other one.
    trust, jobs = manifest.trust_in_cards(), []
    allowed = [flag for flag, on in (("--allow-hub", trust.hub), ("--trust-paths", trust.paths)) if on]
    for artifact, command, part in parts:
        settings = manifest.train_of(part)
        arguments = ("-m", "atoll", *command, "--run", str(layout.root), "--resume", "--quiet", *allowed)
        # The student trains on one GPU at most.
        part_gpus = 0 if settings.device == "cpu" else min(gpus, 1) if artifact.name == STUDENT else gpus
        # The command starts one process per GPU.
        if part_gpus > 1:
            arguments += ("--nproc", str(part_gpus))
        job = Job(
            name=artifact.name,
            arguments=arguments,
            directory=TrainingLayout.of(artifact).root,
            result=artifact / CARD,
            steps=settings.steps,
            images=float(settings.steps * settings.batch),
            threads=settings.threads,
            gpus=part_gpus,
            after=COMMON if manifest.starts_from_common(part) else "",
        )
        jobs.append(job)
    # The longest first: the last one to finish then started as early as possible. Experts wait for the common model.
    return sorted(jobs, key=lambda job: (job.name != COMMON, -job.images))


class Process:
    """A job's process, a child of this one; constructing it starts the process.

    Args:
        job: what to run.
        environment: variables to set beside those of this process.
        lock_timeout: seconds to wait for the lock while another process may still hold it.
    """

    def __init__(self, job: Job, environment: Mapping[str, str] | None = None, lock_timeout: float = 0.0):
        self.job = job
        job.directory.mkdir(parents=True, exist_ok=True)
        with job.files.lock.open("a+") as lock:
            # Only the process that holds the lock may write into the directory.
            self._held_by = "" if try_lock(lock.fileno(), lock_timeout) else _name_in(lock)
            if self._held_by:
                return
            lock.truncate(0)
            # Keep the output of the start before, which may explain why there is another one.
            with suppress(FileNotFoundError):
                os.replace(job.files.output, job.files.output_before)
            with job.files.output.open("wb") as output:
                # -I and -S make the small script start fast; the command that replaces it has the usual environment.
                self._child = subprocess.Popen(
                    [sys.executable, "-ISc", _WITH_PARENT, str(os.getpid()), *job.arguments],
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    env={**os.environ, "OMP_NUM_THREADS": str(job.threads), **(environment or {})},
                    pass_fds=[lock.fileno()],  # the child inherits the lock and holds it until it exits
                    start_new_session=True,  # signals to this process (Ctrl-C, Slurm's USR2) do not reach the child
                )
            # Another launch says who trains the part.
            lock.write(f"process {self._child.pid} on {socket.gethostname()}\n")

    def poll(self) -> ExitStatus | None:
        """Return how it ended, or None while it runs."""
        if self._held_by:
            message = f"another process trains it: stop it or wait; if none is running, remove {self.job.files.lock}"
            return ExitStatus(EXIT_USER_ERROR, message, self._held_by)
        # The last line of the output usually names the error.
        code = self._child.poll()
        return None if code is None else ExitStatus(code, last_output_line(self.job))

    def stop(self) -> None:
        """Request that it saves its state and exits."""
        # Never stop a process of another launch.
        if not self._held_by:
            self._child.terminate()

    def wait(self) -> None:
        """Wait until it has exited.

        Made for signal handlers: it takes none of the locks that the interrupted code may hold.
        """
        if not self._held_by and self._child.returncode is None:
            with suppress(ChildProcessError):  # its exit code was read already
                os.waitid(os.P_PID, self._child.pid, os.WEXITED | os.WNOWAIT)


def holder_of(job: Job) -> str:
    """Return which process trains a part now, such as "process 4711 on islet"; "" if none does."""
    try:
        # The lock is free again as soon as this file is closed.
        with job.files.lock.open("r+") as lock:
            return "" if try_lock(lock.fileno()) else _name_in(lock)
    except FileNotFoundError:
        return ""


def _name_in(lock: IO[str]) -> str:
    """The process that a lock file names. A process that has just taken the lock has not written its name yet."""
    lock.seek(0)
    return lock.read(_NAME).strip() or "another process"


def supervise(process: Process, token: str, sleep: Callable[[float], None] = time.sleep) -> ExitStatus:
    """Wait for a queued job's process on the machine where it runs; stop it when its `stop` file appears.

    Args:
        process: the job's process.
        token: identifies the submission; one line of it is added to `starts`.
        sleep: waits for the given seconds.
    """
    files, stopping = process.job.files, False
    # The launch, perhaps on another machine, sees by this line that the job has started.
    with files.starts.open("a") as starts:
        starts.write(f"{token}\n")
    while (exit_status := process.poll()) is None:
        # Stop it once: it needs time to save its state.
        if not stopping and files.stop.exists():
            process.stop()
            stopping = True
        sleep(0.2)
    return exit_status


def count_starts(job: Job, token: str) -> int:
    """Count how often a queued job was started under this token."""
    try:
        return job.files.starts.read_text().split().count(token)
    except FileNotFoundError:
        return 0


def request_stop(job: Job) -> None:
    """Request that a job on another machine saves its state and exits; see `supervise`."""
    job.directory.mkdir(parents=True, exist_ok=True)
    job.files.stop.touch()


def clear_stop_request(job: Job) -> None:
    """Withdraw `request_stop`, before the job is submitted again."""
    job.files.stop.unlink(missing_ok=True)


def last_output_line(job: Job) -> str:
    """Return the last line of output.log that is not blank; "" if there is none."""
    lines = [text.strip() for text in _tail(job.files.output) if text.strip()]
    return lines[-1] if lines else ""


def last_metrics(job: Job) -> dict[str, Any]:
    """Return the last complete line of metrics.jsonl that describes a training step; {} if there is none."""
    # From the end, because a validation or a cut line may come last.
    for text in reversed(_tail(job.files.metrics)):
        try:
            line = json.loads(text)
        except ValueError:  # cut off, by a crash or because `_tail` starts in the middle of it
            continue
        if isinstance(line, dict) and line.keys() >= _STEP_KEYS:  # other lines describe a validation or an event
            return line
    return {}


def name_of_signal(number: int) -> str:
    """SIGKILL for 9; "signal 99" for a number that has no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _tail(file: Path) -> list[str]:
    """Return the last lines of a file, of which the first may be cut off; [] if it cannot be read."""
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - _TAIL))
            return stream.read().decode(errors="replace").splitlines()
    except OSError:
        return []
