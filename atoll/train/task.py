"""What the loop trains: a module, its batches as functions of their index, and the loss of a batch."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from atoll.train.feed import Batch


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
        """Draws what the module can do by now; nothing where that is no picture. Without a file: for the others of the
        island, whose parts of the weights are needed."""
