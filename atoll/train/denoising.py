"""The task of training a denoiser: its batches, its loss, and what its training shows."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from atoll.condition import Condition
from atoll.encoders.trust import STRANGER, Trust
from atoll.manifest import TrainSettings
from atoll.nn.token_route import TokenRoute
from atoll.objective import Objective
from atoll.randomness import Stream, seeded
from atoll.storage.cards import TeacherRecord
from atoll.train.batches import CaptionedLatents, drop_condition, mirrored
from atoll.train.drawn_captions import caption_draws
from atoll.train.loop import Task
from atoll.train.prefetch import Batch
from atoll.train.targets import TargetsTerm
from atoll.train.token_routing import KEPT, TokenRouting
from atoll.train.validation_images import ValidationImages

_VALIDATION_ROWS = 256
_VALIDATION_LOG_SNR = (-6, -4, -2, 0, 2, 4, 6)

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
