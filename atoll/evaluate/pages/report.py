"""The report of a run as one self-contained HTML page, and as JSON."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from html import escape
from typing import Any

from torch import Tensor

from atoll.evaluate.diagnostics.trajectory import Diagnostics
from atoll.evaluate.pages.diagnose_page import diagnostics_html, diagnostics_json
from atoll.evaluate.pages.table import head_of, numbers, score_row
from atoll.evaluate.types import Results
from atoll.report.charts import Line, legend, line_chart
from atoll.report.page import colour, document, image_sheet, number, table, weight_strip
from atoll.storage.artifact import finite

FORMAT = 1


@dataclass(frozen=True)
class Grid:
    """Images of the prompts.

    Attributes:
        prompts: P.
        seeds: S, one column each.
        rows: (variant, images [P, S, c, h, w]).
        real: for each prompt, the data's image with this caption [1, c, h, w], or None.
        caption: text above the images.
        keys: of the rows, in the evaluation's cache.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    rows: tuple[tuple[str, Tensor], ...]
    real: tuple[Tensor | None, ...]
    caption: str
    keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class Usage:
    """Routing trace: weights [P, T, E] of the experts at the times [T], for each prompt's first seed."""

    routing: str
    times: tuple[float, ...]
    weights: Tensor


@dataclass(frozen=True)
class ExpertInfo:
    """An expert for the report, and the slope of its calibration at times t (both empty without a calibration)."""

    name: str
    objective: str
    clusters: tuple[int, ...]
    t: tuple[float, ...] = ()
    slope: tuple[float, ...] = ()


@dataclass(frozen=True)
class ClusterInfo:
    """A cluster for the report.

    Attributes:
        number: of the cluster.
        count: images.
        fraction: of all images.
        images: a random sample [n, c, h, w].
        words: (word, fraction of its captions, fraction of all captions), most distinctive first.
    """

    number: int
    count: int
    fraction: float
    images: Tensor
    words: tuple[tuple[str, float, float], ...]


@dataclass(frozen=True)
class Report:
    """The content of the page.

    Attributes:
        provenance: versions, machine, date, seconds.
        settings: of the evaluation.
        hashes: (file or space, sha256).
        groups: names of scores: "ensemble", "expert", "monolith", or "sweep".
        alignment: (label, name of the score), in order.
        clustered_by: feature and method of the clustering, as text.
        store: the evaluation's cache, relative to the report.
        routing: the ensemble's default.
        diagnostics: of the alignment of experts and data; None unless requested.
    """

    title: str
    provenance: dict[str, Any]
    settings: dict[str, Any]
    hashes: tuple[tuple[str, str], ...]
    results: Results
    groups: dict[str, tuple[str, ...]]
    alignment: tuple[tuple[str, str], ...]
    experts: tuple[ExpertInfo, ...]
    grid: Grid
    usages: tuple[Usage, ...]
    clusters: tuple[ClusterInfo, ...]
    clustered_by: str
    store: str = ""
    routing: str = ""
    diagnostics: Diagnostics | None = None


def to_json(report: Report) -> dict[str, Any]:
    """The page's numbers, without its images; non-finite numbers become null."""
    # Provenance and scores first, then clusters, images and routing traces.
    value = {
        "format": FORMAT,
        "kind": "report",
        "title": report.title,
        "provenance": report.provenance,
        "settings": report.settings,
        "hashes": dict(report.hashes),
        "results": {
            **asdict(report.results),
            "frechet_name": report.results.frechet_name,
            "floor": report.results.floor,
            "scores": [{**asdict(score), "frechet": score.frechet} for score in report.results.scores],
        },
        "groups": report.groups,
        "alignment": dict(report.alignment),
        "experts": [asdict(expert) for expert in report.experts],
        "clusters": [
            {"cluster": c.number, "count": c.count, "fraction": c.fraction, "words": c.words} for c in report.clusters
        ],
        "clustered_by": report.clustered_by,
        "diagnostics": diagnostics_json(report.diagnostics) if report.diagnostics else None,
        "store": report.store,
        "routing": report.routing,
        "grid": {
            "prompts": report.grid.prompts,
            "seeds": report.grid.seeds,
            "keys": dict(zip((name for name, _ in report.grid.rows), report.grid.keys, strict=False)),
        },
        "usage": [
            {
                "routing": usage.routing,
                "prompts": report.grid.prompts,
                "times": usage.times,
                "weights": [[[round(w, 4) for w in step] for step in p] for p in usage.weights.tolist()],
            }
            for usage in report.usages
        ],
    }
    # JSON has no NaN or infinity.
    result: dict[str, Any] = finite(value)
    return result


