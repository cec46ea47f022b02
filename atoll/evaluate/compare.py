"""Two evaluated models side by side, with the paired difference of each number: `atoll compare A B`.

Both drew the same prompts from the same noise and denoised the same latents. Differences are taken image by image, so
whatever both have in common (an easy prompt, a hard latent) cancels.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from atoll.errors import AtollError
from atoll.evaluate.metrics.frechet import frechet_distance, metric_name
from atoll.evaluate.metrics.image_metrics import Statistics, image_metrics, kind_of
from atoll.evaluate.store import load_parts
from atoll.evaluate.types import Space
from atoll.storage.artifact import read_json
from atoll.storage.layout import RunLayout

GROUPS = 20  # of images; the jackknife leaves out one group at a time
T_95 = 2.093  # Student's t at 97.5 %, with 19 degrees of freedom
_JACKKNIFED = 4096  # up to this many images, every metric gets an interval; beyond, only the Fréchet distance


@dataclass(frozen=True)
class EvaluatedVariant:
    """One variant of one evaluated run.

    Attributes:
        title: DIRECTORY:VARIANT.
        report: content of report.json.
        score: the variant's score in it.
        store: directory of the evaluation's cached parts.
    """

    title: str
    report: dict[str, Any]
    score: dict[str, Any]
    store: Path

    @property
    def bench(self) -> str:
        """Key of the real data that the variant was measured on; equal keys make variants comparable."""
        return str(self.report["results"]["bench"])

    def features(self, space: int) -> Tensor:
        """Features [n, D] of the drawn images in the space with this number."""
        parts = load_parts(self._cached(self.score["key"]), "images")
        return torch.cat([part[str(space)] for part in parts])

    def prompts(self) -> list[int]:
        """One number per image [n]; equal for equal prompts."""
        # The prompts belong to the reference data, not to a variant.
        (part,) = load_parts(self._cached(self.bench), "prompts")
        return part["number"].tolist()

    def errors(self) -> Tensor:
        """|u - (eps - x0)|^2 on the held-out latents by level, [n, M]."""
        return torch.cat([part["errors"] for part in load_parts(self._cached(self.score["errors_key"]), "errors")])

    def diversity(self) -> Tensor | None:
        """Mean distance between the images of each prompt, [P]; None if it was not measured."""
        # The evaluation measures diversity only if its settings name a distance.
        parts = load_parts(self._cached(self.score["key"]), "diversity")
        return torch.cat([part["distance"] for part in parts]) if parts else None

    def grid(self) -> Tensor | None:
        """The report's images of this variant, [P, S, c, h, w]; None if the report does not show it."""
        key = self.report["grid"]["keys"].get(self.score["name"])
        if key is None:
            return None
        # Images are cached as one axis: prompts, then seeds.
        (part,) = load_parts(self._cached(key), "grid")
        value: Tensor | None = part["images"].unflatten(
            0, (len(self.report["grid"]["prompts"]), len(self.report["grid"]["seeds"]))
        )
        return value

    def _cached(self, key: Any) -> Path:
        """Return the directory of a cached measurement. Raises AtollError for a key that would lead elsewhere."""
        if not re.fullmatch(r"[0-9a-f]{16}", str(key)):
            raise AtollError(f"{self.title}: {key!r:.60} is no key of a cached result; run `atoll evaluate` again")
        return self.store / str(key)


@dataclass(frozen=True)
class Difference:
    """One number of both.

    Attributes:
        half_width: half of the 95 % confidence interval of b - a; None if not estimated.
    """

    name: str
    a: float | None
    b: float | None
    half_width: float | None

    @property
    def difference(self) -> float | None:
        """b - a; None if either is missing."""
        return None if self.a is None or self.b is None else self.b - self.a

    @property
    def significant(self) -> bool:
        """True if the interval excludes 0."""
        return self.difference is not None and self.half_width is not None and abs(self.difference) > self.half_width


