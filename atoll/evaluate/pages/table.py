"""The table of all scores, as HTML."""

from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Any

from atoll.evaluate.metrics.image_metrics import KINDS, kind_of
from atoll.evaluate.types import Results, Score
from atoll.report.page import number, table


def numbers(results: Results, groups: Mapping[str, Sequence[str]], settings: Mapping[str, Any], machine: str) -> str:
    """The table of all scores, in groups of names, with an explanation of every number."""
    # One row per score, then the real images.
    body = []
    for group, names in groups.items():
        for name in names:
            body.append(score_row(name, results.score(name), group))
    head = head_of(results)
    cells = "".join(_cell(results.real.get(metric)) for metric in results.scores[0].metrics)
    real = f"<tr><th scope=row>real images<small>score of a perfect model</small></th>{cells}{'<td></td>' * 3}</tr>"
    scores = table(head, "".join(body) + real, "Scores of every way to sample")
    return f"{scores}\n{_explanation(results, settings, machine)}"


def head_of(results: Results) -> str:
    """Two header rows: spaces with their hashes, and their metrics with an arrow in the better direction."""
    metrics = list(results.scores[0].metrics)
    spaces, kinds = [], []
    # Adjacent metrics of one space share a header cell.
    for (space, sha), group in groupby(metrics, key=_space_of):
        names = list(group)
        code = f"<small><code>{escape(sha)}</code></small>" if sha else ""
        spaces.append(f'<th colspan="{len(names)}" style="text-align:center">{escape(space)}{code}</th>')
        kinds += [f"<th>{escape(_kind(name))}</th>" for name in names]
    # Columns that belong to no space span both rows.
    last = ("denoising error\N{NO-BREAK SPACE}↓", "GFLOPs\N{NO-BREAK SPACE}↓", "images/s\N{NO-BREAK SPACE}↑")
    other = "".join(f'<th rowspan="2">{name}</th>' for name in last)
    return f'<tr><th rowspan="2"></th>{"".join(spaces)}{other}</tr><tr>{"".join(kinds)}</tr>'


def _space_of(metric: str) -> tuple[str, str]:
    """(space, hash) of a metric: ("MNv2-pca64", "3fa9c2d1") for "FD-MNv2-pca64 [3fa9c2d1]"; Inception for FID."""
    # The hash is at the end, in brackets.
    name, _, sha = metric.removeprefix("std of ").partition(" [")
    space = name.removeprefix(f"{kind_of(metric)}-")
    return {"FID": "Inception", "KID": "Inception", "CMMD": "CLIP", "CLIPScore": "CLIP"}.get(name, space), sha[:-1]


def _kind(metric: str) -> str:
    """Header of its column: "FD ↓"."""
    kind = kind_of(metric)
    if metric.startswith("std of "):
        return "std"
    # FID, KID and CMMD keep their names: they imply the space.
    own = metric.split(" [")[0]
    arrow = "↑" if KINDS[kind][1] else "↓"
    return f"{own if own in ('FID', 'KID', 'CMMD') else kind}\N{NO-BREAK SPACE}{arrow}"


def _cell(value: float | None) -> str:
    return f"<td>{'' if value is None else number(value)}</td>"


def score_row(label: str, score: Score, group: str = "") -> str:
    """One row of the table; diverged images have no metrics."""
    error = score.denoising
    # One cell across all metrics.
    if score.diverged:
        cells = f'<td colspan="{len(score.metrics)}">{score.diverged} images diverged</td>'
    else:
        cells = "".join(_cell(value) for value in score.metrics.values())
    return (
        f'<tr class="{group}"><th scope=row>{escape(label)}<small>{escape(score.description)}</small></th>{cells}'
        f"<td>{number(error.mean)} ± {number(error.standard_error, 2)}</td><td>{number(score.gflops, missing='')}</td>"
        f"<td>{score.images_per_second:.3g}</td></tr>"
    )


def _explanation(r: Results, s: Mapping[str, Any], machine: str) -> str:
    """How each number of the table was measured."""
    # The metrics and spaces.
    steps = ", ".join(sorted({f"{x.steps} {x.method} steps, guidance {x.guidance_scale:g}" for x in r.scores}))
    kinds = dict.fromkeys(kind_of(metric) for metric in r.scores[0].metrics)
    meanings = "; ".join(f"<b>{escape(kind)}</b>: {escape(KINDS[kind][0])}" for kind in kinds)
    spaces = "; ".join(
        f"{escape(space.name)}: {space.dim} dimensions with {space.explained:.1%} of the real images' variance"
        for space in r.spaces
    )
    # Warnings, such as too few images.
    notes = "".join(f'<p class="warning">{escape(note)}.</p>' for note in r.notes)
    # One paragraph for the metrics, one for the denoising error, one for cost and speed.
    return (
        f"<p>{meanings}. {r.images} drawn images against {r.reference} real training images, in each space: {spaces}. "
        f"The code below a name is its network's hash; do not compare numbers with different hashes. "
        f"{steps}; seeds {s['seed']} to {s['seed'] + r.images - 1}; the prompts are the captions of {r.images} "
        f"training images outside of the {r.reference}, and the row <b>real images</b> scores these images. Every row "
        f"has the same prompts and noise.</p>{notes}"
        f"<p><b>Denoising error</b>: mean of |u − (ε − x₀)|² per latent value at {len(s['levels'])} times from "
        f"t = {s['levels'][0]:g} to {s['levels'][-1]:g}, on {r.held_out} held-out latents with their captions and the "
        "same noise in every row, without guidance; ± is its standard error over the latents. Its minimum is the "
        "variance of the clean given the noisy latent, not 0.</p>"
        "<p><b>GFLOPs</b>: 10⁹ floating-point operations per image, counted on four images. "
        f"<b>Images/s</b>: speed of drawing, with {r.workers} batches of at most {s['batch']} in parallel, on "
        f"{escape(machine)}.</p>"
    )
