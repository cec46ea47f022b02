"""What a place is: it takes jobs, and tells how they stand."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from atoll.errors import AtollError
from atoll.launch.job import Ended, Job


@dataclass(frozen=True)
class Status:
    """What a place knows of a job. started: not merely queued. restarts: those that the place made by itself."""

    started: bool
    ended: Ended | None = None
    restarts: int = 0


class Submitted(Protocol):
    """A job that a place has taken."""

    def poll(self) -> Status: ...

    def stop(self) -> None:
        """Asks it to save its state and to end, or takes it out of the queue; `poll` tells when it has."""


class Place(Protocol):
    """Where jobs run. slots: how many at a time; None: it has a queue of its own. gpus: of each part.
    outlives: whether jobs go on when the launch itself was killed."""

    slots: int | None
    gpus: int
    outlives: bool

    def submit(self, job: Job) -> Submitted: ...


def open_place(
    on: str, run: Path, jobs: int | None, gpus: int | None, threads: int, options: Mapping[str, str]
) -> AbstractContextManager[Place]:
    """The place called `on`; see `atoll.launch.run.launch_run`. threads: at most, of one part.

    Raises AtollError for an unknown place, options that it does not have, or a package that is not installed.
    """
    if options and on != "slurm":
        raise AtollError(f"--slurm {next(iter(options))}=...: only with --on slurm, got --on {on}")
    if on == "local":
        from atoll.launch.local import local_place

        return local_place(jobs, gpus, threads)
    if on == "ray":
        from atoll.launch.ray import ray_place

        return ray_place(gpus)
    if on == "slurm":
        from atoll.launch.slurm import slurm_place

        return slurm_place(run, gpus, options)
    raise AtollError(f"--on {on}: expected local, ray or slurm")
