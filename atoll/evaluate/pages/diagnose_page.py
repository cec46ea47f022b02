"""The alignment diagnostics as a section of an HTML page, and as JSON."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from typing import Any

from atoll.evaluate.diagnostics.experts import CHOSEN, ExpertErrors
from atoll.evaluate.diagnostics.results import Refinement, Trajectory
from atoll.evaluate.diagnostics.routers import BINS, RouterScores
from atoll.evaluate.diagnostics.trajectory import Diagnostics
from atoll.report.charts import Line, line_chart
from atoll.report.page import colour, number, table
from atoll.storage.artifact import finite

_TIME = "t (0: data, 1: noise)"
_CHOSEN, _OTHERS, _REFERENCE = colour(0), colour(1), "var(--soft)"


def diagnostics_json(diagnostics: Diagnostics) -> dict[str, Any]:
    """All numbers, also those that the page omits; non-finite numbers become null."""
    return {name: finite(part) for name, part in asdict(diagnostics).items() if part is not None}


def diagnostics_html(diagnostics: Diagnostics) -> str:
    """The content of a section of `atoll.report.page.document`."""
    parts = [
        "<p><cite>Expert-Data Alignment Governs Generation Quality in Decentralized Diffusion Models</cite> (arXiv "
        "2602.02685) finds that images are good if the current state is close to the data of the experts in use, not "
        f"if sampling is stable. Here an expert counts as chosen if it has at least {CHOSEN:.0%} of the weight, or the "
        "largest weight.</p>",
        _trajectory(diagnostics.trajectory),
    ]
    # Sections on held-out latents, if they were measured.
    if diagnostics.experts is not None:
        parts += [_errors(diagnostics.experts), _specialisation(diagnostics.experts)]
    if diagnostics.router is not None:
        parts += [_router(diagnostics.router), _confusion(diagnostics.router)]
    return "\n".join(parts)


def _trajectory(trajectory: Trajectory) -> str:
    """Distances, disagreement, sensitivity and refinement."""
    how = (
        f"{trajectory.images} images, {trajectory.steps} {escape(trajectory.method)} steps, guidance "
        f"{trajectory.guidance_scale:g}, routing {escape(trajectory.routing)}"
    )
    return "\n".join(
        [
            f"<h3>Along the trajectory</h3>\n<p>Measured before each step of {how}.</p>",
            _distances(trajectory),
            f'<div class="pair" style="margin:1rem 0">{_disagreement(trajectory)}{_sensitivity(trajectory)}</div>',
            _refinement(trajectory.refinement),
        ]
    )


def _distances(trajectory: Trajectory) -> str:
    """A chart for each kind of distance, and one for the weight on the nearest cluster's experts."""
    if not trajectory.distances:
        return ""
    # The distances for chosen and other experts.
    charts = []
    for distance in trajectory.distances:
        label = f"Distance of the x₀ estimate to the {distance.kind} of experts' clusters against the time t"
        chart = line_chart(
            [
                _line("chosen experts", trajectory.times, distance.chosen, _CHOSEN),
                _line("other experts", trajectory.times, distance.unchosen, _OTHERS),
                _line("nearest cluster", trajectory.times, distance.nearest, _REFERENCE, "4 4"),
            ],
            label,
            _TIME,
            f"RMS distance to the {distance.kind}",
            include=(0,),
        )
        # A sentence with the result, then what the chart shows.
        comparison = _lower("The chosen experts' data", distance.chosen, "the others'", distance.unchosen, "nearer")
        note = (
            f"{comparison} RMS distance per value between the x₀ estimate and the {distance.kind} of the experts' "
            f"clusters, in {escape(trajectory.space)}; for other experts, over the images that have any."
        )
        charts.append(_figure(chart, note))
    # The weight of experts that cover the nearest cluster.
    aligned = line_chart(
        [
            _line(distance.kind, trajectory.times, distance.aligned, colour(2 + index))
            for index, distance in enumerate(trajectory.distances)
        ],
        "Weight on the experts of the nearest cluster against the time t",
        _TIME,
        "weight on nearest cluster",
        include=(0, 1),
    )
    # The result as one number per kind of distance.
    means = ", ".join(f"{_mean(distance.aligned):.0%} (by {distance.kind})" for distance in trajectory.distances)
    note = f"Mean over the steps: the experts of the nearest cluster have {means} of the weight."
    return f'<div class="pair" style="margin:1rem 0">{"".join(charts)}{_figure(aligned, note)}</div>'


