"""Measures variants of one model: Fréchet distance to real pictures, held-out denoising error, pictures per second."""

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from atoll.codec import Codec
from atoll.condition import Condition, Conditions, Encoder, SeveralEncoders
from atoll.ensemble import Ensemble
from atoll.errors import AtollError
from atoll.evaluate.metrics import (
    DenoisingError,
    Moments,
    PixelPCA,
    frechet_distance,
    seeded_noise,
    squared_errors,
)
from atoll.manifest import EvaluateSettings
from atoll.shards import Shards
from atoll.solver import Method, sample

Item = TypeVar("Item")
Result = TypeVar("Result")

# (network calls done, network calls in all, what is being measured)
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Variant:
    """One way to sample: what is measured is `ensemble.velocity`.

    Attributes:
        name: unique among the variants.
        ensemble: a single expert is an ensemble of one.
        made_by: in words, for the report.
        steps, method, guidance_scale: instead of the settings' own.
    """

    name: str
    ensemble: Ensemble
    made_by: str = ""
    steps: int | None = None
    method: Method | None = None
    guidance_scale: float | None = None

    @property
    def calls(self) -> int:
        """Experts asked per velocity, at most: the unit of the time left."""
        experts = len(self.ensemble.experts)
        counted = re.fullmatch(r"(?:top|sample)-(\d+)", self.ensemble.routing)
        return min(experts, int(counted[1])) if counted else experts


@dataclass(frozen=True)
class Reference:
    """Real pictures and held-out latents: an encoded data set with what reads it.

    Pictures are decoded from their latents, so a distance is the diffusion's alone, not the codec's.
    """

    encoded: Shards
    encoder: Encoder | SeveralEncoders
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

        All pictures are measured against the base. The probe, n real pictures, gives the floor, and its captions are
        the prompts: a model that draws exactly the data's distribution scores the floor.

        Raises:
            AtollError: fewer than four training pictures.
        """
        rows = self.encoded.rows("train")
        if len(rows) < 4:
            raise AtollError(f"{self.encoded.path}: {len(rows)} training pictures; expected at least 4 to compare with")
        generator = torch.Generator().manual_seed(settings.seed)
        rows = rows[torch.randperm(len(rows), generator=generator)]
        n = min(settings.images, len(rows) // 2)
        return rows[:n], rows[n : n + settings.reference]

    def held_out(self, settings: EvaluateSettings) -> Tensor:
        """At most `settings.held_out` validation rows, at random. Raises AtollError where there are none."""
        rows = self.encoded.rows("val")
        if len(rows) == 0:
            raise AtollError(f"{self.encoded.path}: no held-out rows (split val); encode the data with some held out")
        generator = torch.Generator().manual_seed(settings.seed)
        return rows[torch.randperm(len(rows), generator=generator)[: settings.held_out]].sort().values


@dataclass(frozen=True)
class Score:
    """One variant's numbers. frechet is None where `diverged` of its pictures held NaN or infinity."""

    name: str
    made_by: str
    steps: int
    method: str
    guidance_scale: float
    frechet: float | None
    diverged: int
    denoising: DenoisingError
    images_per_second: float


@dataclass(frozen=True)
class Results:
    """All scores and what they share. `frechet_name` names the feature space, `features_sha256` its fitted basis,
    `features_explain` the share of the real pictures' variance that lies in it."""

    frechet_name: str
    features_sha256: str
    features_explain: float
    images: int  # per variant, and in the floor
    reference: int  # real pictures compared with
    held_out: int
    floor: float
    workers: int
    scores: tuple[Score, ...] = field(default=())

    def score(self, name: str) -> Score:
        """By the variant's name (KeyError if there is none)."""
        return {score.name: score for score in self.scores}[name]


def evaluate(
    variants: Sequence[Variant],
    reference: Reference,
    settings: EvaluateSettings | None = None,
    progress: Progress | None = None,
    device: str | torch.device = "cpu",
) -> Results:
    """Measures every variant with the same captions, the same noise per picture and the same held-out latents.

    Raises:
        AtollError: too few real pictures, no held-out ones, or two variants of one name.
    """
    settings = settings or EvaluateSettings()
    names = [variant.name for variant in variants]
    if len(set(names)) < len(names):
        raise AtollError(f"two variants have one name among {', '.join(names)}; expected names that differ")
    count = worker_count(settings, device)
    bench = _Bench(reference, settings, torch.device(device), count, sum(v.calls for v in variants), progress)
    with side_by_side(count) as run:
        # What is measured is the variant as it is: an expert that breaks is not left out of it.
        kept = (replace(variant, ensemble=variant.ensemble.with_options(drops=False)) for variant in variants)
        scores = tuple(bench.score(variant, run) for variant in kept)
    return Results(
        frechet_name=f"FD-{bench.features.name}",
        features_sha256=bench.features.sha256,
        features_explain=bench.features.explained,
        images=len(bench.probe),
        reference=bench.base.count,
        held_out=len(bench.held_out),
        floor=bench.floor,
        workers=count,
        scores=scores,
    )


