"""The application: options that commands share, the progress bar, and error messages."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from atoll.errors import AtollError, escaped
from atoll.storage.layout import EXIT_USER_ERROR

# The order of a run's stages, for `atoll --help`.
ORDER = [
    "init",
    "plan",
    "recaption",
    "encode",
    "cluster",
    "train",
    "launch",
    "calibrate",
    "ema",
    "convert",
    "merge",
    "assemble",
    "sample",
]
ORDER += ["evaluate", "compare", "statistics", "study", "distil", "synthesize", "collective", "serve", "demo"]


class _InOrder(typer.core.TyperGroup):
    """Lists the commands in the order of a run's stages."""

    def list_commands(self, ctx: Any) -> list[str]:
        """All commands, in `ORDER`."""
        return sorted(super().list_commands(ctx), key=ORDER.index)


app = typer.Typer(
    name="atoll",
    cls=_InOrder,
    no_args_is_help=True,
    add_completion=False,
    # The help texts use markdown for bold names.
    rich_markup_mode="markdown",
    help="One diffusion model, trained on many machines that never talk to each other.\n\n"
    "A run is a directory with an atoll.yaml. Its stages, in order: **init**, **encode**, **cluster**, **train** "
    "(one expert, on any machine; **launch** trains all parts), **assemble**, **sample**, **evaluate**. "
    "**demo** runs all of them on a built-in data set.",
)
RunOption = Annotated[Path, typer.Option("--run", "-r", help="Directory of the run, with atoll.yaml.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint, bit for bit.")]
Restart = Annotated[bool, typer.Option("--restart", help="Discard an existing checkpoint or artifact.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress bar.")]
AllowHub = Annotated[
    bool, typer.Option("--allow-hub", help="Fetch frozen networks that cards name from the hub, checked by their hash.")
]
TrustPaths = Annotated[
    bool, typer.Option("--trust-paths", help="Let cards name files outside their directory: for your own artifacts.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace existing output.")]


@contextmanager
def bar(what: str, unit: str, quiet: bool) -> Iterator[Callable[..., None]]:
    """Show a progress bar on the terminal, and yield its update function (done, total, note); silent without one."""
    # Imported late: only commands with a progress bar need them.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    # On stderr, so that a pipe gets the results only.
    console = Console(stderr=True)
    # Description, bar, counts, note, and the remaining time.
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit),
        TextColumn("{task.fields[note]}", markup=False), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as progress:
        # The total is not known before the first update.
        task = progress.add_task(what, total=None, note="")

        # `done` counts from the start, not since the last call.
        def update(done: int, total: int | None, note: str = "") -> None:
            progress.update(task, completed=done, total=total, note=escaped(note))  # names of parts are foreign text

        yield update


def main() -> None:
    """The entry point: an AtollError is one line and exit code 2, a warning is one line."""
    import os
    import warnings

    # By default, OpenMP's threads spin while they wait; on shared cores that made small networks ten times slower.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    # Warnings as single lines, without the source code.
    def show(message: Warning | str, *_: object) -> None:
        typer.secho(f"atoll: warning: {escaped(str(message))}", fg="yellow", err=True)

    warnings.showwarning = show  # type: ignore[assignment]
    # Mistakes as single lines, without a traceback.
    try:
        app()
    except AtollError as error:
        typer.secho(f"atoll: {error}", fg="red", err=True)
        sys.exit(EXIT_USER_ERROR)
    except OSError as error:  # a path that cannot be read or written, without a better message from a stage
        problem = f"{error.filename or 'input or output'}: {error.strerror or error}"
        typer.secho(f"atoll: {escaped(problem)}", fg="red", err=True)
        sys.exit(EXIT_USER_ERROR)
    except Exception as error:
        # Memory that ran out anywhere is one line too; every other error is a crash, with its traceback.
        from atoll.storage.memory import one_line

        if (line := one_line(error)) is None:
            raise
        typer.secho(f"atoll: {line}", fg="red", err=True)
        sys.exit(EXIT_USER_ERROR)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    # Without --version, the command itself runs next.
    if version:
        from atoll import __version__

        typer.echo(f"atoll {__version__}")
        raise typer.Exit
