"""The verbs that train: one part, or all of them."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from atoll.cli.app import Quiet, Restart, Resume, Run, app, bar
from atoll.errors import AtollError

train_app = typer.Typer(
    no_args_is_help=True, help="Train one part, alone. Reads its own shards, writes its own artifact."
)
app.add_typer(train_app, name="train", rich_help_panel="Stages")


@train_app.command("expert")
def train_expert(
    expert: Annotated[str, typer.Argument(help="Its cluster's number, or its name: 3, or 3-eps-cosine.")],
    run: Run = Path(),
    resume: Resume = False,
    restart: Restart = False,
    quiet: Quiet = False,
) -> None:
    """Train one expert on its cluster's shards and nothing else -> experts/."""
    from atoll.train.expert import train_expert as work

    _train("expert", run, quiet, lambda m, tell: work(run, m, expert, resume, restart, tell))


@train_app.command("router")
def train_router(run: Run = Path(), resume: Resume = False, restart: Restart = False, quiet: Quiet = False) -> None:
    """Train the router on all latents and their clusters -> router/."""
    from atoll.train.router import train_router as work

    _train("router", run, quiet, lambda m, tell: work(run, m, resume, restart, tell))


@train_app.command("monolith")
def train_monolith(run: Run = Path(), resume: Resume = False, restart: Restart = False, quiet: Quiet = False) -> None:
    """Train the dense model to compare with, on everything -> monolith/."""
    from atoll.train.expert import train_monolith as work

    _train("monolith", run, quiet, lambda m, tell: work(run, m, resume, restart, tell))


@app.command(rich_help_panel="Stages")
def launch(
    run: Run = Path(),
    jobs: Annotated[int | None, typer.Option("--jobs", "-j", min=1, help="At a time; default: one per core.")] = None,
) -> None:
    """Train every expert, the router and the monolith that atoll.yaml names: processes on this machine.

    What is done is not done again, what was interrupted goes on. Ctrl-C saves and stops all.
    """
    import os

    from atoll.launch.local import jobs_of, run_jobs
    from atoll.launch.progress import LaunchView
    from atoll.manifest import load_manifest

    slots = jobs or len(os.sched_getaffinity(0))
    with LaunchView("training", slots) as view:
        done = run_jobs(jobs_of(run, load_manifest(run)), slots, view.update)
    failed = [job for job in done if job.state == "failed"]
    if failed:
        raise AtollError("; ".join(f"{job.name} failed: {job.error}" for job in failed))


def _train(what: str, run: Path, quiet: bool, work: Callable[[Any, Any], Path]) -> None:
    """Runs one training behind a progress bar; a signal that stopped it in order is no error."""
    from atoll.manifest import load_manifest
    from atoll.train.loop import Interrupted

    with bar(what, "steps", quiet) as tell:

        def line(metrics: dict[str, Any]) -> None:
            note = f"loss {metrics['loss']:.4f}, {metrics['images_per_s']:.0f} images/s"
            tell(metrics["step"], metrics["steps"], note)

        try:
            typer.echo(f"{work(load_manifest(run), line)} written")
        except Interrupted as stop:
            typer.echo(str(stop))
