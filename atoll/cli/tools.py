"""Verbs that stand beside the stages: plan, before one begins; convert, to begin from what exists."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from atoll.cli.app import app
from atoll.errors import AtollError

if TYPE_CHECKING:
    from atoll.convert import CheckpointKind, Modulation


@app.command(rich_help_panel="Tools")
def plan(
    recipe: Annotated[str, typer.Argument(help="A built-in recipe, a yaml file, or a run's directory.")],
    gpu: Annotated[
        str | None, typer.Option(help="a40, a100, h100, h200, 4090, ..., a memory such as 24GB, or here: measured.")
    ] = None,
    islands: Annotated[Path | None, typer.Option(help="A yaml list of machines: simulates them to a date.")] = None,
    mfu: Annotated[float | None, typer.Option(help="The share of the GPU's speed that training reaches.")] = None,
    images: Annotated[int | None, typer.Option(help="Of the data set; default: as many as the run encoded.")] = None,
    text: Annotated[str | None, typer.Option(help="Tokens x width of a caption, where the recipe hides it.")] = None,
    trials: Annotated[int, typer.Option(min=1, help="Of the simulated islands.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the simulated islands' luck.")] = 0,
    compare: Annotated[
        bool, typer.Option("--compare", help="Hold the run's trained experts against the plan.")
    ] = False,
    json: Annotated[Path | None, typer.Option("--json", help="Write all of it there too.")] = None,
) -> None:
    """What a run costs, before anything is spent: batches that fit, images/s, GPU-days, price, the day of its end."""
    from rich.console import Console

    from atoll.plan import as_json, compare_run, comparison_lines, plan_run, render
    from atoll.plan.recipe import parse_text
    from atoll.storage.artifact import write_json

    caption = parse_text(text) if text else None
    if compare:
        if gpu not in (None, "here") or islands or mfu is not None:
            raise AtollError("--compare measures this machine: leave --gpu, --islands and --mfu out")
        found = compare_run(Path(recipe), caption)
        typer.echo(comparison_lines(found))
        value: Any = [c.as_json() for c in found]
    else:
        planned = plan_run(recipe, gpu, islands, mfu, images, caption, trials, seed)
        Console().print(render(planned))
        value = as_json(planned)
    if json:
        write_json(json, value)
        typer.echo(f"{json} written")


@app.command(rich_help_panel="Tools")
def convert(
    source: Annotated[Path, typer.Argument(help="A .pt or safetensors file, diffusers' directory, or Paris's.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The directory to make: an expert's, or Paris's ensemble's.")
    ],
    directory: Annotated[Path | None, typer.Argument(help="After a kind: `atoll convert paris DIR`.")] = None,
    kind: Annotated[
        str, typer.Option(help="dit, sit, repa, pixart, diffusers-dit, paris; auto: by the names and arguments in it.")
    ] = "auto",
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave diffusers' PixArt or DiT what it is: its own class computes it.")
    ] = False,
    run: Annotated[
        Path | None, typer.Option("--run", "-r", help="The run it is for: tells all that --expert is to be.")
    ] = None,
    expert: Annotated[str | None, typer.Option(help="With --run: its cluster's number, or its name: 3-flow.")] = None,
    objective: Annotated[str | None, typer.Option(help="eps (default: what it was trained with), flow, x0, v.")] = None,
    schedule: Annotated[
        str | None, typer.Option(help="linear, cosine, linear-beta, ...; default: linear for flow, else linear-beta.")
    ] = None,
    modulation: Annotated[
        str | None, typer.Option(help="Of DiT's adaLN: fit (default), reinit, per-block (exact; 36 % more weights).")
    ] = None,
    condition: Annotated[str | None, typer.Option(help="NAME,KEY=VALUE,...: clip,weights=DIR or hash,dim=64.")] = None,
    codec: Annotated[str | None, typer.Option(help="NAME,KEY=VALUE,...: kl,weights=DIR.")] = None,
    cluster: Annotated[list[int] | None, typer.Option(help="That it is of; several: a generalist. Default: 0.")] = None,
    of: Annotated[int | None, typer.Option(help="How many clusters there are.")] = None,
    size: Annotated[str | None, typer.Option(help="Of the latent, 32x48; default: the original's.")] = None,
    pooled: Annotated[bool, typer.Option("--pooled", help="It reads the caption's pooled vector too.")] = False,
    heads: Annotated[int | None, typer.Option(min=1, help="Of a DiT of none of the published sizes.")] = None,
    classes: Annotated[
        int | None, typer.Option(min=1, help="A DiT's classes without the null class; default: as its arguments say.")
    ] = None,
    name: Annotated[str, typer.Option(help="The expert's name; default: that of its directory.")] = "",
    seed: Annotated[int, typer.Option(help="Of the weights that the checkpoint does not have.")] = 0,
) -> None:
    """A foreign checkpoint into an expert: `atoll convert DiT-XL-2-256x256.pt -o start --run . --expert 3`."""
    from atoll.convert import convert as work
    from atoll.convert.arguments import arguments_of_run, codec_of, frozen_network, objective_of, size_of, summary
    from atoll.convert.foreign import keep as keep_as_it_is
    from atoll.convert.paris import is_paris

    source, kind = (source, kind) if directory is None else (directory, str(source))
    encoder = frozen_network("condition", condition) if condition else None
    decoder = codec_of(codec) if codec else None
    options = {
        "objective": objective, "schedule": schedule, "cluster": cluster, "of": of, "size": size, "run": run,
        "expert": expert, "modulation": modulation, "condition": condition, "codec": codec, "heads": heads,
        "classes": classes,
        "keep": keep or None, "pooled": pooled or None, "name": name or None,
    }  # fmt: skip
    paris = kind == "paris" or (kind == "auto" and is_paris(source))
    _check_options({option for option, value in options.items() if value is not None}, paris)
    if paris:
        _convert_paris(source, out, encoder, decoder, heads)
        return
    if run is not None and expert is not None:
        arguments = arguments_of_run(run, expert)
    else:
        arguments = {
            "objective": objective_of(objective, schedule),
            "condition": encoder,
            "codec": decoder,
            "clusters": cluster or (0,),
            "k": of,
            "size": size_of(size) if size else None,
            "pooled": pooled,
            "name": name,
        }
    chosen = cast('CheckpointKind | Literal["auto"]', kind)
    if keep:
        kept = {key: value for key, value in arguments.items() if key not in ("network", "pooled")}
        typer.echo(summary(keep_as_it_is(source, out, chosen, **kept | ({"condition": encoder} if encoder else {}))))
        return
    typer.echo(
        summary(
            work(
                source,
                out,
                chosen,
                modulation=cast("Modulation", modulation),
                heads=heads,
                seed=seed,
                classes=classes,
                **arguments,
            )
        )
    )


def _check_options(given: set[str], paris: bool) -> None:
    """Raises AtollError where options of `atoll convert` do not go together; given: the names of those in use."""
    of_run = {"objective", "schedule", "cluster", "of", "size", "pooled", "name"}
    if paris and given & {*of_run, "run", "expert", "modulation", "keep", "classes"}:
        raise AtollError("Paris's release tells all but --condition, --codec and --heads: leave the others out")
    if "keep" in given and given & {"modulation", "pooled", "heads", "classes"}:
        raise AtollError("--keep does not convert: leave --modulation, --pooled, --heads and --classes out")
    if ("run" in given) != ("expert" in given):
        raise AtollError("--run and --expert belong together: which expert of which run is it to become?")
    frozen = {"codec"} if "keep" in given else {"codec", "condition"}  # what is kept still has to name its encoder
    if "run" in given and given & (of_run | frozen):
        raise AtollError(
            "--run tells objective, schedule, condition, codec, clusters, size, pooled and name: leave them out"
        )


def _convert_paris(
    source: Path, out: Path, condition: dict[str, Any] | None, codec: dict[str, Any] | None, heads: int | None
) -> None:
    """Paris's directory into an ensemble's."""
    from atoll.assemble import assemble
    from atoll.convert.paris import SAMPLING, convert_paris

    experts, router = convert_paris(source, out, condition, codec, heads)
    assemble(experts, router, out, SAMPLING)
    typer.echo(f"{out} written: an ensemble of Paris's {len(experts)} experts and its router")
