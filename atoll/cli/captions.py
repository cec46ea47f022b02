"""The command that captions images anew, by a program or a function of the user."""

from pathlib import Path
from typing import Annotated, cast

import typer

from atoll.cli.app import Quiet, app, bar
from atoll.errors import AtollError
from atoll.storage.layout import RunLayout


@app.command(rich_help_panel="Tools")
def recaption(
    source: Annotated[str, typer.Argument(help="A run's directory, or images: a directory, tars, parquet files.")],
    command: Annotated[
        str | None, typer.Option(help="A program that reads and writes a line of JSON per image; no shell.")
    ] = None,
    python: Annotated[
        str | None, typer.Option(help="A function MODULE:FUNCTION that captions a list of images.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The file of captions; default: captions.jsonl of the run, or here."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 16,
    side: Annotated[int, typer.Option(min=16, help="Pixels of the longer side that are sent at most.")] = 1024,
    send: Annotated[str, typer.Option(help="image (PNG in base64) or path (of local files).")] = "image",
    restart: Annotated[bool, typer.Option("--restart", help="Discard the captions that are there.")] = False,
    quiet: Quiet = False,
) -> None:
    """Caption images with your own model -> captions.jsonl, for data.captions_from. If interrupted, run it again."""
    from atoll.data.captioner import Captioner, Command, Function
    from atoll.data.init import source_of
    from atoll.data.recaption import Send
    from atoll.data.recaption import recaption as work
    from atoll.data.sources import build_source
    from atoll.manifest import DataSettings, load_manifest

    # Check the options before anything is started.
    if (command is None) == (python is None):
        raise AtollError("name the captioner: either --command 'PROGRAM ARGUMENTS' or --python MODULE:FUNCTION")
    if send not in ("image", "path"):
        raise AtollError(f"--send {send}: expected image or path")
    # A run's own data, so that the keys are those of its encoding; or images without a run.
    run = Path(source)
    if RunLayout(run).manifest.is_file() or run.suffix in (".yaml", ".yml"):
        data = load_manifest(run).data.model_copy(update={"captions_from": None, "own_captions": 0.0})
        out = out or RunLayout(run if run.is_dir() else run.parent).captions
    else:
        data = DataSettings(source=source_of(source), path=source)
        out = out or RunLayout(Path()).captions
    images = build_source(data.model_copy(update={"allow_uncaptioned": True}))
    captioner: Captioner = Command(command) if command is not None else Function(cast(str, python))
    with bar("recaption", "images", quiet) as tell:
        done = work(
            images,
            captioner,
            out,
            batch=batch,
            side=side,
            send=cast(Send, send),
            restart=restart,
            progress=tell,
        )
    typer.echo(done)
