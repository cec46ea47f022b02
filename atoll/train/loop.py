"""The training loop, in the open: experts, the router and the monolith all go through it."""

import math
import signal
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from atoll.errors import AtollError
from atoll.manifest import TrainSettings
from atoll.runtime.device import has_bf16
from atoll.storage.artifact import CARD, read_card
from atoll.storage.cards import ExpertCard, RouterCard
from atoll.storage.layout import TrainingLayout
from atoll.train.checkpoint import Checkpoints, fingerprint
from atoll.train.island import Island, gather
from atoll.train.prefetch import Batch, Prefetcher
from atoll.train.snapshots import Snapshots
from atoll.train.state import Counters, State, learning_rate
from atoll.train.track import Tracker, TrainProgress


class Task(ABC):
    """One training. Nothing in it may be random but generators that are seeded by a batch's index."""

    module: nn.Module

    @abstractmethod
    def batch(self, index: int, share: slice) -> Batch:
        """The rows `share` of a batch, on the CPU, with all that is random in it: a function of the index alone."""

    @abstractmethod
    def losses(self, module: Callable[..., Tensor], batch: Batch) -> Tensor:
        """The loss [b] of each row; `module` is the task's own, perhaps wrapped."""

    def validate(self, module: Callable[..., Tensor]) -> dict[str, float]:
        """Losses on rows that are not trained on, by name; the same rows and noise at every call."""
        return {}

    def draw(self, module: Callable[..., Tensor], file: Path | None) -> None:  # noqa: B027 (a router draws nothing)
        """Draws what the module can do by now; nothing where that is no image. Without a file: for the others of the
        island, whose parts of the weights are needed."""


class Interrupted(Exception):
    """SIGTERM or SIGINT came; the state is saved."""


# Settings that may differ between a run and its continuation: they do not change what is computed, but for rounding.
_MAY_CHANGE = {
    *("threads", "device", "accumulate", "compile", "checkpointing", "sharding"),
    *("checkpoint_every", "log_every", "validate_every", "sample_every", "ema_snapshot_every", "track"),
    "init",  # training_mark has the hash of what it names
}
_ROLLBACKS = 3  # after which training gives up
_CALM = 100  # steps after which a spike can be told from the beginning


def training_mark(identity: dict[str, Any], settings: TrainSettings) -> str:
    """A hash of all that a training's result depends on: data, network, objective, seed and settings."""
    return fingerprint({**identity, "train": settings.model_dump(exclude=_MAY_CHANGE)})


def finished(path: Path, kind: type[ExpertCard | RouterCard], mark: str, resume: bool, restart: bool) -> bool:
    """Whether the artifact at `path` is already what a training of this mark would make.

    Raises:
        AtollError: an artifact is there, and neither resume nor restart was asked or its mark is another.
    """
    if restart or not (path / CARD).exists():
        return False
    training = read_card(path, kind).training
    if training is None or training.mark != mark:
        raise AtollError(f"{path} was trained under other settings or on other data; add --restart to replace it")
    if not resume:
        raise AtollError(f"{path} is already trained; add --restart to train it again")
    return True


@dataclass(frozen=True)
class Trained:
    """What the loop returns: what the card tells of the training. The module has its EMA weights in place."""

    summary: dict[str, Any]


