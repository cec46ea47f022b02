"""The training loop, in the open: experts, the router and the monolith all go through it."""

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from atoll.artifact import CARD, read_card
from atoll.errors import AtollError
from atoll.manifest import TrainSettings
from atoll.train.checkpoint import CHECKPOINT, fingerprint, load_checkpoint, save_checkpoint

BatchLoss = Callable[[int], Tensor]  # step -> mean loss of that step's batch, a function of the step alone
Progress = Callable[[dict[str, Any]], None]

METRICS = "metrics.jsonl"


class Interrupted(Exception):
    """SIGTERM or SIGINT came; the state is saved."""


# Settings that may differ between a run and its continuation: they do not change what is computed.
_MAY_CHANGE = {"threads", "checkpoint_every", "log_every"}


def training_mark(identity: dict[str, Any], settings: TrainSettings) -> str:
    """A hash of all that a training's result depends on: data, network, objective, seed and settings."""
    return fingerprint({**identity, "train": settings.model_dump(exclude=_MAY_CHANGE)})


def finished(path: Path, kind: str, mark: str, resume: bool, restart: bool) -> bool:
    """Whether the artifact at `path` is already what a training of this mark would make.

    Raises:
        AtollError: an artifact is there, and neither resume nor restart was asked or its mark is another.
    """
    if restart or not (path / CARD).exists():
        return False
    trained = read_card(path, kind)["training"]["mark"]
    if trained != mark:
        raise AtollError(f"{path} was trained under other settings or on other data; add --restart to replace it")
    if not resume:
        raise AtollError(f"{path} is already trained; add --restart to train it again")
    return True


@dataclass(frozen=True)
class Trained:
    """What the loop returns: the module with its EMA weights in place, and what the card tells of the training."""

    summary: dict[str, Any]


