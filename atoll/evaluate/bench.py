"""What all variants are measured on: equal real images, prompts, noise and held-out latents, in equal spaces."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from atoll.choices import Method
from atoll.condition import Condition, Conditions
from atoll.ensemble import Ensemble
from atoll.errors import AtollError
from atoll.evaluate.metrics.agreement import CLIPScore, RidgeAgreement, pooled_vectors
from atoll.evaluate.metrics.cost import count_flops
from atoll.evaluate.metrics.diversity import Diversity, PerceptualDistance, build_distance, mean_distance
from atoll.evaluate.metrics.frechet import DenoisingError, Features, bias_warning, squared_errors
from atoll.evaluate.metrics.image_metrics import Statistics, image_metrics
from atoll.evaluate.reference import FORMAT, ReferenceData
from atoll.evaluate.store import ResultCache, TensorDict
from atoll.evaluate.types import EvaluateProgress, MapFunction, Places, Reference, Results, Score, Space, Variant
from atoll.manifest import EvaluateSettings
from atoll.randomness import seeded_noise
from atoll.solver import sample

_COUNTED = 4  # images drawn to count their operations


@dataclass(frozen=True)
class _How:
    """How a variant's images are drawn."""

    steps: int
    method: Method
    guidance_scale: float
    grid: str | None = None

    def about(self) -> dict[str, Any]:
        """What its images depend on, with nothing said of what is usual."""
        return {key: value for key, value in asdict(self).items() if value is not None}


# (tokens of B prompts, B seeds of noise) -> images [B, c, h, w]
_Draw = Callable[[Any, Sequence[int]], Tensor]


