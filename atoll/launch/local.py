"""Processes on this machine, a few at a time; each is `atoll train ...` and shares nothing with the others."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from atoll.manifest import Manifest

JobState = Literal["waiting", "running", "done", "failed"]


@dataclass
class Job:
    """One training: its command, where it logs, and how it stands."""

    name: str
    arguments: list[str]  # after `python -m atoll`
    directory: Path  # of metrics.jsonl and output.log
    steps: int
    work: float  # images in all: the longest begins first
    threads: int = 1
    state: JobState = "waiting"
    metrics: dict[str, Any] = field(default_factory=dict)
    process: "subprocess.Popen[bytes] | None" = None
    error: str = ""


def jobs_of(run: Path, manifest: Manifest) -> list[Job]:
    """Every training that the manifest names, the longest first."""
    parts: list[tuple[str, list[str], Path, Any]] = [
        (e.full_name, ["expert", e.full_name], run / "experts", e) for e in manifest.experts
    ]
    parts.append(("router", ["router"], run, manifest.router))
    if manifest.monolith is not None:
        parts.append(("monolith", ["monolith"], run, manifest.monolith))
    jobs = []
    for name, words, parent, part in parts:
        settings = manifest.train_of(part)
        arguments = ["train", *words, "--run", str(run), "--resume", "--quiet"]
        work = float(settings.steps * settings.batch)
        jobs.append(Job(name, arguments, parent / f".train-{name}", settings.steps, work, settings.threads))
    return sorted(jobs, key=lambda job: -job.work)


def run_jobs(jobs: Iterable[Job], slots: int, update: Callable[[list[Job]], None], interval: float = 0.5) -> list[Job]:
    """Runs all jobs, at most `slots` at a time; no job waits for another's success, one that fails is reported.

    Whatever ends this function early (Ctrl-C too) asks the running jobs to save their state and waits for them.
    """
    jobs = list(jobs)
    try:
        while any(job.state in ("waiting", "running") for job in jobs):
            for job in jobs:
                _look(job)
            free = slots - sum(job.state == "running" for job in jobs)
            for job in [job for job in jobs if job.state == "waiting"][:free]:
                _start(job)
            update(jobs)
            time.sleep(interval)
    finally:
        _stop([job for job in jobs if job.state == "running"])
    update(jobs)
    return jobs


def _start(job: Job) -> None:
    job.directory.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(job.threads)}
    with _log(job).open("wb") as log:
        job.process = subprocess.Popen(
            [sys.executable, "-m", "atoll", *job.arguments],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches this process alone, which then stops its jobs in order
        )
    job.state = "running"


def _look(job: Job) -> None:
    if job.state != "running" or job.process is None:
        return
    job.metrics = _last_line(job.directory / "metrics.jsonl") or job.metrics
    code = job.process.poll()
    if code is None:
        return
    job.state = "done" if code == 0 else "failed"
    if code != 0:
        text = _log(job).read_text(errors="replace").strip()
        job.error = text.splitlines()[-1] if text else f"ended with code {code}"


def _stop(running: list[Job]) -> None:
    for job in running:
        if job.process is not None:
            job.process.send_signal(signal.SIGTERM)
    for job in running:
        if job.process is not None:
            try:
                job.process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                job.process.kill()


def _log(job: Job) -> Path:
    return job.directory / "output.log"


def _last_line(file: Path) -> dict[str, Any] | None:
    """The last whole line of a metrics file that tells of a step, read from its end."""
    try:
        with file.open("rb") as stream:
            return _parse_tail(stream)
    except OSError:
        return None


def _parse_tail(stream: IO[bytes]) -> dict[str, Any] | None:
    stream.seek(0, os.SEEK_END)
    stream.seek(max(0, stream.tell() - 2000))
    for text in reversed(stream.read().splitlines()):
        try:
            line: dict[str, Any] = json.loads(text)
        except ValueError:
            continue
        if "loss" in line:  # others tell of a validation, or of an event
            return line
    return None
