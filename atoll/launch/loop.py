"""The launch loop: it submits every part to a backend, polls, restarts what crashed, and stops everything in order."""

import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from atoll.errors import AtollError
from atoll.launch.backend import Backend, JobHandle
from atoll.launch.job import ExitStatus, Job, holder_of, last_metrics, name_of_signal
from atoll.storage.layout import EXIT_OUT_OF_MEMORY, EXIT_USER_ERROR

PartState = Literal["waiting", "running", "elsewhere", "stopping", "done", "failed", "not started", "stopped"]
_MAX_PAUSE = 60.0  # seconds before a restart
_LOCK_INTERVAL = 1.0  # seconds between looks at the lock of a part that another launch trains


@dataclass
class TrackedJob:
    """A job of this launch and its state.

    restarts: since the launch began, by the launch or by the backend. metrics: the last line that describes a training
    step. fresh: whether that line is from the current start. error: why it failed, why it is being restarted, or which
    process of another launch trains it. handle: None unless submitted. crashes: counted against the retries.
    earlier_restarts: those before the current submission. restart_at: on the monotonic clock, after a crash.
    """

    job: Job
    state: PartState = "waiting"
    restarts: int = 0
    metrics: dict[str, Any] = field(default_factory=dict)
    fresh: bool = False
    error: str = ""
    handle: JobHandle | None = None
    crashes: int = 0
    earlier_restarts: int = 0
    restart_at: float = 0.0


def run_jobs(
    jobs: Iterable[Job],
    backend: Backend,
    update: Callable[[list[TrackedJob]], None],
    *,
    retries: int = 3,
    limit: int | None = None,
    interval: float = 0.5,
    pause: float = 1.0,
) -> list[TrackedJob]:
    """Run all jobs. One that crashes is restarted, one that ends with a user error is not.

    A job that comes after another (`Job.after`) starts once that one is done. If that one fails, it is not started, and
    fails as well. One that comes after a job which is not in `jobs` does not wait.

    A part that another launch trains is watched, and holds no slot. When the process there ends, it is submitted here:
    that finds it done, or resumes it if it was stopped there.

    Whatever ends this function early, Ctrl-C and SIGTERM included, first stops the running jobs and waits until they
    have saved their state; a second Ctrl-C does not wait.

    Args:
        jobs: what to run.
        backend: where.
        update: called with all parts, every `interval` seconds.
        retries: restarts of a part after crashes.
        limit: jobs at a time, if fewer than the backend has slots.
        interval: seconds between polls.
        pause: seconds before the first restart of a job; doubled for each further one.

    Returns:
        The parts in their final states.
    """
    parts = [TrackedJob(job) for job in jobs]
    # A backend without slots queues the parts itself, so all of them can be submitted.
    slots = min(backend.slots or len(parts), limit or len(parts))
    with _signals_to_stop(backend.survives_launch) as stopped:
        try:
            # Until all parts are done or failed, or a signal arrives.
            while not stopped() and any(part.state in ("waiting", "running", "elsewhere") for part in parts):
                # Fill the free slots; restarts wait in the same queue.
                for part in _ready(parts, slots):
                    _submit(part, backend)
                # Collect progress and exits.
                for part in parts:
                    _poll(part, retries, pause)
                    _watch(part)
                _give_up_dependents(parts)
                update(parts)
                time.sleep(interval)
        finally:
            # Errors of the launch itself, such as a broken view, stop the jobs too.
            _stop(parts, update, interval)
    update(parts)
    return parts


def _ready(parts: list[TrackedJob], slots: int) -> list[TrackedJob]:
    """The waiting parts that fit into the free slots."""
    # A submitted part holds its slot even while it waits in the backend's own queue.
    free = slots - sum(part.handle is not None for part in parts)
    now = time.monotonic()
    done = {p.job.name: p.state == "done" for p in parts}
    # A part that crashed waits until its pause is over; one that starts from another part's result, for that part.
    ready = [p for p in parts if p.state == "waiting" and p.handle is None and p.restart_at <= now]
    ready = [p for p in ready if done.get(p.job.after, True)]
    return ready[: max(0, free)]


def _give_up_dependents(parts: list[TrackedJob]) -> None:
    """Give up the parts that would start from the result of one that failed or was given up."""
    lost = {part.job.name for part in parts if part.state in ("failed", "not started")}
    for part in parts:
        if part.state == "waiting" and part.handle is None and part.job.after in lost:
            part.state, part.error = "not started", f"{part.job.after}, from which it starts, failed"


def _submit(part: TrackedJob, backend: Backend) -> None:
    # Metrics of an earlier start give the step to show, but no rate.
    part.metrics, part.fresh = last_metrics(part.job), False
    try:
        # A backend that refuses one part does not stop the others.
        part.handle = backend.submit(part.job)
    except AtollError as error:
        part.state, part.error = "failed", str(error)


