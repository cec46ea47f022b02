"""Two evaluated models side by side, with the paired difference of each number: `atoll compare A B`.

Both were asked for the same prompts from the same noise, and denoised the same latents: differences are taken image
by image, so that what both have in common (an easy prompt, a hard latent) cancels.
"""

import math
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

GROUPS = 20  # of images, of which the jackknife leaves out one after the other
T_95 = 2.093  # Student's t at 97.5 %, of 19 degrees of freedom
_JACKKNIFED = 4096  # images at most for which all metrics get an interval; of more, the Fréchet distance alone


@dataclass(frozen=True)
class Measured:
    """One variant of one evaluated run: its name, score and grid as report.json has them, and where its parts are."""

    title: str
    report: dict[str, Any]
    score: dict[str, Any]
    store: Path

    @property
    def bench(self) -> str:
        return str(self.report["results"]["bench"])

    def features(self, space: int) -> Tensor:
        """[n, D] in the space of this number."""
        parts = load_parts(self.store / self.score["key"], "images")
        return torch.cat([part[str(space)] for part in parts])

    def prompts(self) -> list[int]:
        """[n]: equal numbers for equal prompts."""
        (part,) = load_parts(self.store / self.bench, "prompts")
        return part["number"].tolist()

    def errors(self) -> Tensor:
        """|u - (eps - x0)|^2 of the held-out latents by level, [n, M]."""
        return torch.cat([part["errors"] for part in load_parts(self.store / self.score["errors_key"], "errors")])

    def diversity(self) -> Tensor | None:
        """Mean distance between the images of each prompt, [P]; None where it was not measured."""
        parts = load_parts(self.store / self.score["key"], "diversity")
        return torch.cat([part["distance"] for part in parts]) if parts else None

    def grid(self) -> Tensor | None:
        """[P, S, c, h, w]; None where the report shows none of it."""
        key = self.report["grid"]["keys"].get(self.score["name"])
        if key is None:
            return None
        (part,) = load_parts(self.store / key, "grid")
        return part["images"].unflatten(0, (len(self.report["grid"]["prompts"]), len(self.report["grid"]["seeds"])))


