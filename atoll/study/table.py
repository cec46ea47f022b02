"""The results of a study: every variant of every run, with mean and spread over the seeds."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atoll.evaluate.compare import likeness, open_evaluated
from atoll.report.page import number
from atoll.storage.artifact import read_json, write_bytes, write_json
from atoll.storage.layout import RunLayout
from atoll.study.recipe import Study, run_path

FORMAT = 1
ERROR, LIKENESS = "denoising error", "likeness"
# Quantiles at 97.5 % of Student's t, for 1 to 9 degrees of freedom, and of the normal distribution for more.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
_NORMAL = 1.96


@dataclass
class ResultRow:
    """One variant of one run. values: by the metric's full name, then by seed."""

    run: str
    variant: str
    axes: dict[str, Any]
    values: dict[str, dict[int, float]] = field(default_factory=dict)


def collect(study: Study, out: Path, seeds: Sequence[int]) -> list[ResultRow]:
    """Read the reports of all evaluated runs, in the order of the study."""
    rows: dict[tuple[str, str], ResultRow] = {}
    for run in study.runs:
        for seed in seeds:
            directory = run_path(out, seed, run)
            report = RunLayout(directory).report_json
            # The table grows while the study runs: skip runs without a report.
            if not report.is_file():
                continue
            for score in read_json(report)["results"]["scores"]:
                # One row per variant, one value per seed and metric.
                row = rows.setdefault((run, score["name"]), ResultRow(run, score["name"], score["axes"]))
                metrics = {**score["metrics"], ERROR: score["denoising"]["mean"], "GFLOPs": score["gflops"]}
                metrics[LIKENESS] = _likeness(study, out, seed, run, score["name"])
                for name, value in metrics.items():
                    if value is not None:
                        row.values.setdefault(name, {})[seed] = value
    return list(rows.values())


def _likeness(study: Study, out: Path, seed: int, run: str, variant: str) -> float | None:
    """How alike a variant's images and the baseline's are, from the same noise; None if they cannot be compared."""
    # Likeness is measured against the baseline.
    if study.baseline is None:
        return None
    base_run, _, base_variant = study.baseline.partition(":")
    base_path = run_path(out, seed, base_run)
    if not RunLayout(base_path).report_json.is_file():
        return None
    base = open_evaluated(f"{base_path}:{base_variant.strip()}")
    other = open_evaluated(f"{run_path(out, seed, run)}:{variant}")
    # The same bench: the same prompts, noise and settings.
    return likeness(base, other)[0] if base.bench == other.bench else None


def write_results(study: Study, out: Path, seeds: Sequence[int]) -> Path:
    """Write results.json (every number of every seed) and results.md (the table); return the path of the table."""
    # Read everything anew: reports of an earlier call count too.
    rows = collect(study, out, seeds)
    content = {
        "format": FORMAT,
        "kind": "study",
        "name": study.name,
        "seeds": list(seeds),
        "rows": [vars(row) for row in rows],
    }
    write_json(out / "results.json", content)
    write_bytes(out / "results.md", markdown(study, rows).encode())
    return out / "results.md"


def markdown(study: Study, rows: Sequence[ResultRow]) -> str:
    """Format one table: mean ± standard deviation over the seeds, and the paired difference to the baseline."""
    if not rows:
        return "No run is evaluated yet.\n"
    # Columns: the requested metrics in the order in which they appear, and the difference in the first of them.
    names = [name for name in dict.fromkeys(n for row in rows for n in row.values) if _is_column(study, name)]
    base = next((row for row in rows if f"{row.run}:{row.variant}" == study.baseline), None)
    head = ["run", "variant", *names, *([f"{names[0]} minus the baseline's"] if base and names else [])]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    # A row per variant; the baseline has no difference to itself.
    for row in rows:
        cells = [row.run, row.variant, *(mean_and_spread(row.values.get(name, {})) for name in names)]
        if base and names:
            cells.append("" if row is base else difference(row.values.get(names[0], {}), base.values.get(names[0], {})))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _is_column(study: Study, name: str) -> bool:
    return not study.columns or any(name.startswith(prefix) for prefix in study.columns)


def mean_and_spread(values: dict[int, float]) -> str:
    """Format the values of all seeds as mean ± standard deviation; of one seed, as its value; of none, as ""."""
    # One value has no standard deviation.
    numbers = list(values.values())
    if len(numbers) < 2:
        return number(numbers[0]) if numbers else ""
    return f"{number(statistics.mean(numbers))} ± {number(statistics.stdev(numbers), 2)}"


def difference(values: dict[int, float], base: dict[int, float]) -> str:
    """Format the mean of the paired differences over common seeds, with its 95 % interval (Student's t)."""
    paired = [values[seed] - base[seed] for seed in values if seed in base]
    if not paired:
        return ""
    # Paired by seed, which removes what a seed changes in both.
    mean = statistics.mean(paired)
    text = f"{'+' if mean > 0 else ''}{number(mean)}"
    if len(paired) < 2:
        return text
    # n differences have n - 1 degrees of freedom; the table starts at 1.
    t = _T[len(paired) - 2] if len(paired) - 2 < len(_T) else _NORMAL
    return f"{text} ± {number(t * statistics.stdev(paired) / len(paired) ** 0.5, 2)}"
