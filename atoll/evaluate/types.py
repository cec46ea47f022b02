"""The types of evaluation: variants and reference data in, scores and results out."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from atoll.choices import Method
from atoll.encoders.codec import Codec
from atoll.encoders.text import PromptEncoder
from atoll.ensemble import Ensemble
from atoll.errors import AtollError
from atoll.evaluate.metrics.frechet import DenoisingError
from atoll.manifest import EvaluateSettings
from atoll.randomness import cpu_generator, random_rows
from atoll.schedule import build_schedule
from atoll.solver import times_of
from atoll.storage.shards import LATENTS, Shards

# (network calls done, network calls in all, what is being measured)
EvaluateProgress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Variant:
    """One way to sample; the evaluation measures `ensemble.velocity`.

    Attributes:
        name: unique among the variants.
        ensemble: a single expert is an ensemble of one.
        description: text for the report.
        steps, method, guidance_scale: override the settings.
        grid: the schedule in whose time the steps are even; None: even in t.
        axes: values on the axes of a sweep.
        identity: hash of everything in the ensemble, so that cached results are reused; "" caches nothing.
    """

    name: str
    ensemble: Ensemble
    description: str = ""
    steps: int | None = None
    method: Method | None = None
    guidance_scale: float | None = None
    grid: str | None = None
    axes: dict[str, Any] = field(default_factory=dict)
    identity: str = ""

    def times(self, steps: int) -> Tensor | None:
        """Times of `steps` steps, [steps + 1]; None for even steps."""
        return None if self.grid is None else times_of(build_schedule(self.grid), steps)

    @property
    def calls(self) -> int:
        """Experts evaluated per velocity, at most: the unit of the progress."""
        # Routings without a number may evaluate every expert.
        experts = len(self.ensemble.experts)
        counted = re.fullmatch(r"(?:top|sample)-(\d+)", self.ensemble.routing)
        return min(experts, int(counted[1])) if counted else experts


@dataclass(frozen=True)
class Reference:
    """Real images and held-out latents: an encoded data set with its encoder and codec.

    Images are decoded from their latents, so distances measure the diffusion model and not the codec. Of data with
    several sizes, those of the main one, which is sampled.
    """

    encoded: Shards
    encoder: PromptEncoder
    codec: Codec

    def images(self, rows: Tensor) -> Tensor:
        """Images of rows [n]: [n, c, h, w] in [0, 1], float32."""
        return self.codec.decode(self.latents(rows))

    def latents(self, rows: Tensor) -> Tensor:
        """Latents of rows [n]: [n, C, H, W], float32."""
        return self.encoded.read("latent", rows).float()

    def captions(self, rows: Tensor) -> list[str]:
        """Captions of rows [n]."""
        return [self.encoded.captions[row] for row in rows.tolist()]

    def split(self, settings: EvaluateSettings) -> tuple[Tensor, Tensor]:
        """(probe [n], base [m]): two disjoint random sets of training rows.

        Drawn images are compared with the base. The probe's n real images give the floor, and its captions are the
        prompts: a model that draws exactly the data's distribution scores the floor.

        Raises:
            AtollError: fewer than four training images.
        """
        rows = self.encoded.rows("train", LATENTS[0])
        # Each set needs two images for its covariance.
        if len(rows) < 4:
            raise AtollError(f"{self.encoded.path}: {len(rows)} training images of the main size; expected at least 4 "
                             "to compare with")  # fmt: skip
        # Shuffle once; small data sets are split in halves.
        rows = rows[random_rows(len(rows), len(rows), cpu_generator(settings.seed))]
        # At least half of the images remain for the base.
        n = min(settings.images, len(rows) // 2)
        return rows[:n], rows[n : n + settings.reference]

    def held_out(self, settings: EvaluateSettings) -> Tensor:
        """At most `settings.held_out` random validation rows, sorted. Raises AtollError if there are none."""
        # The denoising error needs latents that no model was trained on.
        rows = self.encoded.rows("val", LATENTS[0])
        if len(rows) == 0:
            raise AtollError(f"{self.encoded.path}: no held-out rows (split val); encode the data with some held out")
        return rows[random_rows(len(rows), settings.held_out, cpu_generator(settings.seed))].sort().values


@dataclass(frozen=True)
class Score:
    """One variant's numbers.

    Attributes:
        description: text for the report.
        metrics: by full name, which contains the feature network and its hash; None if images diverged.
        diverged: images with NaN or infinity.
        gflops: of one image, 10^9 floating-point operations; None if they cannot be counted.
        key, errors_key: cache directories of its images' features and of its denoising errors; "" without a cache.
    """

    name: str
    description: str
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
        """The first metric: the Fréchet distance on the pixels' principal components."""
        return next(iter(self.metrics.values()))


@dataclass(frozen=True)
class Space:
    """A feature space for the report. explained: fraction of the real images' variance within it."""

    name: str
    dim: int
    sha256: str
    explained: float


@dataclass(frozen=True)
class Results:
    """All scores, and what they have in common.

    Attributes:
        spaces: the pixels' first.
        images: drawn per variant; as many real ones are in the probe.
        reference: real images in the base, which all are compared with.
        held_out: latents of the denoising error.
        real: metrics of the probe's real images: the scores of a perfect model.
        workers: batches in parallel.
        bench: key of the reference data; results with equal keys are comparable image by image.
        notes: warnings about the numbers.
        scores: one per variant.
    """

    spaces: tuple[Space, ...]
    images: int
    reference: int
    held_out: int
    real: dict[str, float | None]
    workers: int
    bench: str
    notes: tuple[str, ...] = ()
    scores: tuple[Score, ...] = field(default=())

    @property
    def frechet_name(self) -> str:
        """Name of `Score.frechet`."""
        return f"FD-{self.spaces[0].name}"

    @property
    def floor(self) -> float:
        """The Fréchet distance between two sets of real images, on the pixels' principal components."""
        distance = next(iter(self.real.values()))
        assert distance is not None  # real images are finite
        return distance

    def score(self, name: str) -> Score:
        """Score of the variant with this name (KeyError if there is none)."""
        return {score.name: score for score in self.scores}[name]


@dataclass(frozen=True)
class CachePaths:
    """Where results are cached: permanently in `store`, or until the evaluation ends."""

    store: Path | None
    temporary: Path

    def path_for(self, identity: str) -> Path:
        """Only results with an identity are cached permanently."""
        return self.store if self.store is not None and identity else self.temporary


# Like `map`, in parallel: (function, items) -> results in order.
MapFunction = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]
