"""The training loop, in the open: experts, the router and the models of all clusters run through it."""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from atoll.errors import AtollError
from atoll.manifest import TrainSettings
from atoll.runtime.device import has_bf16
from atoll.storage.layout import TrainingLayout
from atoll.train.block_swap import BlockSwap
from atoll.train.checkpoint import Checkpoints, not_finite
from atoll.train.island import Island, gather
from atoll.train.observe import Observer, is_due
from atoll.train.plans import TrainingMarks, extended, is_exact
from atoll.train.prefetch import Batch, Prefetcher
from atoll.train.snapshots import Snapshots
from atoll.train.state import Counters, State, steps_before_decay
from atoll.train.stopping import Interrupted as Interrupted
from atoll.train.stopping import stop_signals
from atoll.train.track import Tracker, TrainProgress
from atoll.train.validation_images import ValidationImages


class Task(ABC):
    """What is trained: batches and their losses. All randomness must come from generators seeded by a batch's index."""

    module: nn.Module

    @abstractmethod
    def batch(self, index: int, local_rows: slice) -> Batch:
        """Return the rows `local_rows` of a batch, on the CPU, with all its random numbers.

        The whole batch is a function of the index alone; each process takes its rows of it.
        """

    @abstractmethod
    def losses(self, module: Callable[..., Tensor], batch: Batch) -> Tensor:
        """Return the loss [b] of each row; `module` is the task's own, possibly wrapped for several processes."""

    def validate(self, module: Callable[..., Tensor]) -> dict[str, float]:
        """Return losses on held-out rows by name, for the same rows and noise at every call."""
        return {}

    def validation_images(self) -> ValidationImages | None:
        """Return what draws images for the user's own prompts, if the task's module draws and there are prompts."""
        return None

    def draw(self, module: Callable[..., Tensor], file: Path | None) -> None:  # noqa: B027 (a router draws nothing)
        """Draw samples into a file, if the task's module draws.

        With file None the samples are computed but not written: sharded weights need every process.
        """


_ROLLBACKS = 3  # at most; after one more, training fails
_CALM = 100  # steps before a spike can be distinguished from the fall at the start


@dataclass(frozen=True)
class Trained:
    """The result of the loop: the card's record of the training. The module holds its EMA weights."""

    summary: dict[str, Any]


def train(
    task: Task,
    settings: TrainSettings,
    directory: Path,
    marks: TrainingMarks,
    island: Island,
    *,
    resume: bool = False,
    restart: bool = False,
    progress: TrainProgress | None = None,
    stopped: Callable[[], bool] | None = None,
) -> Trained:
    """Train the task's module in place for settings.steps steps and leave its EMA weights in it.

    Args:
        task: batches and losses.
        settings: of the training.
        directory: for checkpoints, metrics.jsonl, summary.json and sample grids; created if missing.
        marks: of the training; a checkpoint of another one is refused.
        island: the processes that train together; each of them calls this.
        resume: continue from the checkpoint, bit for bit as if never stopped; without one, start. If it was written
            under another plan of steps, the training is extended, see `atoll.train.plans`.
        restart: discard an existing checkpoint.
        progress: called with each line of metrics.jsonl that reports a step.
        stopped: whether a signal arrived, see `stop_signals`; None: signals are recorded until this function returns.

    Raises:
        AtollError: a checkpoint exists, and resume and restart are False; more steps are done than settings.steps; the
            loss was not finite, or spiked, more often than `_ROLLBACKS`; the disk is full.
        Interrupted: SIGTERM or SIGINT; the state was saved.
    """
    directory.mkdir(parents=True, exist_ok=True)
    module, state = _set_up(task.module, settings, island)
    # A checkpoint in progress is completed on every exit.
    signals = stop_signals() if stopped is None else nullcontext(stopped)
    early = TrainingLayout(directory).before_decay
    with (
        signals as stopped,
        Checkpoints(directory, marks, island) as checkpoints,
        Checkpoints(early, marks, island) as before_decay,
    ):
        log = _run(
            task,
            module,
            state,
            checkpoints,
            before_decay,
            settings=settings,
            directory=directory,
            island=island,
            resume=resume,
            restart=restart,
            progress=progress,
            stopped=stopped,
        )
    with torch.no_grad():
        # The EMA weights are what the artifact holds.
        for parameter, average in zip(state.parameters, state.ema, strict=True):
            parameter.copy_(average)
    task.module.eval()
    return Trained(summary=log.close(state.numbers))


def _set_up(network: nn.Module, settings: TrainSettings, island: Island) -> tuple[nn.Module, State]:
    """Return the network, on its device and wrapped for several processes, and the state of its training."""
    for key in ("fused_backward", "block_swap"):
        if getattr(settings, key) and island.world > 1:
            raise AtollError(
                f"train.{key}: takes each gradient before {island.world} processes could average it; train with one "
                "process, or leave it out"
            )
    network = prepared(network, settings)
    # Its hooks come before those of the state, which may step on the gradients.
    if settings.block_swap:
        BlockSwap(network, settings.block_swap, island.device, settings.accumulate)
    else:
        network.to(island.device)
    return island.wrap(network, settings.sharding), State(network, settings)