def _disagreement(trajectory: Trajectory) -> str:
    """The chart of angles between velocities."""
    disagreement = trajectory.disagreement
    chart = line_chart(
        [
            _line("chosen experts", trajectory.times, disagreement.chosen, _CHOSEN),
            _line("all experts", trajectory.times, disagreement.every, "currentColor", "4 4"),
        ],
        "Angle between experts' velocities against the time t",
        _TIME,
        "angle in degrees",
        include=(0,),
    )
    # A caption with the largest angle.
    known = [(angle, t) for angle, t in zip(disagreement.every, trajectory.times, strict=True) if math.isfinite(angle)]
    summary = "There are no two experts to compare."
    if known:
        angle, t = max(known)
        summary = f"Experts disagree most at t = {t:.2g}: by {angle:.3g}°."
    note = "Angle between two experts' velocities at the same state, mean over pairs and images."
    return _figure(chart, f"{summary} {note}")


def _sensitivity(trajectory: Trajectory) -> str:
    """The chart of a perturbation's growth."""
    sensitivity = trajectory.sensitivity
    chart = line_chart(
        [_line("growth of a perturbation", sensitivity.times, sensitivity.growth, "currentColor")],
        "Growth of a perturbation from the time t to the image",
        _TIME,
        "|Δx₀| / |Δxₜ|",
        include=(0, 1),
    )
    # Diverged images have no growth.
    known = [value for value in sensitivity.growth if math.isfinite(value)]
    summary = f"A perturbation grows by a factor of at most {number(max(known))}." if known else ""
    note = f"A random perturbation of {sensitivity.size:g} per value at time t, followed to the end; mean over images."
    return _figure(chart, f"{summary} {note}")


def _refinement(refinement: Refinement) -> str:
    """The table of differences between step counts."""
    # One column per pair of step counts.
    head = "".join(f"<th>{a} and {b} steps</th>" for a, b, _ in refinement.distances)
    cells = "".join(f"<td>{number(distance, missing='–')}</td>" for _, _, distance in refinement.distances)
    row = f"<tr><th scope=row>RMS difference per value</th>{cells}</tr>"
    return (
        f"{table(f'<tr><th></th>{head}</tr>', row, 'Distance between samples of different step counts')}\n"
        "<p>Root mean square difference of final latents from the same noise with different numbers of steps, mean "
        "over images. If it is small, finer steps would not change the image.</p>"
    )


def _errors(errors: ExpertErrors) -> str:
    """The chart of errors by noise level."""
    chart = line_chart(
        [
            _line("chosen experts", errors.levels, errors.chosen, _CHOSEN),
            _line("other experts", errors.levels, errors.unchosen, _OTHERS),
            _line("ensemble", errors.levels, errors.fused, "currentColor", "4 4"),
        ],
        "Denoising error of chosen and other experts against the time t",
        _TIME,
        "E|u − (ε − x₀)|² per value",
        log_y=True,
    )
    # A sentence with the result.
    comparison = _lower("The chosen experts", errors.chosen, "the others", errors.unchosen, "more accurate")
    note = (
        f"Each expert alone on {errors.count} held-out latents with the same noise; chosen experts weighted as in the "
        "ensemble."
    )
    return f"<h3>Chosen and other experts on held-out latents</h3>\n{_figure(chart, f'{comparison} {note}')}"


def _specialisation(errors: ExpertErrors) -> str:
    """The table of errors by cluster and expert."""
    # One row per cluster, shaded by rank within the row.
    rows = []
    for k, row in enumerate(errors.matrix):
        if not errors.counts[k]:
            continue
        # The lowest error of the row is the darkest cell.
        low, high = min(row), max(row)
        cells = [
            _cell(
                f"{number(value, missing='–')} ± {number(error, 2, missing='–')}",
                (high - value) / (high - low) if high > low else 0.0,
                k in clusters,
            )
            for value, error, clusters in zip(row, errors.matrix_error[k], errors.clusters, strict=True)
        ]
        rows.append(f"<tr><th scope=row>cluster {k}<small>{errors.counts[k]} latents</small></th>{''.join(cells)}</tr>")
    # Two rows of ratios.
    for label, ratios in (
        ("own clusters / other clusters", errors.over_other_clusters),
        ("own clusters: this expert / the others", errors.over_other_experts),
    ):
        cells = [f"<td>{number(ratio, missing='–')}</td>" for ratio in ratios]
        rows.append(f"<tr><th scope=row>{label}</th>{''.join(cells)}</tr>")
    # The summary.
    known = [ratio for ratio in errors.over_other_experts if math.isfinite(ratio)]
    better = sum(ratio < 1 for ratio in known)
    head = "".join(f"<th>{escape(name)}</th>" for name in errors.names)
    return (
        "<h3>Specialisation</h3>\n"
        f"<p>{better} of {len(known)} experts are more accurate in their own clusters than the experts of other "
        "clusters are there. Error of each expert (column) in each cluster (row), mean over noise levels, ± standard "
        "error; darker cells are lower in their row; the expert's own clusters are bold.</p>\n"
        f"{table(f'<tr><th></th>{head}</tr>', ''.join(rows), 'Error of each expert in each cluster')}"
    )


