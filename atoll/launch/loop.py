"""The loop of a launch: submits every part to a place, watches, restarts what died, and stops all in order."""

import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from atoll.errors import AtollError
from atoll.launch.backend import Backend, JobHandle
from atoll.launch.job import ExitStatus, Job, last_metrics, name_of_signal
from atoll.storage.layout import EXIT_USER_ERROR

PartState = Literal["waiting", "running", "stopping", "done", "failed", "stopped"]
_LONGEST_PAUSE = 60.0  # seconds before a restart


@dataclass
class TrackedJob:
    """A job in this launch, and how it stands.

    restarts: since the launch began, by it or by the place. metrics: the last line that tells of a step; fresh: whether
    of this start. deaths: what its retries are counted by. earlier: restarts before the present submission.
    """

    job: Job
    state: PartState = "waiting"
    restarts: int = 0
    metrics: dict[str, Any] = field(default_factory=dict)
    fresh: bool = False
    error: str = ""
    submitted: JobHandle | None = None
    deaths: int = 0
    earlier: int = 0
    not_before: float = 0.0  # on the monotonic clock, after a death


def run_jobs(
    jobs: Iterable[Job],
    place: Backend,
    update: Callable[[list[TrackedJob]], None],
    *,
    retries: int = 3,
    limit: int | None = None,
    interval: float = 0.5,
    pause: float = 1.0,
) -> list[TrackedJob]:
    """Runs all jobs; none waits for another's success. One that dies is restarted, one that makes a mistake is not.

    Whatever ends this function early (Ctrl-C and SIGTERM too) asks the running jobs to save their state and waits for
    them; a second Ctrl-C does not wait.

    Args:
        update: hears of all parts, each `interval` seconds.
        limit: jobs at a time, beside what the place itself can hold.
        pause: seconds before the first restart of a job; doubled for each further one.
    """
    parts = [TrackedJob(job) for job in jobs]
    slots = min(place.slots or len(parts), limit or len(parts))
    with _signals_to_stop(place.outlives) as stopped:
        try:
            while not stopped() and any(part.state in ("waiting", "running") for part in parts):
                for part in _next(parts, slots):
                    _submit(part, place)
                for part in parts:
                    _look(part, retries, pause)
                update(parts)
                time.sleep(interval)
        finally:
            _stop(parts, update, interval)
    update(parts)
    return parts


def _next(parts: list[TrackedJob], slots: int) -> list[TrackedJob]:
    """Those to be submitted now."""
    free = slots - sum(part.submitted is not None for part in parts)
    now = time.monotonic()
    ready = [p for p in parts if p.state == "waiting" and p.submitted is None and p.not_before <= now]
    return ready[: max(0, free)]


def _submit(part: TrackedJob, place: Backend) -> None:
    part.metrics, part.fresh = last_metrics(part.job), False
    try:
        part.submitted = place.submit(part.job)
    except AtollError as error:
        part.state, part.error = "failed", str(error)


def _look(part: TrackedJob, retries: int, pause: float) -> None:
    """Learns how a submitted part stands, and decides what becomes of it if it has ended."""
    if part.submitted is None:
        return
    status = part.submitted.poll()
    part.state = "running" if status.started else "waiting"
    part.restarts = part.earlier + status.restarts
    metrics = last_metrics(part.job)
    part.fresh = part.fresh or metrics != part.metrics
    part.metrics = metrics or part.metrics
    if status.ended is None:
        return
    part.submitted = None
    if status.ended.code == 0 and part.job.result.exists():
        part.state = "done"
    elif status.ended.code == EXIT_USER_ERROR or part.deaths >= retries:
        part.state, part.error = "failed", _told(status.ended, part.deaths)
    else:
        part.state, part.error = "waiting", _told(status.ended, 0)
        part.not_before = time.monotonic() + min(_LONGEST_PAUSE, pause * 2**part.deaths)
        part.deaths += 1
        part.restarts = part.earlier = part.restarts + 1


def _told(ended: ExitStatus, deaths: int) -> str:
    """One line: what ended it, after how many deaths, and what it said last."""
    if ended.code == EXIT_USER_ERROR:
        return ended.words
    how: list[str] = []
    if ended.code == 0:
        how.append("ended before it was done")
    elif ended.code == -signal.SIGKILL:
        how.append("ended by SIGKILL (out of memory?)")
    elif ended.code is not None:
        how.append(f"ended by {name_of_signal(-ended.code)}" if ended.code < 0 else f"ended with code {ended.code}")
    if deaths:
        how.append(f"after {deaths} restart{'s' if deaths > 1 else ''}")
    return ": ".join(text for text in (", ".join(how), ended.words) if text)


def _stop(parts: list[TrackedJob], update: Callable[[list[TrackedJob]], None], interval: float) -> None:
    """Asks all submitted parts to end, and waits until they have."""
    running = [part for part in parts if part.submitted is not None]
    for part in running:
        assert part.submitted is not None
        part.submitted.stop()
        part.state = "stopping"
    while running:
        for part in running:
            assert part.submitted is not None
            part.metrics = last_metrics(part.job) or part.metrics
            status = part.submitted.poll()
            if status.ended is not None:
                done = status.ended.code == 0 and part.job.result.exists()
                part.state = "done" if done else "stopped" if status.started else "waiting"
                part.submitted = None
        running = [part for part in running if part.submitted is not None]
        update(parts)
        time.sleep(min(interval, 0.1))


@contextmanager
def _signals_to_stop(outlives: bool) -> Iterator[Callable[[], bool]]:
    """Within it the first SIGINT, SIGTERM or SIGHUP is noted; the second SIGINT is a KeyboardInterrupt again.

    outlives: a closed terminal (SIGHUP) does not end the jobs. Nor does it where it is ignored, under nohup.
    """
    seen: list[int] = []

    def note(number: int, _: Any) -> None:
        seen.append(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if not outlives and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    previous = {number: signal.signal(number, note) for number in numbers}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
