"""How experts compare with one model of equal training FLOPs: the law of docs/results.md, evaluated at a plan.

`benchmarks/map_law.py write` fitted it on small networks and wrote law.json. It is linear in log2 of images per
parameter and in the share of a common start, and quadratic in log2 of the clusters. It holds where it was fitted: a
plan outside of that is moved to the nearest point inside, and says so.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from atoll.plan.numbers import count
from atoll.plan.types import Plan

if TYPE_CHECKING:
    from rich.table import Table

SCRATCH, COMMON, LEVELS = "from scratch", "common start", "common start, generalist"
CLUSTERS = (2, 4, 8, 16)  # shown beside the plan's own number
SEEN = "images per parameter"  # of all networks, as often as they are seen
NEAR = 0.1  # percentage points that are no difference


@dataclass(frozen=True)
class ErrorDifference:
    """The error of experts less that of one model of equal FLOPs, in percent, with its 95 % interval on new data."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.1f} ({self.low:+.1f} to {self.high:+.1f})"


@dataclass(frozen=True)
class OneModel:
    """What the law says of a plan.

    Attributes:
        way: how the plan trains its experts: `SCRATCH`, `COMMON` or `LEVELS`.
        clusters: of the plan.
        share: of the training FLOPs, in the common model.
        full: the plan's own difference with all experts evaluated.
        top_1: with one.
        others: by way and number of clusters, with all experts and half of the FLOPs in the common model.
        seen: images per parameter of a network, of all networks together.
        per_doubling: what each doubling of `seen` adds to `full`.
        per_quarter: what a quarter more of the FLOPs in the common model adds to it; 0 from scratch.
        outside: what of the plan is beyond the law's range: (name, the plan's value, lowest, highest).
    """

    way: str
    clusters: int
    share: float
    full: ErrorDifference
    top_1: ErrorDifference
    others: dict[str, dict[int, ErrorDifference]]
    seen: float
    per_doubling: float
    per_quarter: float
    outside: tuple[tuple[str, float, float, float], ...]


@cache
def _law() -> dict[str, Any]:
    law: dict[str, Any] = json.loads(resources.files("atoll.plan").joinpath("law.json").read_text())
    return law


def difference(
    way: str, routing: str, parameters: float, images: float, clusters: float, share: float
) -> ErrorDifference:
    """Evaluate the law within its range.

    Args:
        way: `SCRATCH`, `COMMON` or `LEVELS`.
        routing: "full" or "top-1".
        parameters: of one network.
        images: seen by all networks together, or by the one model.
        clusters: their number.
        share: of the images, that the common model sees; not used from scratch.
    """
    law = _law()
    of_way = law["ways"][way][routing]
    # The nearest point inside the range.
    values = {SEEN: images / parameters, "clusters": clusters, "share": share}
    inside = {name: min(max(value, law["range"][name][0]), law["range"][name][1]) for name, value in values.items()}
    moved = math.fsum(a * b for a, b in zip(of_way["slopes"], terms(inside, law["centre"]), strict=True))
    mean = of_way["constant"] + moved
    return ErrorDifference(mean, mean - of_way["half_width"], mean + of_way["half_width"])


def terms(values: Mapping[str, float], centre: Mapping[str, float]) -> list[float]:
    """Return what the law has slopes for: doublings of `SEEN`, of the clusters, their square, quarters of the share.

    Args:
        values: `SEEN`, "clusters" and "share" of a point.
        centre: the same of the point where all terms are 0.
    """
    seen, of_clusters = (math.log2(values[name] / centre[name]) for name in (SEEN, "clusters"))
    return [seen, of_clusters, of_clusters**2, (values["share"] - centre["share"]) / 0.25]