def _router(scores: RouterScores) -> str:
    """The charts of accuracy, cross-entropy and calibration error."""
    # Each against the value without a router, or with a perfect one.
    majority = [scores.majority] * len(scores.levels)
    accuracy = line_chart(
        [
            _line("accuracy", scores.levels, scores.accuracy, _CHOSEN),
            _line("always the largest cluster", scores.levels, majority, _REFERENCE, "4 4"),
        ],
        "The router's accuracy against the time t",
        _TIME,
        "top-1 accuracy",
        include=(0, 1),
    )
    cross_entropy = line_chart(
        [
            _line("cross-entropy", scores.levels, scores.cross_entropy, _CHOSEN),
            _line("cluster frequencies", scores.levels, [scores.entropy] * len(scores.levels), _REFERENCE, "4 4"),
        ],
        "The router's cross-entropy against the time t",
        _TIME,
        "nats",
        include=(0,),
    )
    ece = line_chart(
        [
            _line("calibration error", scores.levels, scores.ece, _CHOSEN),
            _line("expected if calibrated", scores.levels, scores.ece_floor, _REFERENCE, "4 4"),
        ],
        "The router's calibration error against the time t",
        _TIME,
        "ECE",
        include=(0,),
    )
    # The captions.
    accuracies = _range(scores.levels, scores.accuracy)
    notes = (
        f"The router predicts the cluster of {accuracies}. On {scores.count} noisy held-out latents.",
        "Mean of −log p of the true cluster.",
        f"Expected difference between confidence and accuracy, in {BINS} bins (Guo et al. 2017). With {scores.count} "
        "latents, calibrated probabilities would also score the dashed line.",
    )
    figures = "".join(_figure(c, note) for c, note in zip((accuracy, cross_entropy, ece), notes, strict=True))
    return f'<h3>Router</h3>\n<div class="pair" style="margin:1rem 0">{figures}</div>'


def _confusion(scores: RouterScores) -> str:
    """The table of true and predicted clusters at the middle noise level."""
    # The level nearest to t = 0.5.
    middle = min(range(len(scores.levels)), key=lambda index: abs(scores.levels[index] - 0.5))
    rows = []
    for k, row in enumerate(scores.confusion[middle]):
        # A cluster without latents has no fractions.
        total = sum(row)
        fractions = [count / total if total else 0.0 for count in row]
        texts = [f"{fraction:.0%}" if total else "–" for fraction in fractions]
        cells = "".join(_cell(texts[j], fraction, k == j) for j, fraction in enumerate(fractions))
        rows.append(f"<tr><th scope=row>cluster {k}<small>{total} latents</small></th>{cells}</tr>")
    head = "".join(f"<th>{k}</th>" for k in range(len(scores.confusion[middle])))
    return (
        f"<p>At t = {scores.levels[middle]:g}, {scores.accuracy[middle]:.0%} of the latents are assigned to their own "
        "cluster. Row: the true cluster; column: the router's most probable one; as fractions of the row.</p>\n"
        f"{table(f'<tr><th></th>{head}</tr>', ''.join(rows), 'True clusters and those the router predicts')}"
    )


def _cell(text: str, strength: float, own: bool) -> str:
    """A shaded table cell. strength: 0 to 1; own: bold."""
    # No more than 45 % of the colour, so that the text stays readable.
    percent = 45 * strength if math.isfinite(strength) else 0.0
    weight = ";font-weight:700" if own else ""
    return f'<td style="background:color-mix(in srgb,var(--c0) {percent:.0f}%,transparent){weight}">{text}</td>'


def _line(name: str, x: Sequence[float], y: Sequence[float], css: str, dash: str = "") -> Line:
    """A line with rounded values, so that values that differ only by rounding errors give a flat line."""
    return Line(name, x, [round(value, 9) for value in y], css, dash)


def _figure(chart: str, note: str) -> str:
    return f"<figure>{chart}<figcaption>{note}</figcaption></figure>"


def _lower(one: str, ones: Sequence[float], other: str, others: Sequence[float], better: str) -> str:
    """At how many times the first series is lower than the second, and both means, as a sentence."""
    # Only times at which both are finite.
    both = [(a, b) for a, b in zip(ones, others, strict=True) if math.isfinite(a) and math.isfinite(b)]
    if not both:
        return "Every expert is chosen, so there are no others to compare with."
    lower = sum(a < b for a, b in both)
    means = [number(sum(column) / len(both)) for column in zip(*both, strict=True)]
    return f"{one} are {better} than {other} at {lower} of {len(both)} times: {means[0]} against {means[1]} on average."


def _range(levels: Sequence[float], accuracy: Sequence[float]) -> str:
    """Accuracy at the lowest and the highest noise level, as text."""
    first, last = min(levels), max(levels)
    at = dict(zip(levels, accuracy, strict=True))
    return f"{at[first]:.0%} of the latents at t = {first:g} and of {at[last]:.0%} at t = {last:g}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