def train(
    module: nn.Module,
    batch_loss: BatchLoss,
    settings: TrainSettings,
    directory: Path,
    mark: str,
    resume: bool = False,
    restart: bool = False,
    progress: Progress | None = None,
) -> Trained:
    """Trains `module` in place for settings.steps steps and leaves its EMA weights in it.

    Args:
        batch_loss: step -> mean loss; must use nothing random but generators seeded by the step.
        directory: of checkpoint.safetensors and metrics.jsonl; made if missing.
        mark: of `training_mark`; a checkpoint of another mark is refused.
        resume: continue from the checkpoint, bit for bit as if never stopped; without one, start.
        restart: throw an existing checkpoint away.
        progress: called with each line of metrics.jsonl.

    Raises:
        AtollError: a checkpoint exists and neither resume nor restart was asked; NaN loss.
        Interrupted: SIGTERM or SIGINT; the state was saved.
    """
    torch.set_num_threads(settings.threads)
    directory.mkdir(parents=True, exist_ok=True)
    parameters: list[Tensor] = list(module.parameters())
    ema = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay, fused=True
    )

    # Where to begin.
    checkpoint = directory / CHECKPOINT
    if restart:
        checkpoint.unlink(missing_ok=True)
    start = 0
    if checkpoint.exists():
        if not resume:
            raise AtollError(f"{checkpoint} exists; add --resume to go on from it, or --restart to begin again")
        start = load_checkpoint(directory, module, ema, optimizer, mark)
    log = _Log(directory / METRICS, start, settings, mark, progress)
    autocast = _autocast(settings.precision, parameters[0].device)

    module.train()
    with _stop_signals() as stopped:
        for step in range(start, settings.steps):
            # Forward and backward.
            with autocast():
                loss = batch_loss(step)
            if not math.isfinite(value := loss.item()):
                raise AtollError(
                    f"step {step}: the loss is {value}; the checkpoint of step {_last_step(step, start, settings)} is "
                    "whole: lower lr, or set precision to fp32, and start again"
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            # Update.
            norm = nn.utils.clip_grad_norm_(parameters, settings.clip, foreach=True)
            optimizer.param_groups[0]["lr"] = _learning_rate(step, settings)
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(ema, parameters, 1 - _ema_decay(step, settings))
            # Log and save.
            log.step(step, value, norm)
            done = step + 1
            if stopped() or done % settings.checkpoint_every == 0 or done == settings.steps:
                save_checkpoint(directory, done, module, ema, optimizer, mark)
            if stopped() and done < settings.steps:
                raise Interrupted(f"stopped at step {done} of {settings.steps}; --resume goes on from there")

    with torch.no_grad():
        torch._foreach_copy_(parameters, ema)
    module.eval()
    return Trained(summary=log.summary())


def _learning_rate(step: int, settings: TrainSettings) -> float:
    """Linear warm-up, constant, then linear to 0 from `decay_from` on."""
    warm = min(1.0, (step + 1) / settings.warmup) if settings.warmup else 1.0
    begin = settings.decay_from * settings.steps
    fall = 1.0 if step < begin else (settings.steps - step) / max(1.0, settings.steps - begin)
    return settings.lr * warm * fall


def _ema_decay(step: int, settings: TrainSettings) -> float:
    """The decay grows to its value as (1 + n)/(10 + n), so that the average forgets the initial weights."""
    return min(settings.ema, (1 + step) / (10 + step))


def _last_step(step: int, start: int, settings: TrainSettings) -> int:
    return max(start, step - step % settings.checkpoint_every)


def _autocast(precision: str, device: torch.device) -> Callable[[], Any]:
    """bf16 autocast where asked, and with "auto" where the hardware multiplies bf16 matrices."""
    if precision == "bf16" or (precision == "auto" and has_bf16(device)):
        return lambda: torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext


def has_bf16(device: torch.device) -> bool:
    """Whether matrix products in bf16 run in hardware there (Ampere and later; AMX or AVX512-BF16)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return False


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Within it, SIGTERM and SIGINT are noted instead of ending the process: the loop saves and leaves by itself."""
    seen: list[int] = []
    previous = {
        number: signal.signal(number, lambda signum, _: seen.append(signum))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Log:
    """metrics.jsonl: one line each `log_every` steps. A continued run rewrites what came after its checkpoint."""

    def __init__(self, file: Path, start: int, settings: TrainSettings, mark: str, progress: Progress | None):
        self.settings, self.mark, self.progress = settings, mark, progress
        kept = [line for line in _lines(file) if line["step"] <= start]
        self.file = file
        temporary = file.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(temporary, file)
        self.seconds_before = kept[-1]["seconds"] if kept else 0.0
        self.began = self.last = time.monotonic()
        self.losses: list[float] = []
        self.final: dict[str, Any] = kept[-1] if kept else {}

    def step(self, step: int, loss: float, norm: Tensor) -> None:
        self.losses.append(loss)
        done = step + 1
        if done % self.settings.log_every and done != self.settings.steps:
            return
        now = time.monotonic()
        rate = len(self.losses) / max(now - self.last, 1e-9)
        line = {
            "step": done,
            "steps": self.settings.steps,
            "loss": sum(self.losses) / len(self.losses),
            "grad_norm": float(norm),
            "lr": _learning_rate(step, self.settings),
            "images_per_s": rate * self.settings.batch,
            "seconds": self.seconds_before + now - self.began,
            "eta_s": (self.settings.steps - done) / rate,
        }
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.final, self.losses, self.last = line, [], now
        if self.progress is not None:
            self.progress(line)

    def summary(self) -> dict[str, Any]:
        return {
            "mark": self.mark,
            "settings": self.settings.model_dump(),
            "steps": self.settings.steps,
            "loss": self.final.get("loss"),
            "seconds": round(self.final.get("seconds", 0.0), 1),
        }


def _lines(file: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl; a line cut by a crash is left out."""
    if not file.exists():
        return []
    lines = []
    for text in file.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines
