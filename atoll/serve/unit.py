"""A few images of one job, which advance together and wait together."""

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from atoll.choices import Method
from atoll.condition import Condition
from atoll.ensemble import Alignment
from atoll.image_size import ImageSize
from atoll.serve.types import Event, Failed, Finished, ImageJob
from atoll.solver import Integration

if TYPE_CHECKING:
    from PIL.Image import Image

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """A request's settings, completed by the ensemble's defaults.

    Attributes:
        steps, guidance_scale, guidance_range, method, routing, alignment, cluster, size, shift: as in `ImageRequest`,
            without None.
    """

    steps: int
    guidance_scale: float
    guidance_range: tuple[float, float]
    method: Method
    routing: str
    alignment: Alignment
    cluster: int | None
    size: ImageSize
    shift: float


@dataclass(eq=False)
class Unit:
    """Images of one job that share every step.

    Attributes:
        job: the job and what its units share.
        rows: their places in the request's seeds.
        integration: how far they are; None before the first step, when they take no memory.
        times: the time of each evaluation so far.
        weights: each expert's weight [n, E] at each evaluation so far.
        experts: the experts that the last evaluation used; None before the first.
    """

    job: "EngineJob"
    rows: range
    integration: Integration | None = None
    times: list[float] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    experts: frozenset[int] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def running(self) -> Integration:
        """The integration of a unit that was started."""
        assert self.integration is not None
        return self.integration

    @property
    def point(self) -> tuple[Tensor, Tensor]:
        """(x [n, ...], t [n]) at which a unit that is not finished needs the velocity."""
        assert self.running.point is not None
        return self.running.point


@dataclass(eq=False)
class EngineJob:
    """A job in the engine.

    Attributes:
        handle: what the caller holds.
        settings: its complete settings.
        units: all of its units.
        arrival: its number in the order of submission.
        submitted: when it came, on the monotonic clock, in seconds.
        started: when its first step began; None before.
        sampled: when its last step ended; None before.
        prompt, null: the numbers of its prompt and of its negative prompt in the prompt pool; -1 before encoding.
        conditions: its prompt and its negative prompt as encoded, by text; empty before encoding.
        truncated: ends of these texts that are cut off.
        evaluations_left: image evaluations until all images are sampled.
        images: the decoded images by their place.
        step: the step that was last told to the listener.
        excluded: the experts that answered it with NaN or infinity.
        over: whether the last event was sent.
    """

    handle: ImageJob
    settings: Settings
    units: Sequence[Unit] = ()
    arrival: int = 0
    submitted: float = field(default_factory=time.monotonic)
    started: float | None = None
    sampled: float | None = None
    prompt: int = -1
    null: int = -1
    conditions: dict[str, tuple[Condition, ...]] = field(default_factory=dict)
    truncated: tuple[str, ...] = ()
    evaluations_left: int = 0
    images: dict[int, "Image"] = field(default_factory=dict)
    step: int = 0
    excluded: frozenset[int] = frozenset()
    over: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def tell(self, event: Event) -> None:
        """Send an event to the listener, unless the last one was sent; thread-safe."""
        with self._lock:
            if self.over:
                return
            self.over = isinstance(event, Finished | Failed)
            try:
                self.handle.listener(event)
            except Exception:  # a listener's fault is its owner's
                _log.exception("the listener of job %s failed", self.handle.id)
            if self.over:
                self.handle.done.set()

    @property
    def options(self) -> tuple[str, Alignment, frozenset[int], bool, ImageSize]:
        """What is equal for all images of one evaluation of the ensemble."""
        settings = self.settings
        return settings.routing, settings.alignment, self.excluded, settings.cluster is None, settings.size

    @property
    def user(self) -> str:
        return self.handle.request.user

    @property
    def deadline(self) -> float | None:
        """When the job fails, on the monotonic clock; None without a deadline."""
        seconds = self.handle.request.deadline
        return None if seconds is None else self.submitted + seconds