def train(
    task: Task,
    settings: TrainSettings,
    directory: Path,
    mark: str,
    island: Island,
    *,
    resume: bool = False,
    restart: bool = False,
    progress: TrainProgress | None = None,
) -> Trained:
    """Trains the task's module in place for settings.steps steps and leaves its EMA weights in it.

    Args:
        directory: of checkpoint, metrics.jsonl, summary.json and the sample grids; made if missing.
        mark: of `training_mark`; a checkpoint of another mark is refused.
        island: the processes that train together; each calls this.
        resume: continue from the checkpoint, bit for bit as if never stopped; without one, start.
        restart: throw an existing checkpoint away.
        progress: called with each line of metrics.jsonl that tells of a step.

    Raises:
        AtollError: a checkpoint exists and neither resume nor restart was asked; the loss was not finite, or leapt,
            once more than can be skipped; the disk is full.
        Interrupted: SIGTERM or SIGINT; the state was saved.
    """
    directory.mkdir(parents=True, exist_ok=True)
    task.module.to(island.device)
    module = island.wrap(prepared(task.module, settings), settings.sharding)
    state = State(task.module, settings)
    with Checkpoints(directory, mark, island) as checkpoints:
        log = _run(
            task,
            module,
            state,
            checkpoints,
            settings=settings,
            directory=directory,
            island=island,
            resume=resume,
            restart=restart,
            progress=progress,
        )
    with torch.no_grad():
        for parameter, average in zip(state.parameters, state.ema, strict=True):
            parameter.copy_(average)
    task.module.eval()
    return Trained(summary=log.close(state.numbers.rollbacks, state.numbers.skipped))


def _run(
    task: Task,
    module: nn.Module,
    state: State,
    checkpoints: Checkpoints,
    *,
    settings: TrainSettings,
    directory: Path,
    island: Island,
    resume: bool,
    restart: bool,
    progress: TrainProgress | None,
) -> Tracker:
    """The steps that are still to be done."""
    share = island.share(settings.batch, settings.accumulate)
    snapshots = Snapshots(directory, checkpoints.mark, island)
    _begin(state, checkpoints, snapshots, resume, restart)
    numbers = state.numbers
    log = Tracker(
        directory, numbers.step, settings, mark=checkpoints.mark, progress=progress, quiet=not island.is_first
    )
    autocast = autocast_of(settings.precision, island.device)

    module.train()
    with Prefetcher(lambda index: task.batch(index, share), island.device) as feed, _stop_signals() as stopped:
        while numbers.step < settings.steps:
            batch = feed.get(numbers.step + numbers.skipped, settings.steps + numbers.skipped - 1)
            value, norm = gradients(task, module, batch, state=state, island=island, autocast=autocast)
            if not _is_sound(value, norm, numbers, settings):
                numbers = _roll_back(state, checkpoints, value, log)
                snapshots.drop_after(numbers.step)
                continue
            # Update.
            lr = learning_rate(numbers.step, settings)
            state.update(lr)
            done = numbers.step
            # Log, look and save.
            log.step(done, value, norm, lr)
            if _due(done, settings.validate_every, settings):
                log.validated(done, _with_average(state, task.validate))
            if _due(done, settings.sample_every, settings):
                image = TrainingLayout(directory).samples(done) if island.is_first else None
                _with_average(state, partial(task.draw, file=image))
            if settings.ema_profiles and _due(done, settings.ema_snapshot_every, settings):
                snapshots.save(state)
            stop = island.any(stopped())
            if stop or done % settings.checkpoint_every == 0 or done == settings.steps:
                checkpoints.save(state)
            if stop and done < settings.steps:
                checkpoints.finish()
                log.stop()
                raise Interrupted(f"stopped at step {done} of {settings.steps}; --resume goes on from there")
    checkpoints.finish()
    return log


def gradients(
    task: Task, module: nn.Module, batch: Batch, *, state: State, island: Island, autocast: Callable[[], Any]
) -> tuple[float, float]:
    """Forward and backward, part by part: the batch's mean loss, and the norm of the gradients before clipping.

    The clipped gradients are left in the parameters, for `state.update`.
    """
    settings = state.settings
    rows = settings.batch // island.world
    state.optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=island.device)
    for number, part in enumerate(_parts(batch, settings.accumulate)):
        with autocast(), island.accumulating(module, last=number + 1 == settings.accumulate):
            loss = task.losses(module, part).sum() / rows
            loss.backward()
        total += loss.detach()
    value = float(island.mean(total))
    return value, float(gather(nn.utils.clip_grad_norm_(state.parameters, settings.clip, foreach=True)))


