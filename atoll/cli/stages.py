"""The verbs of a run's life, from images to a report; those that train stand in training.py."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from atoll.cli.app import AllowHub, Force, Quiet, RunOption, TrustPaths, app, bar
from atoll.cli.sampling import sample
from atoll.cli.training import launch
from atoll.errors import AtollError
from atoll.storage.layout import RunLayout

if TYPE_CHECKING:
    from atoll.data.encode import EncodeBackend


Recipe = Annotated[str | None, typer.Option(help="A built-in recipe, or a yaml file; default: demo, or images.")]
Data = Annotated[str | None, typer.Option(help="Your images: a directory, tars, parquet files, a glob or a URL.")]


@app.command(rich_help_panel="Stages")
def init(
    run: Annotated[Path, typer.Argument(help="The directory to make.")], recipe: Recipe = None, data: Data = None
) -> None:
    """Make a run: a directory with an atoll.yaml to edit."""
    from atoll.data.init import init_run

    typer.echo(f"{init_run(run, recipe, data)} written")


@app.command(rich_help_panel="Stages")
def encode(
    run: RunOption = Path(),
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted encoding.")] = False,
    force: Force = False,
    on: Annotated[str, typer.Option(help="local, or ray for all machines of a Ray cluster.")] = "local",
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that decode (local), or workers of the machines (ray).")
    ] = None,
    max_skipped: Annotated[
        float | None, typer.Option(min=0, max=1, help="Fraction of images that may fail; default: atoll.yaml's.")
    ] = None,
    allow_uncaptioned: Annotated[
        bool, typer.Option("--allow-uncaptioned", help="Go on where captions lie beside images and none is read.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Encode images and captions -> encoded/: shards of latents, captions and features."""
    from atoll.data.encode import encode_run
    from atoll.manifest import load_manifest

    # Check the backend before anything is loaded.
    if on not in ("local", "ray"):
        raise AtollError(f"--on {on}: expected local or ray")
    # Options that are not given leave the decision to atoll.yaml.
    with bar("encode", "images", quiet) as tell:
        # Without --allow-uncaptioned, atoll.yaml decides: the flag can only allow.
        done = encode_run(
            run,
            load_manifest(run),
            force=force,
            resume=resume,
            on=cast("EncodeBackend", on),
            workers=workers,
            max_skipped=max_skipped,
            allow_uncaptioned=allow_uncaptioned or None,
            progress=tell,
        )
    typer.echo(done)


@app.command(rich_help_panel="Stages")
def cluster(
    run: RunOption = Path(),
    force: Force = False,
    router_fraction: Annotated[
        float | None, typer.Option(help="Fraction of images for the router; default: atoll.yaml's.")
    ] = None,
    assign_only: Annotated[
        bool, typer.Option("--assign-only", help="Assign new images to the existing clusters.")
    ] = False,
    like: Annotated[
        Path | None, typer.Option(help="Take the clusters of this run, whose images had another size.")
    ] = None,
    new_cluster: Annotated[
        bool, typer.Option("--new-cluster", help="Add the images of --encoded as a cluster of their own.")
    ] = False,
    split: Annotated[
        int | None, typer.Option(min=0, help="Split this cluster in two; the second part becomes the last cluster.")
    ] = None,
    encoded: Annotated[
        list[Path] | None,
        typer.Option(
            help="With --assign-only, --new-cluster, --split: output of `atoll encode`; default: the run's encoded/. "
            "Repeat it for --split if images were added."
        ),
    ] = None,
    allow_hub: AllowHub = False,
    trust_paths: TrustPaths = False,
    quiet: Quiet = False,
) -> None:
    """Cluster the features -> clusters/: the shards of each cluster's expert, and report.html."""
    from atoll.cluster import add_cluster, cluster_like, cluster_run, split_cluster
    from atoll.cluster import assign_only as assign
    from atoll.encoders.trust import Trust
    from atoll.manifest import load_manifest

    # Options of the ways exclude each other.
    chosen = {"--assign-only": assign_only, "--new-cluster": new_cluster, "--split": split is not None}
    way = [name for name, is_chosen in {**chosen, "--like": like is not None}.items() if is_chosen]
    _check_ways(way, encoded, force, router_fraction)
    layout = RunLayout(run)
    with bar("cluster", "images", quiet) as tell:
        # A copy of clusters/ alone has no atoll.yaml, and needs none to grow.
        trust, manifest = Trust(hub=allow_hub, paths=trust_paths), None
        if not way or like or layout.manifest.is_file():
            manifest = load_manifest(run).allowing(hub=allow_hub, paths=trust_paths)
            trust = manifest.trust_in_cards(run)
        # New images join the clusters, the clusters grow, or new ones are made.
        if like is not None and manifest is not None:
            done = cluster_like(run, manifest, like, force=force, progress=tell)
        elif not way and manifest is not None:
            done = cluster_run(run, manifest, force=force, router_fraction=router_fraction, progress=tell)
        else:
            sources = encoded or [layout.encoded]
            if split is not None:
                done = split_cluster(layout.clusters, split, sources, tell, trust)
            else:
                done = (add_cluster if new_cluster else assign)(layout.clusters, sources[0], tell, trust)
    typer.echo(done)


