"""Tables and a plot of efficiency.py's results.

python benchmarks/efficiency_report.py curves OUT             # FLOPs and time to the baseline's final values
python benchmarks/efficiency_report.py points OUT             # every point of the curves
ATOLL_DATA=... python benchmarks/efficiency_report.py parts OUT   # the ablation
python benchmarks/efficiency_report.py plot OUT curves.svg
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from efficiency import BASELINE, FAST, IMAGES, KINDS, LENGTHS, PARTS, SPACES, WIDTH, Recipe, settings_of
from small import Lines, load, network_config

from atoll.nn import build_network
from atoll.train.state import State

METRICS = ("error", *SPACES)


def to_target(points: Sequence[dict[str, Any]], metric: str, target: float, cost: str) -> float | None:
    """The cost at which a curve reaches a target, between its points by the logarithm of the cost.

    None: not reached. The first point's cost if that is below the target already, so an upper bound.
    """
    points = sorted(points, key=lambda point: point["fraction"])
    before = None
    for point in points:
        if point[metric] <= target:
            if before is None:
                return float(point[cost])
            way = (before[metric] - target) / (before[metric] - point[metric])
            return math.exp((1 - way) * math.log(before[cost]) + way * math.log(point[cost]))
        before = point
    return None


def curves(options: argparse.Namespace) -> None:
    """Print how many times fewer FLOPs, and less time, a recipe needs for the baseline's final metrics."""
    rows = list(Lines(options.out / "curves.jsonl").rows.values())
    print("| set | " + " | ".join(f"{metric}: FLOPs; time" for metric in METRICS) + " |")
    print("|---" * (1 + len(METRICS)) + "|")
    for label in dict.fromkeys(row["set"] for row in rows):
        cells = [label]
        for metric in METRICS:
            flops, seconds = [], []
            for seed in sorted({row["seed"] for row in rows}):
                own = [row for row in rows if row["set"] == label and row["seed"] == seed]
                last = [row for row in own if row["recipe"] == "baseline" and row["fraction"] == 1]
                fast = [row for row in own if row["recipe"] == options.recipe]
                if last and {row["fraction"] for row in fast} >= set(LENGTHS[options.recipe]):
                    for costs, cost in ((flops, "flops"), (seconds, "seconds")):
                        reached = to_target(fast, metric, last[0][metric], cost)
                        costs.append(last[0][cost] / reached if reached else math.nan)
            known = any(not math.isnan(value) for value in flops)
            cells.append(f"{_spread(flops)}; {_spread(seconds)}" if known else "not reached")
        print("| " + " | ".join(cells) + " |")


def points(options: argparse.Namespace) -> None:
    """Print the mean and the range of every point over its seeds."""
    rows = list(Lines(options.out / "curves.jsonl").rows.values())
    print("| set | recipe | of the budget | seeds | " + " | ".join(METRICS) + " |")
    print("|---" * (4 + len(METRICS)) + "|")
    for key in sorted({(row["set"], row["recipe"], row["fraction"]) for row in rows}):
        own = [row for row in rows if (row["set"], row["recipe"], row["fraction"]) == key]
        cells = [key[0], key[1], f"{key[2]:.2f}", str(len(own)), *(_range([row[m] for row in own]) for m in METRICS)]
        print("| " + " | ".join(cells) + " |")