@dataclass(frozen=True)
class Difference:
    """A number of both, b - a, and the half width of its 95 % confidence interval (None: not estimated)."""

    name: str
    a: float | None
    b: float | None
    half: float | None

    @property
    def difference(self) -> float | None:
        return None if self.a is None or self.b is None else self.b - self.a

    @property
    def tells(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.difference is not None and self.half is not None and abs(self.difference) > self.half


def open_measured(named: str) -> Measured:
    """What `DIRECTORY` or `DIRECTORY:VARIANT` names; the variant's default is the ensemble as it is routed.

    Raises:
        AtollError: it was not evaluated, by an older version, without keeping its parts, or has no such variant.
    """
    directory, _, variant = named.partition(":")
    file = Path(directory) / "report.json"
    if not file.is_file():
        raise AtollError(f"{file}: not found; `atoll evaluate --run {directory}` makes it")
    report = read_json(file)
    if "bench" not in report.get("results", {}):
        raise AtollError(f"{file}: is of an older version; `atoll evaluate --run {directory}` makes it anew")
    scores = {score["name"]: score for score in report["results"]["scores"]}
    variant = variant or _default(report)
    if variant not in scores:
        raise AtollError(f"{file}: has no variant {variant!r}; expected one of {', '.join(scores)}")
    store = Path(directory) / report["store"]
    if not scores[variant]["key"] or not (store / scores[variant]["key"]).is_dir():
        raise AtollError(f"{store}: lacks what was measured of {variant}; `atoll evaluate --run {directory}` again")
    return Measured(f"{directory}:{variant}", report, scores[variant], store)


def _default(report: dict[str, Any]) -> str:
    routed = report.get("routing", "")
    names = [name for group in ("ensemble", "sweep", "monolith") for name in report["groups"].get(group, ())]
    return routed if routed in names else names[0]


def differences(a: Measured, b: Measured) -> list[Difference]:
    """Every number of both.

    Raises:
        AtollError: they were measured on different data, prompts, spaces or with other settings.
    """
    _check_alike(a, b)
    halves: dict[str, float | None] = dict(_halves(a, b))
    one, two = a.diversity(), b.diversity()
    if one is not None and two is not None:
        halves |= {name: paired_half(two - one) for name in a.score["metrics"] if kind_of(name) == "diversity"}
    found = [
        Difference(name, value, b.score["metrics"][name], None if name.startswith("std") else halves.get(name))
        for name, value in a.score["metrics"].items()
    ]
    one, two = a.errors().double().mean(1), b.errors().double().mean(1)
    found.append(Difference("denoising error", float(one.mean()), float(two.mean()), paired_half(two - one)))
    found += [Difference(name, a.score[key], b.score[key], None)
              for name, key in (("GFLOPs", "gflops"), ("images/s", "images_per_second"))]  # fmt: skip
    return found


def _check_alike(a: Measured, b: Measured) -> None:
    if a.bench != b.bench:
        one, two = (read_json(side.store / side.bench / "about.json") for side in (a, b))
        other = [f"{key} {one.get(key)} and {two.get(key)}" for key in one if one.get(key) != two.get(key)]
        raise AtollError(
            f"{a.title} and {b.title} were measured on different things ({'; '.join(other)[:300]}); evaluate both on "
            "the same data with the same `evaluate` section"
        )
    if list(a.score["metrics"]) != list(b.score["metrics"]):
        raise AtollError(
            f"{a.title} has {', '.join(a.score['metrics'])}, {b.title} has {', '.join(b.score['metrics'])}: numbers of "
            "different networks do not stand in one column; evaluate both with the same `evaluate` section"
        )


def _halves(a: Measured, b: Measured) -> dict[str, float]:
    """Of what is computed from features, by its name."""
    found: dict[str, float] = {}
    for number, space in enumerate(a.report["results"]["spaces"]):
        real = torch.cat([part[str(number)] for part in load_parts(a.store / a.bench, "base")])
        one, two = a.features(number), b.features(number)
        if not bool(torch.isfinite(one).all() and torch.isfinite(two).all()):
            continue  # diverged: there is nothing to compare
        named = Space(**space)
        whole = max(len(one), len(real)) <= _JACKKNIFED
        measure = partial(_metrics, named, Statistics.of(named.dim, len(real), [real]), whole)
        found |= jackknife(partial(_difference, measure, one, two), len(one))
    return found


def _metrics(space: Space, real: Statistics, whole: bool, drawn: Tensor) -> dict[str, float]:
    statistics = Statistics.of(space.dim, len(drawn), [drawn])
    if not whole:
        return {metric_name("FD", space): frechet_distance(statistics.moments, real.moments)}
    return {name: value for name, value in image_metrics(space, real, statistics).items() if value is not None}


def _difference(measure: Callable[[Tensor], dict[str, float]], a: Tensor, b: Tensor, rows: Tensor) -> dict[str, float]:
    one, two = measure(a[rows]), measure(b[rows])
    return {name: value - one[name] for name, value in two.items()}


def jackknife(difference: Callable[[Tensor], dict[str, float]], count: int) -> dict[str, float]:
    """Half widths of 95 % intervals, by leaving out one of 20 groups of the images after the other.

    The delete-a-group jackknife (Quenouille 1956, Tukey 1958): its variance is (G - 1)/G sum (d_g - mean d)^2, and its
    interval Student's with G - 1 degrees of freedom. A bias that does not depend on the group, as that of the Fréchet
    distance in the number of images, is the same on both sides and cancels.

    Args:
        difference: of the images with the numbers that it is given.
        count: of images.
    """
    groups = torch.arange(count) % min(GROUPS, count)
    found = [difference((groups != group).nonzero().flatten()) for group in range(min(GROUPS, count))]
    values = {name: torch.tensor([one[name] for one in found], dtype=torch.float64) for name in found[0]}
    scale = (len(found) - 1) / len(found)
    return {
        name: T_95 * math.sqrt(scale * float((value - value.mean()).square().sum())) for name, value in values.items()
    }


def paired_half(differences: Tensor) -> float | None:
    """Half the width of the 95 % interval of the mean of paired differences [n]; None for fewer than two."""
    if len(differences) < 2:
        return None
    return 1.96 * float(differences.double().std()) / math.sqrt(len(differences))


def likeness(a: Measured, b: Measured) -> tuple[float, float]:
    """How alike images from the same noise are: (their mean correlation, that of images of other noise).

    Correlation on the principal components of the pixels, around the data's mean (a cosine there). The second pairs
    each image with the next of the same prompt, or of any where a prompt has but one: what prompts alone make alike.
    DDM's sanity check is that with one noise and a deterministic sampler, ensemble and monolith draw alike.
    """
    one, two = a.features(0), b.features(0)
    same = F.cosine_similarity(one, two).mean()
    prompts = a.prompts()
    return float(same), float(F.cosine_similarity(one, two[_next_of_prompt(prompts)]).mean())


def _next_of_prompt(prompts: Sequence[int]) -> Tensor:
    """For each image the number of another one of the same prompt, if there is any, or else of the next."""
    members: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        members.setdefault(prompt, []).append(number)
    after = [(number + 1) % len(prompts) for number in range(len(prompts))]
    for same in members.values():
        if len(same) > 1:
            for place, number in enumerate(same):
                after[number] = same[(place + 1) % len(same)]
    return torch.tensor(after)