def _run(
    task: Task,
    module: nn.Module,
    state: State,
    checkpoints: Checkpoints,
    before_decay: Checkpoints,
    *,
    settings: TrainSettings,
    directory: Path,
    island: Island,
    resume: bool,
    restart: bool,
    progress: TrainProgress | None,
    stopped: Callable[[], bool],
) -> Tracker:
    """Run the steps that are not done yet."""
    # Start from the checkpoint, or from the initial weights.
    local_rows = island.local_rows(settings.batch, settings.accumulate)
    change = _load_or_save(state, checkpoints, before_decay, resume, restart)
    # A rollback replaces this object, so it is read again afterwards.
    numbers = state.numbers
    mark = checkpoints.marks.of(numbers)
    log = Tracker(directory, numbers.step, settings, mark=mark, progress=progress, quiet=not island.is_first)
    if change and island.is_first:
        warnings.warn(change, stacklevel=2)
        log.event(numbers.step, change)
    # Snapshots of later steps would be written twice.
    snapshots = Snapshots(directory, mark, island)
    snapshots.drop_after(numbers.step)
    last_before_decay = steps_before_decay(settings) if settings.keep_checkpoints == "all" else settings.steps
    autocast = autocast_of(settings.precision, island.device)
    observer = Observer(task, state, log, island=island, directory=directory, autocast=autocast)
    observer.start()

    # The steps, with batches prefetched.
    module.train()
    with Prefetcher(lambda index: task.batch(index, local_rows), island.device) as batches:
        while numbers.step < settings.steps:
            # Gradients; a bad loss goes back to the last checkpoint.
            batch = batches.get(numbers.step + numbers.skipped, settings.steps + numbers.skipped - 1)
            value, norm = gradients(task, module, batch, state=state, island=island, autocast=autocast)
            if not _is_sound(value, norm, numbers, settings):
                reason = f"the loss of step {numbers.step + 1} is {value:.4g}"
                numbers = _roll_back(state, checkpoints, numbers.step + 1, reason, log)
                snapshots.drop_after(numbers.step)
                observer.drop_after(numbers.step)
                continue
            # Update.
            lr = state.lr
            state.update()
            done = numbers.step
            # Log, validate, draw.
            log.step(done, value, norm, lr)
            observer.after(done)
            # A signal may reach one process only; all must stop at the same step.
            stop = island.any(stopped())
            snapshot = bool(settings.ema_profiles) and is_due(done, settings.ema_snapshot_every, settings)
            checkpoint = stop or done % settings.checkpoint_every == 0 or done == settings.steps
            early = done == last_before_decay < settings.steps
            # The loss of a step is computed before its update, which can be the one that fails.
            if (snapshot or checkpoint or early) and (wrong := _not_finite(state, island)):
                numbers = _roll_back(state, checkpoints, done, f"after step {done}, {wrong} is not finite", log)
                snapshots.drop_after(numbers.step)
                observer.drop_after(numbers.step)
                continue
            # Save.
            if snapshot:
                snapshots.save(state)
            # Before the other one: if that exists, this one does.
            if early:
                before_decay.save(state)
                before_decay.finish()
            if checkpoint:
                checkpoints.save(state)
            if stop and done < settings.steps:
                checkpoints.finish()
                log.stop()
                raise Interrupted(f"stopped at step {done} of {settings.steps}; continue with --resume")
    checkpoints.finish()
    return log


def gradients(
    task: Task, module: nn.Module, batch: Batch, *, state: State, island: Island, autocast: Callable[[], Any]
) -> tuple[float, float]:
    """Run forward and backward, part by part, and leave the clipped gradients in the parameters.

    With train.fused_backward, the parameters are updated already, and the gradients freed.

    Returns:
        (mean loss of the batch, norm of the gradients before clipping).
    """
    settings = state.settings
    # The mean over the batch: each part contributes its sum over this process's rows.
    rows = settings.batch // island.world
    state.begin()
    total = torch.zeros((), device=island.device)
    for number, part in enumerate(_parts(batch, settings.accumulate)):
        with autocast(), island.accumulating(module, last=number + 1 == settings.accumulate):
            loss = task.losses(module, part).sum() / rows
            loss.backward()
        total += loss.detach()
    # The losses of all processes, and the norm of the clipped gradients.
    value = float(island.mean(total))
    return value, float(gather(state.clip()))


