"""The application itself: the options that verbs share, the progress bar, and how a mistake is told."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from atoll.errors import AtollError
from atoll.storage.layout import EXIT_USER_ERROR

ORDER = ["init", "plan", "encode", "cluster", "train", "launch", "calibrate", "ema", "convert", "assemble", "sample"]
ORDER += ["evaluate", "compare", "statistics", "study", "distil", "synthesize", "demo"]


class _InOrder(typer.core.TyperGroup):
    """Lists the verbs in the order of a run's life."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=ORDER.index)


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
RunOption = Annotated[Path, typer.Option("--run", "-r", help="The run's directory, which holds atoll.yaml.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint, bit for bit.")]
Restart = Annotated[bool, typer.Option("--restart", help="Throw an existing checkpoint or artifact away.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]


@contextmanager
def bar(what: str, unit: str, quiet: bool) -> Iterator[Callable[..., None]]:
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
        sys.exit(EXIT_USER_ERROR)
    except OSError as error:  # a path that cannot be read or written, and that no stage could say more about
        typer.secho(f"atoll: {error.filename or 'input or output'}: {error.strerror or error}", fg="red", err=True)
        sys.exit(EXIT_USER_ERROR)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        from atoll import __version__

        typer.echo(f"atoll {__version__}")
        raise typer.Exit
