"""Trains one expert on its cluster's shards and nothing else, or the monolith on all: `atoll train expert 3`."""

from pathlib import Path

from atoll.errors import AtollError
from atoll.manifest import ExpertSettings, Manifest
from atoll.storage.layout import MONOLITH, RunLayout, expert_seed, monolith_seed
from atoll.storage.shards import Shards
from atoll.train.denoiser import train_denoiser
from atoll.train.denoiser_artifact import TrainingSpec
from atoll.train.track import TrainProgress


def train_expert(
    run: Path,
    manifest: Manifest,
    name: str,
    *,
    resume: bool = False,
    restart: bool = False,
    progress: TrainProgress | None = None,
) -> Path:
    """Train one expert of the run.

    Args:
        run: the run's directory.
        manifest: its atoll.yaml.
        name: the expert's cluster or full name.
        resume: continue from the checkpoint if there is one.
        restart: discard a checkpoint or a finished expert.
        progress: called with each line of metrics.jsonl that reports a step.

    Returns:
        The directory of its artifact.

    Raises:
        AtollError: no such expert, missing or damaged shards, NaN loss, or an existing checkpoint or expert.
    """
    expert = manifest.find_expert(name)
    shards = [Shards(RunLayout(run).cluster(expert.cluster))]
    spec = spec_of(run, manifest, expert)
    return train_denoiser(spec, manifest, shards, resume=resume, restart=restart, progress=progress)


def spec_of(run: Path, manifest: Manifest, expert: ExpertSettings) -> TrainingSpec:
    """Return what distinguishes the training of one expert of a run."""
    # The seed depends on the expert's position in atoll.yaml.
    number = next(i for i, e in enumerate(manifest.experts) if e is expert)
    # The expert learns from one cluster, under its name in atoll.yaml.
    return TrainingSpec(
        run=run,
        path=RunLayout(run).expert(expert.full_name),
        name=expert.full_name,
        part=expert,
        clusters=(expert.cluster,),
        seed=expert_seed(manifest.seed, number),
    )


def train_monolith(
    run: Path,
    manifest: Manifest,
    *,
    resume: bool = False,
    restart: bool = False,
    progress: TrainProgress | None = None,
) -> Path:
    """Train the monolith, the dense model to compare with, on all clusters; see `train_expert`."""
    if manifest.monolith is None:
        raise AtollError("atoll.yaml names no monolith; add a `monolith:` section with its objective")
    # The monolith sees what all experts together see.
    clusters = tuple(range(manifest.clusters.k))
    layout = RunLayout(run)
    shards = [Shards(layout.cluster(k)) for k in clusters]
    spec = TrainingSpec(
        run=run,
        path=layout.monolith,
        name=MONOLITH,
        part=manifest.monolith,
        clusters=clusters,
        seed=monolith_seed(manifest.seed),
    )
    return train_denoiser(spec, manifest, shards, resume=resume, restart=restart, progress=progress)
