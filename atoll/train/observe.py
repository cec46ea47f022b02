"""What is measured and drawn between two steps: validation losses, sample grids, images of the user's own prompts.

None of it draws from the random numbers of the training or changes its state, so the training keeps its bits.
"""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from atoll.manifest import TrainSettings
from atoll.storage.layout import TrainingLayout
from atoll.train.island import Island
from atoll.train.state import State
from atoll.train.track import Tracker
from atoll.train.validation_images import ValidationImages
from atoll.train.validation_page import ValidationStrips


class _Observed(Protocol):
    def validate(self, module: Callable[..., Tensor], /) -> dict[str, float]: ...

    def draw(self, module: Callable[..., Tensor], file: Path | None) -> None: ...

    def validation_images(self) -> ValidationImages | None: ...


class Observer:
    """Validates and draws at the steps that the settings name; every process of an island calls all methods.

    Args:
        task: what is trained.
        state: of the training.
        log: gets the numbers, and the images.
        island: the processes that train together.
        directory: the training's, for images.
        autocast: as in training, for drawing.
    """

    def __init__(
        self,
        task: _Observed,
        state: State,
        log: Tracker,
        *,
        island: Island,
        directory: Path,
        autocast: Callable[[], Any],
    ):
        self._task, self._state, self._log, self._island, self._autocast = task, state, log, island, autocast
        self._files = TrainingLayout(directory)
        chosen = state.settings.validation
        self._images = task.validation_images() if chosen else None
        self._strips = ValidationStrips(directory, self._images.prompts, chosen) if self._images and chosen else None

    def start(self) -> None:
        """Drop images of steps that are trained again; before the first step, draw what the weights draw until then."""
        self.drop_after(self._state.numbers.step)
        if self._state.numbers.step == 0:
            self._draw_prompts(0)

    def drop_after(self, step: int) -> None:
        """Remove the images of later steps."""
        if self._strips is not None and self._island.is_first:
            self._strips.drop_after(step)

    def after(self, done: int) -> None:
        """Validate and draw what is due after `done` steps."""
        settings = self._state.settings
        if is_due(done, settings.validate_every, settings):
            self._log.validated(done, with_average(self._state, self._task.validate))
        if is_due(done, settings.sample_every, settings):
            image = self._files.samples(done) if self._island.is_first else None
            with_average(self._state, partial(self._task.draw, file=image))
        if settings.validation is not None and is_due(done, settings.validation.every, settings):
            self._draw_prompts(done)

    def _draw_prompts(self, done: int) -> None:
        """Draw the validation images with the average and with the trained weights."""
        if self._images is None or self._strips is None:
            return
        started, decodes = time.monotonic(), self._island.is_first

        def draw(module: nn.Module) -> Tensor | None:
            assert self._images is not None
            with self._autocast():
                return self._images.draw(module, decodes)

        # Before the first step, the two are the same.
        average = with_average(self._state, draw)
        drawn = {"ema": average, "trained": with_weights(self._state, draw) if done else average}
        if decodes:
            shown = self._strips.add(done, drawn)
            by_prompt = dict(zip(self._images.prompts, shown, strict=True))
            count = sum(len(images) for images in drawn.values())
            self._log.drawn(done, by_prompt, count, time.monotonic() - started)


def is_due(done: int, every: int, settings: TrainSettings) -> bool:
    """Return whether something that happens every `every` steps, 0 for never, and at the end, happens now."""
    return every > 0 and (done % every == 0 or done == settings.steps)


@torch.no_grad()
def with_weights(state: State, evaluate: Callable[[nn.Module], Any]) -> Any:
    """Return the result of `evaluate` for the module in evaluation mode; every process must call this."""
    state.module.eval()
    try:
        return evaluate(state.module)
    finally:
        state.module.train()


def with_average(state: State, evaluate: Callable[[nn.Module], Any]) -> Any:
    """Return the result of `evaluate` for the module with its EMA weights; every process must call this."""

    # EMA weights in place of the current ones, which come back whatever happens.
    def swapped(module: nn.Module) -> Any:
        state.swap()
        try:
            return evaluate(module)
        finally:
            state.swap()

    return with_weights(state, swapped)
