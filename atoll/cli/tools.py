"""Commands beside the stages: plan a run before it starts, and convert existing checkpoints."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from atoll.cli.app import AllowHub, TrustPaths, app
from atoll.errors import AtollError

if TYPE_CHECKING:
    from atoll.convert import CheckpointKind, Modulation


@app.command(rich_help_panel="Tools")
def plan(
    recipe: Annotated[str, typer.Argument(help="A built-in recipe, a yaml file, or a run's directory.")],
    gpu: Annotated[
        str | None, typer.Option(help="a40, a100, h100, h200, 4090, ...; a memory such as 24GB; or here, to measure.")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs that share each batch of an expert.")] = 1,
    islands: Annotated[Path | None, typer.Option(help="A yaml list of machines; simulates when they finish.")] = None,
    mfu: Annotated[float | None, typer.Option(help="Fraction of the GPU's speed that training reaches.")] = None,
    images: Annotated[int | None, typer.Option(help="Size of the data set; default: as encoded.")] = None,
    text: Annotated[str | None, typer.Option(help="Tokens x width of a caption, if the recipe lacks them.")] = None,
    trials: Annotated[int, typer.Option(min=1, help="Trials of the simulation.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the simulation.")] = 0,
    compare: Annotated[
        bool, typer.Option("--compare", help="Compare the run's trained experts with the plan.")
    ] = False,
    json: Annotated[Path | None, typer.Option("--json", help="Also write everything to this file.")] = None,
) -> None:
    """Compute what a run costs before it starts: batches, images/s, GPU-days, price, finishing date."""
    from rich.console import Console

    from atoll.plan import as_json, compare_run, comparison_lines, plan_run, render
    from atoll.plan.recipe import parse_text
    from atoll.storage.artifact import write_json

    # Compare finished experts, or plan.
    # The size of a caption, if the recipe does not determine it.
    caption = parse_text(text) if text else None
    if compare:
        # A comparison measures this machine, so options of other machines contradict it.
        if gpu not in (None, "here") or gpus > 1 or islands or mfu is not None:
            raise AtollError("--compare measures this machine: leave --gpu, --gpus, --islands and --mfu out")
        comparisons = compare_run(Path(recipe), caption)
        typer.echo(comparison_lines(comparisons))
        value: Any = [c.as_json() for c in comparisons]
    else:
        planned = plan_run(recipe, gpu, islands, mfu, images, caption, trials, seed, each=gpus)
        Console().print(render(planned))
        value = as_json(planned)
    # The same content as in the terminal, for scripts.
    if json:
        write_json(json, value)
        typer.echo(f"{json} written")


OutOption = Annotated[Path, typer.Option("--out", "-o", help="Directory of the new expert, or of Paris's ensemble.")]
KindOption = Annotated[
    str, typer.Option(help="dit, sit, repa, pixart, diffusers-dit, paris, or of --keep; auto detects it.")
]
KeepOption = Annotated[
    bool, typer.Option("--keep", help="Keep diffusers' network as it is: PixArt, DiT, PRX, SD3, Sana, FLUX, ...")
]
GuidanceOption = Annotated[
    float | None,
    typer.Option(min=0, help="With --keep: the scale that a distilled FLUX embeds; default 3.5, FLUX.2 4."),
]
RunForOption = Annotated[
    Path | None, typer.Option("--run", "-r", help="The run to convert for; it determines the expert's settings.")
]
ScheduleOption = Annotated[
    str | None, typer.Option(help="linear, cosine, linear-beta, ...; default: linear for flow, else linear-beta.")
]
ModulationOption = Annotated[
    str | None, typer.Option(help="DiT's adaLN: fit (default), reinit, or per-block (exact; 36 % more weights).")
]
ClusterOption = Annotated[
    list[int] | None, typer.Option(help="Cluster(s) covered; repeat for a generalist. Default: 0.")
]
ClassesOption = Annotated[
    int | None, typer.Option(min=1, help="Classes of a DiT, without the null class; default: as its file says.")
]


@app.command(rich_help_panel="Tools")
def convert(
    source: Annotated[Path, typer.Argument(help="A .pt or safetensors file, or diffusers' or Paris's directory.")],
    out: OutOption,
    directory: Annotated[Path | None, typer.Argument(help="After a kind, as in `atoll convert paris DIR`.")] = None,
    kind: KindOption = "auto",
    keep: KeepOption = False,
    run: RunForOption = None,
    expert: Annotated[str | None, typer.Option(help="With --run: the cluster or name, such as 3 or 3-flow.")] = None,
    objective: Annotated[str | None, typer.Option(help="eps, x0, v or flow; default: as the original.")] = None,
    schedule: ScheduleOption = None,
    modulation: ModulationOption = None,
    condition: Annotated[str | None, typer.Option(help="NAME,KEY=VALUE,..., such as clip,weights=DIR.")] = None,
    codec: Annotated[str | None, typer.Option(help="NAME,KEY=VALUE,..., such as kl,weights=DIR.")] = None,
    cluster: ClusterOption = None,
    of: Annotated[int | None, typer.Option(help="Number of clusters.")] = None,
    size: Annotated[str | None, typer.Option(help="Size of the latent, such as 32x48; default: original.")] = None,
    pooled: Annotated[bool, typer.Option("--pooled", help="Also read the caption's pooled vector.")] = False,
    heads: Annotated[int | None, typer.Option(min=1, help="Heads of a DiT that has no published size.")] = None,
    classes: ClassesOption = None,
    guidance: GuidanceOption = None,
    name: Annotated[str, typer.Option(help="Name of the expert; default: that of its directory.")] = "",
    seed: Annotated[int, typer.Option(help="Seed of weights that the checkpoint lacks.")] = 0,
    allow_hub: AllowHub = False,
    trust_paths: TrustPaths = False,
) -> None:
    """Convert a checkpoint into an expert: `atoll convert DiT-XL-2-256x256.pt -o start --run . --expert 3`."""
    from atoll.convert.arguments import (
        arguments_of_run,
        codec_of,
        condition_beside_run,
        frozen_network,
        objective_of,
        size_of,
    )
    from atoll.convert.paris import is_paris

    # `atoll convert KIND DIR` is short for `atoll convert DIR --kind KIND`.
    source, kind = (source, kind) if directory is None else (directory, str(source))
    encoder = frozen_network("condition", condition) if condition else None
    decoder = codec_of(codec) if codec else None
    # Refuse options that contradict each other.
    options = {
        "objective": objective, "schedule": schedule, "cluster": cluster, "of": of, "size": size, "run": run,
        "expert": expert, "modulation": modulation, "condition": condition, "codec": codec, "heads": heads,
        "classes": classes, "keep": keep or None, "pooled": pooled or None, "name": name or None,
        "guidance": guidance,
    }  # fmt: skip
    paris = kind == "paris" or (kind == "auto" and is_paris(source))
    _check_options({option for option, value in options.items() if value is not None}, paris)
    if paris:
        _convert_paris(source, out, encoder, decoder, heads)
        return
    # The new expert: as the run describes it, or as the options do.
    if run is not None and expert is not None:
        arguments = arguments_of_run(run, expert, allow_hub=allow_hub, trust_paths=trust_paths)
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
    if keep:
        if run is not None and encoder:
            arguments |= condition_beside_run(encoder, arguments["trust"])
        _keep(source, out, kind, arguments | {"guidance": guidance})
    else:
        more = {"modulation": modulation, "heads": heads, "seed": seed, "classes": classes}
        _convert(source, out, kind, arguments | more)


def _convert(source: Path, out: Path, kind: str, arguments: dict[str, Any]) -> None:
    """Convert a checkpoint into an expert with a network of Atoll's, and print a summary."""
    from atoll.convert import convert as work
    from atoll.convert.arguments import summary

    modulation = cast("Modulation", arguments.pop("modulation"))
    typer.echo(summary(work(source, out, _kind(kind), modulation=modulation, **arguments)))


