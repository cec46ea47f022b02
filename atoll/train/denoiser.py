"""Trains one denoiser on shards: an expert, the common model, the monolith or a student."""

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from atoll.condition import Condition
from atoll.encoders.codec.statistics import own_constants
from atoll.encoders.text import TextEncoder, build_encoder
from atoll.encoders.trust import STRANGER, Trust
from atoll.manifest import Manifest, NetworkSettings, TrainSettings
from atoll.nn import build_network, patch_of
from atoll.nn.lora import add_lora
from atoll.nn.token_route import TokenRoute
from atoll.objective import Objective
from atoll.randomness import Stream, seeded
from atoll.storage.cards import (
    CalibrationRecord,
    ClusterShardsCard,
    ExpertCard,
    LoraCard,
    TeacherRecord,
    TrainingRecord,
)
from atoll.storage.layout import TrainingLayout
from atoll.storage.shards import Shards, is_held_out
from atoll.train.batches import CaptionedLatents, Rows, drop_condition, mirrored, sizes_of
from atoll.train.calibrate import calibrate
from atoll.train.checkpoint import discard_checkpoints
from atoll.train.denoiser_artifact import TrainingSpec, denoiser_card, write_denoiser
from atoll.train.drawn_captions import caption_draws, tag_dropout
from atoll.train.init_weights import InitWeights
from atoll.train.island import Island
from atoll.train.loop import Task, train
from atoll.train.plans import TrainingMarks, finished
from atoll.train.prefetch import Batch
from atoll.train.skipped import without_skipped
from atoll.train.stopping import stop_signals, stoppable
from atoll.train.targets import TargetsTerm
from atoll.train.token_routing import KEPT, TokenRouting
from atoll.train.track import TrainProgress
from atoll.train.validation_images import ValidationImages

_VALIDATION_ROWS = 256
_VALIDATION_LOG_SNR = (-6, -4, -2, 0, 2, 4, 6)


