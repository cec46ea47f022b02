"""Tasks of a Ray cluster, one per part: what was on a machine that is lost goes on elsewhere, from its checkpoint."""

import logging
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from atoll.errors import AtollError
from atoll.launch.backend import Status
from atoll.launch.job import PATIENCE, ExitStatus, Job, Process, ask_to_stop, attend, clear_stop, starts_of


def _task(job: Job, token: str) -> ExitStatus:
    """What a worker of Ray does. The job's process dies with it."""
    return attend(Process(job, patience=PATIENCE), token)


class Ray:
    """The cluster that Ray is connected to. gpus: of each part."""

    slots: int | None = None
    outlives = False

    def __init__(self, gpus: int):
        self.gpus = gpus

    def submit(self, job: Job) -> "RayJob":
        return RayJob(job)


class RayJob:
    """A task. Ray does not retry it by itself: the launch does, after a pause, and counts."""

    def __init__(self, job: Job):
        import ray

        clear_stop(job)
        self.job, self.token = job, uuid.uuid4().hex
        remote = ray.remote(num_cpus=job.threads, num_gpus=job.gpus, max_retries=0)(_task)
        self.reference: Any = remote.options(name=job.name).remote(job, self.token)

    def poll(self) -> Status:
        import ray

        started = starts_of(self.job, self.token) > 0
        done, _ = ray.wait([self.reference], timeout=0)
        if not done:
            return Status(started)
        try:
            return Status(started, ray.get(self.reference))
        except ray.exceptions.RayError as error:
            return Status(started, ExitStatus(None, _in_words(error)))

    def stop(self) -> None:
        import ray

        ask_to_stop(self.job)
        if not starts_of(self.job, self.token):
            ray.cancel(self.reference)


@contextmanager
def ray_place(gpus: int | None) -> Iterator[Ray]:
    """The cluster that RAY_ADDRESS names, else a local one. gpus: of each part; None: one, if the cluster has any.

    All its machines must see the run under the same path, and have atoll installed.

    Raises:
        AtollError: no ray, or no such cluster.
    """
    try:
        import ray
    except ImportError:
        raise AtollError("--on ray needs Ray: pip install 'atoll[ray]'") from None
    own = not ray.is_initialized()
    if own:
        try:
            ray.init(logging_level=logging.ERROR, log_to_driver=False, include_dashboard=None)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise AtollError(f"Ray: no cluster ({str(error).strip().splitlines()[0]}); look at RAY_ADDRESS") from None
    try:
        there = int(ray.cluster_resources().get("GPU", 0))
        yield Ray(gpus if gpus is not None else min(1, there))
    finally:
        if own:
            ray.shutdown()


def _in_words(error: BaseException) -> str:
    """The first line of what Ray says, and which kind of error it is."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
