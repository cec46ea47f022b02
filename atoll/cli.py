"""The command line: one verb per stage, no logic. Heavy imports stand inside the verbs: `atoll --help` is instant."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
import typer.core

from atoll.errors import AtollError

if TYPE_CHECKING:
    from atoll.data.encode import Place
    from atoll.ensemble import Alignment
    from atoll.solver import Method


class _InOrder(typer.core.TyperGroup):
    """Lists the verbs in the order of a run's life."""

    def list_commands(self, ctx: Any) -> list[str]:
        order = ["init", "encode", "cluster", "train", "launch", "assemble", "sample", "evaluate", "demo"]
        return sorted(super().list_commands(ctx), key=order.index)


app = typer.Typer(
    name="atoll",
    cls=_InOrder,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="One diffusion model, trained on many machines that never talk to each other.\n\n"
    "A run is a directory with an atoll.yaml. Its stages, in order: **init**, **encode**, **cluster**, **train** "
    "(each expert alone, on any machine; **launch** trains all of them here), **assemble**, **sample**, **evaluate**. "
    "**demo** does all of it on an embedded data set.",
)
train_app = typer.Typer(
    no_args_is_help=True, help="Train one part, alone. Reads its own shards, writes its own artifact."
)
app.add_typer(train_app, name="train", rich_help_panel="Stages")