def open_evaluated(named: str) -> EvaluatedVariant:
    """Open the evaluated variant `DIRECTORY` or `DIRECTORY:VARIANT`; by default the ensemble with its own routing.

    Raises:
        AtollError: the run is not evaluated, or by an older version, or without cached parts, or has no such variant.
    """
    # The report.
    directory, _, variant = named.partition(":")
    file = RunLayout(Path(directory)).report_json
    if not file.is_file():
        raise AtollError(f"{file}: not found; run `atoll evaluate --run {directory}`")
    report = read_json(file)
    try:
        if "bench" not in report.get("results", {}):
            raise AtollError(f"{file}: written by an older version; run `atoll evaluate --run {directory}` again")
        # The variant's score in it.
        scores = {score["name"]: score for score in report["results"]["scores"]}
        # Without a name, take the variant that a user samples by default.
        variant = variant or _default(report)
        # Where its cached results are, so that a wrong type is noticed here.
        store, key = Path(directory) / report["store"], str(scores[variant]["key"] or "") if variant in scores else ""
    except (AttributeError, IndexError, KeyError, TypeError):
        raise AtollError(
            f"{file}: is no report that `atoll evaluate` writes; run `atoll evaluate --run {directory}` again"
        ) from None
    if variant not in scores:
        raise AtollError(f"{file}: no variant {variant!r}; expected one of {', '.join(scores)}")
    # The cached features and errors.
    evaluated = EvaluatedVariant(f"{directory}:{variant}", report, scores[variant], store)
    if not key or not evaluated._cached(key).is_dir():
        raise AtollError(f"{store}: no cached results for {variant}; run `atoll evaluate --run {directory}` again")
    return evaluated


def _default(report: dict[str, Any]) -> str:
    """The ensemble with its own routing, or else the first variant of the report."""
    # A sweep may not contain the default routing.
    routed = report.get("routing", "")
    names = [name for group in ("ensemble", "sweep", "monolith") for name in report["groups"].get(group, ())]
    value: str = routed if routed in names else names[0]
    return value


def differences(a: EvaluatedVariant, b: EvaluatedVariant) -> list[Difference]:
    """The difference of every number of both.

    Raises:
        AtollError: they were measured on different data, prompts or spaces, or with other settings.
    """
    _check_comparable(a, b)
    # Metrics of features by the jackknife; diversity by paired differences of prompts.
    half_widths: dict[str, float | None] = dict(_half_widths(a, b))
    one, two = a.diversity(), b.diversity()
    if one is not None and two is not None:
        half_widths |= {
            name: paired_half_width(two - one) for name in a.score["metrics"] if kind_of(name) == "diversity"
        }
    # A standard deviation gets no interval: the pairs estimate the mean.
    result = [
        Difference(name, value, b.score["metrics"][name], None if name.startswith("std") else half_widths.get(name))
        for name, value in a.score["metrics"].items()
    ]
    # The denoising error by paired differences of latents; cost and speed without an interval.
    one, two = a.errors().double().mean(1), b.errors().double().mean(1)
    result.append(Difference("denoising error", float(one.mean()), float(two.mean()), paired_half_width(two - one)))
    result += [Difference(name, a.score[key], b.score[key], None)
              for name, key in (("GFLOPs", "gflops"), ("images/s", "images_per_second"))]  # fmt: skip
    return result


def _check_comparable(a: EvaluatedVariant, b: EvaluatedVariant) -> None:
    """Raise AtollError if the data, the settings or the metrics differ."""
    # Equal keys: equal images, prompts, noise and settings.
    if a.bench != b.bench:
        # List the values that differ.
        one, two = (read_json(side.store / side.bench / "about.json") for side in (a, b))
        other = [f"{key} {one.get(key)} and {two.get(key)}" for key in one if one.get(key) != two.get(key)]
        raise AtollError(
            f"{a.title} and {b.title} were measured on different data ({'; '.join(other)[:300]}); evaluate both on "
            "the same data with the same `evaluate` section"
        )
    # Equal metrics: equal feature networks.
    if list(a.score["metrics"]) != list(b.score["metrics"]):
        raise AtollError(
            f"{a.title} has {', '.join(a.score['metrics'])}, {b.title} has {', '.join(b.score['metrics'])}: metrics of "
            "different networks are not comparable; evaluate both with the same `evaluate` section"
        )


