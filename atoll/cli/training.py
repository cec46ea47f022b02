"""The verbs that train: one part, or all of them; and the one that makes data for it where there are none."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from atoll.cli.app import Quiet, Restart, Resume, RunOption, app, bar
from atoll.storage.layout import EXIT_INTERRUPTED

if TYPE_CHECKING:
    from atoll.choices import Method

train_app = typer.Typer(
    no_args_is_help=True, help="Train one part, alone. Reads its own shards, writes its own artifact."
)
app.add_typer(train_app, name="train", rich_help_panel="Stages")
Nproc = Annotated[
    int, typer.Option("--nproc", min=1, help="Processes that share each batch: one per GPU of this node.")
]


@train_app.command("expert")
def train_expert(
    expert: Annotated[str, typer.Argument(help="Its cluster's number, or its name: 3, or 3-eps-cosine.")],
    run: RunOption = Path(),
    resume: Resume = False,
    restart: Restart = False,
    nproc: Nproc = 1,
    quiet: Quiet = False,
) -> None:
    """Train one expert on its cluster's shards and nothing else -> experts/."""
    _train(["expert", expert], run, resume, restart, nproc, quiet)


def _verb(part: str, told: str) -> Callable[..., None]:
    """The verb that trains a part of which a run has one; told: its help."""

    def train(
        run: RunOption = Path(),
        resume: Resume = False,
        restart: Restart = False,
        nproc: Nproc = 1,
        quiet: Quiet = False,
    ) -> None:
        _train([part], run, resume, restart, nproc, quiet)

    return train_app.command(part, help=told)(train)


train_router = _verb("router", "Train the router on all latents and their clusters -> router/.")
train_monolith = _verb("monolith", "Train the dense model to compare with, on everything -> monolith/.")
train_student = _verb(
    "student", "Train the dense model that learns from the ensemble -> student/; the same as `atoll distil`."
)
app.command("distil", rich_help_panel="Stages", help="One dense model that learns from the ensemble -> student/.")(
    train_student
)


@app.command(rich_help_panel="Stages")
def synthesize(
    out: Annotated[Path, typer.Argument(help="The run to make, or --run itself where that has no data.")],
    run: RunOption = Path(),
    images: Annotated[int, typer.Option("--images", "-n", min=2, help="Latents of each cluster.")] = 4096,
    captions: Annotated[
        Path | None,
        typer.Option(help="A text file, one caption per line, or a directory with one per cluster (cluster-000.txt)."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Solver steps; default: atoll.yaml's.")] = None,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1 draws what the experts learned.")] = 1.0,
    method: Annotated[str | None, typer.Option(help="euler, heun or dpm++2m; default: atoll.yaml's.")] = None,
    seed: Annotated[int | None, typer.Option(help="Default: atoll.yaml's.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with draws that were interrupted.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace other draws; data are never replaced.")] = False,
    quiet: Quiet = False,
) -> None:
    """Without images: experts draw what router and student train on -> OUT/encoded/ and OUT/clusters/."""
    from atoll.manifest import load_manifest
    from atoll.synthesize import synthesize_run

    with bar("synthesize", "latents", quiet) as tell:
        done = synthesize_run(
            run,
            load_manifest(run),
            out,
            images=images,
            captions=captions,
            steps=steps,
            guidance=guidance,
            method=cast("Method | None", method),
            seed=seed,
            resume=resume,
            force=force,
            progress=tell,
        )
    typer.echo(done)


@app.command(rich_help_panel="Stages")
def launch(
    where: Annotated[
        Path | None, typer.Argument(metavar="RUN", help="The run's directory, or its atoll.yaml; as --run.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", min=1, help="Parts at a time; default: all there is room for.")
    ] = None,
    run: RunOption = Path(),
    on: Annotated[str, typer.Option(help="local (processes here), ray or slurm (a cluster).")] = "local",
    gpus: Annotated[int | None, typer.Option(min=0, help="Of each part; default: 1 where there are any.")] = None,
    retries: Annotated[int, typer.Option(min=0, help="Restarts of a part that was killed or crashed.")] = 3,
    slurm: Annotated[
        list[str] | None, typer.Option(help="An option of sbatch, such as partition=gpu; may be repeated.")
    ] = None,
) -> None:
    """Train every expert, the router and the monolith that atoll.yaml names, each alone.

    What is done is not done again, what was interrupted goes on. Ctrl-C saves and stops all.
    """
    from atoll.launch.run import launch_run

    if not launch_run(where or run, on=on, jobs=jobs, gpus=gpus, retries=retries, options=slurm or []):
        typer.echo("stopped; all progress is saved; run the same command to resume", err=True)
        raise typer.Exit(EXIT_INTERRUPTED)


def _trainer(part: str) -> Callable[..., Path]:
    """What trains a part: (run, manifest, which one of several, resume=, restart=, progress=) -> its directory."""
    if part == "router":
        from atoll.train.router import train_router

        return train_router
    if part == "student":
        from atoll.train.distil import distil_run

        return distil_run
    from atoll.train.expert import train_expert, train_monolith

    return train_expert if part == "expert" else train_monolith


def _train(what: list[str], run: Path, resume: bool, restart: bool, nproc: int, quiet: bool) -> None:
    """Runs one training behind a progress bar; a signal that stopped it in order is no error.

    what: the part, and which one where there are several: what stands behind `atoll train`.
    """
    from atoll.train.workers import is_first_process, reporting, train_together

    if nproc > 1:
        flags = {"--resume": resume, "--restart": restart, "--quiet": quiet}
        train_together(["train", *what, "--run", str(run), *(flag for flag, on in flags.items() if on)], nproc)
        return
    first = is_first_process()
    with reporting(), bar(what[0], "steps", quiet or not first) as tell:
        from atoll.manifest import load_manifest
        from atoll.train.loop import Interrupted

        def line(metrics: dict[str, Any]) -> None:
            note = f"loss {metrics['loss']:.4f}, {metrics['images_per_s']:.0f} images/s"
            tell(metrics["step"], metrics["steps"], note)

        try:
            part, *which = what
            options = {"resume": resume, "restart": restart, "progress": line}
            done = f"{_trainer(part)(run, load_manifest(run), *which, **options)} written"
        except Interrupted as stop:
            done = str(stop)
        if first:
            typer.echo(done)