def _keep(source: Path, out: Path, kind: str, arguments: dict[str, Any]) -> None:
    """Make an expert of a checkpoint whose own class computes it, and print a summary."""
    from atoll.convert.arguments import summary
    from atoll.convert.foreign import keep

    # The kept network determines these two itself.
    own = {key: value for key, value in arguments.items() if key not in ("network", "pooled")}
    typer.echo(summary(keep(source, out, _kind(kind), **own)))


def _kind(kind: str) -> 'CheckpointKind | Literal["auto"]':
    return cast('CheckpointKind | Literal["auto"]', kind)


def _check_options(used: set[str], paris: bool) -> None:
    """Raise AtollError for options of `atoll convert` that contradict each other. used: their names."""
    # The options that a run determines by itself.
    of_run = {"objective", "schedule", "cluster", "of", "size", "pooled", "name"}
    # Paris's release determines everything but its frozen networks.
    if paris and used & {*of_run, "run", "expert", "modulation", "keep", "classes"}:
        raise AtollError("Paris needs only --condition, --codec and --heads; leave the other options out")
    # Without a conversion, its options would be ignored silently.
    if "keep" in used and used & {"modulation", "pooled", "heads", "classes"}:
        raise AtollError("--keep does not convert; leave --modulation, --pooled, --heads and --classes out")
    if "guidance" in used and "keep" not in used:
        raise AtollError("--guidance is for a network that is kept; add --keep, or leave it out")
    # A run has many experts, and an expert's name alone names no run.
    if ("run" in used) != ("expert" in used):
        raise AtollError("--run and --expert belong together; name both the run and its expert")
    # A kept network has its own encoder, which must be named even with a run.
    frozen = {"codec"} if "keep" in used else {"codec", "condition"}
    if "run" in used and used & (of_run | frozen):
        raise AtollError(
            "--run sets objective, schedule, condition, codec, clusters, size, pooled and name; leave them out"
        )


def _convert_paris(
    source: Path, out: Path, condition: dict[str, Any] | None, codec: dict[str, Any] | None, heads: int | None
) -> None:
    """Convert Paris's directory into an ensemble."""
    from atoll.assemble import assemble
    from atoll.convert.paris import SAMPLING, convert_paris

    # A release is a whole ensemble: convert its parts, then assemble them.
    experts, router = convert_paris(source, out, condition, codec, heads)
    assemble(experts, router, out, SAMPLING)
    typer.echo(f"{out} written: an ensemble of Paris's {len(experts)} experts and its router")
