"""The alignment diagnostics as a part of an HTML page, and as JSON."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from typing import Any

from atoll.evaluate.diagnostics.experts import CHOSEN, ExpertErrors
from atoll.evaluate.diagnostics.routers import BINS, RouterScores
from atoll.evaluate.diagnostics.trajectory import Diagnostics, Refinement, Trajectory
from atoll.report.charts import Line, line_chart
from atoll.report.page import colour, number, table
from atoll.storage.artifact import finite

_TIME = "t (0: data, 1: noise)"
_CHOSEN, _OTHERS, _REFERENCE = colour(0), colour(1), "var(--soft)"


def diagnostics_json(found: Diagnostics) -> dict[str, Any]:
    """The page's numbers and all that it leaves out. What is not finite is null."""
    return {name: finite(part) for name, part in asdict(found).items() if part is not None}


def diagnostics_html(found: Diagnostics) -> str:
    """What stands in a section of `atoll.report.page.document`."""
    parts = [
        "<p><cite>Expert-Data Alignment Governs Generation Quality in Decentralized Diffusion Models</cite> (arXiv "
        "2602.02685) finds images good where the experts asked are those whose data the current state belongs to, "
        f"not where sampling is most stable. Here, an expert is chosen where it has at least {CHOSEN:.0%} of the "
        "weight, or the most of all.</p>",
        _trajectory(found.trajectory),
    ]
    if found.experts is not None:
        parts += [_errors(found.experts), _specialisation(found.experts)]
    if found.router is not None:
        parts += [_router(found.router), _confusion(found.router)]
    return "\n".join(parts)


def _trajectory(seen: Trajectory) -> str:
    how = (
        f"{seen.images} images, {seen.steps} {escape(seen.method)} steps, guidance {seen.guidance_scale:g}, "
        f"routing {escape(seen.routing)}"
    )
    return "\n".join(
        [
            f"<h3>Along the trajectory</h3>\n<p>Measured before each step of {how}.</p>",
            _distances(seen),
            f'<div class="pair" style="margin:1rem 0">{_disagreement(seen)}{_sensitivity(seen)}</div>',
            _refinement(seen.refinement),
        ]
    )


def _distances(seen: Trajectory) -> str:
    """One chart for each kind of distance, and one of the weight on the nearest cluster's experts."""
    if not seen.distances:
        return ""
    charts = []
    for found in seen.distances:
        label = f"Distance of the x₀-estimate to the {found.kind} of experts' clusters against the time t"
        chart = line_chart(
            [
                _line("chosen experts", seen.times, found.chosen, _CHOSEN),
                _line("other experts", seen.times, found.unchosen, _OTHERS),
                _line("nearest cluster", seen.times, found.nearest, _REFERENCE, "4 4"),
            ],
            label,
            _TIME,
            f"RMS distance to the {found.kind}",
            include=(0,),
        )
        told = _lower("The chosen experts' data", found.chosen, "the others'", found.unchosen, "nearer")
        note = (
            f"{told} RMS distance per value between the x₀-estimate and the {found.kind} of the experts' clusters, in "
            f"{escape(seen.space)}; of the others, over the images that have any."
        )
        charts.append(_figure(chart, note))
    aligned = line_chart(
        [_line(found.kind, seen.times, found.aligned, colour(2 + index)) for index, found in enumerate(seen.distances)],
        "Weight on the experts of the nearest cluster against the time t",
        _TIME,
        "weight on nearest cluster",
        include=(0, 1),
    )
    means = ", ".join(f"{_mean(found.aligned):.0%} (by {found.kind})" for found in seen.distances)
    note = f"On average over the steps, the experts of the nearest cluster have {means} of the weight."
    return f'<div class="pair" style="margin:1rem 0">{"".join(charts)}{_figure(aligned, note)}</div>'


def _disagreement(seen: Trajectory) -> str:
    found = seen.disagreement
    chart = line_chart(
        [
            _line("chosen experts", seen.times, found.chosen, _CHOSEN),
            _line("all experts", seen.times, found.every, "currentColor", "4 4"),
        ],
        "Angle between experts' velocities against the time t",
        _TIME,
        "angle in degrees",
        include=(0,),
    )
    known = [(angle, t) for angle, t in zip(found.every, seen.times, strict=True) if math.isfinite(angle)]
    told = "There are no two experts to compare."
    if known:
        angle, t = max(known)
        told = f"Experts disagree most at t = {t:.2g}: by {angle:.3g}°."
    note = "Angle between two experts' velocities at the same state, mean over pairs and images."
    return _figure(chart, f"{told} {note}")


