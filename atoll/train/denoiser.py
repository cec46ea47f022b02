"""Trains one denoiser on shards: an expert, the common model, the monolith or a student."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from atoll.encoders.codec.statistics import own_constants
from atoll.encoders.text import TextEncoder, build_encoder
from atoll.encoders.trust import Trust
from atoll.manifest import Manifest, NetworkSettings, TrainSettings
from atoll.nn import build_network, patch_of
from atoll.nn.lora import add_lora
from atoll.objective import Objective
from atoll.storage.cards import (
    CalibrationRecord,
    ClusterShardsCard,
    ExpertCard,
    LoraCard,
    TrainingRecord,
)
from atoll.storage.layout import TrainingLayout
from atoll.storage.shards import Shards, is_held_out
from atoll.train.batches import CaptionedLatents, Rows, sizes_of
from atoll.train.calibrate import calibrate
from atoll.train.checkpoint import discard_checkpoints
from atoll.train.denoiser_artifact import TrainingSpec, denoiser_card, write_denoiser
from atoll.train.denoising import Denoising, Teaching
from atoll.train.drawn_captions import tag_dropout
from atoll.train.init_weights import InitWeights
from atoll.train.island import Island
from atoll.train.loop import train
from atoll.train.plans import TrainingMarks, finished
from atoll.train.skipped import without_skipped
from atoll.train.stopping import stop_signals, stoppable
from atoll.train.targets import TargetsTerm
from atoll.train.token_routing import TokenRouting
from atoll.train.track import TrainProgress
from atoll.train.validation_images import ValidationImages


def train_denoiser(
    spec: TrainingSpec,
    manifest: Manifest,
    shards: Sequence[Shards],
    *,
    resume: bool,
    restart: bool,
    progress: TrainProgress | None,
    teaching: Teaching | None = None,
) -> Path:
    """Train one denoiser, from the shards to the artifact.

    Args:
        spec: what is trained.
        manifest: the run's atoll.yaml.
        shards: directories of latents to train on.
        resume: continue from the checkpoint if there is one.
        restart: discard a checkpoint or a finished artifact.
        progress: called with each line of metrics.jsonl that reports a step.
        teaching: replaces the data in the target, see `atoll.train.distil`; None for the data.

    Returns:
        The directory of the artifact.

    Raises:
        AtollError: as `train_expert`.
    """
    setup = _Setup.of(spec, manifest, shards, teaching)
    # A finished artifact with today's mark is the result already.
    marks, settings = TrainingMarks(setup.identity, setup.settings), setup.settings
    if finished(spec.path, LoraCard if spec.lora else ExpertCard, marks, resume, restart):
        return spec.path
    network = setup.network()
    state = TrainingLayout.of(spec.path).root
    # Signals are recorded from here on: the last checkpoint, and the artifact, are written as a whole.
    with Island.join(settings.device, settings.threads) as island, stop_signals() as stopped:
        task = setup.task(network, island, teaching)
        for line in setup.warnings() if island.is_first else ():
            warnings.warn(f"{spec.name}: {line}", stacklevel=2)
        options: dict[str, Any] = {"resume": resume, "restart": restart, "progress": progress, "stopped": stopped}
        trained = train(task, settings, state, marks, island, **options)
        if setup.targets is not None:
            setup.targets.detach(network)
        # Calibrate with the EMA weights, which training leaves in the network.
        calibration = calibrate(
            stoppable(network, island, stopped),
            setup.objective,
            setup.held_out,
            mean=setup.training.rows.mean(),
            seed=spec.seed,
            device=island.device,
        )
        # Write the artifact, in the first process.
        measured = CalibrationRecord(**calibration.config(), measured_on=setup.measured_on)
        record = setup.record(trained.summary)
        card = denoiser_card(spec, setup.data, setup.identity, calibration=measured, training=record)
        write_denoiser(spec.path, card, network, calibration, island)
        if island.is_first and settings.keep_checkpoints == "none":
            discard_checkpoints(state)
    return spec.path


@dataclass(frozen=True, eq=False)
class _Setup:
    """What a training is made of: the data, the choices and what identifies it.

    Attributes:
        spec: what is trained.
        data: the card of the shards.
        trust: what its names may reach.
        config: of the network.
        init: the weights that it begins with; None for new ones.
        origin: what it was made from, for the card and the mark.
        training, held_out: rows to train on, and rows that show the errors which sampling will meet.
        measured_on: which rows the latter are.
        identity: a change of any of these makes another expert.
    """

    spec: TrainingSpec
    data: ClusterShardsCard
    trust: Trust
    objective: Objective
    settings: TrainSettings
    config: dict[str, Any]
    init: InitWeights | None
    origin: dict[str, Any]
    targets: TargetsTerm | None
    routing: TokenRouting | None
    training: CaptionedLatents
    held_out: CaptionedLatents
    measured_on: str
    identity: dict[str, Any]

    @classmethod
    def of(
        cls, spec: TrainingSpec, manifest: Manifest, shards: Sequence[Shards], teaching: Teaching | None
    ) -> "_Setup":
        """Read the data and settle every choice. Raises AtollError as `train_expert`."""
        # Directories of clusters that grew name the assignment that they were written under: the latest is the run's.
        data = max((part.card(ClusterShardsCard) for part in shards), key=lambda card: card.clusters)
        trust = manifest.trust_in_cards(spec.run)
        encoder = build_encoder(data.condition, trust)
        objective = Objective(**spec.part.objective.model_dump())
        settings = spec.settings or manifest.train_of(spec.part)
        shards, left_out = without_skipped(spec.run, settings, shards)
        # The network, and what it begins with.
        config = denoiser_config(manifest.network_of(spec.part), data.latent_shape, encoder.dim, encoder.pooled_dim)
        init = InitWeights.of(spec, settings)
        config = init.config(config, data, objective) if init else config
        targets = TargetsTerm.of(settings, manifest.targets, shards, config)
        origin = {
            **({"init": init.about.plain()} if init else {}),
            **({"teacher": teaching.about.plain()} if teaching else {}),
            **left_out,
            **({"targets": targets.record.plain()} if targets else {}),
        }
        # Held-out rows show the errors that sampling will meet.
        training, held_out, measured_on = split_holdout(shards, encoder, settings.calibration_holdout)
        training.tags = tag_dropout(settings, encoder)
        routing = TokenRouting.of(settings, config, training.rows.shapes, targets.block if targets else None)

        identity = {
            "network": config,
            "objective": objective.config(),
            "assignment": data.assignment,
            "clusters": list(spec.clusters),
            "seed": spec.seed,
            **sizes_of(training.rows, data.latent_shape),
            **origin,
            **own_constants(data.codec),
            **({"lora": spec.lora.plain()} if spec.lora else {}),
        }
        chosen = (objective, settings, config, init, origin, targets, routing)
        return cls(spec, data, trust, *chosen, training, held_out, measured_on, identity)

    def network(self) -> nn.Module:
        """Build the network that training begins with."""
        # The seed determines the initial weights, unless another expert's replace them.
        torch.manual_seed(self.spec.seed)
        network = build_network(self.config)
        if self.init:
            network.load_state_dict(self.init.weights(self.config))
        if self.spec.lora:
            add_lora(network, self.spec.lora)
        return network

    def task(self, network: nn.Module, island: Island, teaching: Teaching | None) -> Denoising:
        """Return the task, which holds the network; training changes it in place."""
        settings, codec, trust = self.settings, self.data.codec, self.trust
        options: dict[str, Any] = {"settings": settings, "seed": self.spec.seed, "codec": codec, "trust": trust}
        task = Denoising(network, self.objective, self.training, self.held_out, **options)
        task.patch, task.routing = patch_of(self.config), self.routing
        if self.targets is not None:
            self.targets.attach(network, self.spec.seed)
            task.targets = self.targets
        if teaching is not None:
            task.teacher = teaching.on(island.device)
        task.rows = max(1, task.rows // island.world)
        if settings.validation is not None:
            task.drawing = ValidationImages(
                settings.validation,
                self.spec.run,
                objective=self.objective,
                encoder=self.training.encoder,
                shape=self.data.latent_shape,
                codec=codec,
                trust=trust,
                rows=task.rows,
            )
        return task

    def warnings(self) -> list[str]:
        """What the owner should know before the training."""
        lines = [*self.training.repeated(self.settings.batch), self.routing.warning() if self.routing else None]
        return [line for line in lines if line]

    def record(self, summary: dict[str, Any]) -> TrainingRecord:
        """Return the card's part on the training."""
        return TrainingRecord(
            **summary,
            **self.origin,
            rows=len(self.training),
            calibration_holdout=self.settings.calibration_holdout,
            seed=self.spec.seed,
            torch=torch.__version__,
        )


