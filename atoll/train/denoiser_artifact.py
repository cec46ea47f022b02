"""What distinguishes one training of a denoiser, and the artifact that it writes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from atoll.calibration import Calibration
from atoll.manifest import ExpertSettings, MonolithSettings, TrainSettings
from atoll.storage.artifact import save_artifact
from atoll.storage.cards import CalibrationRecord, ClusterShardsCard, ExpertCard, LoraCard, LoraRecord, TrainingRecord
from atoll.train.island import Island, gathered_state


@dataclass(frozen=True, kw_only=True)
class TrainingSpec:
    """What distinguishes one training of a denoiser from another.

    Attributes:
        run: the run's directory.
        path: where the artifact is written.
        name: of the denoiser, in its card.
        part: its section of atoll.yaml.
        clusters: that it is trained on.
        seed: of its weights and batches.
        settings: of the training, in place of those of its section.
        base: the expert to start from, in place of train.init.
        lora: a low-rank update of that expert is trained, and written alone; None: all weights.
    """

    run: Path
    path: Path
    name: str
    part: ExpertSettings | MonolithSettings
    clusters: tuple[int, ...]
    seed: int
    settings: TrainSettings | None = None
    base: Path | None = None
    lora: LoraRecord | None = None


def denoiser_card(
    spec: TrainingSpec,
    data: ClusterShardsCard,
    identity: dict[str, Any],
    *,
    calibration: CalibrationRecord,
    training: TrainingRecord,
) -> ExpertCard | LoraCard:
    """Return the card: what identifies the training, what the data are, and what was measured."""
    values: dict[str, Any] = {
        "name": spec.name,
        "k": data.clusters,
        "clusters": spec.clusters,
        "objective": identity["objective"],
        "network": identity["network"],
        "assignment": data.assignment,
        "latent_shape": data.latent_shape,
        **({"shapes": identity["shapes"]} if "shapes" in identity else {}),
        "codec": data.codec,
        "condition": data.condition,
        "calibration": calibration,
        "training": training,
    }
    return LoraCard(**values, base=training.init, lora=spec.lora) if spec.lora else ExpertCard(**values)


def write_denoiser(
    path: Path, card: ExpertCard | LoraCard, network: nn.Module, calibration: Calibration, island: Island
) -> None:
    """Write the artifact of a trained network; of a low-rank update, its matrices alone.

    Sharded weights are gathered by all processes, so each of them calls this; the first one writes.
    """
    gathered = gathered_state(network, trained_only=isinstance(card, LoraCard))
    weights = {
        **{f"network.{name}": value for name, value in gathered.items()},
        **{f"calibration.{name}": value for name, value in calibration.tensors().items()},
    }
    if island.is_first:
        save_artifact(path, card, weights)