def train_denoiser(
    spec: TrainingSpec,
    manifest: Manifest,
    shards: Sequence[Shards],
    *,
    resume: bool,
    restart: bool,
    progress: TrainProgress | None,
    teaching: "Teaching | None" = None,
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
    # The data, the network and what identifies the training.
    # Directories of clusters that grew name the assignment that they were written under: the latest one is the run's.
    data = max((part.card(ClusterShardsCard) for part in shards), key=lambda card: card.clusters)
    trust = manifest.trust_in_cards(spec.run)
    encoder = build_encoder(data.condition, trust)
    objective = Objective(**spec.part.objective.model_dump())
    settings = spec.settings or manifest.train_of(spec.part)
    shards, left_out = without_skipped(spec.run, settings, shards)
    network_config = denoiser_config(manifest.network_of(spec.part), data.latent_shape, encoder.dim, encoder.pooled_dim)
    init_weights = InitWeights.of(spec, settings)
    origin = {
        **({"init": init_weights.about.plain()} if init_weights else {}),
        **({"teacher": teaching.about.plain()} if teaching else {}),
        **left_out,
    }
    network_config = init_weights.config(network_config, data, objective) if init_weights else network_config
    targets = TargetsTerm.of(settings, manifest.targets, shards, network_config)
    origin |= {"targets": targets.record.plain()} if targets else {}
    # Held-out rows show the errors that sampling will meet.
    training, held_out, measured_on = split_holdout(shards, encoder, settings.calibration_holdout)
    training.tags = tag_dropout(settings, encoder)
    tap = targets.block if targets else None
    routing = TokenRouting.of(settings, network_config, training.rows.shapes, tap)

    # A change of any of these makes another expert, so they are part of the mark.
    identity = {
        "network": network_config,
        "objective": objective.config(),
        "assignment": data.assignment,
        "clusters": list(spec.clusters),
        "seed": spec.seed,
        **sizes_of(training.rows, data.latent_shape),
        **origin,
        **own_constants(data.codec),
        **({"lora": spec.lora.plain()} if spec.lora else {}),
    }
    marks = TrainingMarks(identity, settings)
    # A finished artifact with today's mark is the result already.
    if finished(spec.path, LoraCard if spec.lora else ExpertCard, marks, resume, restart):
        return spec.path
    # Train and calibrate.
    network = _initial_network(network_config, spec, init_weights)
    state = TrainingLayout.of(spec.path).root
    # Signals are recorded from here on: the last checkpoint, and the artifact, are written as a whole.
    with Island.join(settings.device, settings.threads) as island, stop_signals() as stopped:
        # The task holds the network; training changes it in place.
        task = Denoising(
            network, objective, training, held_out, settings=settings, seed=spec.seed, codec=data.codec, trust=trust
        )
        task.patch, task.routing = patch_of(network_config), routing
        if targets is not None:
            targets.attach(network, spec.seed)
            task.targets = targets
        if teaching is not None:
            task.teacher = teaching.on(island.device)
        task.rows = max(1, task.rows // island.world)
        if settings.validation is not None:
            task.drawing = ValidationImages(
                settings.validation,
                spec.run,
                objective=objective,
                encoder=encoder,
                shape=data.latent_shape,
                codec=data.codec,
                trust=trust,
                rows=task.rows,
            )
        lines = [*training.repeated(settings.batch), routing.warning() if routing else None]
        for line in filter(None, lines if island.is_first else ()):
            warnings.warn(f"{spec.name}: {line}", stacklevel=2)
        options: dict[str, Any] = {"resume": resume, "restart": restart, "progress": progress, "stopped": stopped}
        trained = train(task, settings, state, marks, island, **options)
        if targets is not None:
            targets.detach(network)
        # Calibrate with the EMA weights, which training leaves in the network.
        calibration = calibrate(
            stoppable(network, island, stopped),
            objective,
            held_out,
            mean=training.rows.mean(),
            seed=spec.seed,
            device=island.device,
        )
        # Write the artifact, in the first process.
        record = TrainingRecord(
            **trained.summary,
            **origin,
            rows=len(training),
            calibration_holdout=settings.calibration_holdout,
            seed=spec.seed,
            torch=torch.__version__,
        )
        measured = CalibrationRecord(**calibration.config(), measured_on=measured_on)
        card = denoiser_card(spec, data, identity, calibration=measured, training=record)
        write_denoiser(spec.path, card, network, calibration, island)
        if island.is_first and settings.keep_checkpoints == "none":
            discard_checkpoints(state)
    return spec.path


def _initial_network(config: dict[str, Any], spec: TrainingSpec, init_weights: InitWeights | None) -> nn.Module:
    """Build the network that training begins with."""
    # The seed determines the initial weights, unless another expert's replace them.
    torch.manual_seed(spec.seed)
    network = build_network(config)
    if init_weights:
        network.load_state_dict(init_weights.weights(config))
    if spec.lora:
        add_lora(network, spec.lora)
    return network


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


# (objective, x, t, condition, cluster) -> (x0, eps) of the student's x at its own time t.
Teacher = Callable[[Objective, Tensor, Tensor, Condition, Tensor], tuple[Tensor, Tensor]]


class Teaching(Protocol):
    """A teacher that is not loaded yet.

    Attributes:
        about: its record in the card; the training's mark depends on it.
    """

    about: TeacherRecord

    def on(self, device: torch.device) -> Teacher:
        """Load the teacher on a device."""


class Denoising(Task):
    """The training of an expert: the loss of its objective, with the condition dropped in a fraction of the rows."""

    def __init__(
        self,
        network: nn.Module,
        objective: Objective,
        data: CaptionedLatents,
        held_out: CaptionedLatents,
        *,
        settings: TrainSettings,
        seed: int,
        codec: dict[str, Any],
        trust: Trust = STRANGER,
    ):
        self.module, self.objective, self.data, self.held_out = network, objective, data, held_out
        self.settings, self.seed, self.codec, self.trust = settings, seed, codec, trust
        self.order = data.sampler(settings.batch, seed)
        self.patch = 1  # side of the network's tokens, by whose number times may be shifted
        self.null: Condition | None = None
        self.teacher: Teacher | None = None
        self.targets: TargetsTerm | None = None  # whose projector is attached to the network
        self.routing: TokenRouting | None = None
        self.drawing: ValidationImages | None = None
        self.rows = settings.batch // settings.accumulate  # of a call of the network outside of training, at most

    def batch(self, index: int, local_rows: slice) -> Batch:
        g = seeded(self.seed, index)
        count, every = self.settings.batch, self.order.at(index)
        shape = self.data.rows.shape_of(every)
        # Everything random is drawn for the whole batch, so it does not depend on the number of processes.
        tokens = math.prod(shape[1:]) // self.patch**2
        t = self.objective.sample_time(count, g, tokens)
        eps = torch.randn(count, *shape, generator=g)
        dropped = torch.rand(count, generator=g) < self.settings.dropout
        # Each process reads its own rows only.
        rows = every[local_rows]
        flips, draws = mirrored(self.seed, index, count), caption_draws(self.seed, index, count)
        # Later batches have no targets, and so no term: their steps are the plain ones.
        targets = self.targets is not None and index < self.targets.end
        batch = self.data.batch(rows, flips[local_rows], draws[local_rows], targets)
        batch |= {"t": t[local_rows], "eps": eps[local_rows], "dropped": dropped[local_rows]}
        # So are the tokens that pass all blocks, by a generator of their own; later batches have no route.
        if self.routing is not None and (kept := self.routing.draw(self.seed, index, count, tokens)) is not None:
            batch[KEPT] = kept[local_rows]
        # A teacher may evaluate the expert of each row's own cluster.
        if self.teacher is not None:
            batch["cluster"] = self.data.rows.clusters(rows)
        return batch

    def losses(self, module: Callable[..., Tensor], batch: Batch) -> Tensor:
        # The loss is computed in float32, whatever the latents are stored in.
        x0, eps, t = batch["x0"].float(), batch["eps"], batch["t"]
        condition = drop_condition(self.data.condition(batch), self._null(x0.device), batch["dropped"])
        x = self.objective.schedule.diffuse(x0, eps, t)
        if self.teacher is not None:
            # The targets of all predictions are linear in (x0, eps): the teacher's estimates replace the data.
            x0, eps = self.teacher(self.objective, x, t, condition, batch["cluster"])
        # The network predicts from the noisy latents, at its own time scale.
        time, options = t * self.objective.time_scale, self._options(batch)
        if self.targets is None or "target" not in batch:
            return self.objective.loss(module(x, time, condition, **options), x0, eps, t)
        # With a tap, it also predicts the targets.
        output, predicted = module(x, time, condition, tap=self.targets.block, **options)
        grid = (x.shape[2] // self.patch, x.shape[3] // self.patch)
        return self.objective.loss(output, x0, eps, t) + self.targets.losses(predicted, batch["target"], grid)

    def _options(self, batch: Batch) -> dict[str, TokenRoute]:
        """The network's arguments for a batch whose tokens are routed; none for others."""
        return {"route": self.routing.route(batch[KEPT])} if self.routing is not None and KEPT in batch else {}

    def validate(self, module: Callable[..., Tensor]) -> dict[str, float]:
        """Return the objective's loss on held-out latents with captions, by log-SNR: {"+2": 0.31, ...}."""
        # The same rows at every validation, of every shape that they have.
        groups = self.held_out.some(_VALIDATION_ROWS, self.seed)
        device = next(self.module.parameters()).device
        losses = {}
        for level in _VALIDATION_LOG_SNR:
            # At levels that training leaves out, a loss says nothing.
            if not self.objective.trains_at(level):
                continue
            # The same noise at every validation, so losses compare.
            generator = seeded(self.seed, level + 100, Stream.VALIDATION)
            each = []
            for x0, condition in groups:
                t = self.objective.schedule.time_at(torch.full((len(x0),), float(level)))
                eps = torch.randn(x0.shape, generator=generator)
                x, scaled = self.objective.schedule.diffuse(x0, eps, t), t * self.objective.time_scale
                # A call has as many rows as one of the training, so that it needs no more memory.
                outputs = [
                    module(x[rows].to(device), scaled[rows].to(device), condition.index(rows).to(device)).cpu()
                    for rows in torch.arange(len(x0)).split(self.rows)
                ]
                each.append(self.objective.loss(torch.cat(outputs).float(), x0, eps, t))
            losses[f"{level:+d}"] = round(float(torch.cat(each).mean()), 6)
        return losses

    def validation_images(self) -> ValidationImages | None:
        return self.drawing

    def draw(self, module: Callable[..., Tensor], file: Path | None) -> None:
        """Draw a grid of images by this expert alone, for captions that it was not trained on."""
        from atoll.train.draw import draw_grid

        draw_grid(module, self.objective, self.held_out, codec=self.codec, file=file, seed=self.seed, trust=self.trust)

    def _null(self, device: torch.device) -> Condition:
        # On the device once, not at every step.
        if self.null is None:
            self.null = self.data.encoder.null(1).to(device)
        return self.null
