"""What a study found: every variant of every run, mean and spread over the seeds, and what it is better than."""

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
# Student's t at 97.5 %, of 1 to 9 degrees of freedom; the normal distribution's beyond.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass
class ResultRow:
    """One variant of one run. values: by the metric's whole name, one per seed that has it."""

    run: str
    variant: str
    axes: dict[str, Any]
    values: dict[str, dict[int, float]] = field(default_factory=dict)


def collect(study: Study, out: Path, seeds: Sequence[int]) -> list[ResultRow]:
    """From the reports of all runs that are evaluated, in the order of the study."""
    rows: dict[tuple[str, str], ResultRow] = {}
    for run in study.runs:
        for seed in seeds:
            directory = run_path(out, seed, run)
            report = RunLayout(directory).report_json
            if not report.is_file():
                continue
            for score in read_json(report)["results"]["scores"]:
                row = rows.setdefault((run, score["name"]), ResultRow(run, score["name"], score["axes"]))
                named = {**score["metrics"], ERROR: score["denoising"]["mean"], "GFLOPs": score["gflops"]}
                named[LIKENESS] = _likeness(study, out, seed, run, score["name"])
                for name, value in named.items():
                    if value is not None:
                        row.values.setdefault(name, {})[seed] = value
    return list(rows.values())


def _likeness(study: Study, out: Path, seed: int, run: str, variant: str) -> float | None:
    """To the baseline's images from the same noise; None where they were not measured alike."""
    if study.baseline is None:
        return None
    base, _, name = study.baseline.partition(":")
    if not RunLayout(run_path(out, seed, base)).report_json.is_file():
        return None
    a = open_evaluated(f"{run_path(out, seed, base)}:{name.strip()}")
    b = open_evaluated(f"{run_path(out, seed, run)}:{variant}")
    return likeness(a, b)[0] if a.bench == b.bench else None


def write_results(study: Study, out: Path, seeds: Sequence[int]) -> Path:
    """Writes results.json (every number of every seed) and results.md (the table); returns the latter's path."""
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
    """One table: mean ± standard deviation over the seeds, and the paired difference to the baseline, with interval."""
    if not rows:
        return "Nothing is evaluated yet.\n"
    names = [name for name in dict.fromkeys(n for row in rows for n in row.values) if _is_asked(study, name)]
    base = next((row for row in rows if f"{row.run}:{row.variant}" == study.baseline), None)
    head = ["run", "variant", *names, *([f"{names[0]} less the baseline's"] if base and names else [])]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [row.run, row.variant, *(say(row.values.get(name, {})) for name in names)]
        if base and names:
            cells.append("" if row is base else difference(row.values.get(names[0], {}), base.values.get(names[0], {})))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _is_asked(study: Study, name: str) -> bool:
    return not study.columns or any(name.startswith(prefix) for prefix in study.columns)


def say(values: dict[int, float]) -> str:
    """mean ± standard deviation; of one seed, its number."""
    found = list(values.values())
    if len(found) < 2:
        return number(found[0]) if found else ""
    return f"{number(statistics.mean(found))} ± {number(statistics.stdev(found), 2)}"


def difference(values: dict[int, float], base: dict[int, float]) -> str:
    """The mean of the paired differences over the seeds that both have, with its 95 % interval (Student's)."""
    paired = [values[seed] - base[seed] for seed in values if seed in base]
    if not paired:
        return ""
    mean = statistics.mean(paired)
    said = f"{'+' if mean > 0 else ''}{number(mean)}"
    if len(paired) < 2:
        return said
    t = _T[len(paired) - 2] if len(paired) - 2 < len(_T) else 1.96
    return f"{said} ± {number(t * statistics.stdev(paired) / len(paired) ** 0.5, 2)}"
