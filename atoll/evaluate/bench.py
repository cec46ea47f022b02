"""The evaluator: measures every variant on the same real images, prompts, noise, held-out latents and spaces."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from atoll.choices import Method
from atoll.condition import Condition, move_to
from atoll.ensemble import Ensemble
from atoll.errors import AtollError
from atoll.evaluate.metrics.agreement import CLIPScore, RidgeAgreement, pooled_vectors
from atoll.evaluate.metrics.cost import count_flops
from atoll.evaluate.metrics.diversity import Diversity, PerceptualDistance, build_distance, mean_distance
from atoll.evaluate.metrics.frechet import DenoisingError, Features, bias_warning, squared_errors
from atoll.evaluate.metrics.image_metrics import Statistics, image_metrics
from atoll.evaluate.reference import FORMAT, ReferenceData
from atoll.evaluate.store import ResultCache, TensorDict
from atoll.evaluate.types import CachePaths, EvaluateProgress, MapFunction, Reference, Results, Score, Space, Variant
from atoll.manifest import EvaluateSettings
from atoll.randomness import seeded_noise
from atoll.solver import sample

_COUNTED = 4  # images that are drawn to count operations


@dataclass(frozen=True)
class _Sampling:
    """How a variant's images are sampled."""

    steps: int
    method: Method
    guidance_scale: float
    grid: str | None = None

    def describe(self) -> dict[str, Any]:
        """Values that the images depend on; a grid only if it is not the default."""
        return {key: value for key, value in asdict(self).items() if value is not None}


# (tokens of B prompts, B seeds of noise) -> images [B, c, h, w]
_Draw = Callable[[Any, Sequence[int]], Tensor]


