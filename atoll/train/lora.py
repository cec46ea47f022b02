"""Trains a low-rank update of one frozen expert, and merges it: `atoll train expert 3 --lora 16`, `atoll merge`."""

from dataclasses import replace
from pathlib import Path

from atoll.encoders.weights import same
from atoll.ensemble.lora import merged_tensors, read_lora
from atoll.errors import AtollError
from atoll.manifest import ExpertSettings, Manifest, TrainSettings
from atoll.objective import Objective
from atoll.storage.artifact import CARD, read_card, read_tensors, save_artifact
from atoll.storage.cards import ClusterShardsCard, ExpertCard, InitRecord, LoraRecord, MergeRecord
from atoll.storage.layout import RunLayout
from atoll.storage.shards import Shards
from atoll.train.denoiser import train_denoiser
from atoll.train.expert import spec_of
from atoll.train.init_weights import init_path
from atoll.train.track import TrainProgress


def train_lora(
    run: Path,
    manifest: Manifest,
    name: str,
    rank: int,
    *,
    resume: bool = False,
    restart: bool = False,
    progress: TrainProgress | None = None,
) -> Path:
    """Train a low-rank update of one expert on the shards of its cluster.

    Args:
        run: the run's directory.
        manifest: its atoll.yaml.
        name: the expert's cluster or full name.
        rank: of the update.
        resume: continue from the checkpoint if there is one.
        restart: discard a checkpoint or a finished update.
        progress: called with each line of metrics.jsonl that reports a step.

    Returns:
        The directory of its artifact, in loras/.

    Raises:
        AtollError: no expert to update, one of another objective or network, a rank or targets that do not fit; and as
            `train_expert`.
    """
    expert, layout = manifest.find_expert(name), RunLayout(run)
    settings, chosen = manifest.train_lora_of(expert), manifest.lora
    shards = [Shards(layout.cluster(expert.cluster))]
    base = _base(layout, manifest, expert, settings)
    _refuse_other(base, expert, shards[0].card(ClusterShardsCard))
    # Like the expert's own training, from its weights.
    spec = replace(
        spec_of(run, manifest, expert),
        path=layout.lora(expert.full_name),
        settings=settings,
        base=base,
        lora=LoraRecord(rank=rank, alpha=chosen.alpha or float(rank), targets=chosen.targets),
    )
    return train_denoiser(spec, manifest, shards, resume=resume, restart=restart, progress=progress)


def _base(layout: RunLayout, manifest: Manifest, expert: ExpertSettings, settings: TrainSettings) -> Path:
    """The expert to update: lora.train.init, else the run's own, else the one that it would start from."""
    if manifest.lora.train.get("init"):
        return init_path(layout.root, str(manifest.lora.train["init"]), layout.expert(expert.full_name))
    own = layout.expert(expert.full_name)
    if (own / CARD).is_file():
        return own
    if settings.init:
        return init_path(layout.root, settings.init, own)
    raise AtollError(
        f"{own}: not trained yet, so there is nothing to update; train it without --lora, or name an expert in "
        "lora.train.init"
    )


def _refuse_other(base: Path, expert: ExpertSettings, data: ClusterShardsCard) -> None:
    """Raise AtollError if the update would predict something else than its base, or of other latents or captions."""
    card = read_card(base, ExpertCard)
    for key in ("latent_shape", "codec", "condition"):
        if not same(given := card.plain()[key], wanted := data.plain()[key]):
            raise AtollError(
                f"{base}: has {key} {given}, the data {wanted}; a low-rank update keeps its base's: encode the data "
                "again with it"
            )
    # Sampling of times and weights of the loss may differ.
    mine, theirs = Objective(**expert.objective.model_dump()), Objective(**card.objective)
    for key in ("prediction", "schedule", "time_scale", "levels"):
        if (wanted := mine.config().get(key)) != (given := theirs.config().get(key)):
            raise AtollError(
                f"{base}: its objective has {key} {given}, atoll.yaml's {expert.full_name} {wanted}; a low-rank update "
                "keeps its base's: make them equal"
            )


def merge_expert(base: Path, lora: Path, out: Path, scale: float = 1.0) -> Path:
    """Write the expert whose weights are those of `base` with a low-rank update added.

    Args:
        base: the expert's directory.
        lora: the update's directory.
        out: the directory of the new expert.
        scale: the update is multiplied by this.

    Returns:
        `out`.

    Raises:
        AtollError: the update belongs to another expert; `out` exists already; a damaged artifact.
    """
    if out.exists():
        raise AtollError(f"{out}: exists already; choose another directory, or remove it")
    card = read_card(base, ExpertCard)
    update = read_lora(lora, card, base)
    tensors = merged_tensors(read_tensors(base, card), update, scale)
    mine = InitRecord(name=card.name, sha256=card.weights_sha256)
    theirs = InitRecord(name=update.card.name, sha256=update.card.weights_sha256)
    changes = {
        "calibration": update.calibration_at(scale, card),
        "training": update.card.training,
        "merged": MergeRecord(base=mine, lora=theirs, scale=scale),
    }
    save_artifact(out, card.model_copy(update=changes), tensors)
    return out
