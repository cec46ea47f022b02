"""The verbs of a run's life, from images to a report; those that train stand in training.py."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from atoll.cli.app import Force, Quiet, RunOption, app, bar
from atoll.cli.training import launch
from atoll.errors import AtollError
from atoll.storage.layout import EXIT_DEGRADED, RunLayout

if TYPE_CHECKING:
    from atoll.choices import Method
    from atoll.data.encode import EncodeBackend
    from atoll.ensemble import Alignment
    from atoll.ensemble.offload import WeightDtype


Recipe = Annotated[str | None, typer.Option(help="A built-in recipe, or a yaml file; default: demo, or images.")]
Data = Annotated[str | None, typer.Option(help="Your images: a directory, tars, parquet files, a glob or a URL.")]


@app.command(rich_help_panel="Stages")
def init(
    run: Annotated[Path, typer.Argument(help="The directory to make.")], recipe: Recipe = None, data: Data = None
) -> None:
    """Make a run: a directory with an atoll.yaml to edit."""
    from atoll.data.init import init_run

    typer.echo(f"{init_run(run, recipe, data)} written")


@app.command(rich_help_panel="Stages")
def encode(
    run: RunOption = Path(),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an encoding that was interrupted.")] = False,
    force: Force = False,
    on: Annotated[str, typer.Option(help="local, or ray: all machines of a Ray cluster.")] = "local",
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that decode (local), machines' workers (ray).")
    ] = None,
    max_skipped: Annotated[
        float | None, typer.Option(min=0, max=1, help="The share of images that may fail; default: atoll.yaml's.")
    ] = None,
    allow_uncaptioned: Annotated[
        bool, typer.Option("--allow-uncaptioned", help="Go on where captions lie beside images and none is read.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Images and captions -> encoded/: shards of latents, captions and features."""
    from atoll.data.encode import encode_run
    from atoll.manifest import load_manifest

    if on not in ("local", "ray"):
        raise AtollError(f"--on {on}: expected local or ray")
    with bar("encode", "images", quiet) as tell:
        done = encode_run(
            run,
            load_manifest(run),
            force=force,
            resume=resume,
            on=cast("EncodeBackend", on),
            workers=workers,
            max_skipped=max_skipped,
            allow_uncaptioned=allow_uncaptioned or None,
            progress=tell,
        )
    typer.echo(done)


@app.command(rich_help_panel="Stages")
def cluster(
    run: RunOption = Path(),
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
    with bar("cluster", "images", quiet) as tell:
        if assign_only:
            done = assign(RunLayout(run).clusters, encoded or RunLayout(run).encoded, tell)
        else:
            done = cluster_run(run, load_manifest(run), force, router_fraction, tell)
    typer.echo(done)


@app.command(rich_help_panel="Stages")
def assemble(run: RunOption = Path()) -> None:
    """Experts + router -> ensemble/ensemble.json, which names its parts and their hashes."""
    from atoll.assemble import assemble_run
    from atoll.manifest import load_manifest

    typer.echo(f"{assemble_run(run, load_manifest(run))} written")


@app.command(rich_help_panel="Stages")
def sample(
    ensemble: Annotated[Path, typer.Argument(help="An ensemble's directory (or one expert's).")],
    prompts: Annotated[list[str], typer.Argument(help="One image per prompt.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The image to write (a grid of all).")] = Path("out.png"),
    seed: Annotated[int, typer.Option(help="Of the first image; the next ones count on.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Solver steps; default: the ensemble's.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; default: the ensemble's.")] = None,
    routing: Annotated[
        str | None, typer.Option(help="top-2, full, threshold-0.1, nucleus-0.9, sample-1, oracle-3, ...")
    ] = None,
    replicas: Annotated[
        str | None, typer.Option(help="stacked, inverse-error, equal, time-switch-0.5; default: the ensemble's.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="euler, heun or dpm++2m; default: the ensemble's.")] = None,
    alignment: Annotated[str, typer.Option(help="snr (exact) or native (HDDM's formulas).")] = "snr",
    strict: Annotated[bool, typer.Option("--strict", help="A missing expert is an error.")] = False,
    side: Annotated[int, typer.Option(help="Images are enlarged to at least so many pixels.")] = 128,
    trace: Annotated[Path | None, typer.Option(help="A .json file to write of who was asked when, and a page.")] = None,
    memory_budget: Annotated[
        str | None, typer.Option(help="6GB: of experts and router, no more is held at a time; the rest as it is asked.")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="fp32, bf16, fp16 or int8; default: as they are stored.")] = None,
    quiet: Quiet = False,
) -> None:
    """Draw images: `atoll sample runs/demo/ensemble "latin capital letter a, serif bold" -o out.png`."""
    from atoll.pipeline import sample_to_file

    with bar("sample", "steps", quiet) as tell:
        dropped = sample_to_file(
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
            replicas,
            trace,
            tell,
            memory_budget,
            cast("WeightDtype | None", weights),
        )
    typer.echo(f"{out} written")
    if dropped:
        typer.echo(f"without {', '.join(f'{name}, which {why}' for name, why in dropped.items())}", err=True)
        raise typer.Exit(EXIT_DEGRADED)


@app.command(rich_help_panel="Stages")
def evaluate(
    run: RunOption = Path(),
    sweep: Annotated[
        list[str] | None,
        typer.Option(help="An axis and its values: routing=top-1,top-2; repeated, every combination. Or: monolith."),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A text file, one prompt per line, for the report's images.")
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Ensemble against monolith -> report.html and report.json. Interrupted, it goes on where it stopped."""
    from atoll.evaluate.run import evaluate_run
    from atoll.evaluate.sweep import parse_sweep, read_prompts
    from atoll.manifest import load_manifest

    settings = load_manifest(run).evaluate
    if sweep:
        settings = settings.model_copy(update={"sweep": (parse_sweep(sweep),)})
    if prompts:
        settings = settings.model_copy(update={"prompts": read_prompts(prompts)})
    with bar("evaluate", "steps", quiet) as tell:
        report = evaluate_run(run, settings, progress=tell)
    typer.echo(f"{report} written; open it in a browser")


@app.command()
def demo(
    run: Annotated[Path, typer.Argument(help="The directory to make or to go on with.")] = Path("runs/demo"),
    recipe: Recipe = None,
    data: Data = None,
    jobs: Annotated[int | None, typer.Option("--jobs", "-j", min=1, help="Trainings at a time.")] = None,
) -> None:
    """Everything, on the embedded data set or on yours: encode, cluster, train, assemble, sample, report."""
    from atoll.data.init import init_run
    from atoll.manifest import load_manifest

    init_run(run, recipe, data, again=True)
    layout = RunLayout(run)
    prompts = list(load_manifest(run).evaluate.prompts)
    stages: list[tuple[str, Callable[[], None]]] = [
        ("encode", lambda: encode(run, resume=True)),
        ("cluster", lambda: cluster(run)),
        ("train", lambda: launch(run, jobs)),
        ("assemble", lambda: assemble(run)),
        ("sample", lambda: sample(layout.ensemble, prompts, layout.samples)),
        ("evaluate", lambda: evaluate(run)),
    ]
    if not prompts:  # the report draws captions of held-out images then
        stages = [(name, stage) for name, stage in stages if name != "sample"]
    for number, (name, stage) in enumerate(stages, start=1):
        typer.secho(f"[{number}/{len(stages)}] {name}", bold=True, err=True)
        stage()
