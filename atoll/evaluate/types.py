"""What evaluation exchanges: variants and reference data in, scores and results out."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from atoll.choices import Method
from atoll.encoders.codec import Codec
from atoll.encoders.text import PromptEncoder, TextEncoder
from atoll.ensemble import Ensemble
from atoll.errors import AtollError
from atoll.evaluate.metrics.frechet import DenoisingError
from atoll.manifest import EvaluateSettings
from atoll.randomness import cpu_generator, random_rows
from atoll.schedule import build_schedule
from atoll.solver import times_of
from atoll.storage.shards import Shards

# (network calls done, network calls in all, what is being measured)
EvaluateProgress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Variant:
    """One way to sample: what is measured is `ensemble.velocity`.

    Attributes:
        name: unique among the variants.
        ensemble: a single expert is an ensemble of one.
        made_by: in words, for the report.
        steps, method, guidance_scale: instead of the settings' own.
        grid: the schedule in whose time the steps are even; None: they are even in t.
        axes: of a sweep, the values that it has on its axes.
        identity: names all that the ensemble is made of, so that what was measured of it is found again; "": it is not.
    """

    name: str
    ensemble: Ensemble
    made_by: str = ""
    steps: int | None = None
    method: Method | None = None
    guidance_scale: float | None = None
    grid: str | None = None
    axes: dict[str, Any] = field(default_factory=dict)
    identity: str = ""

    def times(self, steps: int) -> Tensor | None:
        """Of `steps` steps, [steps + 1]; None: even ones."""
        return None if self.grid is None else times_of(build_schedule(self.grid), steps)

    @property
    def calls(self) -> int:
        """Experts asked per velocity, at most: the unit of the time left."""
        experts = len(self.ensemble.experts)
        counted = re.fullmatch(r"(?:top|sample)-(\d+)", self.ensemble.routing)
        return min(experts, int(counted[1])) if counted else experts


@dataclass(frozen=True)
class Reference:
    """Real images and held-out latents: an encoded data set with what reads it.

    Images are decoded from their latents, so a distance is the diffusion's alone, not the codec's.
    """

    encoded: Shards
    encoder: TextEncoder | PromptEncoder
    codec: Codec

    def images(self, rows: Tensor) -> Tensor:
        """[n] -> [n, c, h, w] in [0, 1], float32."""
        return self.codec.decode(self.latents(rows))

    def latents(self, rows: Tensor) -> Tensor:
        """[n] -> [n, C, H, W], float32."""
        return self.encoded.read("latent", rows).float()

    def captions(self, rows: Tensor) -> list[str]:
        return [self.encoded.captions[row] for row in rows.tolist()]

    def split(self, settings: EvaluateSettings) -> tuple[Tensor, Tensor]:
        """(probe [n], base [m]): disjoint training rows, at random.

        All images are measured against the base. The probe, n real images, gives the floor, and its captions are
        the prompts: a model that draws exactly the data's distribution scores the floor.

        Raises:
            AtollError: fewer than four training images.
        """
        rows = self.encoded.rows("train")
        if len(rows) < 4:
            raise AtollError(f"{self.encoded.path}: {len(rows)} training images; expected at least 4 to compare with")
        rows = rows[random_rows(len(rows), len(rows), cpu_generator(settings.seed))]
        n = min(settings.images, len(rows) // 2)
        return rows[:n], rows[n : n + settings.reference]

    def held_out(self, settings: EvaluateSettings) -> Tensor:
        """At most `settings.held_out` validation rows, at random. Raises AtollError where there are none."""
        rows = self.encoded.rows("val")
        if len(rows) == 0:
            raise AtollError(f"{self.encoded.path}: no held-out rows (split val); encode the data with some held out")
        return rows[random_rows(len(rows), settings.held_out, cpu_generator(settings.seed))].sort().values


@dataclass(frozen=True)
class Score:
    """One variant's numbers.

    Attributes:
        metrics: by the metric's whole name, which says its feature network and that network's hash; None where
            `diverged` of the images held NaN or infinity.
        gflops: of one image, 10^9 floating-point operations; None where none could be counted.
        key, errors_key: of the directories of the evaluation's store that hold its images' parts, and its denoising
            errors; "" where they are not kept.
    """

    name: str
    made_by: str
    steps: int
    method: str
    guidance_scale: float
    axes: dict[str, Any]
    metrics: dict[str, float | None]
    diverged: int
    denoising: DenoisingError
    images_per_second: float
    gflops: float | None
    key: str = ""
    errors_key: str = ""

    @property
    def frechet(self) -> float | None:
        """The first of the metrics: the Fréchet distance on principal components of the pixels."""
        return next(iter(self.metrics.values()))


@dataclass(frozen=True)
class Space:
    """A feature space in words. explained: the share of the real images' variance that lies in it."""

    name: str
    dim: int
    sha256: str
    explained: float


@dataclass(frozen=True)
class Results:
    """All scores and what they share. `real` has the metrics of `images` real images: a perfect model's."""

    spaces: tuple[Space, ...]
    images: int  # per variant, and of the real ones
    reference: int  # real images compared with
    held_out: int
    real: dict[str, float | None]
    workers: int
    bench: str  # the key of what all were measured on: numbers of one bench may be compared image by image
    notes: tuple[str, ...] = ()  # what has to be said of the numbers
    scores: tuple[Score, ...] = field(default=())

    @property
    def frechet_name(self) -> str:
        return f"FD-{self.spaces[0].name}"

    @property
    def floor(self) -> float:
        """The Fréchet distance of real images to real images, on principal components of the pixels."""
        found = next(iter(self.real.values()))
        assert found is not None  # real images are finite
        return found

    def score(self, name: str) -> Score:
        """By the variant's name (KeyError if there is none)."""
        return {score.name: score for score in self.scores}[name]


@dataclass(frozen=True)
class Places:
    """Where what is measured is kept: for good, or until the evaluation ends."""

    store: Path | None
    passing: Path

    def of(self, identity: str) -> Path:
        return self.store if self.store is not None and identity else self.passing


MapFunction = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]
