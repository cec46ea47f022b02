"""Tracking: metrics.jsonl always, TensorBoard or W&B if chosen, the progress line, and summary.json."""

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from atoll.errors import AtollError
from atoll.manifest import TrainSettings
from atoll.storage.artifact import write_json
from atoll.storage.bounds import Count, Number, Seconds
from atoll.storage.layout import TrainingLayout, temporary_of
from atoll.train.state import Counters

TrainProgress = Callable[[dict[str, Any]], None]


class Tracker:
    """Accumulates every step and logs every `log_every` steps; a resumed run drops the lines after its checkpoint.

    Args:
        directory: the training's.
        step: steps done so far.
        settings: of the training.
        mark: of the training, for its summary.
        progress: called with each line that reports a step.
        quiet: this process writes nothing; set it in all processes of an island but the first.
    """

    def __init__(
        self,
        directory: Path,
        step: int,
        settings: TrainSettings,
        *,
        mark: str,
        progress: TrainProgress | None,
        quiet: bool,
    ):
        self.files, self.settings, self.mark, self.quiet = TrainingLayout(directory), settings, mark, quiet
        self.progress = None if quiet else progress
        # Lines after the checkpoint belong to steps that are done again.
        earlier = [line for line in read_metrics(directory) if line["step"] <= step]
        if not quiet:
            # The lines that stay replace the file at once, so a crash leaves a complete one.
            temporary = temporary_of(self.files.metrics)
            temporary.write_text("".join(json.dumps(line) + "\n" for line in earlier))
            os.replace(temporary, self.files.metrics)
        # Continue counting time and losses where the checkpoint was.
        steps = [line for line in earlier if "loss" in line]
        self.last_line: dict[str, Any] = steps[-1] if steps else {}
        self.validation: dict[str, float] = next((line["val"] for line in reversed(earlier) if "val" in line), {})
        self.seconds_before = self.last_line.get("seconds", 0.0)
        self.start_time = self.last_time = time.monotonic()
        self.losses: list[float] = []
        # One process per island reports to the tracker.
        self.writer = None if quiet else _writer(settings, directory)

    def step(self, done: int, loss: float, norm: float, lr: float) -> None:
        """Accumulate a step; log the mean of the steps since the last line if one is due.

        Args:
            done: steps done, this one included.
            loss: mean over the batch.
            norm: of the gradients before clipping.
            lr: learning rate.
        """
        self.losses.append(loss)
        # Between two lines, losses are only accumulated.
        if done % self.settings.log_every and done != self.settings.steps:
            return
        now = time.monotonic()
        # Steps per second since the last line, not since the start, so that slowdowns show.
        rate = len(self.losses) / max(now - self.last_time, 1e-9)
        # A line of means since the last one, with an estimate of the time left.
        line = {
            "step": done,
            "steps": self.settings.steps,
            "loss": sum(self.losses) / len(self.losses),
            "grad_norm": norm,
            "lr": lr,
            "images_per_s": rate * self.settings.batch,
            "seconds": self.seconds_before + now - self.start_time,
            "eta_s": (self.settings.steps - done) / rate,
        }
        # Start the next interval.
        self.last_line, self.losses, self.last_time = line, [], now
        self._write(line)
        if self.progress is not None:
            self.progress(line)

    def validated(self, done: int, losses: dict[str, float]) -> None:
        """Log the validation losses after `done` steps.

        Raises:
            AtollError: one of them is NaN or infinite, so every later one would be, too.
        """
        for name, loss in losses.items():
            if not math.isfinite(loss):
                raise AtollError(
                    f"{self.files.root}: the validation loss at {name} is {loss} after step {done}, expected a "
                    "finite one: a held-out latent is not finite (encode the data again), or the weights are not "
                    "(start again with a smaller train.lr)"
                )
        self.validation = losses
        self._write({"step": done, "val": losses})

    def drawn(self, done: int, images: Mapping[str, Tensor], count: int, seconds: float) -> None:
        """Log that validation images were drawn, and what that cost.

        Args:
            done: steps done.
            images: by prompt, [c, h, w] in [0, 1] each.
            count: of single images, EMA's and weights'.
            seconds: that drawing took; the training waited for so long.
        """
        self._write({"step": done, "images": count, "images_seconds": round(seconds, 3)})
        if self.writer is not None:
            for number, (prompt, image) in enumerate(images.items()):
                self.writer.add_image(f"validation/{number:02d}", image, prompt, done)

    def event(self, done: int, message: str) -> None:
        """Log an irregularity, such as a rollback, on a line of its own."""
        self._write({"step": done, "event": message})

    def close(self, numbers: Counters) -> dict[str, Any]:
        """Write summary.json, and return it for the card."""
        # The last values, as the card and `atoll launch` read them.
        summary = {
            "mark": self.mark,
            # The prompts of the validation images are nobody else's business.
            "settings": self.settings.model_dump(exclude={"validation"}),
            "steps": self.settings.steps,
            "loss": self.last_line.get("loss"),
            "validation": self.validation,
            "seconds": round(self.last_line.get("seconds", 0.0), 1),
            "rollbacks": numbers.rollbacks,
            "skipped_batches": numbers.skipped,
            **({"plans": numbers.plans} if numbers.plans else {}),
        }
        if not self.quiet:
            write_json(self.files.summary, summary)
        # The trackers may hold lines that they have not written yet.
        self.stop()
        return summary

    def stop(self) -> None:
        """Flush and close the trackers."""
        if self.writer is not None:
            self.writer.close()

    def _write(self, line: dict[str, Any]) -> None:
        if self.quiet:
            return
        # Opened per line: a reader sees each line as soon as it is written.
        with self.files.metrics.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self.writer is not None:
            # Trackers take numbers only.
            numbers = {k: v for k, v in line.items() if isinstance(v, float)}
            numbers |= {f"val/{name}": value for name, value in line.get("val", {}).items()}
            self.writer.add(numbers, line["step"])