def _sensitivity(seen: Trajectory) -> str:
    found = seen.sensitivity
    chart = line_chart(
        [_line("growth of a perturbation", found.times, found.growth, "currentColor")],
        "Growth of a perturbation from the time t to the image",
        _TIME,
        "|Δx₀| / |Δxₜ|",
        include=(0, 1),
    )
    known = [value for value in found.growth if math.isfinite(value)]
    told = f"A perturbation grows to at most {number(max(known))} times its size." if known else ""
    note = f"A random perturbation of {found.size:g} per value at time t, followed to the end; mean over images."
    return _figure(chart, f"{told} {note}")


def _refinement(found: Refinement) -> str:
    head = "".join(f"<th>{a} and {b} steps</th>" for a, b, _ in found.distances)
    cells = "".join(f"<td>{number(distance, missing='–')}</td>" for _, _, distance in found.distances)
    row = f"<tr><th scope=row>RMS difference per value</th>{cells}</tr>"
    return (
        f"{table(f'<tr><th></th>{head}</tr>', row, 'Distance between samples of different step counts')}\n"
        "<p>How far apart the final latents are that come from the same noise in different numbers of steps, mean over "
        "images. Where this is small, finer steps would not change the image.</p>"
    )


def _errors(found: ExpertErrors) -> str:
    chart = line_chart(
        [
            _line("chosen experts", found.levels, found.chosen, _CHOSEN),
            _line("other experts", found.levels, found.unchosen, _OTHERS),
            _line("ensemble", found.levels, found.fused, "currentColor", "4 4"),
        ],
        "Denoising error of chosen and other experts against the time t",
        _TIME,
        "E|u − (ε − x₀)|² per value",
        log_y=True,
    )
    told = _lower("The chosen experts", found.chosen, "the others", found.unchosen, "more accurate")
    note = (
        f"Each expert alone on {found.count} held-out latents with the same noise; the chosen ones weighted as the "
        "ensemble weighs them."
    )
    return f"<h3>Chosen and other experts on held-out latents</h3>\n{_figure(chart, f'{told} {note}')}"


def _specialisation(found: ExpertErrors) -> str:
    rows = []
    for k, row in enumerate(found.matrix):
        if not found.counts[k]:
            continue
        low, high = min(row), max(row)
        cells = [
            _cell(
                f"{number(value, missing='–')} ± {number(error, 2, missing='–')}",
                (high - value) / (high - low) if high > low else 0.0,
                k in clusters,
            )
            for value, error, clusters in zip(row, found.matrix_error[k], found.clusters, strict=True)
        ]
        rows.append(f"<tr><th scope=row>cluster {k}<small>{found.counts[k]} latents</small></th>{''.join(cells)}</tr>")
    for label, ratios in (
        ("own clusters / other clusters", found.over_other_clusters),
        ("own clusters: this expert / the others", found.over_other_experts),
    ):
        cells = [f"<td>{number(ratio, missing='–')}</td>" for ratio in ratios]
        rows.append(f"<tr><th scope=row>{label}</th>{''.join(cells)}</tr>")
    known = [ratio for ratio in found.over_other_experts if math.isfinite(ratio)]
    better = sum(ratio < 1 for ratio in known)
    head = "".join(f"<th>{escape(name)}</th>" for name in found.names)
    return (
        "<h3>Specialisation</h3>\n"
        f"<p>{better} of {len(known)} experts are more accurate in their own clusters than the experts of other "
        "clusters are there. Error of each expert (column) in each cluster (row), mean over noise levels, ± standard "
        "error; the darker, the lower in its row; bold: the expert's own.</p>\n"
        f"{table(f'<tr><th></th>{head}</tr>', ''.join(rows), 'Error of each expert in each cluster')}"
    )