def _check_ways(way: list[str], encoded: list[Path] | None, force: bool, router_fraction: float | None) -> None:
    """Raise AtollError for options of `cluster` that exclude each other; way: those that are chosen."""
    if len(way) > 1:
        raise AtollError(f"{' and '.join(way)}: choose one")
    if encoded and way in ([], ["--like"]):
        raise AtollError("--encoded names images; use it with --assign-only, --new-cluster or --split")
    if way == ["--like"] and router_fraction is not None:
        raise AtollError("--like takes the other run's fraction; leave --router-fraction out")
    if way and way != ["--like"] and (force or router_fraction is not None):
        raise AtollError(f"{way[0]} does not make all clusters anew; leave --force and --router-fraction out")
    if way == ["--new-cluster"] and not encoded:
        raise AtollError("--new-cluster needs --encoded, the images of the new cluster")
    if len(encoded or []) > 1 and way != ["--split"]:
        raise AtollError(f"{way[0]} takes one --encoded; repeat the command")


@app.command(rich_help_panel="Stages")
def assemble(
    run: RunOption = Path(),
    rows: Annotated[
        Path | None,
        typer.Option(
            help="Weigh replicas on these rows: a directory like clusters/; default: the run's held-out rows."
        ),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(help="Add a low-rank update to its expert: loras/3-moss, or loras/3-moss=0.8; repeatable."),
    ] = None,
    allow_hub: AllowHub = False,
    trust_paths: TrustPaths = False,
) -> None:
    """Combine experts and router -> ensemble/ensemble.json, with the hash of every part."""
    from atoll.assemble import assemble_run
    from atoll.ensemble.lora import parse_lora
    from atoll.manifest import load_manifest

    loras = [parse_lora(text, run) for text in lora or ()]
    out = assemble_run(run, load_manifest(run), rows=rows, loras=loras, allow_hub=allow_hub, trust_paths=trust_paths)
    typer.echo(f"{out} written")


@app.command(rich_help_panel="Stages")
def evaluate(
    run: RunOption = Path(),
    sweep: Annotated[
        list[str] | None,
        typer.Option(help="An axis with values, such as routing=top-1,top-2, or monolith; repeat to combine."),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Text file with one prompt per line, for the report's images.")
    ] = None,
    allow_hub: AllowHub = False,
    trust_paths: TrustPaths = False,
    quiet: Quiet = False,
) -> None:
    """Compare the ensemble with the monolith -> report.html, report.json. If interrupted, run again to resume."""
    from atoll.evaluate.run import evaluate_run
    from atoll.evaluate.sweep import parse_sweep, read_prompts
    from atoll.manifest import load_manifest

    # Options replace values of atoll.yaml for this evaluation only.
    manifest = load_manifest(run).allowing(hub=allow_hub, paths=trust_paths)
    settings, trust = manifest.evaluate, manifest.trust_in_cards(run)
    # All --sweep options together form one sweep, which replaces the manifest's.
    if sweep:
        settings = settings.model_copy(update={"sweep": (parse_sweep(sweep),)})
    if prompts:
        settings = settings.model_copy(update={"prompts": read_prompts(prompts)})
    with bar("evaluate", "steps", quiet) as tell:
        report = evaluate_run(run, settings, progress=tell, trust=trust, skip=manifest.train.skip)
    typer.echo(f"{report} written; open it in a browser")


@app.command()
def demo(
    run: Annotated[Path, typer.Argument(help="Directory to create or to continue.")] = Path("runs/demo"),
    recipe: Recipe = None,
    data: Data = None,
    jobs: Annotated[int | None, typer.Option("--jobs", "-j", min=1, help="Trainings at a time.")] = None,
    collective: Annotated[
        bool, typer.Option("--collective", help="Four contributors who share a directory, in place of one owner.")
    ] = False,
) -> None:
    """Run everything, on built-in or your own data: encode, cluster, train, assemble, sample, evaluate."""
    if collective:
        from atoll.collective.demo import run_demo

        if data is not None or jobs is not None:
            raise AtollError("--collective: takes neither --data nor --jobs; name a --recipe with your data")
        page = run_demo(run, recipe, lambda line: typer.echo(line, err=True))
        typer.echo(f"{page} written; open it in a browser")
        return
    from atoll.data.init import init_run
    from atoll.manifest import load_manifest

    # An existing run is continued; every stage skips what is finished.
    init_run(run, recipe, data, again=True)
    layout = RunLayout(run)
    # The sample draws the prompts of the report.
    evaluation = load_manifest(run).evaluate
    prompts = list(evaluation.prompts)
    # Lambdas, so that each stage reads what the stages before it wrote.
    stages: list[tuple[str, Callable[[], None]]] = [
        ("encode", lambda: encode(run, resume=True)),
        ("cluster", lambda: cluster(run)),
        ("train", lambda: launch(run, jobs)),
        ("assemble", lambda: assemble(run)),
        ("sample", lambda: sample(str(layout.ensemble), prompts, str(layout.samples))),
        ("evaluate", lambda: evaluate(run)),
    ]
    # A grid of its own for each further size that the report shows.
    stages[5:5] = [
        (
            f"sample {size}",
            partial(sample, str(layout.ensemble), prompts, str(layout.samples.with_stem(f"samples-{size}")), size=size),
        )
        for size in evaluation.sizes
    ]
    # Without prompts there is nothing to sample; the report uses held-out captions.
    if not prompts:
        stages = [(name, stage) for name, stage in stages if not name.startswith("sample")]
    # Run them in order, each with a heading.
    for number, (name, stage) in enumerate(stages, start=1):
        typer.secho(f"[{number}/{len(stages)}] {name}", bold=True, err=True)
        stage()