Run = Annotated[Path, typer.Option("--run", "-r", help="The run's directory, which holds atoll.yaml.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint, bit for bit.")]
Restart = Annotated[bool, typer.Option("--restart", help="Throw an existing checkpoint or artifact away.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]


@app.command(rich_help_panel="Stages")
def init(
    run: Annotated[Path, typer.Argument(help="The directory to make.")],
    recipe: Annotated[str, typer.Option(help="A built-in recipe, or a yaml file.")] = "demo",
) -> None:
    """Make a run: a directory with an atoll.yaml to edit."""
    from atoll.artifact import write_bytes
    from atoll.manifest import MANIFEST, parse_manifest, recipe_path

    source = recipe_path(recipe)
    text = source.read_text(encoding="utf-8")
    parse_manifest(text, str(source))
    if (run / MANIFEST).exists():
        raise AtollError(f"{run / MANIFEST} exists; edit it, or name another directory")
    run.mkdir(parents=True, exist_ok=True)
    write_bytes(run / MANIFEST, text.encode())
    typer.echo(f"{run / MANIFEST} written from {source.name}")


@app.command(rich_help_panel="Stages")
def encode(
    run: Run = Path(),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an encoding that was interrupted.")] = False,
    force: Force = False,
    on: Annotated[str, typer.Option(help="local, or ray: all machines of a Ray cluster.")] = "local",
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that decode (local), machines' workers (ray).")
    ] = None,
    max_skipped: Annotated[
        float | None, typer.Option(min=0, max=1, help="The share of pictures that may fail; default: atoll.yaml's.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Pictures and captions -> encoded/: shards of latents, captions and features."""
    from atoll.data.encode import encode_run
    from atoll.manifest import load_manifest

    if on not in ("local", "ray"):
        raise AtollError(f"--on {on}: expected local or ray")
    with _bar("encode", "images", quiet) as tell:
        done = encode_run(
            run,
            load_manifest(run),
            force=force,
            resume=resume,
            on=cast("Place", on),
            workers=workers,
            max_skipped=max_skipped,
            progress=tell,
        )
    typer.echo(done)


@app.command(rich_help_panel="Stages")
def cluster(
    run: Run = Path(),
    force: Force = False,
    router_fraction: Annotated[
        float | None, typer.Option(help="The share of images set apart for the router; default: atoll.yaml's.")
    ] = None,
    assign_only: Annotated[
        bool, typer.Option("--assign-only", help="Put new images into the clusters that are there.")
    ] = False,
    encoded: Annotated[
        Path | None, typer.Option(help="With --assign-only: what `atoll encode` wrote; default: the run's encoded/.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Features -> clusters/: K clusters, each with the shards its expert needs, and report.html."""
    from atoll.cluster import assign_only as assign
    from atoll.cluster import cluster_run
    from atoll.manifest import load_manifest

    if encoded is not None and not assign_only:
        raise AtollError("--encoded names images to add: use it with --assign-only")
    if assign_only and (force or router_fraction is not None):
        raise AtollError("--assign-only adds to the clusters as they are: leave --force and --router-fraction out")
    with _bar("cluster", "images", quiet) as tell:
        if assign_only:
            done = assign(run / "clusters", encoded or run / "encoded", tell)
        else:
            done = cluster_run(run, load_manifest(run), force, router_fraction, tell)
    typer.echo(done)


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


@app.command(rich_help_panel="Stages")
def assemble(run: Run = Path()) -> None:
    """Experts + router -> ensemble/ensemble.json, which names its parts and their hashes."""
    from atoll.assemble import assemble_run
    from atoll.manifest import load_manifest

    typer.echo(f"{assemble_run(run, load_manifest(run))} written")


@app.command(rich_help_panel="Stages")
def sample(
    ensemble: Annotated[Path, typer.Argument(help="An ensemble's directory (or one expert's).")],
    prompts: Annotated[list[str], typer.Argument(help="One picture per prompt.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The picture to write (a grid of all).")] = Path("out.png"),
    seed: Annotated[int, typer.Option(help="Of the first picture; the next ones count on.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Solver steps; default: the ensemble's.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; default: the ensemble's.")] = None,
    routing: Annotated[str | None, typer.Option(help="top-1, top-2, ..., full; default: the ensemble's.")] = None,
    method: Annotated[str | None, typer.Option(help="euler, heun or dpm++2m; default: the ensemble's.")] = None,
    alignment: Annotated[str, typer.Option(help="snr (exact) or native (HDDM's formulas).")] = "snr",
    strict: Annotated[bool, typer.Option("--strict", help="A missing expert is an error.")] = False,
    side: Annotated[int, typer.Option(help="Pictures are enlarged to at least so many pixels.")] = 128,
    quiet: Quiet = False,
) -> None:
    """Draw pictures: `atoll sample runs/demo/ensemble "latin capital letter a, serif bold" -o out.png`."""
    from atoll.pipeline import sample_to_file

    with _bar("sample", "steps", quiet) as tell:
        sample_to_file(
            ensemble,
            prompts,
            out,
            seed,
            steps,
            guidance,
            routing,
            cast("Method | None", method),
            cast("Alignment", alignment),
            strict,
            side,
            tell,
        )
    typer.echo(f"{out} written")


@app.command(rich_help_panel="Stages")
def evaluate(run: Run = Path(), quiet: Quiet = False) -> None:
    """Ensemble against monolith -> report.html and report.json."""
    from atoll.evaluate.run import evaluate_run
    from atoll.manifest import load_manifest

    with _bar("evaluate", "steps", quiet) as tell:
        report = evaluate_run(run, load_manifest(run).evaluate, tell)
    typer.echo(f"{report} written; open it in a browser")


@app.command()
def demo(
    run: Annotated[Path, typer.Argument(help="The directory to make or to go on with.")] = Path("runs/demo"),
    recipe: Annotated[str, typer.Option(help="A built-in recipe, or a yaml file.")] = "demo",
    jobs: Annotated[int | None, typer.Option("--jobs", "-j", min=1, help="Trainings at a time.")] = None,
) -> None:
    """Everything, on the embedded data set: encode, cluster, train, assemble, sample, report."""
    from atoll.manifest import MANIFEST, load_manifest

    if not (run / MANIFEST).exists():
        init(run, recipe)
    prompts = list(load_manifest(run).evaluate.prompts)
    stages: list[tuple[str, Callable[[], None]]] = [
        ("encode", lambda: encode(run, resume=True)),
        ("cluster", lambda: cluster(run)),
        ("train", lambda: launch(run, jobs)),
        ("assemble", lambda: assemble(run)),
        ("sample", lambda: sample(run / "ensemble", prompts, run / "samples.png")),
        ("evaluate", lambda: evaluate(run)),
    ]
    for number, (name, stage) in enumerate(stages, start=1):
        typer.secho(f"[{number}/{len(stages)}] {name}", bold=True, err=True)
        stage()


def _train(what: str, run: Path, quiet: bool, work: Callable[[Any, Any], Path]) -> None:
    """Runs one training behind a progress bar; a signal that stopped it in order is no error."""
    from atoll.manifest import load_manifest
    from atoll.train.loop import Interrupted

    with _bar(what, "steps", quiet) as tell:

        def line(metrics: dict[str, Any]) -> None:
            note = f"loss {metrics['loss']:.4f}, {metrics['images_per_s']:.0f} images/s"
            tell(metrics["step"], metrics["steps"], note)

        try:
            typer.echo(f"{work(load_manifest(run), line)} written")
        except Interrupted as stop:
            typer.echo(str(stop))


@contextmanager
def _bar(what: str, unit: str, quiet: bool) -> Iterator[Callable[..., None]]:
    """A progress bar on the terminal, told by (done, total, note); silent where there is none."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit),
        TextColumn("{task.fields[note]}"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as progress:
        task = progress.add_task(what, total=None, note="")

        def tell(done: int, total: int | None, note: str = "") -> None:
            progress.update(task, completed=done, total=total, note=note)

        yield tell


def main() -> None:
    """The entry point: a mistake is one line and exit code 2, a warning is one line."""
    import os
    import warnings

    # OpenMP's threads otherwise spin while they wait; on shared cores that made small networks ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    def say(message: Warning | str, *_: object) -> None:
        typer.secho(f"atoll: warning: {message}", fg="yellow", err=True)

    warnings.showwarning = say  # type: ignore[assignment]
    try:
        app()
    except AtollError as error:
        typer.secho(f"atoll: {error}", fg="red", err=True)
        sys.exit(2)
    except OSError as error:  # a path that cannot be read or written, and that no stage could say more about
        typer.secho(f"atoll: {error.filename or 'input or output'}: {error.strerror or error}", fg="red", err=True)
        sys.exit(2)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        from atoll import __version__

        typer.echo(f"atoll {__version__}")
        raise typer.Exit


if __name__ == "__main__":
    main()
