"""Trains one expert on one cluster's shards and nothing else: `atoll train expert 3`."""

from pathlib import Path

from atoll.errors import AtollError
from atoll.manifest import Manifest
from atoll.storage.layout import MONOLITH, RunLayout, expert_seed, monolith_seed
from atoll.storage.shards import Shards
from atoll.train.denoiser import TrainingSpec, train_denoiser
from atoll.train.track import TrainProgress


def train_expert(
    run: Path,
    manifest: Manifest,
    wanted: str,
    *,
    resume: bool = False,
    restart: bool = False,
    progress: TrainProgress | None = None,
) -> Path:
    """Trains the expert `wanted` (cluster or full name) of the run and returns its artifact's directory.

    Raises:
        AtollError: no such expert, missing or damaged shards, NaN loss, a checkpoint in the way.
    """
    expert = manifest.find_expert(wanted)
    shards = Shards(RunLayout(run).cluster(expert.cluster))
    number = next(i for i, e in enumerate(manifest.experts) if e is expert)
    job = TrainingSpec(
        run=run,
        path=RunLayout(run).expert(expert.full_name),
        name=expert.full_name,
        part=expert,
        clusters=(expert.cluster,),
        seed=expert_seed(manifest.seed, number),
    )
    return train_denoiser(job, manifest, [shards], resume=resume, restart=restart, progress=progress)


def train_monolith(
    run: Path,
    manifest: Manifest,
    *,
    resume: bool = False,
    restart: bool = False,
    progress: TrainProgress | None = None,
) -> Path:
    """Trains the dense model of the comparison on all clusters and returns its artifact's directory."""
    if manifest.monolith is None:
        raise AtollError("atoll.yaml names no monolith; add a `monolith:` section with its objective")
    clusters = tuple(range(manifest.clusters.k))
    layout = RunLayout(run)
    shards = [Shards(layout.cluster(k)) for k in clusters]
    job = TrainingSpec(
        run=run,
        path=layout.monolith,
        name=MONOLITH,
        part=manifest.monolith,
        clusters=clusters,
        seed=monolith_seed(manifest.seed),
    )
    return train_denoiser(job, manifest, shards, resume=resume, restart=restart, progress=progress)
