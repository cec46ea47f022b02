"""Fill the tables of docs/results.md from the studies' results.

    python benchmarks/results.py studies docs/results.md

A table is between two comments; the first describes it in JSON:

    <!-- table {"study": "eurosat", "rows": ["k8:flow, top-*"], "columns": ["FD-MNv2", "denoising"]} -->
    <!-- end -->

rows: patterns of RUN:VARIANT. columns: prefixes of metrics. less: the row that all others are compared with, in the
first column; the difference is paired by seed, with its 95 % interval (Student's). Tables of a missing study stay as
they are; rows that are not measured yet are left out and reported.
"""

import json
import re
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from atoll.study.table import difference, mean_and_spread

BLOCK = re.compile(r"(<!-- table (\{.*?\}) -->\n).*?(<!-- end -->)", re.DOTALL)
Values = dict[str, dict[str, float]]


def table(rows: list[dict[str, Any]], spec: dict[str, Any]) -> str:
    """The markdown of one table. Raises SystemExit if no metric, or several, match a column."""
    named = {f"{row['run']}:{row['variant']}": row["values"] for row in rows}
    chosen: dict[str, Values] = {}
    for pattern in spec["rows"]:
        fitting = {name: values for name, values in named.items() if fnmatchcase(name, pattern)}
        if not fitting:
            print(f"study {spec['study']}: no row {pattern!r} yet", file=sys.stderr)
        chosen |= fitting
    if not chosen:
        return "*(not measured yet)*\n"
    metrics = [_metric(column, chosen) for column in spec["columns"]]
    base = named.get(spec["less"]) if "less" in spec else None
    head = ["", *metrics, *([f"{metrics[0].split(' [')[0]}, less {spec['less'].split(':')[1]}"] if base else [])]
    lines = [head, ["---"] * len(head)]
    for name, values in chosen.items():
        cells = [name.partition(":")[2] if spec.get("short") else name.replace(":", ": ", 1)]
        cells += [mean_and_spread(_by_seed(values, metric)) for metric in metrics]
        if base is not None:
            same = name == spec["less"]
            cells.append("" if same else difference(_by_seed(values, metrics[0]), _by_seed(base, metrics[0])))
        lines.append(cells)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _metric(column: str, rows: dict[str, Values]) -> str:
    metrics = list(dict.fromkeys(name for values in rows.values() for name in values if name.startswith(column)))
    if len(metrics) != 1:
        sys.exit(f"column {column!r}: expected one metric, found {metrics}")
    return metrics[0]


def _by_seed(values: Values, metric: str) -> dict[int, float]:
    return {int(seed): value for seed, value in values.get(metric, {}).items()}


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    studies, page = Path(sys.argv[1]), Path(sys.argv[2])

    def fill(block: re.Match[str]) -> str:
        spec = json.loads(block[2])
        file = studies / spec["study"] / "results.json"
        if not file.is_file():
            return block[0]
        return f"{block[1]}\n{table(json.loads(file.read_text())['rows'], spec)}\n{block[3]}"

    page.write_text(BLOCK.sub(fill, page.read_text()))
    print(f"{page} written")


if __name__ == "__main__":
    main()