class Evaluator:
    """Measures one variant after the other.

    Args:
        reference: real images and held-out latents.
        settings: with a resolved precision.
        device: of the networks.
        paths: where results are cached.
        calls: network calls per velocity, summed over all variants; the progress counts them.
        progress: called after each batch.
        run: the parallel map of `side_by_side`.
        workers: threads of `run`.
    """

    def __init__(
        self,
        *,
        reference: Reference,
        settings: EvaluateSettings,
        device: torch.device,
        paths: CachePaths,
        calls: int,
        progress: EvaluateProgress | None,
        run: MapFunction,
        workers: int,
    ):
        # Real images: features of the base and of the probe, in every space.
        self.reference, self.settings, self.device, self.paths, self.run = reference, settings, device, paths, run
        self.real = ReferenceData(reference, settings, paths.path_for(reference.encoded.sha256))
        self.spaces, self.probe, self.captions = self.real.spaces, self.real.probe, self.real.captions
        self.base_statistics = self.real.statistics("base", run)
        self.probe_statistics = self.real.statistics("probe", run)
        # The denoising error needs its own latents.
        self.held_out = reference.held_out(settings)
        self.shape = reference.encoded.shape("latent")
        # Tokenise once, in this thread: an encoder may learn new words here.
        self.prompts = reference.encoder.tokenize(self.captions)
        self.held_out_tokens = reference.encoder.tokenize(reference.captions(self.held_out))
        # The metrics that compare images with their prompts, and with each other.
        self.vectors = self._vectors(self.captions[: settings.max_features])
        self.agreement = self._agreement()
        self.clip = CLIPScore.load(settings.clip["weights"]) if settings.clip else None
        self.distance: PerceptualDistance | None = None
        if settings.diversity:
            self.distance = build_distance(settings.diversity.feature)
        # The total of the progress, in network calls.
        drawn = len(self.probe) + (self._prompt_count * settings.diversity.images if settings.diversity else 0)
        per_call = drawn * settings.steps + len(self.held_out) * len(settings.levels)
        self._progress, self._total, self._done = progress, calls * per_call, 0
        self.workers = workers

    def _agreement(self) -> RidgeAgreement | None:
        """Fit the agreement in a network's first space, or else on pixels; None if all captions are equal."""
        # Without different captions, or with fewer than three images, there is nothing to fit.
        if len(set(self.captions)) < 2 or len(self.real.base) < 3:
            return None
        # Space 0 is that of the pixels; space 1, if there is one, is a network's.
        number = min(1, len(self.spaces) - 1)
        features, size = self.base_statistics[number].features, self.settings.batch
        # Regress caption vectors on the features of the base, batch by batch.
        vectors = self._vectors(self.reference.captions(self.real.base[: len(features)]))
        return RidgeAgreement.fit(self.spaces[number], zip(features.split(size), vectors.split(size), strict=True))

    def _vectors(self, captions: Sequence[str]) -> Tensor:
        """One vector per caption, [n, P], batch by batch: token states would fill the memory."""
        # Encode caption by caption, pool each, and drop the states.
        encoder, size = self.reference.encoder, self.settings.batch
        parts = (captions[start : start + size] for start in range(0, len(captions), size))
        return torch.cat([pooled_vectors(encoder.encode(encoder.tokenize(part))) for part in parts])

    def _agreement_of(self, statistics: Sequence[Statistics]) -> dict[str, float | None]:
        """The agreement of drawn images with their prompts, by its name; None if images diverged."""
        if self.agreement is None:
            return {}
        drawn = statistics[min(1, len(self.spaces) - 1)]
        # One diverged image makes the score of all images meaningless.
        if drawn.broken:
            return {self.agreement.name: None}
        # Only the images whose features are in memory, at most `max_features`.
        n = len(drawn.features)
        agreement = self.agreement.score(drawn.features, self.captions[:n], self.vectors[:n])
        return {self.agreement.name: agreement.r_precision}

    def score(self, variant: Variant) -> Score:
        """Measure one variant: metrics of its images, denoising error, speed and operations.

        Results are loaded from the cache where they exist, and computed and cached otherwise.
        """
        # How it is sampled: the variant's own values, or else the settings'.
        s = self.settings
        scale = s.guidance_scale if variant.guidance_scale is None else variant.guidance_scale
        sampling = _Sampling(variant.steps or s.steps, variant.method or s.method, scale, variant.grid)
        steps, times = sampling.steps, variant.times(sampling.steps)
        # Without an identity, results are cached for this evaluation only.
        directory = self.paths.path_for(variant.identity)
        # The key contains the sampling: a sweep caches each of its values.
        store = ResultCache(directory, self._describe_images(variant, sampling))

        # One batch of images, from seeded noise.
        def draw(tokens: Any, seeds: Sequence[int]) -> Tensor:
            condition = move_to(self.reference.encoder.encode(tokens), self.device)
            noise = seeded_noise(seeds, self.shape).to(self.device)
            velocity = _velocity_of(variant.ensemble, condition, scale)
            return self.reference.codec.decode(sample(velocity, noise, steps, sampling.method, times=times))

        # Images first, then everything else.
        statistics, clip, speed = self._images(variant, store, draw, steps)

        # Metrics of the images, by name.
        metrics = dict(self._metrics(statistics))
        if self.clip is not None:
            metrics[self.clip.name] = None if statistics[0].broken else clip
        metrics |= self._diversity(variant, store, draw, steps)
        # The denoising error and the operations do not depend on the images.
        errors = ResultCache(directory, self._describe_errors(variant))
        denoising = self._denoising(variant, errors)
        flops = float(store.part("flops", lambda: self._count_operations(draw))["flops"])
        # Only a permanent cache has keys that a report can refer to.
        permanent = directory == self.paths.store
        return Score(
            name=variant.name,
            description=variant.description,
            steps=steps,
            method=sampling.method,
            guidance_scale=scale,
            axes=variant.axes,
            metrics=metrics,
            diverged=statistics[0].broken,
            denoising=denoising,
            images_per_second=speed,
            gflops=flops / 1e9 if math.isfinite(flops) else None,
            key=store.key if permanent else "",
            errors_key=errors.key if permanent else "",
        )

    def _describe_images(self, variant: Variant, sampling: _Sampling) -> dict[str, Any]:
        """Everything that a variant's images and their metrics depend on: its hash is the cache's key."""
        diversity = self.settings.diversity
        return {
            "format": FORMAT,
            "variant": variant.identity or variant.name,
            **sampling.describe(),
            "levels": self.settings.levels,
            "bench": self.real.key,
            "spaces": [space.sha256 for space in self.spaces],
            "clip": self.clip.name if self.clip else None,
            "diversity": [self.distance.name, diversity.prompts, diversity.images]
            if self.distance and diversity
            else None,
        }

    def _describe_errors(self, variant: Variant) -> dict[str, Any]:
        """Everything that the errors depend on; not the sampling, so a sweep over steps and guidance shares them."""
        return {"format": FORMAT, "errors of": variant.identity or variant.name, "bench": self.real.key}

    def _images(
        self, variant: Variant, store: ResultCache, draw: _Draw, steps: int
    ) -> tuple[list[Statistics], float, float]:
        """Draw the probe's prompts. Returns (statistics in every space, mean CLIP score, images per second)."""

        def load_or_draw(numbered: tuple[int, Tensor]) -> TensorDict:
            # A batch is one cached part.
            number, rows = numbered

            # Draw one batch; keep its features, CLIP scores and seconds, not its images.
            def compute() -> TensorDict:
                # Time the drawing alone, without the feature networks.
                start = time.perf_counter()
                images = draw(self.prompts.index(rows), [self.settings.seed + row for row in rows.tolist()])
                seconds = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
                part = {**self.real.features(images.cpu()), "seconds": seconds}
                if self.clip is not None:
                    # CLIP reads the image with its own prompt.
                    part["clip"] = self.clip(images, [self.captions[row] for row in rows.tolist()])
                return part

            return store.part(f"images-{number:05d}", compute)

        # Sum up in the order of the batches, whichever is ready first.
        statistics = [Statistics(space.dim, self.settings.max_features) for space in self.spaces]
        clip = seconds = 0.0
        for part in self.run(load_or_draw, enumerate(torch.arange(len(self.probe)).split(self.settings.batch))):
            for number, sums in enumerate(statistics):
                sums.update(part[str(number)])
            # Seconds come from the cache too, so a resumed evaluation reports the same speed.
            seconds += float(part["seconds"])
            clip += float(part["clip"].sum()) if "clip" in part else 0.0
            self._report_progress(variant.name, len(part["0"]) * steps * variant.calls)
        # Batches run in parallel, so the speed counts all workers.
        return statistics, clip / len(self.probe), len(self.probe) / seconds * self.workers

    def _count_operations(self, draw: _Draw) -> TensorDict:
        """Floating-point operations of one image, as a part; NaN for experts that are not torch networks."""
        # A few images suffice: the operations per image hardly vary.
        numbers = torch.arange(min(_COUNTED, len(self.probe)))
        try:
            with torch.inference_mode():
                cost = count_flops(lambda: draw(self.prompts.index(numbers), numbers.tolist()), len(numbers)).flops
        # Without torch networks there is nothing to count.
        except AtollError:
            cost = math.nan
        return {"flops": torch.tensor([cost], dtype=torch.float64)}

    def _metrics(self, statistics: Sequence[Statistics]) -> Iterator[tuple[str, float | None]]:
        """(name, value) of every metric in every space, then the agreement with the prompts."""
        sides = zip(self.spaces, self.base_statistics, statistics, self.real.published, strict=True)
        # Distances to the base, and to published statistics if there are any.
        for space, real, drawn, published in sides:
            yield from image_metrics(space, real, drawn, published).items()
        yield from self._agreement_of(statistics).items()

    @property
    def _prompt_count(self) -> int:
        """Prompts for diversity: distinct captions of the probe."""
        diversity = self.settings.diversity
        return min(diversity.prompts, len(set(self.captions))) if diversity else 0

    def _diversity(self, variant: Variant, store: ResultCache, draw: _Draw, steps: int) -> dict[str, float | None]:
        """HDDM's diversity: the mean over prompts of the mean distance, and the standard deviation."""
        if self.distance is None or self.settings.diversity is None:
            return {}
        # Each prompt several times, with the same noise for all prompts.
        distance, count = self.distance, self.settings.diversity.images
        prompts = list(dict.fromkeys(self.captions))[: self._prompt_count]
        # Rows of one prompt are adjacent.
        tokens = self.reference.encoder.tokenize([prompt for prompt in prompts for _ in range(count)])

        def load_or_draw(prompt: int) -> TensorDict:
            def compute() -> TensorDict:
                # One prompt is one cached part.
                rows = torch.arange(prompt * count, (prompt + 1) * count)
                images = draw(tokens.index(rows), range(self.settings.seed, self.settings.seed + count)).cpu()
                return {"distance": torch.tensor([mean_distance(distance, images)], dtype=torch.float64)}

            return store.part(f"diversity-{prompt:05d}", compute)

        # Mean and spread over the prompts.
        means = []
        for part in self.run(load_or_draw, range(len(prompts))):
            means.append(float(part["distance"]))
            self._report_progress(variant.name, count * steps * variant.calls)
        # Diverged images give NaN, which the report shows as missing.
        summary = Diversity.of(means)
        return {distance.name: _number(summary.mean), f"std of {distance.name}": _number(summary.std)}

    def _denoising(self, variant: Variant, store: ResultCache) -> DenoisingError:
        """The velocity's error on the held-out latents, without guidance."""

        def load_or_compute(numbered: tuple[int, Tensor]) -> TensorDict:
            # Positions within the held-out rows; `rows` are those of the data set.
            number, positions = numbered

            # The noise depends on the data's row only: every variant denoises the same latents.
            def compute() -> TensorDict:
                rows = self.held_out[positions]
                condition = move_to(self.reference.encoder.encode(self.held_out_tokens.index(positions)), self.device)
                x0 = self.reference.latents(rows).to(self.device)
                seeds = [self.settings.seed + row for row in rows.tolist()]
                levels = self.settings.levels
                return {"errors": squared_errors(variant.ensemble.velocity, x0, condition, levels, seeds)}

            return store.part(f"errors-{number:05d}", compute)

        # Join the batches in order.
        parts = []
        for part in self.run(load_or_compute, enumerate(torch.arange(len(self.held_out)).split(self.settings.batch))):
            parts.append(part["errors"].cpu())
            self._report_progress(variant.name, parts[-1].numel() * variant.calls)
        return DenoisingError.of(self.settings.levels, torch.cat(parts))

    def _report_progress(self, what: str, calls: int) -> None:
        """Add network calls to the progress; the estimated total is its upper limit."""
        # Cached batches count too, so a resumed evaluation reaches the total.
        self._done += calls
        if self._progress is not None:
            self._progress(min(self._done, self._total), self._total, what)

    def results(self, scores: tuple[Score, ...]) -> Results:
        """Combine scores with what all variants share: spaces, counts, the real images' metrics, warnings."""
        # Warn about every Fréchet distance from too few images, ours or published.
        n, m = len(self.probe), len(self.real.base)
        # The smaller side of each distance determines its bias.
        counts: list[tuple[Features, float]] = [(space, m) for space in self.spaces]
        sides = zip(self.spaces, self.real.published, strict=True)
        counts += [(space, published.count) for space, published in sides if published is not None]
        warned = [(space, bias_warning(n, count, space.dim)) for space, count in counts]
        # A warning appears once per space.
        notes = dict.fromkeys(f"{space.name}: {warning}" for space, warning in warned if warning is not None)
        return Results(
            spaces=tuple(Space(space.name, space.dim, space.sha256, space.explained) for space in self.spaces),
            images=n,
            reference=m,
            held_out=len(self.held_out),
            real=dict(self._metrics(self.probe_statistics)),
            workers=self.workers,
            bench=self.real.key,
            notes=tuple(notes),
            scores=scores,
        )


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _velocity_of(
    ensemble: Ensemble, condition: tuple[Condition, ...], scale: float
) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, t: ensemble.velocity(x, t, condition, scale)
