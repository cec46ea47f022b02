"""What a caller of the engine sees: a request, its job, and the job's events."""

import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from atoll.choices import Method
from atoll.ensemble import Alignment
from atoll.errors import AtollError
from atoll.image_size import ImageSize

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


class QueueFullError(AtollError):
    """The engine refuses a request because as many images wait as its limits allow; try again later."""


@dataclass(frozen=True)
class ImageRequest:
    """Images of one prompt. `None` means the ensemble's default, as in `atoll.Pipeline`.

    Attributes:
        prompt: what the images show.
        seeds: one per image. An image depends on its seed and the settings, not on who shares its batch.
        negative_prompt: in place of the null condition; needs guidance.
        steps: number of steps.
        guidance_scale: the guidance scale.
        guidance_range: the times (0 data, 1 noise) between which there is guidance.
        method: "euler", "heun", "midpoint", "dpm++2m" or "unipc".
        routing: a name of `atoll.ensemble.routing`.
        alignment: "snr" or "native".
        cluster: the images' own cluster, for routing "oracle".
        user: who asks; users share the machine equally, however much each of them asks for.
        priority: a user's share is multiplied by 2^priority for this request; -8 to 8.
        deadline: seconds from submission after which the request fails, if its images are not ready.
        preview_every: steps between previews; 0: none.
        size: of the images; None: the main one.
        shift: of the solver's times, as in `atoll.Pipeline`.
    """

    prompt: str
    seeds: tuple[int, ...] = (0,)
    negative_prompt: str | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    guidance_range: tuple[float, float] = (0.0, 1.0)
    method: Method | None = None
    routing: str | None = None
    alignment: Alignment = "snr"
    cluster: int | None = None
    user: str = ""
    priority: int = 0
    deadline: float | None = None
    preview_every: int = 0
    size: ImageSize | None = None
    shift: float | None = None


@dataclass(frozen=True)
class Started:
    """The first step of the job begins."""


@dataclass(frozen=True)
class JobProgress:
    """A step is done.

    Attributes:
        step: steps done by the slowest image.
        steps: number of steps.
    """

    step: int
    steps: int


@dataclass(frozen=True)
class Preview:
    """What one image will look like, by the estimate of x0 at this step.

    Attributes:
        index: the image's place in the request's seeds.
        step: steps that were done.
        image: the decoded estimate.
    """

    index: int
    step: int
    image: "Image"


@dataclass(frozen=True)
class Finished:
    """All images are ready; the last event of a job.

    Attributes:
        images: one per seed.
        latents: x at t = 0 [n, C, H, W], on the CPU.
        times: the time of each evaluation [V].
        weights: each expert's weight at each evaluation [V, n, E].
        experts: the experts' names.
        dropped: the experts that answered with NaN or infinity and were left out from then on.
        truncated: ends of the prompt, or of the negative prompt, that are too long for the text encoder and cut off.
        queue_seconds: from submission to the first step.
        sample_seconds: from the first step to the last.
    """

    images: list["Image"]
    latents: "Tensor"
    times: "Tensor"
    weights: "Tensor"
    experts: tuple[str, ...]
    dropped: tuple[str, ...]
    truncated: tuple[str, ...]
    queue_seconds: float
    sample_seconds: float


@dataclass(frozen=True)
class Failed:
    """There will be no images; the last event of a job.

    Attributes:
        reason: "failed", "deadline", "cancelled", or "closed" if the engine ends.
        message: one line for the caller.
    """

    reason: str
    message: str


Event = Started | JobProgress | Preview | Finished | Failed
Listener = Callable[[Event], None]


@dataclass(eq=False)
class ImageJob:
    """A request that the engine has accepted.

    Attributes:
        request: the request.
        id: unique.
        done: set with the last event.
    """

    request: ImageRequest
    listener: Listener
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    done: threading.Event = field(default_factory=threading.Event)
    cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Give the job up; its place is free at the next tick. A finished job stays finished."""
        self.cancelled.set()