class _TensorBoard:
    def __init__(self, directory: Path):
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard's events are written beside metrics.jsonl.
        self._writer = SummaryWriter(str(TrainingLayout(directory).tensorboard))

    def add(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def add_image(self, name: str, image: Tensor, prompt: str, step: int) -> None:
        # The prompt is part of the tag: an image has no other text there.
        self._writer.add_image(f"{name} {prompt[:100]}", image, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, directory: Path, settings: TrainSettings):
        import wandb

        # The name is the id, so that a resumed training continues its own W&B run.
        name = TrainingLayout(directory).name
        self._run = wandb.init(project="atoll", name=name, id=name, resume="allow", config=settings.model_dump())

    def add(self, numbers: dict[str, float], step: int) -> None:
        self._run.log(numbers, step=step)

    def add_image(self, name: str, image: Tensor, prompt: str, step: int) -> None:
        import wandb

        pixels = image.permute(1, 2, 0).numpy()  # [h, w, c], in [0, 1]
        self._run.log({name: wandb.Image(pixels, caption=prompt)}, step=step)

    def close(self) -> None:
        self._run.finish()


def _writer(settings: TrainSettings, directory: Path) -> _TensorBoard | _Wandb | None:
    """The tracker that `track` names, None for none. Raises AtollError if its package is not installed."""
    if settings.track == "none":
        return None
    try:
        return _Wandb(directory, settings) if settings.track == "wandb" else _TensorBoard(directory)
    except ImportError:
        # "auto" is TensorBoard if it is installed.
        if settings.track == "auto":
            return None
        raise AtollError(
            f"train.track: {settings.track} is not installed: pip install 'atoll[tracking]', or set it to none"
        ) from None


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl, without a last one that a crash left incomplete.

    Raises:
        AtollError: another line is not what training writes.
    """
    file = TrainingLayout(directory).metrics
    # Without a file, training has not started.
    if not file.exists():
        return []
    lines: list[dict[str, Any]] = []
    texts = file.read_bytes().split(b"\n")
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            _Line.model_validate(line)
            lines.append(line)
        except (ValueError, RecursionError):
            # Every complete line ends with a line break.
            if number == len(texts):
                break
            raise AtollError(
                f"{file}: line {number} is not what training writes; remove this file to go on without the curve so far"
            ) from None
    return lines


class _Line(BaseModel):
    """What a resumed training reads of a line of metrics.jsonl. Loss and norm may be NaN: they are only shown."""

    model_config = ConfigDict(extra="allow")

    step: Count
    loss: float = 0.0
    seconds: Seconds = 0.0
    val: dict[str, Number] = {}
