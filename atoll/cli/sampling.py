"""The command that samples: prompts to a sheet of images, or to one file per image."""

from pathlib import Path
from typing import Annotated, Any

import typer

from atoll.cli.app import AllowHub, Quiet, TrustPaths, app, bar
from atoll.errors import AtollError, escaped
from atoll.storage.layout import EXIT_DEGRADED


@app.command(rich_help_panel="Stages")
def sample(
    ensemble: Annotated[str, typer.Argument(help="Directory of an ensemble or an expert, or a collective's address.")],
    prompts: Annotated[list[str] | None, typer.Argument(help="What to sample; or use --prompts.")] = None,
    out: Annotated[
        str,
        typer.Option(
            "--out",
            "-o",
            help="Image file; several images form a grid. A path that ends in /, or a directory: one PNG file per "
            "image, with its settings inside; run it again to resume.",
        ),
    ] = "out.png",
    prompts_file: Annotated[
        str | None,
        typer.Option(
            "--prompts", help="With -o DIR/: a file with one prompt per line, or JSON lines; - is standard input."
        ),
    ] = None,
    negative: Annotated[str | None, typer.Option(help="Negative prompt, of all prompts without their own.")] = None,
    n: Annotated[int | None, typer.Option("--n", help="Images per prompt; default: 1, or one per seed.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the first image; the others count up; default: 0.")] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Seeds of each prompt's images, such as 0,1,2 or 0-9, in place of --seed.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Solver steps; default: the ensemble's.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; default: the ensemble's.")] = None,
    guidance_range: Annotated[
        str | None, typer.Option(help="Times with guidance, such as 0.2,0.8 (0 data, 1 noise); default: all.")
    ] = None,
    weak: Annotated[
        Path | None,
        typer.Option(
            help="A weaker ensemble of the same clusters (`atoll ema`): guidance leads away from it in place of the "
            "empty prompt."
        ),
    ] = None,
    routing: Annotated[
        str | None, typer.Option(help="top-2, full, threshold-0.1, nucleus-0.9, sample-1, oracle-3, ...")
    ] = None,
    replicas: Annotated[
        str | None, typer.Option(help="stacked, inverse-error, equal, time-switch-0.5; default: the ensemble's.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="euler, heun, midpoint, dpm++2m, unipc; default: the ensemble's.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(help="WIDTHxHEIGHT of the images in pixels, such as 1024x768; default: the main size."),
    ] = None,
    shift: Annotated[
        float | None,
        typer.Option(help="Shift of the solver's times towards noise, 1 for none; default: that of the experts."),
    ] = None,
    alignment: Annotated[str, typer.Option(help="snr (exact) or native (HDDM's formulas).")] = "snr",
    strict: Annotated[bool, typer.Option("--strict", help="Fail if an expert is missing.")] = False,
    side: Annotated[
        int | None, typer.Option(help="Enlarge the images of a grid to at least this many pixels; default: 128.")
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="Write the routing trace to this .json file, and a page.")] = None,
    batch: Annotated[
        int | None, typer.Option(help="With -o DIR/: images sampled at a time, and lost by a kill; default: 16.")
    ] = None,
    memory_budget: Annotated[
        str | None, typer.Option(help="Limit of weights on the device, such as 6GB; others load on demand.")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="fp32, bf16, fp16 or int8; default: as stored.")] = None,
    identity: Annotated[str | None, typer.Option(help="Of a collective: its identity, from its founder.")] = None,
    allow_hub: AllowHub = False,
    trust_paths: TrustPaths = False,
    quiet: Quiet = False,
) -> None:
    """Sample images: `atoll sample runs/demo/ensemble "digit seven, sans bold" -o out.png`, or `-o DIR/`."""
    from atoll.collective.model import is_collective, open_model
    from atoll.image_size import ImageSize
    from atoll.sample.files import BATCH, sample_to_files
    from atoll.sample.options import ImageOptions, check_output, parse_range, parse_seeds
    from atoll.sample.prompts import open_requests
    from atoll.sample.sheet import sample_to_file
    from atoll.sample.source import ModelSource

    # Options that exclude each other, and those with a form of their own.
    to_files = check_output(out, prompts, prompts_file, side=side, trace=trace, batch=batch)
    options = ImageOptions(negative or "", n, seed, None if seeds is None else parse_seeds(seeds))
    times = (0.0, 1.0) if guidance_range is None else parse_range(guidance_range)
    pixels = None if size is None else ImageSize.parse(size, "--size")

    # Of a collective, whatever is admitted now; each expert is fetched when it is first needed.
    model = open_model(ensemble, identity) if is_collective(ensemble) else None
    if identity is not None and model is None:
        raise AtollError(f"--identity: {ensemble} is no collective; leave it out")
    path = Path(ensemble) if model is None else model.directory
    # Options that are None take the ensemble's own values.
    loading: dict[str, Any] = {
        "routing": routing,
        "alignment": alignment,
        "strict": strict,
        "replicas": replicas,
        "memory_budget": memory_budget,
        "weights": weights,
        "allow_hub": allow_hub,
        "trust_paths": trust_paths,
        "fetch": model.fetch if model else None,
        "weak": weak,
    }
    solver: dict[str, Any] = {
        "steps": steps,
        "guidance": guidance,
        "guidance_range": times,
        "method": method,
        "size": pixels,
        "shift": shift,
    }

    # One file per image, or all images on one sheet.
    with open_requests(prompts, prompts_file, options) as requests:
        if to_files:
            source = ModelSource(path=path, name=ensemble.rstrip("/").rpartition("/")[2] if model else None, **loading)
            with bar("sample", "images", quiet) as update:
                done = sample_to_files(
                    source,
                    requests,
                    Path(out),
                    batch_size=BATCH if batch is None else batch,
                    progress=update,
                    **solver,
                )
            dropped, there = done.dropped, f", {done.skipped} were there" if done.skipped else ""
            typer.echo(f"{out}: {done.written} images written{there}")
        else:
            rows = list(requests())
            with bar("sample", "steps", quiet) as update:
                dropped = sample_to_file(
                    path,
                    [row.prompt for row in rows],
                    Path(out),
                    seeds=[one for row in rows for one in row.seeds],
                    negative_prompt=negative or None,
                    images_per_prompt=len(rows[0].seeds),
                    side=128 if side is None else side,
                    trace=trace,
                    progress=update,
                    **loading,
                    **solver,
                )
            typer.echo(f"{out} written")
    # Experts that failed are left out: the images exist, but the exit code reports it.
    if dropped:
        experts = ", ".join(f"{name}, which {why}" for name, why in dropped.items())
        typer.echo(f"without {escaped(experts)}", err=True)
        raise typer.Exit(EXIT_DEGRADED)
