"""Commands for a trained expert: measure its calibration, and average its weights over another length."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from atoll.cli.app import AllowHub, TrustPaths, app

if TYPE_CHECKING:
    from atoll.train.calibrate_expert import Use


@app.command(rich_help_panel="Tools")
def calibrate(
    expert: Annotated[Path, typer.Argument(help="An expert's directory.")],
    shards: Annotated[
        list[Path] | None, typer.Option(help="Latents of its clusters; default: clusters/ of the expert's run.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Output directory; default: in place.")] = None,
    use: Annotated[
        str, typer.Option(help="Rows to measure on: auto (held out from training, or the val split), val, or all.")
    ] = "auto",
    rows: Annotated[int, typer.Option(min=2, help="Maximum number of latents.")] = 2048,
    seed: Annotated[int | None, typer.Option(help="Seed of rows and noise; default: the training's.")] = None,
    skip: Annotated[
        Path | None, typer.Option(help="Text file of keys, one per line, whose rows are left out, as in training.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Also plot the curves to this image.")] = None,
    allow_hub: AllowHub = False,
    trust_paths: TrustPaths = False,
) -> None:
    """Measure an expert's calibration on held-out latents, and write it into its card."""
    from atoll.encoders.trust import Trust
    from atoll.train import calibrate_expert as work

    # Without --shards, the run of the expert holds them.
    held_out = shards or work.shards_of(expert)
    # Without --out, the card of the expert is replaced in place.
    trust = Trust(hub=allow_hub, paths=trust_paths)
    curve = work.calibrate_expert(
        expert, held_out, out=out, use=cast("Use", use), rows=rows, skip=skip, seed=seed, trust=trust
    )
    typer.echo(work.table(curve))
    # The plot is optional, and needs no second measurement.
    if plot is not None:
        work.plot(curve, plot, expert.name)
        typer.echo(f"{plot} written")
    typer.echo(f"{out or expert} written; `atoll assemble` adds it to the ensemble")


@app.command(rich_help_panel="Tools")
def ema(
    expert: Annotated[
        Path,
        typer.Argument(help="Directory of an expert, or of an ensemble for all of its, in the run that trained it."),
    ],
    sigma_rel: Annotated[float, typer.Option("--sigma-rel", help="Width of the average: 0.05 is short, 0.25 long.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory of the new expert or ensemble.")],
    at_step: Annotated[
        int | None,
        typer.Option(help="End the average at this step's snapshot, for a weaker expert; default: the last step."),
    ] = None,
    allow_hub: AllowHub = False,
    trust_paths: TrustPaths = False,
) -> None:
    """Average an expert's weights over another length, from the snapshots of train.ema_profiles (EDM2)."""
    from atoll.encoders.trust import Trust
    from atoll.train.reconstruct import reconstruct

    trust = Trust(hub=allow_hub, paths=trust_paths)
    typer.echo(reconstruct(expert, sigma_rel, out, at_step, trust))


@app.command(rich_help_panel="Tools")
def merge(
    expert: Annotated[Path, typer.Argument(help="Directory of the expert that the update was trained on.")],
    lora: Annotated[Path, typer.Argument(help="Directory of the low-rank update, such as loras/3-moss.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory of the new expert.")],
    scale: Annotated[float, typer.Option(help="The update is multiplied by this.")] = 1.0,
) -> None:
    """Write an expert whose weights have a low-rank update added: `atoll merge experts/3-moss loras/3-moss -o new`."""
    from atoll.train.lora import merge_expert

    merge_expert(expert, lora, out, scale)
    typer.echo(f"{out} written" + ("" if scale in (0.0, 1.0) else "; it has no calibration: `atoll calibrate` it"))
