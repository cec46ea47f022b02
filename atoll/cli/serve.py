"""The command that serves models over HTTP."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from atoll.cli.app import AllowHub, TrustPaths, app
from atoll.errors import AtollError

if TYPE_CHECKING:
    from atoll.ensemble.offload import WeightDtype


@app.command(rich_help_panel="Tools")
def serve(
    ensembles: Annotated[list[str], typer.Argument(help="Directories of ensembles or experts, or NAME=DIRECTORY.")],
    host: Annotated[
        str, typer.Option(help="Address to listen on; other than loopback only with a token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: any free one.")] = 8080,
    token: Annotated[
        list[str] | None,
        typer.Option(envvar="ATOLL_TOKEN", help="Token that requests must have; repeat for several clients."),
    ] = None,
    routing: Annotated[str | None, typer.Option(help="Default routing; default: the ensemble's.")] = None,
    weights: Annotated[str | None, typer.Option(help="fp32, bf16, fp16 or int8; default: as stored.")] = None,
    memory_budget: Annotated[
        str | None, typer.Option(help="Limit of weights on the device, such as 6GB; others load on demand.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images per step of the engine, at most.")] = 64,
    queue: Annotated[int, typer.Option(min=1, help="Images that may wait or run, at most.")] = 1024,
    max_n: Annotated[int, typer.Option(min=1, help="Images per request, at most.")] = 64,
    max_steps: Annotated[int, typer.Option(min=1, max=10_000, help="Steps per image, at most.")] = 250,
    max_priority: Annotated[int, typer.Option(min=-8, max=8, help="Highest priority that a client may choose.")] = 0,
    rate: Annotated[float, typer.Option(min=0, help="Requests per minute and client; 0: no limit.")] = 600,
    licence: Annotated[str | None, typer.Option(help="Licence that /v1/models states.")] = None,
    forwarded_from: Annotated[
        str | None, typer.Option(help="Proxies whose X-Forwarded-For names the client, by commas.")
    ] = None,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Log prompts.")] = False,
    allow_hub: AllowHub = False,
    trust_paths: TrustPaths = False,
) -> None:
    """Serve models over HTTP, with a page and OpenAI's API: `atoll serve runs/demo/ensemble`."""
    from atoll.runtime.libraries import import_library

    for library in ("fastapi", "uvicorn", "sse_starlette", "prometheus_client"):
        import_library(library, "serve")
    from atoll.pipeline import Pipeline
    from atoll.serve.app import create_app
    from atoll.serve.engine import Engine, EngineLimits
    from atoll.serve.server import (
        address_of,
        bind,
        check_access,
        close_engines,
        end_process,
        log_to_stderr,
        make_server,
    )
    from atoll.serve.settings import ServerSettings

    # What cannot work fails before anything is loaded.
    tokens = tuple(token or ())
    hosts = check_access(host, tokens)
    names = _names(ensembles)
    settings = ServerSettings(
        tokens=tokens,
        hosts=hosts,
        max_n=max_n,
        max_steps=max_steps,
        max_priority=max_priority,
        rate=rate,
        licence=licence,
        weights=weights,
        log_prompts=log_prompts,
    )
    engines: dict[str, Engine] = {}
    with bind(host, port) as listener:
        try:
            for name, path in names.items():
                pipeline = Pipeline.from_pretrained(
                    path,
                    routing,
                    memory_budget=memory_budget,
                    weights=cast("WeightDtype | None", weights),
                    allow_hub=allow_hub,
                    trust_paths=trust_paths,
                )
                engines[name] = Engine(pipeline, EngineLimits(batch=batch, queue=queue))
            log_to_stderr()
            server = make_server(create_app(engines, settings), forwarded_from)
            # Until here, connections were refused; from here on, they wait for the server.
            listener.listen()
            typer.echo(f"{', '.join(names)} at {address_of(host, listener)}")
            server.run([listener])
        finally:
            closed = close_engines(engines.values())
    # A step on a large model may take longer than whoever stopped the server waits.
    if not closed:
        end_process()


def _names(ensembles: list[str]) -> dict[str, Path]:
    """Return the directories by the models' names: NAME=DIRECTORY, or the directory's name.

    An `ensemble` is named after its run.
    """
    names: dict[str, Path] = {}
    for text in ensembles:
        name, equals, path = text.partition("=")
        directory = Path(path if equals else text)
        if not equals:
            resolved = directory.resolve()
            name = resolved.parent.name if resolved.name == "ensemble" else resolved.name
        if not name or name in names:
            raise AtollError(f"{text}: the model's name {name!r} is empty or taken; write NAME=DIRECTORY")
        if not directory.is_dir():
            raise AtollError(f"{directory}: no such directory; expected an ensemble's or an expert's")
        names[name] = directory
    return names
