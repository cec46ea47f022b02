"""The interface of a backend: it accepts jobs and reports their status."""

from dataclasses import dataclass
from typing import Protocol

from atoll.launch.job import ExitStatus, Job


@dataclass(frozen=True)
class Status:
    """What a backend knows about a job.

    started: it runs or ran, rather than waits in a queue. exit_status: None while it runs or waits. restarts: those
    that the backend made by itself.
    """

    started: bool
    exit_status: ExitStatus | None = None
    restarts: int = 0


class JobHandle(Protocol):
    """A submitted job."""

    def poll(self) -> Status: ...

    def stop(self) -> None:
        """Request that the job saves its state and exits, or cancel it in the queue; `poll` reports when it is done."""


class Backend(Protocol):
    """Where jobs run.

    slots: how many run at a time; None: the backend has a queue of its own. gpus: per part. survives_launch: jobs go on
    if the launching process is killed.
    """

    slots: int | None
    gpus: int
    survives_launch: bool

    def submit(self, job: Job) -> JobHandle: ...