def _router(found: RouterScores) -> str:
    accuracy = line_chart(
        [
            _line("accuracy", found.levels, found.accuracy, _CHOSEN),
            _line("always the largest cluster", found.levels, [found.majority] * len(found.levels), _REFERENCE, "4 4"),
        ],
        "The router's accuracy against the time t",
        _TIME,
        "top-1 accuracy",
        include=(0, 1),
    )
    surprise = line_chart(
        [
            _line("cross-entropy", found.levels, found.cross_entropy, _CHOSEN),
            _line("the clusters' shares alone", found.levels, [found.entropy] * len(found.levels), _REFERENCE, "4 4"),
        ],
        "The router's cross-entropy against the time t",
        _TIME,
        "nats",
        include=(0,),
    )
    ece = line_chart(
        [
            _line("calibration error", found.levels, found.ece, _CHOSEN),
            _line("expected of true probabilities", found.levels, found.ece_floor, _REFERENCE, "4 4"),
        ],
        "The router's calibration error against the time t",
        _TIME,
        "ECE",
        include=(0,),
    )
    shares = _range(found.levels, found.accuracy)
    notes = (
        f"The router finds the cluster of {shares}. On {found.count} held-out latents with noise added.",
        "Mean of −log p of the true cluster.",
        f"Expected difference between its confidence and its accuracy, in {BINS} bins (Guo et al. 2017). With "
        f"{found.count} latents true probabilities too would score the dashed line.",
    )
    figures = "".join(_figure(c, note) for c, note in zip((accuracy, surprise, ece), notes, strict=True))
    return f'<h3>Router</h3>\n<div class="pair" style="margin:1rem 0">{figures}</div>'


def _confusion(found: RouterScores) -> str:
    middle = min(range(len(found.levels)), key=lambda index: abs(found.levels[index] - 0.5))
    rows = []
    for k, row in enumerate(found.confusion[middle]):
        total = sum(row)
        shares = [count / total if total else 0.0 for count in row]
        cells = "".join(_cell(f"{share:.0%}" if total else "–", share, k == j) for j, share in enumerate(shares))
        rows.append(f"<tr><th scope=row>cluster {k}<small>{total} latents</small></th>{cells}</tr>")
    head = "".join(f"<th>{k}</th>" for k in range(len(found.confusion[middle])))
    return (
        f"<p>At t = {found.levels[middle]:g}, {found.accuracy[middle]:.0%} of the latents are taken for their own "
        "cluster. Row: the true cluster; column: the router's most probable one; in shares of the row.</p>\n"
        f"{table(f'<tr><th></th>{head}</tr>', ''.join(rows), 'Clusters the router takes latents for')}"
    )


def _cell(text: str, strength: float, own: bool) -> str:
    """A shaded cell; strength from 0 to 1."""
    share = 45 * strength if math.isfinite(strength) else 0.0
    weight = ";font-weight:700" if own else ""
    return f'<td style="background:color-mix(in srgb,var(--c0) {share:.0f}%,transparent){weight}">{text}</td>'


def _line(name: str, x: Sequence[float], y: Sequence[float], css: str, dash: str = "") -> Line:
    """Rounded: a chart whose values differ by rounding errors alone is flat."""
    return Line(name, x, [round(value, 9) for value in y], css, dash)


def _figure(chart: str, note: str) -> str:
    return f"<figure>{chart}<figcaption>{note}</figcaption></figure>"


def _lower(one: str, ones: Sequence[float], other: str, others: Sequence[float], better: str) -> str:
    """At how many of the times, where there are both, the first are lower; and the means."""
    both = [(a, b) for a, b in zip(ones, others, strict=True) if math.isfinite(a) and math.isfinite(b)]
    if not both:
        return "No expert is left unchosen, so there is nothing to compare with."
    lower = sum(a < b for a, b in both)
    means = [number(sum(column) / len(both)) for column in zip(*both, strict=True)]
    return f"{one} are {better} than {other} at {lower} of {len(both)} times: {means[0]} against {means[1]} on average."


def _range(levels: Sequence[float], accuracy: Sequence[float]) -> str:
    first, last = min(levels), max(levels)
    at = dict(zip(levels, accuracy, strict=True))
    return f"{at[first]:.0%} of the latents at t = {first:g} and of {at[last]:.0%} at t = {last:g}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
