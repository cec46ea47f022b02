"""Local processes: each has GPUs of its own if the machine has GPUs, else its threads' share of the cores."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from atoll.errors import AtollError
from atoll.launch.backend import Status
from atoll.launch.job import Job, Process

_VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"


class Local:
    """`slots` jobs at a time. devices: all GPUs, as CUDA_VISIBLE_DEVICES names them; each job gets `gpus` of them."""

    survives_launch = False

    def __init__(self, slots: int, devices: list[str] | None = None, gpus: int = 0):
        self.slots: int | None = slots
        self.gpus = gpus
        self.free_devices = list(devices or [])

    def submit(self, job: Job) -> "LocalJob":
        return LocalJob(self, job)


class LocalJob:
    """A local process; it returns its GPUs when it exits."""

    def __init__(self, backend: Local, job: Job):
        self.backend = backend
        # Take GPUs from the free ones. A job that trains on the CPU takes none, and sees none.
        self.devices, backend.free_devices = backend.free_devices[: job.gpus], backend.free_devices[job.gpus :]
        self.process = Process(job, {_VISIBLE_GPUS: ",".join(self.devices)} if backend.gpus else None)

    def poll(self) -> Status:
        exit_status = self.process.poll()
        if exit_status is not None:
            # Return them once, however often it is polled.
            self.backend.free_devices += self.devices
            self.devices = []
        return Status(started=True, exit_status=exit_status)

    def stop(self) -> None:
        self.process.stop()


@contextmanager
def local_backend(jobs: int | None, gpus: int | None, threads: int = 1) -> Iterator[Local]:
    """Open this machine as a backend.

    Args:
        jobs: how many run at a time; None: one per GPU, or one per `threads` cores.
        gpus: per job; None: one if the machine has any.
        threads: per job, on a CPU.

    Raises:
        AtollError: the machine has fewer GPUs than one job needs.
    """
    devices = _devices() if gpus != 0 else []
    if gpus and gpus > len(devices):
        raise AtollError(f"--gpus {gpus}: this machine has {len(devices)}; lower it")
    # Without GPUs, jobs share the cores.
    gpus_per_job = (gpus or 1) if devices else 0
    # The cores that this process may use, which a scheduler can restrict.
    cores = len(os.sched_getaffinity(0))
    # More jobs than cores are the user's choice; more jobs than GPUs are not possible.
    max_jobs = len(devices) // gpus_per_job if gpus_per_job else jobs or max(1, cores // threads)
    yield Local(min(max_jobs, jobs or max_jobs), devices, gpus_per_job)


def _devices() -> list[str]:
    import torch

    # Without a GPU there is nothing to hand out.
    if not torch.cuda.is_available():
        return []
    # Respect a restriction by the user or by a scheduler, whose names may be UUIDs.
    named = [name for name in os.environ.get(_VISIBLE_GPUS, "").split(",") if name]
    return named[: torch.cuda.device_count()] or [str(i) for i in range(torch.cuda.device_count())]
