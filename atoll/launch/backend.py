"""What a place is: it takes jobs, and tells how they stand."""

from dataclasses import dataclass
from typing import Protocol

from atoll.launch.job import ExitStatus, Job


@dataclass(frozen=True)
class Status:
    """What a place knows of a job. started: not merely queued. restarts: those that the place made by itself."""

    started: bool
    ended: ExitStatus | None = None
    restarts: int = 0


class JobHandle(Protocol):
    """A job that a place has taken."""

    def poll(self) -> Status: ...

    def stop(self) -> None:
        """Asks it to save its state and to end, or takes it out of the queue; `poll` tells when it has."""


class Backend(Protocol):
    """Where jobs run. slots: how many at a time; None: it has a queue of its own. gpus: of each part.
    outlives: whether jobs go on when the launch itself was killed."""

    slots: int | None
    gpus: int
    outlives: bool

    def submit(self, job: Job) -> JobHandle: ...