def to_html(report: Report) -> str:
    """The page as one file, without scripts; sections without content are left out."""
    sections = [
        ("Images", _images(report)),
        ("Numbers", numbers(report.results, report.groups, report.settings, str(report.provenance["machine"]))),
        ("Denoising error by noise level", _by_level(report)),
        ("Clusters", _clusters(report)),
        *([("Calibration and alignment", _alignment(report))] if report.alignment else []),
        *([("Routing by step", _usage(report))] if report.usages else []),
        *([("Experts and their data", diagnostics_html(report.diagnostics))] if report.diagnostics else []),
        ("How this was provenance", _settings(report)),
    ]
    return document(report.title, _lead(report), sections)


def _lead(report: Report) -> str:
    """The first paragraph: the model and its scores."""
    # A sweep may have many variants: show the best three.
    # The models to name in the first sentence.
    scores = {score.name: score for score in report.results.scores}
    swept_names = sorted(report.groups.get("sweep", ()), key=lambda name: scores[name].frechet or math.inf)
    names = [*report.groups.get("ensemble", ()), *swept_names[:3], *report.groups.get("monolith", ())]
    distances = "; ".join(f"{escape(name)}: {number(scores[name].frechet)}" for name in names)
    return (
        f"<p>{len(report.experts)} experts, trained separately on {len(report.clusters) or 'their'} clusters, sampled "
        f"as one model. Fréchet distance ({report.results.frechet_name}, lower is better): {distances}; between two "
        f"sets of real images: {number(report.results.floor)}.</p>"
    )


def _images(report: Report) -> str:
    """A card per prompt, with a row of images per variant and the data's own image."""
    grid, cards = report.grid, []
    for p, prompt in enumerate(grid.prompts):
        rows = []
        for name, images in grid.rows:
            alt = f"{len(images[p])} images of “{prompt}” by {name}"
            # One row of images per variant.
            rows.append(_strip(name, image_sheet(images[p], len(images[p])), alt, len(images[p]), len(images[p])))
        # The data's image, if a caption equals the prompt.
        real = grid.real[p]
        if real is not None:
            alt = f"the data's own image of “{prompt}”"
            rows.append(_strip("data", image_sheet(real, len(real)), alt, len(real), len(grid.seeds)))
        cards.append(f'<figure class="card">{"".join(rows)}<figcaption>{escape(prompt)}</figcaption></figure>')
    return (
        f"<p>One row per variant, one column per seed ({_listed(map(str, grid.seeds))}); all images of a column start "
        f"from the same noise. {escape(grid.caption)}</p>\n"
        f'<div class="cards">{"".join(cards)}</div>'
    )


def _strip(name: str, uri: str, alt: str, count: int, columns: int) -> str:
    """A labelled row of images; `columns` sets the width of one image."""
    image = f'<img src="{uri}" alt="{escape(alt)}" style="width:{100 * count / columns:.4g}%">'
    return f'<div class="row"><span>{escape(name)}</span><div>{image}</div></div>'


def _by_level(report: Report) -> str:
    """The denoising error by noise level, as a chart and as a table."""
    r = report.results
    # One line per variant of the report's groups.
    names = [name for group in report.groups.values() for name in group]
    chart = line_chart(
        _level_lines(report),
        "Denoising error of each variant against the time t",
        "t (0: data, 1: noise)",
        "E|u − (ε − x₀)|² per value",
        log_y=True,
    )
    # The same numbers as a table.
    levels = r.scores[0].denoising.levels
    head = "".join(f"<th>{t:.2g}</th>" for t in levels)
    rows = "".join(
        f"<tr><th scope=row>{escape(name)}</th>"
        + "".join(f"<td>{number(e)}</td>" for e in r.score(name).denoising.by_level)
        + "</tr>"
        for name in names
    )
    values = table(f"<tr><th>t</th>{head}</tr>", rows, "Denoising error of each variant at each noise level")
    return f"<figure>{chart}<figcaption>As in the table above, one line per variant.</figcaption></figure>\n{values}"


def _level_lines(report: Report) -> list[Line]:
    """Solid or dashed lines in ink for ensembles, grey for the monolith, a colour for each expert."""
    lines = []
    for index, name in enumerate(report.groups.get("expert", ())):
        error = report.results.score(name).denoising
        lines.append(Line(name, error.levels, error.by_level, colour(index), width=1.5))
    # Wide, so that it stays visible below other lines.
    for name in report.groups.get("monolith", ()):
        error = report.results.score(name).denoising
        lines.append(Line(name, error.levels, error.by_level, "var(--soft)", width=4))
    # Different dashes for different routings.
    for name, dash in zip(report.groups.get("ensemble", ()), ("2 4", "7 4", "", "1 6"), strict=False):
        error = report.results.score(name).denoising
        lines.append(Line(name, error.levels, error.by_level, "currentColor", dash))
    return lines


