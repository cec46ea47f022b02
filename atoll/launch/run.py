"""The whole of `atoll launch`."""

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
) -> bool:
    """Trains all parts that the manifest of `run` names and shows how they stand; whether it was not stopped before.

    Args:
        run: the directory, or the atoll.yaml in it.
        on: local, ray or slurm.
        jobs: parts at a time; None: as many as there is room for.
        gpus: of each part; None: one where there are GPUs.
        retries: restarts of a part that died of something else than a mistake.
        options: of sbatch: "partition=gpu".
        only: names of parts ("3-flow-linear", "router"), instead of all; "student" is trained only where it is named.

    Raises:
        AtollError: a mistake in any of that; or, when all others are done, parts that failed for good.
    """
    if run.is_file():
        if run.name != MANIFEST:
            raise AtollError(f"{run}: the manifest of a run is called {MANIFEST}; give that, or the run's directory")
        run = run.parent
    manifest = load_manifest(run)
    threads = max(job.threads for job in jobs_of(run, manifest))
    with open_place(on, run, jobs=jobs, gpus=gpus, threads=threads, options=_pairs(options)) as place:
        todo = jobs_of(run, manifest, place.gpus, student=only is not None)
        if only is not None:
            names = [job.name for job in todo]
            if unknown := [name for name in only if name not in names]:
                raise AtollError(f"{run}: no part {', '.join(unknown)}; expected some of {', '.join(names)}")
            todo = [job for job in todo if job.name in only]
        with LaunchView(manifest.name, place.slots) as view:
            parts = run_jobs(todo, place, view.update, retries=retries, limit=jobs)
    failed = [part.job.name for part in parts if part.state == "failed"]
    if failed:
        logs = TrainingLayout.of(RunLayout(run).root / "**" / "*").output
        raise AtollError(
            f"{len(failed)} of {len(parts)} parts failed ({', '.join(failed)}): why stands above, and in "
            f"{logs}; once that is mended the same command trains what is missing"
        )
    return all(part.state == "done" for part in parts)


def _pairs(options: Sequence[str]) -> dict[str, str]:
    pairs = [option.partition("=") for option in options]
    for key, equals, value in pairs:
        if not (key and equals and value):
            raise AtollError(f"--slurm {key}{equals}{value}: expected an option of sbatch and its value: partition=gpu")
    return {key.removeprefix("--"): value for key, _, value in pairs}


def open_place(
    on: str, run: Path, *, jobs: int | None, gpus: int | None, threads: int, options: Mapping[str, str]
) -> AbstractContextManager[Backend]:
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
