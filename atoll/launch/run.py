"""`atoll launch` as one function."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from atoll.errors import AtollError
from atoll.launch.backend import Backend
from atoll.launch.job import jobs_of
from atoll.launch.loop import run_jobs
from atoll.launch.progress import LaunchView
from atoll.manifest import load_manifest
from atoll.storage.layout import MANIFEST, RunLayout, TrainingLayout


def launch_run(
    run: Path,
    *,
    on: str = "local",
    jobs: int | None = None,
    gpus: int | None = None,
    retries: int = 3,
    options: Sequence[str] = (),
    only: Sequence[str] | None = None,
    allow_hub: bool = False,
    trust_paths: bool = False,
) -> bool:
    """Train all parts that the manifest of a run names, and show their progress.

    Args:
        run: the run's directory, or its atoll.yaml.
        on: "local", "ray" or "slurm".
        jobs: parts at a time; None: as many as fit.
        gpus: per part; None: one if there are any.
        retries: restarts of a part that crashed or was killed.
        options: of sbatch, such as "partition=gpu".
        only: names of the parts to train ("3-flow-linear", "router"); None: all but the student.
        allow_hub, trust_paths: what the cards of the parts' data may reach, as in `load_ensemble`.

    Returns:
        Whether all parts are done; False if the launch was stopped before.

    Raises:
        AtollError: an argument is not valid; or, once all other parts are done, some failed.
    """
    # The run may be named by its manifest.
    if run.is_file():
        if run.name != MANIFEST:
            raise AtollError(f"{run}: expected a file called {MANIFEST}; name that, or the run's directory")
        run = run.parent

    # Local slots depend on the threads of the most demanding part.
    manifest = load_manifest(run).allowing(hub=allow_hub, paths=trust_paths)
    threads = max(job.threads for job in jobs_of(run, manifest))
    with open_backend(on, run, jobs=jobs, gpus=gpus, threads=threads, options=_pairs(options)) as backend:
        # The student needs the assembled ensemble, so it is trained only if named.
        todo = jobs_of(run, manifest, backend.gpus, student=only is not None)
        if only is not None:
            # A misspelt name must not be skipped silently.
            names = [job.name for job in todo]
            if unknown := [name for name in only if name not in names]:
                raise AtollError(f"{run}: no part {', '.join(unknown)}; expected some of {', '.join(names)}")
            todo = [job for job in todo if job.name in only]

        # Run them; the view follows.
        with LaunchView(manifest.name, backend.slots) as view:
            parts = run_jobs(todo, backend, view.update, retries=retries, limit=jobs)

    # Failures are reported once all others are done.
    failed = [part.job.name for part in parts if part.state == "failed"]
    if failed:
        unstarted = [part.job.name for part in parts if part.state == "not started"]
        so = f", so {', '.join(unstarted)} did not start" if unstarted else ""
        logs = TrainingLayout.of(RunLayout(run).root / "**" / "*").output
        raise AtollError(
            f"{len(failed)} of {len(parts)} parts failed ({', '.join(failed)}){so}: see above and {logs}; fix the "
            "cause and run the same command again, which trains what is missing"
        )
    return all(part.state == "done" for part in parts)


def _pairs(options: Sequence[str]) -> dict[str, str]:
    # Options are passed on to sbatch, so only their form is checked.
    pairs = [option.partition("=") for option in options]
    for key, equals, value in pairs:
        if not (key and equals and value):
            raise AtollError(f"--slurm {key}{equals}{value}: expected an option of sbatch and its value: partition=gpu")
    # Both "partition=gpu" and "--partition=gpu" are accepted.
    return {key.removeprefix("--"): value for key, _, value in pairs}


def open_backend(
    on: str, run: Path, *, jobs: int | None, gpus: int | None, threads: int, options: Mapping[str, str]
) -> AbstractContextManager[Backend]:
    """Open a backend by name.

    Args:
        on: "local", "ray" or "slurm".
        run: the run's directory.
        jobs: parts at a time; None: as many as fit.
        gpus: per part; None: one if there are any.
        threads: the most that one part uses.
        options: of sbatch.

    Raises:
        AtollError: the backend is unknown, does not take these options, or its package is not installed.
    """
    if options and on != "slurm":
        raise AtollError(f"--slurm {next(iter(options))}=...: only with --on slurm, got --on {on}")
    # Imported late: Ray and submitit are optional.
    if on == "local":
        from atoll.launch.local import local_backend

        return local_backend(jobs, gpus, threads)
    if on == "ray":
        from atoll.launch.ray import ray_backend

        return ray_backend(gpus)
    if on == "slurm":
        from atoll.launch.slurm import slurm_backend

        return slurm_backend(run, gpus, options)
    raise AtollError(f"--on {on}: expected local, ray or slurm")
