"""The commands that train: one part, or all of them; and synthesize, which generates training data without images."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from atoll.cli.app import AllowHub, Quiet, Restart, Resume, RunOption, TrustPaths, app, bar
from atoll.errors import AtollError
from atoll.storage.layout import COLLECTIVE, EXIT_INTERRUPTED, EXIT_OUT_OF_MEMORY

if TYPE_CHECKING:
    from atoll.choices import Method
    from atoll.manifest import Manifest

train_app = typer.Typer(
    no_args_is_help=True, help="Train one part. It reads its own shards and writes its own artifact."
)
app.add_typer(train_app, name="train", rich_help_panel="Stages")
Nproc = Annotated[
    int, typer.Option("--nproc", min=1, help="Processes that share each batch, one per GPU of this node.")
]
Skip = Annotated[
    Path | None,
    typer.Option("--skip", help="Text file of keys, one per line, whose rows are left out; default: train.skip."),
]


@train_app.command("expert")
def train_expert(
    expert: Annotated[str, typer.Argument(help="Its cluster or its name, such as 3 or 3-eps-cosine.")],
    run: RunOption = Path(),
    resume: Resume = False,
    restart: Restart = False,
    nproc: Nproc = 1,
    lora: Annotated[
        int | None,
        typer.Option(min=1, help="Train a low-rank update of this rank of the finished expert -> loras/."),
    ] = None,
    skip: Skip = None,
    allow_hub: AllowHub = False,
    trust_paths: TrustPaths = False,
    quiet: Quiet = False,
) -> None:
    """Train one expert on the shards of its cluster -> experts/."""
    _train(
        ["expert", expert], run, resume, restart, nproc, quiet, skip=skip, hub=allow_hub, paths=trust_paths, lora=lora
    )


def _command(part: str, text: str) -> Callable[..., None]:
    """The command that trains a part which a run has once. text: its help."""

    # One function per part: typer reads the options from its signature.
    def train(
        run: RunOption = Path(),
        resume: Resume = False,
        restart: Restart = False,
        nproc: Nproc = 1,
        skip: Skip = None,
        allow_hub: AllowHub = False,
        trust_paths: TrustPaths = False,
        quiet: Quiet = False,
    ) -> None:
        _train([part], run, resume, restart, nproc, quiet, skip=skip, hub=allow_hub, paths=trust_paths)

    return train_app.command(part, help=text)(train)


# Parts that a run has once take no name.
@train_app.command("router")
def train_router(
    run: RunOption = Path(),
    resume: Resume = False,
    restart: Restart = False,
    nproc: Nproc = 1,
    skip: Skip = None,
    extend: Annotated[
        bool, typer.Option("--extend", help="Keep the router, and add what its clusters have grown by.")
    ] = False,
    rows: Annotated[
        Path | None,
        typer.Option(help="With --extend: a directory like clusters/, for clusters whose latents are not here."),
    ] = None,
    allow_hub: AllowHub = False,
    trust_paths: TrustPaths = False,
    quiet: Quiet = False,
) -> None:
    """Train the router on latents of all clusters -> router/."""
    if not extend:
        if rows is not None:
            raise AtollError("--rows names latents for --extend; add it")
        _train(["router"], run, resume, restart, nproc, quiet, skip=skip, hub=allow_hub, paths=trust_paths)
        return
    if resume or restart or nproc > 1:
        raise AtollError("--extend takes minutes in one process; leave --resume, --restart and --nproc out")
    from atoll.manifest import load_manifest
    from atoll.train.extend_router import extend_router

    with bar("router", "clusters", quiet) as update:
        out = extend_router(
            run,
            _skipping(load_manifest(run), skip, run).allowing(hub=allow_hub, paths=trust_paths),
            rows=rows,
            progress=lambda m: update(m["step"], m["steps"], f"loss {m['loss']:.4f}"),
        )
    typer.echo(f"{out} written")


train_common = _command("common", "Train the model that experts start from, on all data -> common/.")
train_generalist = _command("generalist", "Train the ensemble's expert of all clusters -> generalist/.")
train_monolith = _command("monolith", "Train one dense model on all data, to compare with -> monolith/.")
train_student = _command("student", "Distil the ensemble into one dense model -> student/; same as `atoll distil`.")
app.command("distil", rich_help_panel="Stages", help="Distil the ensemble into one dense model -> student/.")(
    train_student
)


@app.command(rich_help_panel="Stages")
def synthesize(
    out: Annotated[Path, typer.Argument(help="The run to create, or --run itself if that has no data.")],
    run: RunOption = Path(),
    images: Annotated[int, typer.Option("--images", "-n", min=2, help="Latents per cluster.")] = 4096,
    captions: Annotated[
        Path | None,
        typer.Option(help="A text file with one caption per line, or a directory with one file per cluster."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Solver steps; default: atoll.yaml's.")] = None,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1 samples what the experts learned.")] = 1.0,
    method: Annotated[
        str | None, typer.Option(help="euler, heun, midpoint, dpm++2m, unipc; default: atoll.yaml's.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Default: atoll.yaml's.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted generation.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace generated latents; never real data.")] = False,
    allow_hub: AllowHub = False,
    trust_paths: TrustPaths = False,
    quiet: Quiet = False,
) -> None:
    """Generate training data for router and student with the experts, without images -> OUT/."""
    from atoll.manifest import load_manifest
    from atoll.synthesize import synthesize_run

    # Options that are None take the values of atoll.yaml.
    with bar("synthesize", "latents", quiet) as update:
        done = synthesize_run(
            run,
            load_manifest(run).allowing(hub=allow_hub, paths=trust_paths),
            out,
            images=images,
            captions=captions,
            steps=steps,
            guidance=guidance,
            method=cast("Method | None", method),
            seed=seed,
            resume=resume,
            force=force,
            progress=update,
        )
    typer.echo(done)


@app.command(rich_help_panel="Stages")
def launch(
    where: Annotated[
        Path | None, typer.Argument(metavar="RUN", help="Directory of the run, or its atoll.yaml; like --run.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", min=1, help="Parts at a time; default: as many as fit.")
    ] = None,
    run: RunOption = Path(),
    on: Annotated[str, typer.Option(help="local (processes here), ray or slurm.")] = "local",
    gpus: Annotated[int | None, typer.Option(min=0, help="GPUs per part; default: 1 if there are any.")] = None,
    retries: Annotated[int, typer.Option(min=0, help="Restarts of a part that was killed or crashed.")] = 3,
    slurm: Annotated[
        list[str] | None, typer.Option(help="An option for sbatch, such as partition=gpu; repeatable.")
    ] = None,
    allow_hub: AllowHub = False,
    trust_paths: TrustPaths = False,
) -> None:
    """Train every expert, the common model, the generalist, the router and the monolith of atoll.yaml.

    Experts that start from the common model wait for it. Skips what is trained and resumes what was interrupted. Ctrl-C
    saves and stops all parts.
    """
    from atoll.launch.run import launch_run

    # An interrupted launch is no error, but has a distinct exit code.
    if not launch_run(
        where or run,
        on=on,
        jobs=jobs,
        gpus=gpus,
        retries=retries,
        options=slurm or [],
        allow_hub=allow_hub,
        trust_paths=trust_paths,
    ):
        typer.echo("stopped; all progress is saved; run the same command to resume", err=True)
        raise typer.Exit(EXIT_INTERRUPTED)


def _trainer(part: str) -> Callable[..., Path]:
    """The function that trains a part: (run, manifest[, name], resume=, restart=, progress=) -> its directory."""
    # Imported late: each command loads only what it trains.
    if part == "router":
        from atoll.train.router import train_router

        return train_router
    if part == "student":
        from atoll.train.distil import distil_run

        return distil_run
    if part == "lora":
        from atoll.train.lora import train_lora

        return train_lora
    # Experts and models of all clusters are trained alike.
    from atoll.train.expert import train_common, train_expert, train_generalist, train_monolith

    trainers: dict[str, Callable[..., Path]] = {
        "expert": train_expert,
        "common": train_common,
        "generalist": train_generalist,
        "monolith": train_monolith,
    }
    return trainers[part]


def _train(
    what: list[str],
    run: Path,
    resume: bool,
    restart: bool,
    nproc: int,
    quiet: bool,
    *,
    skip: Path | None,
    hub: bool,
    paths: bool,
    lora: int | None = None,
) -> None:
    """Run one training with a progress bar; a signal that stops it in order is no error.

    Args:
        what: the arguments of `atoll train`: the part, and its name if there are several.
        run, resume, restart, quiet: options of the command.
        nproc: processes that share each batch.
        skip: a list of keys, in place of those of atoll.yaml.
        hub, paths: what cards may reach.
        lora: the rank of a low-rank update that is trained instead of the expert; None: the expert.
    """
    from atoll.train.workers import is_first_process, reporting, train_together

    # Several processes: start this command in each.
    if nproc > 1:
        # The processes get the same options as this command.
        flags = {"--resume": resume, "--restart": restart, "--quiet": quiet}
        flags |= {"--allow-hub": hub, "--trust-paths": paths}
        more = [] if lora is None else ["--lora", str(lora)]
        more += [] if skip is None else ["--skip", str(skip.absolute())]
        with _lease(what, run, lora):
            arguments = ["train", *what, "--run", str(run), *more, *(flag for flag, on in flags.items() if on)]
            train_together(arguments, nproc)
        return
    # One process, or one of several: only the first one prints.
    first = is_first_process()
    with _memory_apart(), reporting(), _lease(what, run, lora), bar(what[0], "steps", quiet or not first) as update:
        from atoll.manifest import load_manifest
        from atoll.train.loop import Interrupted

        # The progress bar also shows loss and speed.
        def show(metrics: dict[str, Any]) -> None:
            note = f"loss {metrics['loss']:.4f}, {metrics['images_per_s']:.0f} images/s"
            update(metrics["step"], metrics["steps"], note)

        try:
            # Only experts have a name.
            part, *which = what
            options: dict[str, Any] = {"resume": resume, "restart": restart, "progress": show}
            options |= {} if lora is None else {"rank": lora}
            manifest = _skipping(load_manifest(run), skip, run).allowing(hub=hub, paths=paths)
            done = f"{_trainer('lora' if lora else part)(run, manifest, *which, **options)} written"
        # The training has saved its state, so this is no failure.
        except Interrupted as stop:
            done = str(stop)
        # Other processes would print the same line again.
        if first:
            typer.echo(done)


def _skipping(manifest: "Manifest", skip: Path | None, run: Path) -> "Manifest":
    """The manifest with a list of keys that is named on the command line, in place of its own."""
    # Relative to the run, as in atoll.yaml; real paths, since ".." leads elsewhere behind a link.
    return manifest if skip is None else manifest.skipping(os.path.relpath(skip.resolve(), run.resolve()))


@contextmanager
def _memory_apart() -> Iterator[None]:
    """Report lack of memory in one line, with an exit code that `atoll launch` retries, unlike a mistake."""
    from atoll.storage.memory import is_out_of_memory, one_line

    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        typer.secho(f"atoll: {one_line(error)}", fg="red", err=True)
        raise typer.Exit(EXIT_OUT_OF_MEMORY) from None


def _lease(what: list[str], run: Path, lora: int | None) -> AbstractContextManager[object]:
    """Renew the lease of a whole expert while it is trained, if this run has joined a collective."""
    from atoll.train.workers import is_first_process, is_worker

    # One process renews the lease: the one that started the workers, or the first one under torchrun.
    alone = is_first_process() and not is_worker()
    if what[0] != "expert" or lora is not None or not alone or not (run / COLLECTIVE).is_file():
        return nullcontext()
    from atoll.collective.heartbeat import renewed

    return renewed(run, what[1])
