"""Trains one expert on its cluster's shards and nothing else, or a model on all: `atoll train expert 3`."""

from pathlib import Path

from atoll.errors import AtollError
from atoll.manifest import ExpertSettings, Manifest, MonolithSettings
from atoll.storage.artifact import CARD, load_clusters, read_card
from atoll.storage.cards import ExpertCard
from atoll.storage.layout import RunLayout, common_seed, expert_seed, generalist_seed, monolith_seed
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
        AtollError: no such expert, missing or damaged shards, NaN loss, an existing checkpoint or expert, or no common
            model yet, from which it starts.
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
    spec = _spec_of_all(run, manifest, manifest.monolith, RunLayout(run).monolith, monolith_seed(manifest.seed))
    return _train_on_all(spec, manifest, resume=resume, restart=restart, progress=progress)


def train_common(
    run: Path,
    manifest: Manifest,
    *,
    resume: bool = False,
    restart: bool = False,
    progress: TrainProgress | None = None,
) -> Path:
    """Train the common model, from which experts start, on all clusters; see `train_expert`.

    A run whose clusters grew keeps the model of its earlier clusters: experts started from it. With `resume` it is
    complete; `restart` trains another one.
    """
    if manifest.common is None:
        raise AtollError("atoll.yaml names no common model; add a `common:` section with its objective")
    if resume and not restart and _is_of_earlier_clusters(RunLayout(run)):
        return RunLayout(run).common
    spec = _spec_of_all(run, manifest, manifest.common, RunLayout(run).common, common_seed(manifest.seed))
    return _train_on_all(spec, manifest, resume=resume, restart=restart, progress=progress)


def train_generalist(
    run: Path,
    manifest: Manifest,
    *,
    resume: bool = False,
    restart: bool = False,
    progress: TrainProgress | None = None,
) -> Path:
    """Train the generalist, the ensemble's expert of all clusters, see `train_expert`."""
    if manifest.generalist is None:
        raise AtollError("atoll.yaml names no generalist; add a `generalist:` section with its objective")
    path = RunLayout(run).generalist
    spec = _spec_of_all(run, manifest, manifest.generalist, path, generalist_seed(manifest.seed))
    return _train_on_all(spec, manifest, resume=resume, restart=restart, progress=progress)


def _is_of_earlier_clusters(layout: RunLayout) -> bool:
    """Whether there is a common model, of an assignment from which the run's clusters grew."""
    if not ((layout.common / CARD).is_file() and layout.clusters_card.is_file()):
        return False
    assignment = read_card(layout.common, ExpertCard).assignment
    return load_clusters(layout.clusters_card).descent.ancestor(assignment) is not None


def _spec_of_all(run: Path, manifest: Manifest, part: MonolithSettings, path: Path, seed: int) -> TrainingSpec:
    """Return what distinguishes the training of a model of all clusters, called like its directory."""
    clusters = tuple(range(manifest.clusters.k))
    return TrainingSpec(run=run, path=path, name=path.name, part=part, clusters=clusters, seed=seed)


def _train_on_all(
    spec: TrainingSpec, manifest: Manifest, *, resume: bool, restart: bool, progress: TrainProgress | None
) -> Path:
    """Train a model on what all experts together see."""
    shards = [Shards(RunLayout(spec.run).cluster(k)) for k in spec.clusters]
    return train_denoiser(spec, manifest, shards, resume=resume, restart=restart, progress=progress)
