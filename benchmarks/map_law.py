"""A law of map.py's results: how the error of an ensemble differs from that of one model of equal training FLOPs.

    python benchmarks/map_law.py fit OUT                          # coefficients, and the error of predictions
    python benchmarks/map_law.py write OUT atoll/plan/law.json    # the same law, as `atoll plan` reads it
    python benchmarks/map_law.py plot OUT map.svg                 # what was measured, as a heat map

The difference, in percent of the monolith's error and by a trained router (map_router.py), is linear in the doublings
of the images seen per parameter of a network and in the share of the common start, and quadratic in the doublings of
the number of clusters, with a constant of each set. Each way of training (`WAYS`) and each routing has its own law.
It is tested before it is fitted on everything: on a quarter of the cells, chosen by a hash of their settings and left
out of the fit; on each set in turn, by the others' mean constant, as a new set gets it; and on networks of width
`LARGER`, which no fit sees.
"""

import argparse
import functools
import hashlib
import json
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from map_report import NAMES, T_95, results
from small import Lines

from atoll.nn import build_network
from atoll.plan.law import COMMON, LEVELS, SCRATCH, SEEN, terms

WAYS = {SCRATCH: (False, False), COMMON: (True, False), LEVELS: (True, True)}  # common start, generalist
ROUTINGS = ("full", "top-1")
LARGER = 128
# Where all terms are zero, and what one unit of each is.
CENTRE = {SEEN: 1.0, "clusters": 4, "share": 0.5}
TERMS = ("images per parameter, doubled", "clusters, doubled", "the square of that", "a quarter more in common")
LEFT_OUT = 4  # one cell of so many is predicted before the fit on all
LARGEST = 6  # percent, of the plot's colours


@dataclass(frozen=True)
class Point:
    """A cell of the map less the monolith, over its seeds."""

    name: str
    way: str
    width: int
    depth: int
    images: int
    clusters: int
    share: float
    change: dict[str, float]  # percent of the monolith's error, by routing

    @property
    def terms(self) -> list[float]:
        """What the law is linear in."""
        seen = self.images / parameters_of(self.width, self.depth)
        return terms({SEEN: seen, "clusters": self.clusters, "share": self.share}, CENTRE)

    @property
    def is_left_out(self) -> bool:
        """Whether the first fit does not see it; the same for all ways of training."""
        key = f"{self.name} {self.width}x{self.depth} {self.images} {self.clusters} {self.share}"
        return hashlib.sha256(key.encode()).digest()[0] % LEFT_OUT == 0


@dataclass(frozen=True)
class Law:
    """A constant of each set, and a slope of each term; percent."""

    constants: dict[str, float]
    slopes: list[float]
    errors: list[float]  # standard errors of the slopes
    residual: float  # standard deviation

    def predict(self, point: Point) -> float:
        """The difference at a point; of a set that it does not know by the mean of those that it knows."""
        constant = self.constants.get(point.name, statistics.mean(self.constants.values()))
        return constant + math.fsum(a * b for a, b in zip(self.slopes, point.terms, strict=True))


