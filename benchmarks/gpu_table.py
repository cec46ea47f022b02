"""A report of benchmarks/gpu.py as the markdown for docs/benchmarks.md."""

from collections.abc import Mapping, Sequence
from typing import Any

Report = Mapping[str, Any]


def table(report: Report) -> str:
    """The markdown of all parts in the report, with notes on skipped, failed and GPU-only ones."""
    memory = f", {report['memory_gb']:.0f} GB" if "memory_gb" in report else ""
    lines = [f"{report['device']}{memory}, torch {report['torch']}, {report['date'][:10]}: `{report['command']}`"]
    if report["tiny"]:
        lines += ["", "Tiny sizes, to try the code: these numbers say nothing about a GPU."]
    for name, render in RENDERERS.items():
        if name in report["parts"]:
            part = report["parts"][name]
            lines += ["", *render(part)]
            lines += [f"\nNot done: {note}." for note in part.get("left_out", ())]
            lines += [f"\nFailed: {part['error']}."] if "error" in part else []
    return "\n".join(lines)


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A markdown table; "" without rows."""
    if not rows:
        return []
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _ceiling(part: Report) -> list[str]:
    rows = [[name, f"{value:.4g}"] for name, value in part.get("products", {}).items()]
    return _rows(["bf16 matrix product", "TFLOP/s"], rows)


def _training(part: Report) -> list[str]:
    rows = []
    for size, found in part.items():
        for variant, row in found.get("variants", {}).items() if isinstance(found, dict) else ():
            ratios = [_number(row.get(f"over_{base}"), ".2f") for base in ("diffusers", "diffusers-compiled")]
            shares = [f"{row['of_ceiling']:.0%}", _number(row["mfu"], ".0%")]
            rate = f"{row['images_per_second']:.4g}"
            rows.append([f"{size}, batch {found['batch']}", variant, rate, *ratios, *shares])
    head = ["training step", "variant", "images/s", "against diffusers", "against it compiled", "of the ceiling", "MFU"]
    return _rows(head, rows)


def _correct(part: Report) -> list[str]:
    answers = {True: "yes", False: "**no**", None: "cannot be told: kernels differ from run to run"}
    rows = []
    for name, found in part.items():
        if not isinstance(found, dict):
            continue
        if "distance" in found:
            told = f"{found['distance']:.1e} (at most {found['limit']:g})"
        else:
            told = f"{found['resumed_difference']:.1e}; two unbroken ones: {found['repeated_difference']:.1e}"
        rows.append([name, told, answers[found["holds"]]])
    return _rows(["check", "difference", "holds"], rows)


def _sampling(part: Report) -> list[str]:
    rows = []
    for name, row in part.items():
        if isinstance(row, dict):
            numbers = [f"{row['images_per_second']:.4g}", f"{row['seconds']:.4g}", _number(row["peak_gib"], ".1f")]
            rows.append([name, *numbers])
    what = f"sampling, {part.get('experts')} x {part.get('expert')}, {part.get('steps')} steps, guided"
    return _rows([what, "images/s", "seconds", "peak GiB"], rows)


def _batch(part: Report) -> list[str]:
    if "needs" in part:
        return [f"The largest batch was not searched: it needs {part['needs']}."]
    rows = []
    for name, found in part.items():
        if isinstance(found, dict) and "predicted" in found:
            ended = "; ".join(found["ended"])
            told = [_number(found[key], "d") for key in ("predicted", "found", "too_large")]
            rows.append([name, *told, ended])
    return _rows(["largest batch", "predicted", "fits", "does not", "note"], rows)


RENDERERS = {"ceiling": _ceiling, "training": _training, "correct": _correct, "sampling": _sampling, "batch": _batch}
