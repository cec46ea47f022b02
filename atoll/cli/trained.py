"""Verbs for an expert that is trained: how far its estimates can be trusted, and another average of its weights."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from atoll.cli.app import app

if TYPE_CHECKING:
    from atoll.train.calibrate_expert import Use


@app.command(rich_help_panel="Tools")
def calibrate(
    expert: Annotated[Path, typer.Argument(help="An expert's directory.")],
    shards: Annotated[
        list[Path] | None, typer.Option(help="Latents of its clusters; default: clusters/ of the run it lies in.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Default: in place.")] = None,
    use: Annotated[
        str, typer.Option(help="auto: the rows its training held back, or the val split. val. all.")
    ] = "auto",
    rows: Annotated[int, typer.Option(min=2, help="At most so many latents.")] = 2048,
    seed: Annotated[int | None, typer.Option(help="Of the rows and the noise; default: the training's.")] = None,
    plot: Annotated[Path | None, typer.Option(help="An image of the curves to write.")] = None,
) -> None:
    """Measure an expert's calibration on held-out latents and write it into its card."""
    from atoll.train import calibrate_expert as work

    found = work.calibrate_expert(
        expert, shards or work.shards_of(expert), out=out, use=cast("Use", use), rows=rows, seed=seed
    )
    typer.echo(work.table(found))
    if plot is not None:
        work.plot(found, plot, expert.name)
        typer.echo(f"{plot} written")
    typer.echo(f"{out or expert} written; `atoll assemble` takes it into the ensemble")


@app.command(rich_help_panel="Tools")
def ema(
    expert: Annotated[Path, typer.Argument(help="An expert's directory, where training wrote it.")],
    sigma_rel: Annotated[float, typer.Option("--sigma-rel", help="The average's width: 0.05 is short, 0.25 is long.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The expert's directory to make.")],
) -> None:
    """Average an expert's weights over another length, from the snapshots of train.ema_profiles (EDM2)."""
    from atoll.train.snapshots import reconstruct_expert

    typer.echo(f"{reconstruct_expert(expert, sigma_rel, out)} written; atoll calibrate measures it anew")
