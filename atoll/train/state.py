"""The state of a training: weights, their averages, the optimizer's moments, and a few counters."""

from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from atoll.manifest import TrainSettings
from atoll.train.eight_bit import adamw_8bit, eager_on_cpu, moment_tensors
from atoll.train.ema import decay, gamma_of
from atoll.train.fused_backward import FusedBackward
from atoll.train.muon import MUON_MOMENTUM, Muon, muon_matrices
from atoll.train.rates import by_scale, rate_scales

_EMA_EVERY_ON_CPU = 10  # steps between updates of an average in CPU memory


@dataclass
class Counters:
    """The numbers of a state, which a checkpoint stores as text.

    Attributes:
        step: steps done.
        skipped: batches skipped so far; the batch of a step is number step + skipped.
        rollbacks: number of returns to a checkpoint.
        mean: running mean of the log-loss.
        square: running mean of its square.
        seen: number of steps in these means.
        planned: steps of the plan that the training follows; 0 in a checkpoint that does not say.
        plans: the plans before that one, as plain values of `EarlierPlan`.
    """

    step: int = 0
    skipped: int = 0
    rollbacks: int = 0
    mean: float = 0.0
    square: float = 0.0
    seen: int = 0
    planned: int = 0
    plans: list[dict[str, Any]] = field(default_factory=list)

    @property
    def age(self) -> tuple[int, int]:
        """The order of the states of one training: by steps, then by rollbacks to the same step."""
        return self.step, self.rollbacks