def parts(options: argparse.Namespace) -> None:
    """Print one line of each option, at a third of the budget, and the baseline at all of it."""
    rows = list(Lines(options.out / "parts.jsonl").rows.values())
    rows += [
        {**row, "recipe": row["recipe"] if row["fraction"] < 1 else "baseline, all of its FLOPs"}
        for row in Lines(options.out / "curves.jsonl").rows.values()
        if abs(row["fraction"] - 1 / 3) < 0.01 or row["fraction"] == 1
    ]
    recipes = {"fast": FAST, **PARTS, "baseline": BASELINE, "baseline, all of its FLOPs": BASELINE}
    for label in dict.fromkeys(row["set"] for row in rows if row["recipe"] in PARTS):
        name, _, kind = label.partition(", ")
        print(f"\n**{label}**\n")
        print("| | seeds | TFLOP | seconds | state, MB | " + " | ".join(METRICS) + " |")
        print("|---" * (5 + len(METRICS)) + "|")
        for recipe_name, recipe in recipes.items():
            own = [row for row in rows if (row["set"], row["recipe"]) == (label, recipe_name)]
            if own:
                flops, seconds = (statistics.mean(row[cost] for row in own) for cost in ("flops", "seconds"))
                state = state_bytes(options.out, name, kind, recipe) / 1e6
                cells = [recipe_name, str(len(own)), f"{flops / 1e12:.2f}", f"{seconds:.0f}", f"{state:.1f}"]
                print("| " + " | ".join([*cells, *(_range([row[m] for row in own]) for m in METRICS)]) + " |")


def state_bytes(out: Path, name: str, kind: str, recipe: Recipe) -> int:
    """The bytes of weights, gradients, moments and average of a training."""
    base, side = name.split("-")
    clusters = 1 if KINDS[kind] is None else 4
    network = build_network(network_config(load(out, base, int(side), clusters), WIDTH, recipe.network))
    state = State(network, settings_of(recipe, IMAGES[name], clusters))
    gradients = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
    return gradients + sum(tensor.numel() * tensor.element_size() for tensor in state.tensors().values())


def plot(options: argparse.Namespace) -> None:
    """Draw every curve: the three metrics against training FLOPs, a row of panels for each set."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "atoll"}  # text, and the same ids each time
    rows = list(Lines(options.out / "curves.jsonl").rows.values())
    labels = list(dict.fromkeys(row["set"] for row in rows))
    metrics = {"error": "denoising error", **{name: name for name in SPACES}}
    figure = Figure(figsize=(9, 2.1 * len(labels)), layout="constrained")
    panels = figure.subplots(len(labels), len(metrics), squeeze=False)
    colours = {"baseline": "#8a8a8a", "fast": "#0b6e99", "fast-adamw": "#c4532e"}
    for label, line in zip(labels, panels, strict=True):
        for (metric, title), axes in zip(metrics.items(), line, strict=True):
            for recipe, colour in colours.items():
                for seed in sorted({row["seed"] for row in rows}):
                    own = [r for r in rows if (r["set"], r["recipe"], r["seed"]) == (label, recipe, seed)]
                    own.sort(key=lambda row: row["flops"])
                    name = recipe if seed == 0 else None
                    axes.plot(
                        [r["flops"] / 1e12 for r in own],
                        [r[metric] for r in own],
                        "o-",
                        ms=3,
                        lw=1,
                        c=colour,
                        label=name,
                    )
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_locator(MaxNLocator(4))
            axes.set_title(f"{label}: {title}", fontsize=8)
            axes.tick_params(labelsize=6)
    for axes in panels[-1]:
        axes.set_xlabel("training TFLOP", fontsize=8)
    panels[0][0].legend(fontsize=7, frameon=False)
    figure.savefig(options.file, metadata={"Date": None})


def _spread(values: Sequence[float]) -> str:
    """The mean of numbers, their range if they are several, and how many are not known."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "not reached"
    span = f" ({min(known):.2f} to {max(known):.2f})" if len(known) > 1 else ""
    return f"{statistics.mean(known):.2f}{span}" + (
        f", {len(values) - len(known)} not" if len(known) < len(values) else ""
    )


def _range(values: Sequence[float]) -> str:
    """The mean of numbers, and their range if they are several."""
    mean = f"{statistics.mean(values):.4g}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.4g} to {max(values):.4g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("curves", "points", "parts", "plot"))
    parser.add_argument("out", type=Path)
    parser.add_argument("file", type=Path, nargs="?", default=Path("curves.svg"))
    parser.add_argument("--recipe", choices=("fast", "fast-adamw"), default="fast", help="of curves")
    options = parser.parse_args()
    {"curves": curves, "points": points, "parts": parts, "plot": plot}[options.command](options)


if __name__ == "__main__":
    main()