def _begin(state: State, checkpoints: Checkpoints, snapshots: Snapshots, resume: bool, restart: bool) -> None:
    """Puts the last checkpoint into the state, or writes the first one."""
    if restart:
        checkpoints.clear()
    if not checkpoints.exists():
        checkpoints.save(state)
    elif resume:
        checkpoints.load(state)
    else:
        where = checkpoints.directory
        raise AtollError(f"{where}: holds a checkpoint; --resume goes on from it, --restart begins again")
    snapshots.drop_after(state.numbers.step)


def prepared(module: nn.Module, settings: TrainSettings) -> nn.Module:
    """The module with the switches that trade time for memory or for compilation.

    Raises:
        AtollError: a switch is asked for that a network from elsewhere does not have.
    """
    blocks: list[Any] = list(getattr(module, "blocks", ()))
    if not blocks or not all(hasattr(block, "checkpointing") for block in blocks):
        for key, off in (("checkpointing", "none"), ("compile", False), ("sharding", "replicate")):
            if getattr(settings, key) != off:
                raise AtollError(f"train.{key}: a network that is kept as it came has no such switch; leave it out")
        return module
    for block in blocks:
        block.checkpointing = settings.checkpointing
        if settings.compile:
            block.compile()  # one block is compiled and serves for all: seconds, where the whole network takes minutes
    return module


def _parts(batch: Batch, count: int) -> Iterator[Batch]:
    size = len(next(iter(batch.values()))) // count
    for start in range(0, size * count, size):
        yield {name: tensor[start : start + size] for name, tensor in batch.items()}


def _is_sound(loss: float, norm: float, numbers: Counters, settings: TrainSettings) -> bool:
    """Whether loss and gradient are finite and the loss did not leap; takes it into the running moments if so."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        return False
    level = math.log(max(loss, 1e-30))
    spread = math.sqrt(max(numbers.square - numbers.mean**2, 1e-4))
    if numbers.seen >= _CALM and level > numbers.mean + settings.spike * spread:
        return False
    keep = min(0.99, numbers.seen / (numbers.seen + 1))
    numbers.mean = keep * numbers.mean + (1 - keep) * level
    numbers.square = keep * numbers.square + (1 - keep) * level**2
    numbers.seen += 1
    return True


def _roll_back(state: State, checkpoints: Checkpoints, loss: float, log: Tracker) -> Counters:
    """Goes back to the last checkpoint and skips the batches since: the numbers to go on with, saved at once."""
    bad = state.numbers
    checkpoints.load(state)
    numbers = state.numbers
    what = f"the loss of step {bad.step + 1} is {loss:.4g}"
    if numbers.rollbacks == _ROLLBACKS:
        raise AtollError(
            f"{what}, after {_ROLLBACKS} returns to a checkpoint; the one of step {numbers.step} is whole: "
            "lower train.lr or set train.precision to fp32, and start again"
        )
    numbers.skipped += bad.step + 1 - numbers.step
    numbers.rollbacks += 1
    checkpoints.save(state)
    told = f"{what}: back to step {numbers.step}, {numbers.skipped} batches skipped so far"
    warnings.warn(told, stacklevel=2)
    log.event(numbers.step, told)
    return numbers


def _due(done: int, every: int, settings: TrainSettings) -> bool:
    return every > 0 and (done % every == 0 or done == settings.steps)


@torch.no_grad()
def _with_average(state: State, look: Callable[[nn.Module], Any]) -> Any:
    """What `look` sees of the module with its averaged weights, as it will be delivered; the same in every process."""
    state.module.eval()
    state.swap()
    try:
        return look(state.module)
    finally:
        state.swap()
        state.module.train()


def autocast_of(precision: str, device: torch.device) -> Callable[[], Any]:
    """bf16 autocast where asked, and with "auto" where the hardware multiplies bf16 matrices."""
    if precision == "bf16" or (precision == "auto" and has_bf16(device)):
        return lambda: torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext


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
