"""What a training carries from step to step: weights, their average, the optimizer's moments, and a few numbers."""

from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from atoll.manifest import TrainSettings
from atoll.train.eight_bit import adamw_8bit, eager_on_cpu, moment_tensors
from atoll.train.ema import decay, gamma_of

_EMA_EVERY_ON_CPU = 10  # steps between updates of an average that lies in the CPU's memory


@dataclass
class Counters:
    """The numbers of a state, which a checkpoint holds as text.

    step: steps done. skipped: batches left out so far, which shifts those that follow. rollbacks: returns to a
    checkpoint. mean, square, seen: running moments of the log-loss, and over how many steps.
    """

    step: int = 0
    skipped: int = 0
    rollbacks: int = 0
    mean: float = 0.0
    square: float = 0.0
    seen: int = 0

    @property
    def age(self) -> tuple[int, int]:
        """Which of two states of one training is the later one: by steps, and after a rollback to the same step."""
        return self.step, self.rollbacks


class State:
    """The state of one training. Its tensors exist from the start, so that loading is copying into them."""

    def __init__(self, module: nn.Module, settings: TrainSettings):
        self.module, self.settings, self.numbers = module, settings, Counters()
        self.parameters: list[nn.Parameter] = list(module.parameters())
        self.optimizer = _optimizer(self.parameters, settings)
        self._eight_bit = settings.optimizer_state == "8bit"
        device = "cpu" if settings.ema_device == "cpu" else None
        self.ema = [p.detach().to(device or p.device, copy=True) for p in self.parameters]
        self._every = _EMA_EVERY_ON_CPU if settings.ema_device == "cpu" else 1
        self.names = [name for name, _ in module.named_parameters()]
        self.gammas = [gamma_of(width) for width in settings.ema_profiles]
        self.profiles = [[average.clone() for average in self.ema] for _ in self.gammas]

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its name: model.*, ema.*, profile-<number>.*, optimizer.<moment>.*; parts of a quantised
        one end in #part."""
        found: dict[str, Tensor] = {}
        for (name, parameter), average in zip(self.module.named_parameters(), self.ema, strict=True):
            found[f"model.{name}"] = parameter.detach()
            found[f"ema.{name}"] = average
            for moment, value in self.optimizer.state[parameter].items():
                entry = f"optimizer.{moment}.{name}"
                found |= moment_tensors(entry, value) if self._eight_bit else {entry: value.detach()}
        for number, averages in enumerate(self.profiles):
            found |= {f"profile-{number}.{name}": value for name, value in zip(self.names, averages, strict=True)}
        return found

    def text(self) -> dict[str, Any]:
        return asdict(self.numbers)

    @torch.no_grad()
    def update(self, lr: float) -> None:
        """One step of the optimizer along the gradients, and of the average."""
        group = self.optimizer.param_groups[0]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
        with eager_on_cpu(self.parameters[0].device) if self._eight_bit else nullcontext():
            self.optimizer.step()
        self.numbers.step += 1
        if self.numbers.step % self._every == 0:
            keep = 1.0
            for step in range(self.numbers.step - self._every, self.numbers.step):
                keep *= ema_decay(step, self.settings)
            now = [p.detach().to(e.device) for p, e in zip(self.parameters, self.ema, strict=True)]
            torch._foreach_lerp_(self.ema, now, 1 - keep)
            for gamma, averages in zip(self.gammas, self.profiles, strict=True):
                torch._foreach_lerp_(averages, now, 1 - decay(gamma, self.numbers.step, self._every))

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the weights with their average; twice is once too many."""
        for parameter, average in zip(self.parameters, self.ema, strict=True):
            now = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(now)
        for module in self.module.modules():
            if callable(reshard := getattr(module, "reshard", None)):
                reshard()  # FSDP2 keeps the outermost weights gathered after a forward pass: those from before


def ema_decay(step: int, settings: TrainSettings) -> float:
    """The decay grows to its value as (1 + n)/(10 + n), so that the average forgets the initial weights."""
    return min(settings.ema, (1 + step) / (10 + step))


def learning_rate(step: int, settings: TrainSettings) -> float:
    """Linear warm-up, constant, then linear to 0 from `decay_from` on."""
    warm = min(1.0, (step + 1) / settings.warmup) if settings.warmup else 1.0
    begin = settings.decay_from * settings.steps
    fall = 1.0 if step < begin else (settings.steps - step) / max(1.0, settings.steps - begin)
    return settings.lr * warm * fall


def _optimizer(parameters: list[nn.Parameter], settings: TrainSettings) -> torch.optim.Optimizer:
    """AdamW with its moments already there: fused, or torchao's with 8 bits per moment."""
    options: dict[str, Any] = {"lr": settings.lr, "betas": settings.betas, "weight_decay": settings.weight_decay}
    if settings.optimizer_state == "8bit":
        return adamw_8bit(parameters, options)
    optimizer = torch.optim.AdamW(parameters, **options, fused=True)
    for p in parameters:
        step = torch.zeros((), dtype=torch.float32, device=p.device)
        optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer
