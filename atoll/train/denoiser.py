"""Trains one denoiser on shards: an expert, the monolith or a student."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from atoll.calibration import Calibration
from atoll.condition import Condition
from atoll.encoders.text import TextEncoder, build_encoder
from atoll.manifest import ExpertSettings, Manifest, MonolithSettings, NetworkSettings, TrainSettings
from atoll.nn import build_network
from atoll.objective import Objective
from atoll.randomness import Stream, seeded
from atoll.storage.artifact import save_artifact
from atoll.storage.cards import CalibrationRecord, ClusterShardsCard, ExpertCard, TeacherRecord, TrainingRecord
from atoll.storage.layout import TrainingLayout
from atoll.storage.shards import Shards, is_held_out
from atoll.train.batches import CaptionedLatents, Rows, SeededSampler, drop_condition, mirrored
from atoll.train.calibrate import measure_calibration
from atoll.train.init_weights import InitWeights
from atoll.train.island import Island, gathered_state
from atoll.train.loop import Task, finished, train, training_mark
from atoll.train.prefetch import Batch
from atoll.train.track import TrainProgress

_VALIDATION_ROWS = 256


_VALIDATION_LOG_SNR = (-6, -4, -2, 0, 2, 4, 6)


CALIBRATION_ROWS = 2048  # at most; a few hundred are enough


@dataclass(frozen=True, kw_only=True)
class TrainingSpec:
    """What distinguishes one training of a denoiser from another.

    run: the run's directory. path: where the artifact is written. part: its section of atoll.yaml.
    """

    run: Path
    path: Path
    name: str
    part: ExpertSettings | MonolithSettings
    clusters: tuple[int, ...]
    seed: int


def train_denoiser(
    job: TrainingSpec,
    manifest: Manifest,
    shards: Sequence[Shards],
    *,
    resume: bool,
    restart: bool,
    progress: TrainProgress | None,
    teaching: "Teaching | None" = None,
) -> Path:
    """One training of a denoiser, from the shards to the artifact.

    teaching: where the target comes from, if not from the data; see `atoll.train.distil`.

    Raises:
        AtollError: as `train_expert`.
    """
    data = shards[0].card(ClusterShardsCard)
    encoder = build_encoder(data.condition)
    objective = Objective(**job.part.objective.model_dump())
    settings = manifest.train_of(job.part)
    network_config = dit_config(manifest.network_of(job.part), data.latent_shape, encoder.dim, encoder.pooled_dim)
    start = InitWeights(job.run / settings.init) if settings.init else None
    began = {
        **({"init": start.about.plain()} if start else {}),
        **({"teacher": teaching.about.plain()} if teaching else {}),
    }
    network_config = start.config(network_config, data) if start else network_config
    training, held_out, measured_on = split_holdout(shards, encoder, settings.calibration_holdout)

    identity = {
        "network": network_config,
        "objective": objective.config(),
        "assignment": data.assignment,
        "clusters": list(job.clusters),
        "seed": job.seed,
        **began,
    }
    mark = training_mark(identity, settings)
    if finished(job.path, ExpertCard, mark, resume, restart):
        return job.path
    torch.manual_seed(job.seed)
    network = build_network(network_config)
    if start:
        network.load_state_dict(start.weights())
    state = TrainingLayout.of(job.path).root
    with Island.join(settings.device, settings.threads) as island:
        task = Denoising(network, objective, training, held_out, settings=settings, seed=job.seed, codec=data.codec)
        if teaching is not None:
            task.teacher = teaching.on(island.device)
        trained = train(task, settings, state, mark, island, resume=resume, restart=restart, progress=progress)
        calibration = calibrate(
            network, objective, held_out, mean=training.rows.mean(), seed=job.seed, device=island.device
        )
        weights = {
            **{f"network.{name}": value for name, value in gathered_state(network).items()},
            **{f"calibration.{name}": value for name, value in calibration.tensors().items()},
        }
        if island.is_first:
            record = TrainingRecord(
                **trained.summary,
                **began,
                rows=len(training),
                calibration_holdout=settings.calibration_holdout,
                seed=job.seed,
                torch=torch.__version__,
            )
            card = ExpertCard(
                name=job.name,
                k=data.clusters,
                clusters=job.clusters,
                objective=objective.config(),
                network=network_config,
                assignment=data.assignment,
                latent_shape=data.latent_shape,
                codec=data.codec,
                condition=data.condition,
                calibration=CalibrationRecord(**calibration.config(), measured_on=measured_on),
                training=record,
            )
            save_artifact(job.path, card, weights)
    return job.path


def split_holdout(
    shards: Sequence[Shards], encoder: TextEncoder, share: float
) -> tuple[CaptionedLatents, CaptionedLatents, str]:
    """(rows to train on, rows to calibrate on, what the latter are).

    With a share, so many training rows are kept from training (`is_held_out`: the same for all replicas): held out, but
    of the same words as what is asked at inference. Without one they are the val split, or, on an island that has
    none, the training rows themselves.
    """
    every, val = Rows.of(shards, "train"), Rows.of(shards, "val")
    if share > 0:
        back_rows = is_held_out(shards, share)[every.numbers]  # [n] bool
        training, back = (every.select(rows.nonzero().flatten()) for rows in (~back_rows, back_rows))
        return CaptionedLatents(training, encoder), CaptionedLatents(back, encoder), "held back"
    if len(val):
        return CaptionedLatents(every, encoder), CaptionedLatents(val, encoder), "val"
    return CaptionedLatents(every, encoder), CaptionedLatents(every, encoder), "train"


def dit_config(
    network: NetworkSettings, latent_shape: Sequence[int], states_dim: int, pooled_dim: int | None
) -> dict[str, Any]:
    """The whole DiT config from the manifest's choices, the latent's shape [C, H, W] and the text's widths."""
    channels, height, width = latent_shape
    free = network.model_dump(exclude={"pooled"})
    return {
        "name": "dit",
        **free,
        "channels": channels,
        "size": [height, width],
        "states_dim": states_dim,
        "pooled_dim": pooled_dim if network.pooled else None,
    }