def _clusters(report: Report) -> str:
    """A card per cluster: its experts, random images and distinctive words."""
    cards = []
    for c in report.clusters:
        # Experts of the cluster, with the colour that they have in the charts.
        owners = [(i, e) for i, e in enumerate(report.experts) if c.number in e.clusters]
        experts = "".join(f"<li>{_key(i)}<b>{escape(e.name)}</b>: {escape(e.objective)}</li>" for i, e in owners)
        words = _listed(f"{escape(w)} ({own:.0%}, overall {of_all:.0%})" for w, own, of_all in c.words)
        alt = f"{len(c.images)} images of cluster {c.number}"
        cards.append(
            f"<figure><h3>Cluster {c.number}: {c.count} images, {c.fraction:.1%}</h3>"
            f'<img class="sheet" src="{image_sheet(c.images, 8)}" alt="{alt}">'
            f'<figcaption><ul class="legend">{experts or "<li>no expert</li>"}</ul>Words: {words}</figcaption></figure>'
        )
    # A run with an ensemble and encoded/ alone can be evaluated too.
    if not cards:
        return "<p>The run has no clusters.</p>"
    return (
        f"<p>{escape(report.clustered_by)} Random images; the most distinctive words (fraction of the cluster's "
        f'captions, fraction of all captions).</p>\n<div class="cards">{"".join(cards)}</div>'
    )


def _alignment(report: Report) -> str:
    """Each expert's calibration, and the scores of every alignment."""
    # The slopes of the calibrations.
    slopes = [
        Line(f"{e.name} ({e.objective})", e.t, e.slope, colour(i)) for i, e in enumerate(report.experts) if e.slope
    ]
    label = "Slope of each expert's calibration against the time t"
    chart = line_chart(slopes, label, "t (0: data, 1: noise)", "slope s", include=(0, 1))
    # The scores under each alignment.
    rows = "".join(score_row(label, report.results.score(name)) for label, name in report.alignment)
    head = head_of(report.results)
    note = (
        "The slope s says how far to trust an expert's x₀, measured on held-out latents of its own cluster: x₀ is "
        "replaced by m + s (x₀ − m), where m is the cluster's mean. 1: fully; 0: only the mean."
    )
    figure = f"<figure>{chart}<figcaption>{note}</figcaption></figure>"
    # A chart without lines would only show its axes.
    if not slopes:
        figure = "<p>No expert has a calibration.</p>"
    return (
        f"{figure}\n<p>The same ensemble with four ways to convert its experts to the common path. <b>native</b>: "
        "HDDM's formulas (Eqs. 5–8) with its hand-set safeguards; <b>snr</b>: evaluation at matched log-SNR, which is "
        "exact for exact experts. Measured as in the first table.</p>\n"
        f"{table(head, rows, 'Scores of every alignment')}"
    )


def _usage(report: Report) -> str:
    """A strip of the experts' weights by step, for each prompt and routing."""
    columns = "".join(f"<th>{escape(usage.routing)}</th>" for usage in report.usages)
    rows = []
    for p, prompt in enumerate(report.grid.prompts):
        # The expert with the largest mean weight names the strip for screen readers.
        cells = []
        for usage in report.usages:
            mean_weights = usage.weights[p].mean(0)
            largest = int(mean_weights.argmax())
            name = report.experts[largest].name
            label = f"{usage.routing}, “{prompt}”: mostly {name}, {float(mean_weights[largest]):.0%}"
            cells.append(f"<td>{weight_strip(usage.weights[p], label)}</td>")
        rows.append(f"<tr><th scope=row>{escape(prompt)}</th>{''.join(cells)}</tr>")
    names = legend([Line(e.name, (), (), colour(i), width=8) for i, e in enumerate(report.experts)])
    steps = len(report.usages[0].times) if report.usages else 0
    # The legend, and how to read the strips.
    return (
        f"<p>For each prompt's first image: one column per step ({steps}, from noise at the left, t = 1, to the "
        f"image at the right, t = 0); the height of a colour is the expert's weight.</p>{names}\n"
        f"{table(f'<tr><th></th>{columns}</tr>', ''.join(rows), 'Weights of the experts by step', 'usage')}"
    )


def _settings(report: Report) -> str:
    """Provenance, settings and hashes."""
    # Everything that is needed to repeat the evaluation.
    rows = [*report.provenance.items(), *report.settings.items()]
    values = "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(_plain(v))}</dd>" for k, v in rows)
    hashes = "".join(f"<dt>{escape(what)}</dt><dd><code>{escape(sha)}</code></dd>" for what, sha in report.hashes)
    return f"<dl>{values}</dl>\n<h3>sha256</h3>\n<dl>{hashes}</dl>"


def _key(index: int) -> str:
    return f'<i style="background:{colour(index)}"></i>'


def _plain(value: Any) -> str:
    return "; ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _listed(items: Iterable[str]) -> str:
    return ", ".join(items)
