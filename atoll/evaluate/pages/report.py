"""The report of a run as one HTML page that needs nothing else, and as JSON."""

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
    """Images of the prompts. rows: (variant, images [P, S, c, h, w]); real: for each prompt, the data's own image
    [1, c, h, w] where a caption equals it, else None."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    rows: tuple[tuple[str, Tensor], ...]
    real: tuple[Tensor | None, ...]
    made_by: str
    keys: tuple[str, ...] = ()  # of the rows, in the evaluation's store


@dataclass(frozen=True)
class Usage:
    """Who was asked when, for each prompt's first seed: weights [P, T, E] at the times [T]."""

    routing: str
    times: tuple[float, ...]
    weights: Tensor


@dataclass(frozen=True)
class ExpertInfo:
    """An expert in words, and the slope of its calibration at the times t (both empty where it has none)."""

    name: str
    objective: str
    clusters: tuple[int, ...]
    t: tuple[float, ...] = ()
    slope: tuple[float, ...] = ()


@dataclass(frozen=True)
class ClusterInfo:
    """What a cluster holds. words: (word, share of its captions, share of all captions), most telling first."""

    number: int
    count: int
    share: float
    images: Tensor
    words: tuple[tuple[str, float, float], ...]


@dataclass(frozen=True)
class Report:
    """All that the page shows.

    Attributes:
        made: what made it: versions, machine, date, seconds.
        hashes: (what, sha256).
        groups: names of scores: "ensemble", "expert", "monolith".
        alignment: (label, name of the score) in the order shown.
        clustered_by: the feature and method of the clustering, in words.
        store: where what was measured is kept, seen from the report's directory.
        routing: the ensemble's own.
        diagnostics: of the alignment of experts and data, where they were asked for.
    """

    title: str
    made: dict[str, Any]
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
    """The page's numbers, without its images. What is not finite is null."""
    value = {
        "format": FORMAT,
        "kind": "report",
        "title": report.title,
        "made": report.made,
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
            {"cluster": c.number, "count": c.count, "share": c.share, "words": c.words} for c in report.clusters
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
    return finite(value)


def to_html(report: Report) -> str:
    """The page: no scripts, no files beside it."""
    sections = [
        ("Images", _images(report)),
        ("Numbers", numbers(report.results, report.groups, report.settings, str(report.made["machine"]))),
        ("Denoising error by noise level", _by_level(report)),
        ("Clusters", _clusters(report)),
        *([("Calibration and alignment", _alignment(report))] if report.alignment else []),
        *([("Which expert was used when", _usage(report))] if report.usages else []),
        *([("Experts and their data", diagnostics_html(report.diagnostics))] if report.diagnostics else []),
        ("How this was made", _made(report)),
    ]
    return document(report.title, _lead(report), sections)


def _lead(report: Report) -> str:
    """The first sentence: what this is, and the answer."""
    scores = {score.name: score for score in report.results.scores}
    swept = sorted(report.groups.get("sweep", ()), key=lambda name: scores[name].frechet or math.inf)
    names = [*report.groups.get("ensemble", ()), *swept[:3], *report.groups.get("monolith", ())]
    told = "; ".join(f"{escape(name)}: {number(scores[name].frechet)}" for name in names)
    return (
        f"<p>{len(report.experts)} experts, trained apart on {len(report.clusters) or 'their'} clusters, sampled as "
        f"one model. Fréchet distance ({report.results.frechet_name}, smaller is better): {told}; two sets of real "
        f"images are {number(report.results.floor)} apart.</p>"
    )


def _images(report: Report) -> str:
    grid, cards = report.grid, []
    for p, prompt in enumerate(grid.prompts):
        rows = []
        for name, images in grid.rows:
            alt = f"{len(images[p])} images of “{prompt}” by {name}"
            rows.append(_strip(name, image_sheet(images[p], len(images[p])), alt, len(images[p]), len(images[p])))
        real = grid.real[p]
        if real is not None:
            alt = f"the data's own image of “{prompt}”"
            rows.append(_strip("data", image_sheet(real, len(real)), alt, len(real), len(grid.seeds)))
        cards.append(f'<figure class="card">{"".join(rows)}<figcaption>{escape(prompt)}</figcaption></figure>')
    return (
        f"<p>One row per way of sampling, one column per seed ({_listed(map(str, grid.seeds))}): in a column all began "
        f"with the same noise. {escape(grid.made_by)}</p>\n"
        f'<div class="cards">{"".join(cards)}</div>'
    )


def _strip(name: str, uri: str, alt: str, count: int, columns: int) -> str:
    image = f'<img src="{uri}" alt="{escape(alt)}" style="width:{100 * count / columns:.4g}%">'
    return f'<div class="row"><span>{escape(name)}</span><div>{image}</div></div>'


def _by_level(report: Report) -> str:
    r = report.results
    names = [name for group in report.groups.values() for name in group]
    chart = line_chart(
        _level_lines(report),
        "Denoising error of each variant against the time t",
        "t (0: data, 1: noise)",
        "E|u − (ε − x₀)|² per value",
        log_y=True,
    )
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
    """Ensembles in ink, the monolith in grey, experts each in their colour."""
    lines = []
    for index, name in enumerate(report.groups.get("expert", ())):
        error = report.results.score(name).denoising
        lines.append(Line(name, error.levels, error.by_level, colour(index), width=1.5))
    for name in report.groups.get("monolith", ()):
        error = report.results.score(name).denoising
        lines.append(Line(name, error.levels, error.by_level, "var(--soft)", width=4))
    for name, dash in zip(report.groups.get("ensemble", ()), ("2 4", "7 4", "", "1 6"), strict=False):
        error = report.results.score(name).denoising
        lines.append(Line(name, error.levels, error.by_level, "currentColor", dash))
    return lines


def _clusters(report: Report) -> str:
    cards = []
    for c in report.clusters:
        owners = [(i, e) for i, e in enumerate(report.experts) if c.number in e.clusters]
        experts = "".join(f"<li>{_key(i)}<b>{escape(e.name)}</b>: {escape(e.objective)}</li>" for i, e in owners)
        words = _listed(f"{escape(w)} ({own:.0%}, overall {of_all:.0%})" for w, own, of_all in c.words)
        alt = f"{len(c.images)} images of cluster {c.number}"
        cards.append(
            f"<figure><h3>Cluster {c.number}: {c.count} images, {c.share:.1%}</h3>"
            f'<img class="sheet" src="{image_sheet(c.images, 8)}" alt="{alt}">'
            f'<figcaption><ul class="legend">{experts or "<li>no expert</li>"}</ul>Words: {words}</figcaption></figure>'
        )
    if not cards:
        return "<p>This run has no clusters beside it.</p>"
    return (
        f"<p>{escape(report.clustered_by)} Images at random; words by how much they tell the cluster from the rest "
        f'(share of its captions, share of all).</p>\n<div class="cards">{"".join(cards)}</div>'
    )


def _alignment(report: Report) -> str:
    slopes = [
        Line(f"{e.name} ({e.objective})", e.t, e.slope, colour(i)) for i, e in enumerate(report.experts) if e.slope
    ]
    label = "Slope of each expert's calibration against the time t"
    chart = line_chart(slopes, label, "t (0: data, 1: noise)", "slope s", include=(0, 1))
    rows = "".join(score_row(label, report.results.score(name)) for label, name in report.alignment)
    head = head_of(report.results)
    note = (
        "The slope says how much of an expert's x₀ is to be believed, as measured on held-out latents of its own "
        "cluster: x₀ becomes m + s (x₀ − m), m being the cluster's mean. 1: all of it; 0: nothing but the mean."
    )
    figure = f"<figure>{chart}<figcaption>{note}</figcaption></figure>"
    if not slopes:
        figure = "<p>No expert has a calibration.</p>"
    return (
        f"{figure}\n<p>The same ensemble with its experts brought to the common path in four ways. <b>native</b>: "
        "HDDM's formulas (Eqs. 5–8) with its hand-set safeguards; <b>snr</b>: asked at equal log-SNR, which is exact "
        "for exact experts. Measured as in the first table.</p>\n"
        f"{table(head, rows, 'Scores of every alignment')}"
    )


def _usage(report: Report) -> str:
    columns = "".join(f"<th>{escape(usage.routing)}</th>" for usage in report.usages)
    rows = []
    for p, prompt in enumerate(report.grid.prompts):
        cells = []
        for usage in report.usages:
            shares = usage.weights[p].mean(0)
            most = int(shares.argmax())
            label = f"{usage.routing}, “{prompt}”: mostly {report.experts[most].name}, {float(shares[most]):.0%}"
            cells.append(f"<td>{weight_strip(usage.weights[p], label)}</td>")
        rows.append(f"<tr><th scope=row>{escape(prompt)}</th>{''.join(cells)}</tr>")
    names = legend([Line(e.name, (), (), colour(i), width=8) for i, e in enumerate(report.experts)])
    steps = len(report.usages[0].times) if report.usages else 0
    return (
        f"<p>For each prompt's first image: one column per step ({steps}, from noise at the left, t = 1, to the "
        f"image at the right, t = 0); the height of a colour is the expert's weight.</p>{names}\n"
        f"{table(f'<tr><th></th>{columns}</tr>', ''.join(rows), 'Weights of the experts by step', 'usage')}"
    )


def _made(report: Report) -> str:
    rows = [*report.made.items(), *report.settings.items()]
    values = "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(_plain(v))}</dd>" for k, v in rows)
    hashes = "".join(f"<dt>{escape(what)}</dt><dd><code>{escape(sha)}</code></dd>" for what, sha in report.hashes)
    return f"<dl>{values}</dl>\n<h3>sha256</h3>\n<dl>{hashes}</dl>"


def _key(index: int) -> str:
    return f'<i style="background:{colour(index)}"></i>'


def _plain(value: Any) -> str:
    return "; ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _listed(items: Iterable[str]) -> str:
    return ", ".join(items)
