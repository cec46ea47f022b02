"""Jobs of Slurm through submitit, one per part: preempted or out of time, a job saves, is requeued, and goes on."""

import logging
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from atoll.errors import AtollError
from atoll.launch.backend import Status
from atoll.launch.job import (
    PATIENCE,
    ExitStatus,
    Job,
    Process,
    ask_to_stop,
    attend,
    clear_stop,
    starts_of,
)
from atoll.storage.layout import EXIT_USER_ERROR, RunLayout

_TIME = 24 * 60  # minutes, unless `time` is given
_REQUEUES = 1000  # at the time limit: days of training are many jobs' time
_SAVING = 180  # seconds before the time limit at which a job is told
_SACCT = 30.0  # seconds between two questions to Slurm's accounting
_GRACE = 30.0  # seconds in which a shared file system shows what an ended job wrote


class Training:
    """What is run in the queue: a callable that submitit pickles, and asks for a checkpoint before it requeues it."""

    def __init__(self, job: Job):
        self.job = job
        self.process: Process | None = None

    def __call__(self) -> ExitStatus:
        import submitit

        self.process = Process(self.job, patience=PATIENCE)
        return attend(self.process, submitit.JobEnvironment().job_id)

    def checkpoint(self) -> Any:
        """Called on Slurm's signal (SIGUSR2): saves, and says what is to be run when the job's turn comes again."""
        from submitit.helpers import DelayedSubmission

        if self.process is not None:
            self.process.stop()
            self.process.wait()
        return DelayedSubmission(Training(self.job))


class Slurm:
    """A queue. cluster: "slurm", or "local" (submitit's own processes here, for tests). options: of sbatch."""

    slots: int | None = None
    outlives = True

    def __init__(self, run: Path, gpus: int, options: Mapping[str, str], cluster: str = "slurm"):
        logging.getLogger("submitit").setLevel(logging.ERROR)
        self.folder, self.gpus, self.cluster = RunLayout(run.resolve()).slurm, gpus, cluster
        self.minutes = _minutes(options.get("time", str(_TIME)))
        self.options = {key.replace("-", "_"): value for key, value in options.items() if key != "time"}
        self.asked = time.monotonic()

    def submit(self, job: Job) -> "SlurmJob":
        """A job that an earlier launch left in the queue is taken over."""
        import submitit

        from atoll.storage.artifact import write_json  # not above: torch is too much for a task that only waits

        if self.cluster == "slurm" and (number := _number(job)) and _state_in_queue(number):
            return SlurmJob(self, job, submitit.SlurmJob(self.folder, number))
        clear_stop(job)
        try:
            submitted = self._executor(job).submit(Training(job))
        except (RuntimeError, OSError) as error:  # submitit's own are RuntimeErrors
            raise AtollError(f"Slurm refused it: {' '.join(str(error).split())}") from None
        job.directory.mkdir(parents=True, exist_ok=True)
        write_json(job.files.slurm_job, {"id": submitted.job_id})
        return SlurmJob(self, job, submitted)

    def _executor(self, job: Job) -> Any:
        import submitit

        timeouts = {f"{self.cluster}_max_num_timeout": _REQUEUES}
        executor = submitit.AutoExecutor(self.folder, cluster=self.cluster, **timeouts)
        executor.update_parameters(
            name=f"atoll-{job.name}",
            timeout_min=self.minutes,
            nodes=1,
            tasks_per_node=1,
            cpus_per_task=job.threads,
            gpus_per_node=job.gpus or None,
            slurm_signal_delay_s=_SAVING,
            slurm_additional_parameters={"requeue": True, **self.options},
        )
        return executor

    def ask(self) -> None:
        """Lets submitit ask sacct for the state of all jobs, now and then."""
        if self.cluster == "slurm" and time.monotonic() - self.asked > _SACCT:
            import submitit

            submitit.SlurmJob.watcher.update()
            self.asked = time.monotonic()


class SlurmJob:
    """A job in the queue. submitted: submitit's."""

    def __init__(self, place: Slurm, job: Job, submitted: Any):
        self.place, self.job, self.submitted = place, job, submitted
        self.ended_at: float | None = None
        self.cancelled = False

    def poll(self) -> Status:
        self.place.ask()
        ended = None
        if self.cancelled:
            ended = ExitStatus(EXIT_USER_ERROR, "cancelled")
        elif self.submitted.done() and self._is_certain():
            ended = self._ended()
        # Read last: the job may have been requeued and have ended while Slurm was asked.
        starts = starts_of(self.job, self.submitted.job_id)
        return Status(starts > 0, ended, max(0, starts - 1))

    def _is_certain(self) -> bool:
        """Whether a job that Slurm says has ended is not about to be requeued, nor its result about to be seen."""
        if self.submitted.paths.result_pickle.exists() or self.place.cluster != "slurm":
            return True
        self.ended_at = self.ended_at or time.monotonic()
        return time.monotonic() - self.ended_at > _GRACE and not _state_in_queue(self.submitted.job_id)

    def _ended(self) -> ExitStatus:
        state, log = self.submitted.state, self.submitted.paths.stderr
        if not self.submitted.paths.result_pickle.exists():
            code = EXIT_USER_ERROR if state.startswith("CANCELLED") else None
            return ExitStatus(code, f"Slurm job {self.submitted.job_id} is {state}; see {log}")
        error = self.submitted.exception()
        if error is None:
            ended: ExitStatus = self.submitted.result()
            return ended
        lines = [line for line in str(error).splitlines() if "Error" in line]
        return ExitStatus(
            None, f"Slurm job {self.submitted.job_id}: {lines[-1].strip() if lines else 'failed'}; see {log}"
        )

    def stop(self) -> None:
        ask_to_stop(self.job)
        number = self.submitted.job_id
        if self.place.cluster == "slurm":
            runs = _state_in_queue(number) == "RUNNING"  # and no requeued one that waits
        else:
            runs = starts_of(self.job, number) > 0
        if not runs:
            self.submitted.cancel(check=False)
            self.cancelled = True


@contextmanager
def slurm_place(run: Path, gpus: int | None, options: Mapping[str, str]) -> Iterator[Slurm]:
    """The cluster that this machine submits to. gpus: of each part; None: one.

    Raises:
        AtollError: no submitit, no Slurm, or options that it does not take.
    """
    try:
        import submitit  # noqa: F401
    except ImportError:
        raise AtollError("--on slurm needs submitit: pip install 'atoll[slurm]'") from None
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise AtollError("--on slurm: no sbatch and srun here; launch from a login node of the cluster")
    yield Slurm(run, 1 if gpus is None else gpus, options)


def _minutes(text: str) -> int:
    if not text.isdigit() or text == "0":
        raise AtollError(f"--slurm time={text}: expected minutes, such as time=1440")
    return int(text)


def _number(job: Job) -> str | None:
    """Of the part's last job."""
    from atoll.storage.artifact import read_json

    file = job.files.slurm_job
    return str(read_json(file)["id"]) if file.exists() else None


def _state_in_queue(number: str) -> str:
    """PENDING, RUNNING, ...; empty for a job that is not in the queue any more."""
    listed = subprocess.run(["squeue", "-h", "-j", number, "-o", "%T"], capture_output=True, text=True)
    return listed.stdout.strip()
