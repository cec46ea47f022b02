"""Slurm jobs through submitit, one per part: a job that is preempted or out of time saves, is requeued, and resumes."""

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
    LOCK_TIMEOUT,
    ExitStatus,
    Job,
    Process,
    clear_stop_request,
    count_starts,
    request_stop,
    supervise,
)
from atoll.storage.layout import EXIT_USER_ERROR, RunLayout

_TIME = 24 * 60  # minutes: the default time limit of one job
_REQUEUES = 1000  # at the time limit; a training of days takes many jobs
_SAVING = 180  # seconds before the time limit at which Slurm signals a job
_SACCT = 30.0  # seconds between two queries of Slurm's accounting
_GRACE = 30.0  # seconds until a shared file system shows what a job wrote before it ended


class Training:
    """What a queued job runs: a callable that submitit pickles, and whose `checkpoint` it calls before a requeue."""

    def __init__(self, job: Job):
        self.job = job
        self.process: Process | None = None

    def __call__(self) -> ExitStatus:
        import submitit

        # The process is stored so that `checkpoint` can stop it.
        self.process = Process(self.job, lock_timeout=LOCK_TIMEOUT)
        return supervise(self.process, submitit.JobEnvironment().job_id)

    def checkpoint(self) -> Any:
        """Save the state on Slurm's signal (SIGUSR2), and return what the requeued job runs."""
        from submitit.helpers import DelayedSubmission

        # The requeued job resumes from what is saved here.
        if self.process is not None:
            self.process.stop()
            self.process.wait()
        return DelayedSubmission(Training(self.job))


class Slurm:
    """A Slurm queue.

    Args:
        run: the run's directory, which all nodes see.
        gpus: per part.
        options: of sbatch; `time` is in minutes.
        cluster: "slurm", or "local" (submitit's own local processes, for tests).
    """

    slots: int | None = None
    survives_launch = True

    def __init__(self, run: Path, gpus: int, options: Mapping[str, str], cluster: str = "slurm"):
        logging.getLogger("submitit").setLevel(logging.ERROR)
        self.folder, self.gpus, self.cluster = RunLayout(run.resolve()).slurm, gpus, cluster
        # The time limit is submitit's own argument; the other options go to sbatch, with its names.
        self.minutes = _minutes(options.get("time", str(_TIME)))
        self.options = {key.replace("-", "_"): value for key, value in options.items() if key != "time"}
        self.last_refresh = time.monotonic()

    def submit(self, job: Job) -> "SlurmJob":
        """Submit a job, or adopt the one that an earlier launch left in the queue."""
        import submitit

        from atoll.storage.artifact import write_json  # imported late: a task that only waits does not need torch

        # Slurm jobs survive the launch: the last one of this part may still wait or run.
        if self.cluster == "slurm" and (number := _last_number(job)) and _state_in_queue(number):
            return SlurmJob(self, job, submitit.SlurmJob(self.folder, number))

        # None is left: submit a new one, and remember its number for the next launch.
        clear_stop_request(job)
        try:
            submission = self._executor(job).submit(Training(job))
        except (RuntimeError, OSError) as error:  # submitit's errors are RuntimeErrors
            raise AtollError(f"Slurm refused the job: {' '.join(str(error).split())}") from None
        job.directory.mkdir(parents=True, exist_ok=True)
        write_json(job.files.slurm_job, {"id": submission.job_id})
        return SlurmJob(self, job, submission)

    def _executor(self, job: Job) -> Any:
        import submitit

        # A job that reaches its time limit is requeued up to this many times.
        timeouts = {f"{self.cluster}_max_num_timeout": _REQUEUES}
        executor = submitit.AutoExecutor(self.folder, cluster=self.cluster, **timeouts)
        # One task on one node per part: an island is one node at most.
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

    def refresh(self) -> None:
        """Let submitit query sacct for the states of all jobs, at most every `_SACCT` seconds."""
        if self.cluster == "slurm" and time.monotonic() - self.last_refresh > _SACCT:
            import submitit

            submitit.SlurmJob.watcher.update()
            self.last_refresh = time.monotonic()


class SlurmJob:
    """A job in the queue. submission: submitit's handle of it."""

    def __init__(self, backend: Slurm, job: Job, submission: Any):
        self.backend, self.job, self.submission = backend, job, submission
        self.seen_ended_at: float | None = None
        self.cancelled = False

    def poll(self) -> Status:
        self.backend.refresh()
        exit_status = None
        # A job cancelled in the queue has no result to wait for.
        if self.cancelled:
            exit_status = ExitStatus(EXIT_USER_ERROR, "cancelled")
        elif self.submission.done() and self._has_surely_ended():
            exit_status = self._exit_status()
        # Read last: the job may have been requeued, and have ended, while Slurm answered.
        starts = count_starts(self.job, self.submission.job_id)
        return Status(starts > 0, exit_status, max(0, starts - 1))

    def _has_surely_ended(self) -> bool:
        """Whether a job that Slurm reports as ended will neither be requeued nor show its result a moment later."""
        if self.submission.paths.result_pickle.exists() or self.backend.cluster != "slurm":
            return True
        # Between two runs of a requeued job, sacct reports it as ended for a moment.
        self.seen_ended_at = self.seen_ended_at or time.monotonic()
        return time.monotonic() - self.seen_ended_at > _GRACE and not _state_in_queue(self.submission.job_id)

    def _exit_status(self) -> ExitStatus:
        state, log = self.submission.state, self.submission.paths.stderr
        # No result: the task itself was killed, or a person cancelled the job, which must not be restarted.
        if not self.submission.paths.result_pickle.exists():
            code = EXIT_USER_ERROR if state.startswith("CANCELLED") else None
            return ExitStatus(code, f"Slurm job {self.submission.job_id} is {state}; see {log}")
        # With a result, the task ended in order, or raised an error that submitit recorded.
        error = self.submission.exception()
        if error is None:
            exit_status: ExitStatus = self.submission.result()
            return exit_status
        # submitit's message is the traceback of the task: its last error line says what happened.
        lines = [line for line in str(error).splitlines() if "Error" in line]
        reason = lines[-1].strip() if lines else "failed"
        return ExitStatus(None, f"Slurm job {self.submission.job_id}: {reason}; see {log}")

    def stop(self) -> None:
        request_stop(self.job)
        number = self.submission.job_id
        # Of a requeued job, an earlier start says nothing: only the queue knows whether it runs now.
        if self.backend.cluster == "slurm":
            runs = _state_in_queue(number) == "RUNNING"
        else:
            runs = count_starts(self.job, number) > 0
        # A job that does not run has nothing left to save: cancel it.
        if not runs:
            self.submission.cancel(check=False)
            self.cancelled = True


@contextmanager
def slurm_backend(run: Path, gpus: int | None, options: Mapping[str, str]) -> Iterator[Slurm]:
    """Open the cluster that this machine submits to.

    Args:
        run: the run's directory.
        gpus: per part; None: one.
        options: of sbatch.

    Raises:
        AtollError: submitit or Slurm is missing, or an option is not valid.
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


def _last_number(job: Job) -> str | None:
    """The number of the part's last job in the queue."""
    from atoll.storage.artifact import read_json

    file = job.files.slurm_job
    return str(read_json(file)["id"]) if file.exists() else None


def _state_in_queue(number: str) -> str:
    """Return PENDING, RUNNING, ...; "" for a job that has left the queue."""
    listed = subprocess.run(["squeue", "-h", "-j", number, "-o", "%T"], capture_output=True, text=True)
    return listed.stdout.strip()