class State:
    """The state of one training. All tensors exist from the start; a checkpoint is loaded by copying into them.

    Attributes:
        parameters: of the module that are trained, in its order; frozen ones are no part of the state.
        ema: their averages, in the same order.
        gammas: exponents of the power-function averages (`atoll.train.ema`).
        profiles: the power-function averages, for each gamma in the order of the parameters.
    """

    def __init__(self, module: nn.Module, settings: TrainSettings):
        self.module, self.settings, self.numbers = module, settings, Counters(planned=settings.steps)
        self._trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self.parameters: list[nn.Parameter] = [p for _, p in self._trained]
        self._eight_bit = settings.optimizer_state == "8bit"
        # One optimizer for all parameters of equal rate, or for those that Muon does not step, or one for each.
        matrices = muon_matrices(self._trained) if settings.optimizer == "muon" else {}
        rest = [p for p in self.parameters if p not in matrices]
        scales = rate_scales(module, self._trained, matrices, settings)
        groups = [[p] for p in rest] if settings.fused_backward else by_scale(rest, scales)
        self._optimizers = {_optimizer(group, settings, scales.get(group[0], 1.0)): group for group in groups}
        if matrices:
            # All are hidden matrices, of one factor.
            scale = scales.get(next(iter(matrices)), 1.0)
            self._optimizers[Muon(matrices, settings.lr * scale, settings.weight_decay / scale)] = list(matrices)
        self._scales = {optimizer: scales.get(group[0], 1.0) for optimizer, group in self._optimizers.items()}
        owners = {p: optimizer for optimizer, group in self._optimizers.items() for p in group}
        self._moments = {p: optimizer.state[p] for p, optimizer in owners.items()}
        self._fused = FusedBackward(owners, self._step) if settings.fused_backward else None
        # An average in CPU memory saves GPU memory, and is updated less often for it.
        device = "cpu" if settings.ema_device == "cpu" else None
        self.ema = [p.detach().to(device or p.device, copy=True) for p in self.parameters]
        self._every = _EMA_EVERY_ON_CPU if settings.ema_device == "cpu" else 1
        self.names = [name for name, _ in self._trained]
        self.gammas = [gamma_of(width) for width in settings.ema_profiles]
        self.profiles = [[average.clone() for average in self.ema] for _ in self.gammas]

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor by name: model.*, ema.*, profile-<number>.*, optimizer.<moment>.*.

        The names of a quantised tensor's parts end in #part.
        """
        named: dict[str, Tensor] = {}
        # Weights and their average, under the parameter's own name.
        for (name, parameter), average in zip(self._trained, self.ema, strict=True):
            named[f"model.{name}"] = parameter.detach()
            named[f"ema.{name}"] = average
            # The optimizer's moments, by the parameter's name.
            for moment, value in self._moments[parameter].items():
                entry = f"optimizer.{moment}.{name}"
                eight_bit = self._eight_bit and moment != MUON_MOMENTUM
                named |= moment_tensors(entry, value) if eight_bit else {entry: value.detach()}
        # The power-function averages, one set per width.
        for number, averages in enumerate(self.profiles):
            named |= {f"profile-{number}.{name}": value for name, value in zip(self.names, averages, strict=True)}
        return named

    def text(self) -> dict[str, Any]:
        """Return the counters as plain values."""
        return asdict(self.numbers)

    @property
    def lr(self) -> float:
        """The learning rate of the next step, before it is scaled by the width."""
        return learning_rate(self.numbers.step, self.settings)

    def begin(self) -> None:
        """Prepare a step, before its backward pass: set the learning rate, and free the last gradients."""
        for optimizer in self._optimizers:
            # Set to None, so that no memory is spent on zeros.
            optimizer.zero_grad(set_to_none=True)
            group, lr = optimizer.param_groups[0], self.lr * self._scales[optimizer]
            # torchao's AdamW holds its learning rate as a tensor.
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def clip(self) -> Tensor:
        """Clip the gradients to the norm `settings.clip`, if it is set, and return their norm before that."""
        if self._fused is not None:
            return self._fused.norm()
        if self.settings.clip is not None:
            return nn.utils.clip_grad_norm_(self.parameters, self.settings.clip, foreach=True)
        return nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None], foreach=True)

    def _step(self, optimizer: torch.optim.Optimizer) -> None:
        # Compilation of torchao's step is skipped on a CPU.
        with eager_on_cpu(self.parameters[0].device) if self._eight_bit else nullcontext():
            optimizer.step()

    @torch.no_grad()
    def update(self) -> None:
        """Step the optimizer along the gradients, unless the backward pass did, then update the averages."""
        for optimizer in self._optimizers if self._fused is None else ():
            self._step(optimizer)
        self.numbers.step += 1
        if self.numbers.step % self._every == 0:
            # One update for all steps since the last one.
            beta = 1.0
            for step in range(self.numbers.step - self._every, self.numbers.step):
                beta *= ema_decay(step, self.settings)
            weights = [p.detach().to(e.device) for p, e in zip(self.parameters, self.ema, strict=True)]
            torch._foreach_lerp_(self.ema, weights, 1 - beta)
            # The power-function averages take the same weights.
            for gamma, averages in zip(self.gammas, self.profiles, strict=True):
                torch._foreach_lerp_(averages, weights, 1 - decay(gamma, self.numbers.step, self._every))

    @torch.no_grad()
    def swap(self) -> None:
        """Swap weights and EMA; call again to restore."""
        for parameter, average in zip(self.parameters, self.ema, strict=True):
            weights = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(weights)
        for module in self.module.modules():
            if callable(reshard := getattr(module, "reshard", None)):
                reshard()  # FSDP2 keeps the outermost weights gathered after a forward pass; these are outdated now


def ema_decay(step: int, settings: TrainSettings) -> float:
    """Return the decay of the EMA at a step: (1 + step)/(10 + step) at first, which forgets the initial weights."""
    return min(settings.ema, (1 + step) / (10 + step))


def learning_rate(step: int, settings: TrainSettings) -> float:
    """Return the learning rate of a step: linear warm-up, constant, then linear to 0 from `decay_from` on."""
    # Warm-up: Adam's moments are not reliable yet.
    warmup = min(1.0, (step + 1) / settings.warmup) if settings.warmup else 1.0
    decay_start = settings.decay_from * settings.steps
    # The decay to 0 lets the loss fall once more at the end.
    cooldown = 1.0 if step < decay_start else (settings.steps - step) / max(1.0, settings.steps - decay_start)
    return settings.lr * warmup * cooldown


def steps_before_decay(settings: TrainSettings) -> int:
    """Return how many steps have a learning rate that does not depend on `settings.steps`: those before the decay."""
    return int(settings.decay_from * settings.steps)


def _optimizer(parameters: list[nn.Parameter], settings: TrainSettings, scale: float) -> torch.optim.Optimizer:
    """AdamW with its moments allocated: torch's fused one, or torchao's with 8 bits per moment; scale: of the rate."""
    # The same options for both optimizers. Their product, the decay of a step, is not scaled.
    lr, weight_decay = settings.lr * scale, settings.weight_decay / scale
    options: dict[str, Any] = {"lr": lr, "betas": settings.betas, "weight_decay": weight_decay}
    if settings.optimizer_state == "8bit":
        return adamw_8bit(parameters, options)
    optimizer = torch.optim.AdamW(parameters, **options, fused=True)
    for p in parameters:
        # As AdamW itself would at its first step: a checkpoint is loaded into existing tensors.
        step = torch.zeros((), dtype=torch.float32, device=p.device)
        optimizer.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return optimizer