# (objective, x, t, condition, cluster) -> (x0, eps): what stands behind the student's x at its own time t.
Teacher = Callable[[Objective, Tensor, Tensor, Condition, Tensor], tuple[Tensor, Tensor]]


class Teaching(Protocol):
    """A teacher that is not loaded yet; about: what the card tells of it, and the training's mark depends on."""

    about: TeacherRecord

    def on(self, device: torch.device) -> Teacher: ...


class Denoising(Task):
    """An expert's training: the loss of its objective, with the condition dropped in a share of the rows."""

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
    ):
        self.module, self.objective, self.data, self.held_out = network, objective, data, held_out
        self.settings, self.seed, self.codec = settings, seed, codec
        self.order = SeededSampler(len(data), settings.batch, seed)
        self.shape = data.rows.shards[0].shape("latent")
        self.null: Condition | None = None
        self.teacher: Teacher | None = None

    def batch(self, index: int, share: slice) -> Batch:
        g = seeded(self.seed, index)
        count = self.settings.batch
        t = self.objective.sample_time(count, g)
        eps = torch.randn(count, *self.shape, generator=g)
        dropped = torch.rand(count, generator=g) < self.settings.dropout
        rows = self.data.batch(self.order.at(index)[share], mirrored(self.seed, index, count)[share])
        made = {**rows, "t": t[share], "eps": eps[share], "dropped": dropped[share]}
        if self.teacher is not None:
            made["cluster"] = self.data.rows.clusters(self.order.at(index)[share])
        return made

    def losses(self, module: Callable[..., Tensor], batch: Batch) -> Tensor:
        x0, eps, t = batch["x0"].float(), batch["eps"], batch["t"]
        condition = drop_condition(self.data.condition(batch), self._null(x0.device), batch["dropped"])
        x = self.objective.schedule.diffuse(x0, eps, t)
        if self.teacher is not None:
            # The targets of all predictions are linear in (x0, eps): the teacher's estimates take the data's place.
            x0, eps = self.teacher(self.objective, x, t, condition, batch["cluster"])
        output = module(x, t * self.objective.time_scale, condition)
        return self.objective.loss(output, x0, eps, t)

    def validate(self, module: Callable[..., Tensor]) -> dict[str, float]:
        """The objective's loss on held-out latents at some log-SNR of its path, conditioned: {"+2": 0.31, ...}."""
        x0, condition = self.held_out.some(_VALIDATION_ROWS, self.seed)
        device = next(self.module.parameters()).device
        losses = {}
        for level in _VALIDATION_LOG_SNR:
            t = self.objective.schedule.time_at(torch.full((len(x0),), float(level)))
            eps = torch.randn(x0.shape, generator=seeded(self.seed, level + 100, Stream.VALIDATION))
            x, scaled = self.objective.schedule.diffuse(x0, eps, t), t * self.objective.time_scale
            output = module(x.to(device), scaled.to(device), condition.to(device)).cpu()
            losses[f"{level:+d}"] = round(float(self.objective.loss(output.float(), x0, eps, t).mean()), 6)
        return losses

    def draw(self, module: Callable[..., Tensor], file: Path | None) -> None:
        """A grid of images by this expert alone, for captions that it was not trained on."""
        from atoll.train.draw import draw_grid

        draw_grid(module, self.objective, self.held_out, codec=self.codec, file=file, seed=self.seed)

    def _null(self, device: torch.device) -> Condition:
        if self.null is None:
            self.null = self.data.encoder.null(1).to(device)
        return self.null


def calibrate(
    network: Callable[..., Tensor],
    objective: Objective,
    data: CaptionedLatents,
    *,
    mean: Tensor,
    seed: int,
    device: torch.device,
    rows: int = CALIBRATION_ROWS,
) -> Calibration:
    """The expert's calibration on at most `rows` held-out latents with their own captions; mean: the cluster's."""
    x0, condition = data.some(rows, seed)

    def on_device(x: Tensor, time: Tensor, given: Condition | None) -> Tensor:
        return network(x.to(device), time.to(device), None if given is None else given.to(device)).cpu()

    return measure_calibration(on_device, objective, x0, condition.to("cpu"), mean=mean, seed=seed)
