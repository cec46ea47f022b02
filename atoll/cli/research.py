"""The verbs of those who measure: compare two models, study a question over several seeds, hand statistics on."""

from pathlib import Path
from typing import Annotated

import typer

from atoll.cli.app import Quiet, RunOption, app, bar


@app.command(rich_help_panel="Tools")
def compare(
    a: Annotated[str, typer.Argument(help="An evaluated run's directory, or RUN:VARIANT (runs/demo:top-1).")],
    b: Annotated[str, typer.Argument(help="The other: runs/demo:monolith.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write; its numbers go beside it, as .json.")] = (
        Path("compare.html")
    ),
) -> None:
    """Two evaluated models side by side: each number's paired difference and its confidence interval."""
    from rich.console import Console
    from rich.table import Table

    from atoll.evaluate.pages.compare_page import compare_runs, lines

    found = compare_runs(a, b, out)
    table = Table("", a, b, "difference (95 %)")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in lines(found):
        table.add_row(*row)
    Console().print(table)
    typer.echo(f"{out} written; open it in a browser")


@app.command(rich_help_panel="Tools")
def study(
    recipe: Annotated[str, typer.Argument(help="A built-in study (eurosat), or a yaml file.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Its directory; default: studies/NAME.")] = None,
    seeds: Annotated[list[int] | None, typer.Option("--seed", help="Instead of the recipe's; may be repeated.")] = None,
    jobs: Annotated[int | None, typer.Option("--jobs", "-j", min=1, help="Trainings at a time.")] = None,
) -> None:
    """Many runs over several seeds: trained, measured, put into one table with the spread. Goes on where it stopped."""
    from atoll.study import load_study, run_study

    loaded = load_study(recipe)
    place = out or Path("studies") / loaded.name
    done = run_study(loaded, place, seeds or loaded.seeds, jobs, lambda what: typer.secho(what, bold=True, err=True))
    typer.echo(f"{done} written")


@app.command(rich_help_panel="Tools")
def statistics(
    run: RunOption = Path(),
    out: Annotated[Path, typer.Option("--out", "-o", help="The directory to write to.")] = Path("statistics"),
    quiet: Quiet = False,
) -> None:
    """Mean and covariance of a run's images in every feature space, for those who have not the images."""
    from atoll.evaluate.run_statistics import statistics_run
    from atoll.manifest import load_manifest

    with bar("statistics", "images", quiet) as tell:
        written = statistics_run(run, load_manifest(run), out, tell)
    for file in written:
        typer.echo(f"{file} written; name it as `statistics` of that feature's space")