def _load_or_save(
    state: State, checkpoints: Checkpoints, before_decay: Checkpoints, resume: bool, restart: bool
) -> str:
    """Load the last checkpoint into the state, or save the first one.

    Returns:
        A line that says what a change of the planned steps means; "" if they did not change.
    """
    # A restart discards the old checkpoints before anything is loaded.
    if restart:
        checkpoints.clear()
        before_decay.clear()
    # The first checkpoint holds the initial weights, where a rollback at the start returns to.
    if not checkpoints.exists():
        checkpoints.save(state)
        return ""
    if not resume:
        raise AtollError(
            f"{checkpoints.directory}: holds a checkpoint; --resume continues from it, --restart discards it"
        )
    # The same plan: go on where it stopped.
    marks, numbers = checkpoints.marks, checkpoints.numbers()
    if numbers.planned == marks.settings.steps:
        checkpoints.load(state)
        return ""
    # Another plan: from before the decay, if only that is as the new plan would have it.
    source = checkpoints
    if not is_exact(numbers, marks.settings) and before_decay.exists():
        early = before_decay.numbers()
        source = before_decay if is_exact(early, marks.settings) else checkpoints
    _, change = extended(source.numbers(), marks)
    source.load(state)
    state.numbers, _ = extended(state.numbers, marks)
    # On disk at once: from here on, the training follows the new plan only.
    checkpoints.save(state)
    checkpoints.finish()
    return change


def prepared(module: nn.Module, settings: TrainSettings) -> nn.Module:
    """Return the module with activation checkpointing and compilation set up.

    Raises:
        AtollError: the settings need a switch that a converted network does not have.
    """
    # Only Atoll's own networks have blocks with these switches.
    blocks: list[Any] = list(getattr(module, "blocks", ()))
    if not blocks or not all(hasattr(block, "checkpointing") for block in blocks):
        for key, off in (("checkpointing", "none"), ("compile", False), ("sharding", "replicate"), ("block_swap", 0)):
            if getattr(settings, key) != off:
                raise AtollError(f"train.{key}: a network that is kept as it came does not support it; leave it out")
        return module
    for block in blocks:
        block.checkpointing = settings.checkpointing
        if settings.compile:
            block.compile()  # one compiled block serves for all: seconds instead of minutes for the whole network
    return module


def _parts(batch: Batch, count: int) -> Iterator[Batch]:
    """The batch in `count` equal parts."""
    # The rows are divided evenly; `local_rows` has checked that.
    size = len(next(iter(batch.values()))) // count
    for start in range(0, size * count, size):
        yield {name: tensor[start : start + size] for name, tensor in batch.items()}


def _is_sound(loss: float, norm: float, numbers: Counters, settings: TrainSettings) -> bool:
    """Whether loss and gradient are finite and the loss is no spike; if so, the running moments are updated."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        return False
    # A spike is measured in the log-loss, whose spread does not depend on the scale of the loss.
    level = math.log(max(loss, 1e-30))
    # A lower bound on the spread: an even loss is no reason for a rollback.
    spread = math.sqrt(max(numbers.square - numbers.mean**2, 1e-4))
    if numbers.seen >= _CALM and level > numbers.mean + settings.spike * spread:
        return False
    # Plain means at first, then exponential ones over about 100 steps.
    decay = min(0.99, numbers.seen / (numbers.seen + 1))
    numbers.mean = decay * numbers.mean + (1 - decay) * level
    numbers.square = decay * numbers.square + (1 - decay) * level**2
    numbers.seen += 1
    return True


def _not_finite(state: State, island: Island) -> str:
    """The name of a tensor of the state that is not finite, "" if all are; every process must call this."""
    name = not_finite(state.tensors())
    # All processes go back, also those whose parts are finite.
    return (name or "a tensor of another process") if island.any(name is not None) else ""


def _roll_back(state: State, checkpoints: Checkpoints, failed: int, reason: str, log: Tracker) -> Counters:
    """Load the last checkpoint and skip the batches up to that of step `failed`.

    Returns:
        The counters to continue with, already saved.
    """
    checkpoints.load(state)
    numbers = state.numbers
    # After several returns, the cause is in the settings or the data.
    if numbers.rollbacks == _ROLLBACKS:
        raise AtollError(
            f"{reason}, after {_ROLLBACKS} returns to a checkpoint; the one of step {numbers.step} is valid: "
            "lower train.lr or set train.precision to fp32, and train again"
        )
    # Skipping moves all later batches, so the same ones are not tried again.
    numbers.skipped += failed - numbers.step
    numbers.rollbacks += 1
    # Saved at once, so that a crash does not try the bad batches again.
    checkpoints.save(state)
    message = f"{reason}: back to step {numbers.step}, {numbers.skipped} batches skipped so far"
    warnings.warn(message, stacklevel=2)
    log.event(numbers.step, message)
    return numbers


def autocast_of(precision: str, device: torch.device) -> Callable[[], Any]:
    """Return bf16 autocast for "bf16", and for "auto" if the hardware multiplies bf16 matrices; else no autocast."""
    # Without hardware support bf16 is slower than float32.
    if precision == "bf16" or (precision == "auto" and has_bf16(device)):
        return lambda: torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext
