"""Tables and a plot of map.py's results.

    python benchmarks/map_report.py table OUT [--seeds 3]  # Markdown: error and distances, less the monolith's
    python benchmarks/map_report.py grid OUT               # Markdown: errors by the router, a column a set
    python benchmarks/map_report.py tuning OUT             # Markdown: batches and rates that were tried
    python benchmarks/map_report.py plot OUT levels.svg [--seeds 3]    # the difference by noise level

--seeds leaves out what was trained with fewer seeds.
A difference is that of an ensemble from the monolith of the same set, network, images and seed, in percent; its
interval is the 95 % one of Student's t over the seeds.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

from small import LEVELS, Lines

T_95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57}  # quantiles of Student's t, by degrees of freedom
# Errors of each image by its own cluster's expert, by the router's top-1, and by all experts as the router weighs them.
METRICS = {"error": "error, own expert", "top-1": "error, top-1", "full": "error, full"}
SPACES = ("FD-MNv2", "FD-Squeeze")
METRICS |= {space: f"{space}, own expert" for space in SPACES}
METRICS |= {f"{space} {routing}": f"{space}, {routing}" for routing in ("top-1", "full") for space in SPACES}
NAMES = {"eurosat": "satellite photos", "emoji": "emoji", "mixture": "three kinds of images", "glyphs": "glyphs"}
COLOURS = ("#0b6e99", "#c4532e", "#5b8c3a")
Row = dict[str, Any]


def results(out: Path) -> list[Row]:
    """The cells of OUT, with the errors by the router and the distances of those that have them."""
    distances, routed = Lines(out / "distances.jsonl").rows, Lines(out / "routed.jsonl").rows
    drawn_by_router = Lines(out / "routed-distances.jsonl").rows
    rows = []
    for key, row in Lines(out / "cells.jsonl").rows.items():
        by_router = {}
        if row["k"] == 1:  # needs no router
            by_router = {"top-1": row["error"], "full": row["error"], "levels_full": row["levels"]}
            own = distances.get(key, {})
            by_router |= {f"{s} {routing}": own[s] for s in SPACES if s in own for routing in ("top-1", "full")}
        elif key in routed:
            own = routed[key]
            by_router = {"top-1": own["error"], "full": own["error_full"], "levels_full": own["levels_full"]}
        rows.append({**row, **distances.get(key, {}), **drawn_by_router.get(key, {}), **by_router})
    return rows


def label_of(row: Row) -> str:
    """What a cell is, but for its set, network, images and seed."""
    if row["k"] == 1:
        return "the monolith divided by level" if row["by_level"] else "monolith"
    parts = [f"K = {row['k']}", f"common start, {row['share']:.0%}" if row["share"] else "from scratch"]
    parts += ["generalist at the fine end"] if row["by_level"] else []
    parts += [f"{row['method']} clusters"] if row.get("method", "balanced") != "balanced" else []
    if row.get("others"):
        parts.append(f"{row['others']} of {row['prediction']}" + ("" if row["others_start"] else ", without the start"))
    return ", ".join(parts)


def group_of(row: Row) -> tuple[Any, ...]:
    """What cells share that are compared."""
    return (row["name"], row["size"], row["width"], row["depth"], row["images"])


def groups_of(rows: list[Row], seeds: int) -> list[tuple[Any, ...]]:
    """The groups of which so many monoliths were trained."""
    groups = dict.fromkeys(map(group_of, rows))
    return [g for g in groups if sum(group_of(row) == g and label_of(row) == "monolith" for row in rows) >= seeds]


def labels_of(rows: list[Row], seeds: int) -> list[str]:
    """What was trained with so many seeds, in its order."""
    labels = list(map(label_of, rows))
    return [label for label in dict.fromkeys(labels) if labels.count(label) >= seeds]


def interval(values: list[float]) -> str:
    """A mean with its 95 % interval."""
    if len(values) < 2:
        return f"{values[0]:+.1f}"
    half = T_95[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):+.1f} ± {half:.1f}"


def differences(rows: list[Row], label: str, metric: str) -> list[float]:
    """In percent of the monolith's, one of each seed that has both."""
    monolith = {row["seed"]: row for row in rows if label_of(row) == "monolith" and metric in row}
    own = [row for row in rows if label_of(row) == label and metric in row and row["seed"] in monolith]
    return [100 * (row[metric] / monolith[row["seed"]][metric] - 1) for row in own]


def table(options: argparse.Namespace) -> None:
    """Print a table of each set, network and number of images."""
    every = results(options.out)
    for group in groups_of(every, options.seeds):
        rows = [row for row in every if group_of(row) == group]
        name, size, width, depth, images = group
        monoliths = sum(label_of(row) == "monolith" for row in rows)
        print(f"\n**{NAMES[name]}**, {size} px, width {width}, {depth} blocks, {images:,} images, {monoliths} seeds\n")
        print("| | " + " | ".join(METRICS.values()) + " |")
        print("|---" * (1 + len(METRICS)) + "|")
        for label in labels_of(rows, options.seeds):
            cells = [label]
            for metric in METRICS:
                values = [row[metric] for row in rows if label_of(row) == label and metric in row]
                change = differences(rows, label, metric) if label != "monolith" else []
                percent = f" ({interval(change)} %)" if change else ""
                cells.append(f"{statistics.mean(values):.4g}{percent}" if values else "")
            print("| " + " | ".join(cells) + " |")


def grid(options: argparse.Namespace) -> None:
    """Print a table of each network and number of images: the differences by all experts and by top-1."""
    every = results(options.out)
    for shape in sorted({group_of(row)[1:] for row in every}):
        rows = [row for row in every if group_of(row)[1:] == shape]
        names = [name for name in NAMES if any(row["name"] == name for row in rows)]
        print(f"\n**Width {shape[1]}, {shape[2]} block{'s' * (shape[2] > 1)}, {shape[3]:,} images**\n")
        print("| | " + " | ".join(NAMES[name] for name in names) + " |")
        print("|---" * (1 + len(names)) + "|")
        for label in dict.fromkeys(map(label_of, rows)):
            cells = []
            for name in names:
                own = [row for row in rows if row["name"] == name]
                if label == "monolith":
                    values = [row["error"] for row in own if label_of(row) == label]
                    cells.append(f"{statistics.mean(values):.4f}")
                    continue
                full, top = (differences(own, label, routing) for routing in ("full", "top-1"))
                cells.append(f"{statistics.mean(full):+.1f} ({statistics.mean(top):+.1f})" if full else "")
            print("| " + " | ".join([label, *cells]) + " |")


def tuning(options: argparse.Namespace) -> None:
    """Print the error of each batch and rate that was tried, of the monolith and of the experts."""
    rows = list(Lines(options.out / "tuning.jsonl").rows.values())
    sets = list(dict.fromkeys(row["name"] for row in rows))
    print("| | batch | rate | decay of the last | " + " | ".join(sets) + " |")
    print("|---" * (4 + len(sets)) + "|")
    tried: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in sorted(rows, key=lambda row: row["k"]):
        choice = (label_of(row), row["batch"], row["lr"], row.get("decay_from", 0.6))
        tried.setdefault(choice, {})[row["name"]] = row["error"]
    for (label, batch, lr, decay_from), by_set in tried.items():
        errors = " | ".join(f"{by_set[name]:.4f}" if name in by_set else "" for name in sets)
        print(f"| {label} | {batch} | {lr:g} | {1 - decay_from:.0%} | {errors} |")


def plot(options: argparse.Namespace) -> None:
    """Draw the difference by noise level, of all experts by the router: a panel of each set, a line of each kind."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "atoll"}  # text, and the same ids each time
    every = results(options.out)
    groups = groups_of(every, options.seeds)
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for group, axes in zip(groups, panels, strict=True):
        rows = [row for row in every if group_of(row) == group]
        labels = [label for label in labels_of(rows, options.seeds) if label != "monolith"]
        for label, colour in zip(labels, COLOURS, strict=False):
            # The mean over seeds, and a thin line of each.
            monolith = {row["seed"]: row["levels"] for row in rows if label_of(row) == "monolith"}
            lines = [
                [100 * (own / other - 1) for own, other in zip(row["levels_full"], monolith[row["seed"]], strict=True)]
                for row in rows
                if label_of(row) == label and "levels_full" in row and row["seed"] in monolith
            ]
            if not lines:
                continue
            for line in lines:
                axes.plot(LEVELS, line, lw=0.5, c=colour, alpha=0.5)
            mean = [statistics.mean(values) for values in zip(*lines, strict=True)]
            axes.plot(LEVELS, mean, lw=1.8, c=colour, label=label)
        axes.axhline(0, c="#444", lw=0.8)
        axes.set_title(NAMES[group[0]], fontsize=9)
        axes.set_xlabel("path time t (0 data, 1 noise)", fontsize=8)
        axes.tick_params(labelsize=7)
    panels[0].set_ylabel("error less the monolith's, %", fontsize=8)
    # Each label once, though every panel has it.
    shown = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(list(shown.values()), list(shown), loc="outside lower center", ncols=3, fontsize=7, frameon=False)
    figure.savefig(options.file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("table", "grid", "tuning", "plot"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("file", type=Path, nargs="?", default=Path("levels.svg"))
    options = parser.parse_args()
    {"table": table, "grid": grid, "tuning": tuning, "plot": plot}[options.command](options)


if __name__ == "__main__":
    main()