def one_model(plan: Plan) -> OneModel | None:
    """Compare a plan with one model of equal FLOPs; None if it has experts of one cluster only."""
    clusters = len({expert.name.partition("-")[0] for expert in plan.experts})
    if clusters < 2:
        return None
    # All images that pass through networks, as images of the mean expert.
    of_all = [one.training for one in (plan.common, plan.generalist) if one]
    cost = statistics.mean(expert.training_flops for expert in plan.experts)
    images = sum(one.images * one.training_flops for one in (*plan.experts, *of_all)) / cost
    parameters = statistics.mean(expert.parameters for expert in plan.experts)
    share = plan.common.fraction if plan.common and plan.common.experts else 0.0
    way = SCRATCH if not share else LEVELS if plan.generalist and plan.generalist.levels else COMMON
    at = (parameters, images)
    # Outside of the range, nobody has measured.
    values = {"parameters": parameters, SEEN: images / parameters, "clusters": clusters}
    values |= {"share": share} if share else {}
    bounds = {name: _law()["range"][name] for name in values}
    slopes = _law()["ways"][way]["full"]["slopes"]
    return OneModel(
        way=way,
        clusters=clusters,
        share=share,
        full=difference(way, "full", *at, clusters, share),
        top_1=difference(way, "top-1", *at, clusters, share),
        others={
            name: {k: difference(name, "full", *at, k, 0.5) for k in CLUSTERS} for name in (SCRATCH, COMMON, LEVELS)
        },
        seen=images / parameters,
        per_doubling=slopes[0],
        per_quarter=slopes[-1],
        outside=tuple(
            (name, value, *bounds[name]) for name, value in values.items() if not _is_within(value, bounds[name])
        ),
    )


def _is_within(value: float, bounds: Sequence[float]) -> bool:
    return bounds[0] * 0.99 <= value <= bounds[1] * 1.01  # steps are whole numbers


def table(found: OneModel) -> "Table":
    """The law's differences by way and number of clusters."""
    from rich.table import Table

    title = "Experts, less one model of equal FLOPs: denoising error, %"
    shown = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    shown.add_column("clusters")
    for way in found.others:
        shown.add_column(way, justify="right")
    for k in CLUSTERS:
        shown.add_row(str(k), *(str(by_clusters[k]) for by_clusters in found.others.values()))
    return shown


def sentences(found: OneModel) -> list[str]:
    """What the plan's experts are by the law, what would be better, and where the law does not reach."""
    lines = [
        "All experts evaluated, half of the FLOPs in a common model; in parentheses the 95 % interval for new data. "
        "docs/results.md has the law."
    ]
    # The plan itself.
    start = f", {found.share:.0%} of the FLOPs in the common model" if found.share else ""
    lines.append(
        f"This plan, K = {found.clusters}, {found.way}{start}: {found.full} % by all experts, {found.top_1} % by "
        f"top-1. {_verdict(found.full, found.outside)}"
    )
    # The best of the table, if it is another one.
    way, k = min(
        ((way, k) for way, by_clusters in found.others.items() for k in by_clusters),
        key=lambda one: found.others[one[0]][one[1]].mean,
    )
    best = found.others[way][k]
    if best.mean < found.full.mean - NEAR:
        lines.append(f"Lowest: K = {k}, {way}: {best} %. {_verdict(best, found.outside)}")
    # Which sizes, and which share.
    moves = [f"each doubling of the images seen per parameter (here {found.seen:.2g}) by {found.per_doubling:+.1f}"]
    moves += [f"a quarter more of the FLOPs in the common model by {found.per_quarter:+.1f}"] if found.share else []
    if found.per_doubling:  # from scratch it was not varied
        lines.append(f"What moves it: {', '.join(moves)} points.")
    if found.outside:
        named = "; ".join(
            f"{name}: {_value(name, value)}, measured {_value(name, low)} to {_value(name, high)}"
            for name, value, low, high in found.outside
        )
        lines.append(f"Outside of what was measured ({named}): these are the numbers of the nearest point inside.")
    return lines


def _value(name: str, value: float) -> str:
    return f"{value:.0%}" if name == "share" else count(value) if name == "parameters" else f"{value:.3g}"


def _verdict(found: ErrorDifference, outside: Sequence[Any]) -> str:
    if outside:
        return "Nobody has measured it there."
    if found.high < 0:
        return "The experts are better."
    if found.low > 0:
        return "One model is better, if it can be trained."
    return "Which is better is not known: the interval includes 0."