class _Bench:
    """What all variants are measured on."""

    def __init__(
        self,
        reference: Reference,
        settings: EvaluateSettings,
        device: torch.device,
        workers: int,
        calls: int,
        progress: Progress | None,
    ):
        self.reference, self.settings, self.device, self.workers = reference, settings, device, workers
        self.probe, base = reference.split(settings)
        self.held_out = reference.held_out(settings)
        self.features = PixelPCA.fit(map(reference.images, base.split(settings.batch)), settings.components)
        self.base = self._moments(reference.images(rows) for rows in base.split(settings.batch))
        probe = self._moments(reference.images(rows) for rows in self.probe.split(settings.batch))
        self.floor = frechet_distance(probe, self.base)
        # Tokenised once: an encoder may learn new words here, which is not for several threads at a time.
        self.prompts = reference.encoder.tokenize(reference.captions(self.probe))
        self.held_out_tokens = reference.encoder.tokenize(reference.captions(self.held_out))
        self.shape = reference.encoded.shape("latent")
        per_call = len(self.probe) * settings.steps + len(self.held_out) * len(settings.levels)
        self._progress, self._total, self._done = progress, calls * per_call, 0

    def _moments(self, batches: Iterable[Tensor]) -> Moments:
        moments = Moments(self.features.dim)
        for images in batches:
            moments.update(self.features(images))
        return moments

    def _parts(self, count: int) -> Sequence[Tensor]:
        """0..count-1 in equal batches, the same number for every worker."""
        rounds = -(-count // (self.settings.batch * self.workers))
        return torch.arange(count).tensor_split(min(count, rounds * self.workers))

    def _tell(self, what: str, calls: int) -> None:
        self._done += calls
        if self._progress is not None:
            self._progress(min(self._done, self._total), self._total, what)

    def score(self, variant: Variant, run: "Run") -> Score:
        steps = variant.steps or self.settings.steps
        method = variant.method or self.settings.method
        scale = self.settings.guidance_scale if variant.guidance_scale is None else variant.guidance_scale

        def draw(numbers: Tensor) -> Tensor:
            """Features of the pictures with these numbers, [B, dim]."""
            condition = self.reference.encoder.encode(self.prompts.index(numbers)).to(self.device)
            seeds = [self.settings.seed + number for number in numbers.tolist()]
            noise = seeded_noise(seeds, self.shape).to(self.device)
            velocity = _bound(variant.ensemble, condition, scale)
            images = self.reference.codec.decode(sample(velocity, noise, steps, method))
            return self.features(images.cpu())

        moments, diverged, start = Moments(self.features.dim), 0, time.perf_counter()
        for features in run(draw, self._parts(len(self.probe))):
            moments.update(features)
            diverged += int((~torch.isfinite(features).all(1)).sum())
            self._tell(variant.name, len(features) * self.settings.steps * variant.calls)
        seconds = time.perf_counter() - start
        return Score(
            name=variant.name,
            made_by=variant.made_by,
            steps=steps,
            method=method,
            guidance_scale=scale,
            frechet=None if diverged else frechet_distance(moments, self.base),
            diverged=diverged,
            denoising=self._denoising(variant, run),
            images_per_second=len(self.probe) / seconds,
        )

    def _denoising(self, variant: Variant, run: "Run") -> DenoisingError:
        def errors(numbers: Tensor) -> Tensor:
            rows = self.held_out[numbers]
            condition = self.reference.encoder.encode(self.held_out_tokens.index(numbers)).to(self.device)
            x0 = self.reference.latents(rows).to(self.device)
            seeds = [self.settings.seed + row for row in rows.tolist()]
            return squared_errors(variant.ensemble.velocity, x0, condition, self.settings.levels, seeds).cpu()

        parts = []
        for part in run(errors, self._parts(len(self.held_out))):
            parts.append(part)
            self._tell(variant.name, part.numel() * variant.calls)
        return DenoisingError.of(self.settings.levels, torch.cat(parts))


def _bound(ensemble: Ensemble, condition: Condition | Conditions, scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, t: ensemble.velocity(x, t, condition, scale)


Run = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]


def worker_count(settings: EvaluateSettings, device: str | torch.device) -> int:
    """Batches side by side: `settings.workers`, or one per core; one on an accelerator."""
    if settings.workers is not None:
        return settings.workers
    if torch.device(device).type != "cpu":
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def side_by_side(workers: int) -> Iterator[Run]:
    """A function like `map` whose calls run in `workers` threads without gradients, in order.

    Small networks on a CPU gain more from batches side by side, one thread each, than from several threads in each
    operation (1.6 times on two idle cores), and do not collapse on busy cores (20 times).
    """
    before = torch.get_num_threads()
    threads = max(1, before // workers)
    torch.set_num_threads(threads)
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
            yield lambda function, items: pool.map(torch.inference_mode()(function), items)
    finally:
        torch.set_num_threads(before)