@functools.cache
def parameters_of(width: int, depth: int) -> int:
    """Of one network for three channels."""
    shape = {"name": "mmdit", "channels": 3, "size": [16, 16], "patch": 4, "states_dim": 64}
    network = build_network({**shape, "width": width, "depth": depth, "heads": max(1, width // 32)})
    return sum(parameter.numel() for parameter in network.parameters())


def points(out: Path) -> list[Point]:
    """The cells of OUT that a router was trained for, of semantic clusters and one objective."""
    rows = results(out)
    monoliths = {_key(row): row for row in rows if row["k"] == 1 and not row["by_level"]}
    groups: dict[tuple[Any, ...], list[dict[str, float]]] = {}
    for row in rows:
        is_plain = row.get("method", "balanced") == "balanced" and not row.get("others")
        if row["k"] > 1 and is_plain and "full" in row and _key(row) in monoliths:
            way = next(way for way, kind in WAYS.items() if kind == (row["share"] > 0, row["by_level"]))
            shape = (row["width"], row["depth"], row["images"], row["k"], row["share"])
            base = monoliths[_key(row)]["error"]
            change = {routing: 100 * (row[routing] / base - 1) for routing in ROUTINGS}
            groups.setdefault((row["name"], way, *shape), []).append(change)
    return [
        Point(*key, {routing: statistics.mean(change[routing] for change in changes) for routing in ROUTINGS})
        for key, changes in groups.items()
    ]


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("name", "size", "width", "depth", "images", "seed"))


def fit(own: list[Point], routing: str) -> Law:
    """Least squares; a term that does not vary has slope 0."""
    names = sorted({point.name for point in own})
    values = np.array([point.terms for point in own])
    varies = np.ptp(values, axis=0) > 1e-9
    dummies = np.array([[point.name == name for name in names] for point in own], dtype=float)
    matrix, target = np.hstack([dummies, values[:, varies]]), np.array([point.change[routing] for point in own])
    solution = np.linalg.lstsq(matrix, target, rcond=None)[0]
    freedom = max(1, len(own) - matrix.shape[1])
    variance = float(np.square(matrix @ solution - target).sum()) / freedom
    deviations = np.sqrt(variance * np.diag(np.linalg.pinv(matrix.T @ matrix)))
    slopes, errors = np.zeros(len(TERMS)), np.zeros(len(TERMS))
    slopes[varies], errors[varies] = solution[len(names) :], deviations[len(names) :]
    constants = dict(zip(names, solution[: len(names)].tolist(), strict=True))
    return Law(constants, slopes.tolist(), errors.tolist(), variance**0.5)


def rms(values: Iterable[float]) -> float:
    """Root of the mean square; NaN of nothing."""
    squares = [value**2 for value in values]
    return math.sqrt(statistics.mean(squares)) if squares else math.nan


def tested(own: list[Point], routing: str) -> dict[str, str]:
    """The errors of predictions, in percentage points, and beside each that of saying "no difference"."""

    def shown(chosen: list[Point], law_of: Callable[[Point], Law]) -> str:
        if not chosen:
            return ""
        missed = rms(law_of(point).predict(point) - point.change[routing] for point in chosen)
        return f"{missed:.2f} ({rms(point.change[routing] for point in chosen):.2f}; {len(chosen)})"

    small = [point for point in own if point.width < LARGER]
    seen = [point for point in small if not point.is_left_out]
    without = {name: fit([point for point in small if point.name != name], routing) for name in NAMES}
    first, whole = fit(seen, routing), fit(small, routing)
    return {
        "cells left out": shown([point for point in small if point.is_left_out], lambda _: first),
        "a new set": shown(small, lambda point: without[point.name]),
        "larger networks": shown([point for point in own if point.width >= LARGER], lambda _: whole),
    }


def half_width(law: Law, own: list[Point], routing: str) -> float:
    """Of the 95 % interval for a new set: the constants' spread over the sets, and what the law leaves."""
    count = len(law.constants)
    spread = statistics.variance(law.constants.values()) * (1 + 1 / count)
    return T_95[count - 1] * math.sqrt(spread + law.residual**2)


def show(options: argparse.Namespace) -> None:
    """Print the laws, and how well they predict."""
    every = points(options.out)
    names = sorted({point.name for point in every})
    print("| | " + " | ".join([*(NAMES[name] for name in names), *TERMS, "a new set, ±"]) + " |")
    print("|---" * (2 + len(names) + len(TERMS)) + "|")
    tests = []
    for way in WAYS:
        own = [point for point in every if point.way == way]
        small = [point for point in own if point.width < LARGER]
        for routing in ROUTINGS:
            law = fit(small, routing)
            slopes = [
                f"{slope:+.2f} ± {1.96 * error:.2f}" if error else ""
                for slope, error in zip(law.slopes, law.errors, strict=True)
            ]
            cells = [f"{law.constants[name]:+.2f}" for name in names] + slopes
            print(f"| {way}, {routing} | " + " | ".join([*cells, f"{half_width(law, small, routing):.1f}"]) + " |")
            tests.append((f"{way}, {routing}", tested(own, routing)))
    print("\n| error of prediction | " + " | ".join(tests[0][1]) + " |")
    print("|---" * (1 + len(tests[0][1])) + "|")
    for label, columns in tests:
        print(f"| {label} | " + " | ".join(columns.values()) + " |")
    seconds = sum(row.get("seconds", 0) for row in Lines(options.out / "cells.jsonl").rows.values())
    print(f"\n{len(every)} cells of the law; training took {seconds / 3600:.1f} hours of one core.")


def write(options: argparse.Namespace) -> None:
    """Write the laws for `atoll plan`."""
    every = [point for point in points(options.out) if point.width < LARGER]
    sizes = [parameters_of(point.width, point.depth) for point in every]
    measured = {
        "parameters": sizes,
        SEEN: [round(point.images / size, 3) for point, size in zip(every, sizes, strict=True)],
        "clusters": [point.clusters for point in every],
        "share": [point.share for point in every if point.share],
    }
    ranges = {name: [min(values), max(values)] for name, values in measured.items()}
    ways: dict[str, Any] = {}
    for way in WAYS:
        own = [point for point in every if point.way == way]
        for routing in ROUTINGS:
            law = fit(own, routing)
            ways.setdefault(way, {})[routing] = {
                "constant": round(statistics.mean(law.constants.values()), 3),
                "slopes": [round(slope, 3) for slope in law.slopes],
                "half_width": round(half_width(law, own, routing), 2),
            }
    options.file.write_text(json.dumps({"centre": CENTRE, "range": ranges, "ways": ways}, indent=1) + "\n")


def plot(options: argparse.Namespace) -> None:
    """Draw the differences by all experts: panels of ways and K, rows of sets, columns by images per parameter."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "atoll"}  # text, and the same ids each time
    every = [point for point in points(options.out) if point.share in (0.0, CENTRE["share"])]
    clusters = [k for k in (4, 16) if any(point.clusters == k for point in every)]
    sizes = {(point.width, point.depth, point.images) for point in every if point.clusters in clusters}
    columns = sorted(sizes, key=lambda size: size[2] / parameters_of(*size[:2]))
    figure = Figure(figsize=(9, 1.9 * len(clusters) + 0.6), layout="constrained")
    panels = figure.subplots(len(clusters), len(WAYS), squeeze=False, sharex=True, sharey=True)
    picture = None
    for k, line in zip(clusters, panels, strict=True):
        for way, axes in zip(WAYS, line, strict=True):
            values = np.full((len(NAMES), len(columns)), np.nan)
            for point in every:
                if (point.way, point.clusters) == (way, k):
                    place = columns.index((point.width, point.depth, point.images))
                    values[list(NAMES).index(point.name), place] = point.change["full"]
            picture = axes.imshow(values, cmap="RdBu_r", vmin=-LARGEST, vmax=LARGEST, aspect="auto")
            for (i, j), value in np.ndenumerate(values):
                if not math.isnan(value):
                    colour = "white" if abs(value) > LARGEST * 2 / 3 else "black"
                    axes.text(j, i, f"{value:+.1f}", ha="center", va="center", fontsize=6.5, color=colour)
            axes.set_title(f"{way}, K = {k}", fontsize=8)
            axes.set_yticks(range(len(NAMES)), list(NAMES.values()), fontsize=7)
            labels = [f"{w} x {d}\n{n // 1000}k" for w, d, n in columns]
            axes.set_xticks(range(len(columns)), labels, fontsize=6.5)
    if picture is not None:
        bar = figure.colorbar(picture, ax=panels, shrink=0.8)
        bar.set_label("error less the monolith's, %", fontsize=7)
        bar.ax.tick_params(labelsize=6)
    figure.savefig(options.file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("fit", "write", "plot"))
    parser.add_argument("out", type=Path)
    parser.add_argument("file", type=Path, nargs="?", default=Path("map.svg"))
    options = parser.parse_args()
    {"fit": show, "write": write, "plot": plot}[options.command](options)


if __name__ == "__main__":
    main()