def _poll(part: TrackedJob, retries: int, pause: float) -> None:
    """Update a submitted part's state; if it has ended, decide whether it is done, failed or to be restarted."""
    if part.handle is None:
        return
    # Take over what the backend and the metrics say.
    status = part.handle.poll()
    part.state = "running" if status.started else "waiting"
    part.restarts = part.earlier_restarts + status.restarts
    metrics = last_metrics(part.job)
    part.fresh = part.fresh or metrics != part.metrics
    part.metrics = metrics or part.metrics
    if status.exit_status is None:
        return
    # Another launch trains it.
    if status.exit_status.held_by:
        part.handle, part.state, part.fresh = None, "elsewhere", False
        part.error = f"trained by another launch ({status.exit_status.held_by})"
        part.restart_at = time.monotonic() + _LOCK_INTERVAL
        return
    # It has ended: an exit code of 0 counts only if the artifact is there, as a stopped training exits with 0 too.
    part.handle = None
    if status.exit_status.code == 0 and part.job.result.exists():
        part.state = "done"
    # A user error would repeat itself: it is not retried.
    elif status.exit_status.code == EXIT_USER_ERROR or part.crashes >= retries:
        part.state, part.error = "failed", _describe(status.exit_status, part.crashes)
    # Everything else may be the machine's fault, lack of memory too, since others may use it. Wait, twice as long each
    # time, and restart from the checkpoint.
    else:
        part.state, part.error = "waiting", _describe(status.exit_status, 0)
        part.restart_at = time.monotonic() + min(_MAX_PAUSE, pause * 2**part.crashes)
        part.crashes += 1
        part.restarts = part.earlier_restarts = part.restarts + 1


def _watch(part: TrackedJob) -> None:
    """Update a part that another launch trains: it is to be submitted here once nobody trains it there."""
    if part.state != "elsewhere" or time.monotonic() < part.restart_at:
        return
    # Its metrics show that it advances.
    metrics = last_metrics(part.job)
    part.fresh = part.fresh or metrics != part.metrics
    part.metrics, part.restart_at = metrics or part.metrics, time.monotonic() + _LOCK_INTERVAL
    if holder := holder_of(part.job):
        part.error = f"trained by another launch ({holder})"
    else:
        part.state, part.error = "waiting", ""


def _describe(exit_status: ExitStatus, crashes: int) -> str:
    """One line: what ended the job, after how many restarts, and its last message."""
    code = exit_status.code
    if code == EXIT_USER_ERROR:
        return exit_status.message
    # Negative codes are signals, None is a lost machine. Its message says so, as that of lack of memory does.
    reason: list[str] = []
    if code == 0:
        reason.append("exited before it was done")
    elif code == -signal.SIGKILL:
        reason.append("killed by SIGKILL (out of memory?)")
    elif code is not None and code != EXIT_OUT_OF_MEMORY:
        reason.append(f"killed by {name_of_signal(-code)}" if code < 0 else f"exited with code {code}")
    # How often it was tried before it was given up.
    if crashes:
        reason.append(f"after {crashes} restart{'s' if crashes > 1 else ''}")
    return ": ".join(text for text in (", ".join(reason), exit_status.message) if text)


def _stop(parts: list[TrackedJob], update: Callable[[list[TrackedJob]], None], interval: float) -> None:
    """Stop all submitted parts, and wait until they have saved and exited."""
    # Request it from all of them first, so that they save at the same time.
    running = [part for part in parts if part.handle is not None]
    for part in running:
        assert part.handle is not None
        part.handle.stop()
        part.state = "stopping"
    # Then wait, and keep the view up to date.
    while running:
        for part in running:
            assert part.handle is not None
            part.metrics = last_metrics(part.job) or part.metrics
            status = part.handle.poll()
            if status.exit_status is not None:
                # It may have finished just before the signal arrived.
                done = status.exit_status.code == 0 and part.job.result.exists()
                part.state = "done" if done else "stopped" if status.started else "waiting"
                part.handle = None
        running = [part for part in running if part.handle is not None]
        update(parts)
        time.sleep(min(interval, 0.1))


@contextmanager
def _signals_to_stop(survives_launch: bool) -> Iterator[Callable[[], bool]]:
    """Within it, the first SIGINT, SIGTERM or SIGHUP is recorded; a second SIGINT raises KeyboardInterrupt as usual.

    SIGHUP (a closed terminal) is left alone if the jobs survive the launch, and if it is ignored, as under nohup.
    """
    received: list[int] = []

    def record(number: int, _: Any) -> None:
        received.append(number)
        # An impatient user gets Python's own handler back.
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if not survives_launch and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    # The earlier handlers return when the launch is over.
    previous = {number: signal.signal(number, record) for number in numbers}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