class Evaluator:
    """Measures one variant after the other.

    Args:
        places: where what is measured is kept.
        calls: of all variants together, for the progress.
        run: of `side_by_side`, with so many workers.
    """

    def __init__(
        self,
        reference: Reference,
        settings: EvaluateSettings,
        device: torch.device,
        places: Places,
        calls: int,
        progress: EvaluateProgress | None,
        run: MapFunction,
        workers: int,
    ):
        self.reference, self.settings, self.device, self.places, self.run = reference, settings, device, places, run
        self.real = ReferenceData(reference, settings, places.of(reference.encoded.sha256))
        self.spaces, self.probe, self.captions = self.real.spaces, self.real.probe, self.real.captions
        self.base_statistics = self.real.statistics("base", run)
        self.probe_statistics = self.real.statistics("probe", run)
        self.held_out = reference.held_out(settings)
        self.shape = reference.encoded.shape("latent")
        # Tokenised once: an encoder may learn new words here, which is not for several threads at a time.
        self.prompts = reference.encoder.tokenize(self.captions)
        self.held_out_tokens = reference.encoder.tokenize(reference.captions(self.held_out))
        self.vectors = self._vectors(self.captions[: settings.max_features])
        self.agreement = self._agreement()
        self.clip = CLIPScore.load(settings.clip["weights"]) if settings.clip else None
        self.distance: PerceptualDistance | None = None
        if settings.diversity:
            self.distance = build_distance(settings.diversity.feature)
        drawn = len(self.probe) + (self._diverse * settings.diversity.images if settings.diversity else 0)
        per_call = drawn * settings.steps + len(self.held_out) * len(settings.levels)
        self._progress, self._total, self._done = progress, calls * per_call, 0
        self.workers = workers

    def _agreement(self) -> RidgeAgreement | None:
        """Fitted in the first space of a network, or else on the pixels; None where there is nothing to tell apart."""
        if len(set(self.captions)) < 2 or len(self.real.base) < 3:
            return None
        number = min(1, len(self.spaces) - 1)
        features, size = self.base_statistics[number].features, self.settings.batch
        vectors = self._vectors(self.reference.captions(self.real.base[: len(features)]))
        return RidgeAgreement.fit(self.spaces[number], zip(features.split(size), vectors.split(size), strict=True))

    def _vectors(self, captions: Sequence[str]) -> Tensor:
        """One vector per caption, [n, P]; its token states are not kept."""
        encoder, size = self.reference.encoder, self.settings.batch
        parts = (captions[start : start + size] for start in range(0, len(captions), size))
        return torch.cat([pooled_vectors(encoder.encode(encoder.tokenize(part))) for part in parts])

    def _agreement_of(self, statistics: Sequence[Statistics]) -> dict[str, float | None]:
        if self.agreement is None:
            return {}
        found = statistics[min(1, len(self.spaces) - 1)]
        if found.broken:
            return {self.agreement.name: None}
        n = len(found.features)
        agreement = self.agreement.score(found.features, self.captions[:n], self.vectors[:n])
        return {self.agreement.name: agreement.r_precision}

    # A variant.

    def score(self, variant: Variant) -> Score:
        s = self.settings
        scale = s.guidance_scale if variant.guidance_scale is None else variant.guidance_scale
        how = _How(variant.steps or s.steps, variant.method or s.method, scale, variant.grid)
        store = ResultCache(self.places.of(variant.identity), self._about_variant(variant, how))

        def draw(tokens: Any, seeds: Sequence[int]) -> Tensor:
            condition = self.reference.encoder.encode(tokens).to(self.device)
            noise = seeded_noise(seeds, self.shape).to(self.device)
            velocity = _bound(variant.ensemble, condition, scale)
            return self.reference.codec.decode(
                sample(velocity, noise, how.steps, how.method, times=variant.times(how.steps))
            )

        def counted() -> TensorDict:
            numbers = torch.arange(min(_COUNTED, len(self.probe)))
            try:
                with torch.inference_mode():
                    cost = count_flops(lambda: draw(self.prompts.index(numbers), numbers.tolist()), len(numbers)).flops
            except AtollError:  # experts that are no networks of torch
                cost = math.nan
            return {"flops": torch.tensor([cost], dtype=torch.float64)}

        statistics, clip, speed = self._images(variant, store, draw, how.steps)
        metrics = dict(self._metrics(statistics))
        if self.clip is not None:
            metrics[self.clip.name] = None if statistics[0].broken else clip
        metrics |= self._diversity(variant, store, draw, how.steps)
        errors = ResultCache(self.places.of(variant.identity), self._about_errors(variant))
        denoising = self._denoising(variant, errors)
        flops = float(store.part("flops", counted)["flops"])
        kept = self.places.of(variant.identity) == self.places.store
        return Score(
            name=variant.name,
            made_by=variant.made_by,
            steps=how.steps,
            method=how.method,
            guidance_scale=scale,
            axes=variant.axes,
            metrics=metrics,
            diverged=statistics[0].broken,
            denoising=denoising,
            images_per_second=speed,
            gflops=flops / 1e9 if math.isfinite(flops) else None,
            key=store.key if kept else "",
            errors_key=errors.key if kept else "",
        )

    def _about_variant(self, variant: Variant, how: _How) -> dict[str, Any]:
        diversity = self.settings.diversity
        return {
            "format": FORMAT,
            "variant": variant.identity or variant.name,
            **how.about(),
            "levels": self.settings.levels,
            "bench": self.real.key,
            "spaces": [space.sha256 for space in self.spaces],
            "clip": self.clip.name if self.clip else None,
            "diversity": [self.distance.name, diversity.prompts, diversity.images]
            if self.distance and diversity
            else None,
        }

    def _about_errors(self, variant: Variant) -> dict[str, Any]:
        """Not of how images are drawn: a sweep over steps and guidance measures these errors once."""
        return {"format": FORMAT, "errors of": variant.identity or variant.name, "bench": self.real.key}

    def _images(
        self, variant: Variant, store: ResultCache, draw: _Draw, steps: int
    ) -> tuple[list[Statistics], float, float]:
        """(statistics in every space, mean CLIP score, images per second)."""

        def make(numbered: tuple[int, Tensor]) -> TensorDict:
            number, rows = numbered

            def drawn() -> TensorDict:
                start = time.perf_counter()
                images = draw(self.prompts.index(rows), [self.settings.seed + row for row in rows.tolist()])
                seconds = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
                part = {**self.real.seen(images.cpu()), "seconds": seconds}
                if self.clip is not None:
                    part["clip"] = self.clip(images, [self.captions[row] for row in rows.tolist()])
                return part

            return store.part(f"images-{number:05d}", drawn)

        statistics = [Statistics(space.dim, self.settings.max_features) for space in self.spaces]
        clip = seconds = 0.0
        for part in self.run(make, enumerate(torch.arange(len(self.probe)).split(self.settings.batch))):
            for number, found in enumerate(statistics):
                found.update(part[str(number)])
            seconds += float(part["seconds"])
            clip += float(part["clip"].sum()) if "clip" in part else 0.0
            self._tell(variant.name, len(part["0"]) * steps * variant.calls)
        return statistics, clip / len(self.probe), len(self.probe) / seconds * self.workers

    def _metrics(self, statistics: Sequence[Statistics]) -> Iterator[tuple[str, float | None]]:
        sides = zip(self.spaces, self.base_statistics, statistics, self.real.published, strict=True)
        for space, real, drawn, published in sides:
            yield from image_metrics(space, real, drawn, published).items()
        yield from self._agreement_of(statistics).items()

    @property
    def _diverse(self) -> int:
        """Prompts that diversity is measured on: distinct captions of the probe."""
        asked = self.settings.diversity
        return min(asked.prompts, len(set(self.captions))) if asked else 0

    def _diversity(self, variant: Variant, store: ResultCache, draw: _Draw, steps: int) -> dict[str, float | None]:
        """HDDM: the mean over prompts, and their standard deviation."""
        if self.distance is None or self.settings.diversity is None:
            return {}
        distance, count = self.distance, self.settings.diversity.images
        prompts = list(dict.fromkeys(self.captions))[: self._diverse]
        tokens = self.reference.encoder.tokenize([prompt for prompt in prompts for _ in range(count)])

        def make(prompt: int) -> TensorDict:
            def drawn() -> TensorDict:
                rows = torch.arange(prompt * count, (prompt + 1) * count)
                images = draw(tokens.index(rows), range(self.settings.seed, self.settings.seed + count)).cpu()
                return {"distance": torch.tensor([mean_distance(distance, images)], dtype=torch.float64)}

            return store.part(f"diversity-{prompt:05d}", drawn)

        means = []
        for part in self.run(make, range(len(prompts))):
            means.append(float(part["distance"]))
            self._tell(variant.name, count * steps * variant.calls)
        found = Diversity.of(means)
        return {distance.name: _number(found.mean), f"std of {distance.name}": _number(found.std)}

    def _denoising(self, variant: Variant, store: ResultCache) -> DenoisingError:
        def make(numbered: tuple[int, Tensor]) -> TensorDict:
            number, numbers = numbered

            def errors() -> TensorDict:
                rows = self.held_out[numbers]
                condition = self.reference.encoder.encode(self.held_out_tokens.index(numbers)).to(self.device)
                x0 = self.reference.latents(rows).to(self.device)
                seeds = [self.settings.seed + row for row in rows.tolist()]
                levels = self.settings.levels
                return {"errors": squared_errors(variant.ensemble.velocity, x0, condition, levels, seeds)}

            return store.part(f"errors-{number:05d}", errors)

        parts = []
        for part in self.run(make, enumerate(torch.arange(len(self.held_out)).split(self.settings.batch))):
            parts.append(part["errors"].cpu())
            self._tell(variant.name, parts[-1].numel() * variant.calls)
        return DenoisingError.of(self.settings.levels, torch.cat(parts))

    def _tell(self, what: str, calls: int) -> None:
        self._done += calls
        if self._progress is not None:
            self._progress(min(self._done, self._total), self._total, what)

    def results(self, scores: tuple[Score, ...]) -> Results:
        n, m = len(self.probe), len(self.real.base)
        counts: list[tuple[Features, float]] = [(space, m) for space in self.spaces]
        sides = zip(self.spaces, self.real.published, strict=True)
        counts += [(space, given.count) for space, given in sides if given is not None]
        warned = [(space, bias_warning(n, count, space.dim)) for space, count in counts]
        notes = dict.fromkeys(f"{space.name}: {said}" for space, said in warned if said is not None)
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


def _bound(ensemble: Ensemble, condition: Condition | Conditions, scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, t: ensemble.velocity(x, t, condition, scale)
