"""Processes on this machine: each has GPUs of its own where there are GPUs, else its threads' share of the cores."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from atoll.errors import AtollError
from atoll.launch.backend import Status
from atoll.launch.job import Job, Process

_GPUS = "CUDA_VISIBLE_DEVICES"


class Local:
    """`slots` jobs at a time. devices: the GPUs there are, as CUDA_VISIBLE_DEVICES names them; each job gets `gpus`."""

    outlives = False

    def __init__(self, slots: int, devices: list[str] | None = None, gpus: int = 0):
        self.slots: int | None = slots
        self.gpus = gpus
        self.free = list(devices or [])

    def submit(self, job: Job) -> "LocalJob":
        return LocalJob(self, job)


class LocalJob:
    """A process; its GPUs are free again when it has ended."""

    def __init__(self, place: Local, job: Job):
        self.place = place
        self.devices, place.free = place.free[: job.gpus], place.free[job.gpus :]
        self.process = Process(job, {_GPUS: ",".join(self.devices)} if place.gpus else None)

    def poll(self) -> Status:
        ended = self.process.poll()
        if ended is not None:
            self.place.free += self.devices
            self.devices = []
        return Status(started=True, ended=ended)

    def stop(self) -> None:
        self.process.stop()


@contextmanager
def local_place(jobs: int | None, gpus: int | None, threads: int = 1) -> Iterator[Local]:
    """This machine. jobs: at a time; None: one per GPU, or per `threads` cores. gpus: of each; None: one, if any.

    Raises:
        AtollError: fewer GPUs than one job shall have.
    """
    devices = _devices() if gpus != 0 else []
    if gpus and gpus > len(devices):
        raise AtollError(f"--gpus {gpus}: this machine has {len(devices)}")
    each = (gpus or 1) if devices else 0
    most = len(devices) // each if each else jobs or max(1, len(os.sched_getaffinity(0)) // threads)
    yield Local(min(most, jobs or most), devices, each)


def _devices() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return []
    named = [name for name in os.environ.get(_GPUS, "").split(",") if name]
    return named[: torch.cuda.device_count()] or [str(i) for i in range(torch.cuda.device_count())]