def _half_widths(a: EvaluatedVariant, b: EvaluatedVariant) -> dict[str, float]:
    """Half widths of the metrics that are computed from features, by name."""
    half_widths: dict[str, float] = {}
    for number, space in enumerate(a.report["results"]["spaces"]):
        # Skip diverged images: they have no metrics.
        real = torch.cat([part[str(number)] for part in load_parts(a.store / a.bench, "base")])
        one, two = a.features(number), b.features(number)
        if not bool(torch.isfinite(one).all() and torch.isfinite(two).all()):
            continue
        # With many images, manifolds and kernels would take too long.
        named = Space(**space)
        every_metric = max(len(one), len(real)) <= _JACKKNIFED
        measure = partial(_metrics, named, Statistics.of(named.dim, len(real), [real]), every_metric)
        # Both sides leave out the same images, so the difference is paired.
        half_widths |= jackknife(partial(_difference, measure, one, two), len(one))
    return half_widths


def _metrics(space: Space, real: Statistics, every_metric: bool, drawn: Tensor) -> dict[str, float]:
    """All metrics of drawn features, or only the Fréchet distance."""
    # Features in memory are enough to recompute every metric.
    statistics = Statistics.of(space.dim, len(drawn), [drawn])
    if not every_metric:
        return {metric_name("FD", space): frechet_distance(statistics.moments, real.moments)}
    return {name: value for name, value in image_metrics(space, real, statistics).items() if value is not None}


def _difference(measure: Callable[[Tensor], dict[str, float]], a: Tensor, b: Tensor, rows: Tensor) -> dict[str, float]:
    """The difference b - a of every metric, on the images in `rows`."""
    # The same rows on both sides: equal prompts and equal noise.
    one, two = measure(a[rows]), measure(b[rows])
    return {name: value - one[name] for name, value in two.items()}


def jackknife(difference: Callable[[Tensor], dict[str, float]], count: int) -> dict[str, float]:
    """Half widths of 95 % intervals, from leaving out one of 20 groups of images at a time.

    The delete-a-group jackknife (Quenouille 1956, Tukey 1958): the variance is (G - 1)/G sum (d_g - mean d)^2, and the
    interval is Student's with G - 1 degrees of freedom. A bias that does not depend on the group, such as the Fréchet
    distance's in the number of images, is equal on both sides and cancels.

    Args:
        difference: computes the differences on the images with the given numbers.
        count: of images.

    Returns:
        The half width of each difference, by its name.
    """
    # The differences without each group; image i is in group i % G.
    groups = torch.arange(count) % min(GROUPS, count)
    values_without = [difference((groups != group).nonzero().flatten()) for group in range(min(GROUPS, count))]
    # One series of G values per difference.
    values = {
        name: torch.tensor([one[name] for one in values_without], dtype=torch.float64) for name in values_without[0]
    }
    # The variance of the difference, from the spread between them.
    scale = (len(values_without) - 1) / len(values_without)
    return {
        name: T_95 * math.sqrt(scale * float((value - value.mean()).square().sum())) for name, value in values.items()
    }


def paired_half_width(differences: Tensor) -> float | None:
    """Half the width of the 95 % interval of a mean of paired differences [n]; None for fewer than two."""
    # One difference has no spread.
    if len(differences) < 2:
        return None
    return 1.96 * float(differences.double().std()) / math.sqrt(len(differences))


def likeness(a: EvaluatedVariant, b: EvaluatedVariant) -> tuple[float, float]:
    """Similarity of images from the same noise: (their mean correlation, the mean correlation across other noise).

    The correlation is a cosine on the pixels' principal components, around the data's mean. The second number pairs
    each image with the next one of the same prompt (of any prompt if there is no other): the similarity that the
    prompt alone explains. DDM's sanity check: from equal noise with a deterministic sampler, ensemble and monolith draw
    similar images.
    """
    one, two = a.features(0), b.features(0)
    # Row i of both comes from the same noise and prompt.
    same = F.cosine_similarity(one, two).mean()
    prompts = a.prompts()
    return float(same), float(F.cosine_similarity(one, two[_next_of_prompt(prompts)]).mean())


def _next_of_prompt(prompts: Sequence[int]) -> Tensor:
    """For each image, the number of the next one of the same prompt, or of the next one if there is no other."""
    # The images of each prompt.
    members: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        members.setdefault(prompt, []).append(number)
    # By default the next image, cyclically.
    after = [(number + 1) % len(prompts) for number in range(len(prompts))]
    # Within a prompt, the images form a ring.
    for same in members.values():
        if len(same) > 1:
            for place, number in enumerate(same):
                after[number] = same[(place + 1) % len(same)]
    return torch.tensor(after)
