"""Commands for measuring: compare two models, run a study over several seeds, share statistics."""

from pathlib import Path
from typing import Annotated

import typer

from atoll.cli.app import AllowHub, Quiet, RunOption, TrustPaths, app, bar
from atoll.errors import escaped


@app.command(rich_help_panel="Tools")
def compare(
    a: Annotated[str, typer.Argument(help="An evaluated run, or RUN:VARIANT, such as runs/demo:top-1.")],
    b: Annotated[str, typer.Argument(help="The other one, such as runs/demo:monolith.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write; its numbers go into a .json file.")] = (
        Path("compare.html")
    ),
) -> None:
    """Compare two evaluated models: the paired difference of each number, with its confidence interval."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from atoll.evaluate.pages.compare_page import compare_runs, lines

    # The page and its .json are written first, then summarised here.
    numbers = compare_runs(a, b, out)
    # The same numbers in the terminal.
    table = Table("", a, b, "difference (95 %)")
    # Numbers align at the right, names at the left.
    for column in table.columns[1:]:
        column.justify = "right"
    for row in lines(numbers):
        table.add_row(*(Text(escaped(cell)) for cell in row))  # names of metrics come from the reports: no markup
    Console().print(table)
    typer.echo(f"{out} written; open it in a browser")


@app.command(rich_help_panel="Tools")
def study(
    recipe: Annotated[str, typer.Argument(help="A built-in study, such as eurosat, or a yaml file.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Output directory; default: studies/NAME.")] = None,
    seeds: Annotated[list[int] | None, typer.Option("--seed", help="Replaces the recipe's seeds; repeatable.")] = None,
    jobs: Annotated[int | None, typer.Option("--jobs", "-j", min=1, help="Trainings at a time.")] = None,
) -> None:
    """Train and evaluate many runs over several seeds, and write one table. If interrupted, run again to resume."""
    from atoll.study import load_study, run_study

    # The study's name is its directory's.
    loaded = load_study(recipe)
    directory = out or Path("studies") / loaded.name
    # Options replace the recipe's values; the log goes to stderr.
    done = run_study(
        loaded, directory, seeds or loaded.seeds, jobs, lambda what: typer.secho(what, bold=True, err=True)
    )
    typer.echo(f"{done} written")


@app.command(rich_help_panel="Tools")
def statistics(
    run: RunOption = Path(),
    out: Annotated[Path, typer.Option("--out", "-o", help="Output directory.")] = Path("statistics"),
    allow_hub: AllowHub = False,
    trust_paths: TrustPaths = False,
    quiet: Quiet = False,
) -> None:
    """Write mean and covariance of a run's images in every feature space, for others to compare with."""
    from atoll.evaluate.run_statistics import statistics_run
    from atoll.manifest import load_manifest

    # One pass over the images serves all features.
    manifest = load_manifest(run).allowing(hub=allow_hub, paths=trust_paths)
    with bar("statistics", "images", quiet) as update:
        written = statistics_run(run, manifest, out, update)
    for file in written:
        typer.echo(f"{file} written; set it as `statistics` of that feature's space")
