"""Tasks of a Ray cluster, one per part: if a machine is lost, its parts resume elsewhere from their checkpoints."""

import logging
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from atoll.errors import AtollError
from atoll.launch.backend import Status
from atoll.launch.job import (
    LOCK_TIMEOUT,
    ExitStatus,
    Job,
    Process,
    clear_stop_request,
    count_starts,
    request_stop,
    supervise,
)


def _task(job: Job, token: str) -> ExitStatus:
    """Run a job in a Ray worker. The job's process ends with the worker."""
    return supervise(Process(job, lock_timeout=LOCK_TIMEOUT), token)


class Ray:
    """The cluster that Ray is connected to. gpus: per part."""

    slots: int | None = None
    survives_launch = False

    def __init__(self, gpus: int):
        self.gpus = gpus

    def submit(self, job: Job) -> "RayJob":
        return RayJob(job)


class RayJob:
    """A Ray task. Ray itself does not retry it: the launch does, after a pause, and counts the restarts."""

    def __init__(self, job: Job):
        import ray

        clear_stop_request(job)
        # A new token per submission: starts of earlier ones do not count.
        self.job, self.token = job, uuid.uuid4().hex
        # Ray places the task by these numbers; they do not limit it.
        remote = ray.remote(num_cpus=job.threads, num_gpus=job.gpus, max_retries=0)(_task)
        self.reference: Any = remote.options(name=job.name).remote(job, self.token)

    def poll(self) -> Status:
        import ray

        started = count_starts(self.job, self.token) > 0
        # timeout=0 makes it a poll.
        done, _ = ray.wait([self.reference], timeout=0)
        if not done:
            return Status(started)
        try:
            return Status(started, ray.get(self.reference))
        # The worker died, or its machine is gone: no exit code.
        except ray.exceptions.RayError as error:
            return Status(started, ExitStatus(None, _first_line(error)))

    def stop(self) -> None:
        import ray

        # A started task stops by the file, which lets it save; a queued one has nothing to save.
        request_stop(self.job)
        if not count_starts(self.job, self.token):
            ray.cancel(self.reference)


@contextmanager
def ray_backend(gpus: int | None) -> Iterator[Ray]:
    """Connect to the cluster that RAY_ADDRESS names, or start a local one.

    All machines of the cluster must see the run under the same path and have atoll installed.

    Args:
        gpus: per part; None: one if the cluster has any.

    Raises:
        AtollError: Ray is not installed, or there is no such cluster.
    """
    try:
        import ray
    except ImportError:
        raise AtollError("--on ray needs Ray: pip install 'atoll[ray]'") from None
    # A caller that uses Ray itself keeps its connection.
    starts_ray = not ray.is_initialized()
    if starts_ray:
        try:
            ray.init(logging_level=logging.ERROR, log_to_driver=False, include_dashboard=None)
        except (ConnectionError, ValueError, RuntimeError) as error:
            # Ray's messages are long; the first line states the cause.
            reason = str(error).strip().splitlines()[0]
            raise AtollError(f"Ray: cannot connect to a cluster ({reason}); check RAY_ADDRESS") from None
    try:
        # One GPU per part if the cluster has any, unless the user decided.
        cluster_gpus = int(ray.cluster_resources().get("GPU", 0))
        yield Ray(gpus if gpus is not None else min(1, cluster_gpus))
    finally:
        if starts_ray:
            ray.shutdown()


def _first_line(error: BaseException) -> str:
    """The type of an error of Ray's, and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