def split_holdout(
    shards: Sequence[Shards], encoder: TextEncoder, fraction: float
) -> tuple[CaptionedLatents, CaptionedLatents, str]:
    """Split the rows into those to train on and those to calibrate on.

    Args:
        shards: directories of latents.
        encoder: of their captions.
        fraction: of the training rows that is held out for the calibration (`is_held_out`: the same rows for all
            replicas). These rows have captions like those at inference. With 0 the calibration uses the val split, or
            the training rows themselves if there is none.

    Returns:
        (rows to train on, rows to calibrate on, "held back", "val" or "train" for the latter).
    """
    # Rows that no replica was trained on, or the next best.
    every, val = Rows.of(shards, "train"), Rows.of(shards, "val")
    if fraction > 0:
        # The same numbers in all replicas, so the held-out rows are unseen by each of them.
        held_out = is_held_out(shards, fraction)[every.numbers]  # [n] bool
        training, holdout = (every.select(rows.nonzero().flatten()) for rows in (~held_out, held_out))
        return CaptionedLatents(training, encoder), CaptionedLatents(holdout, encoder), "held back"
    # Without a hold-out, the val split is the nearest to unseen captions.
    if len(val):
        return CaptionedLatents(every, encoder), CaptionedLatents(val, encoder), "val"
    return CaptionedLatents(every, encoder), CaptionedLatents(every, encoder), "train"


def denoiser_config(
    network: NetworkSettings, latent_shape: Sequence[int], states_dim: int, pooled_dim: int | None
) -> dict[str, Any]:
    """Return the complete config of an expert's network.

    Args:
        network: the manifest's choices.
        latent_shape: (C, H, W).
        states_dim: width of the text encoder's token states.
        pooled_dim: width of its pooled vector, None if it has none.
    """
    channels, height, width = latent_shape
    # The text encoder fixes the width of the pooled vector; the manifest only says whether it is used.
    return {
        **network.config(),
        "channels": channels,
        "size": [height, width],
        "states_dim": states_dim,
        "pooled_dim": pooled_dim if network.pooled else None,
    }
