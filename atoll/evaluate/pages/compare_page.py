"""`atoll compare`: the page, and the lines for the terminal."""

from html import escape
from pathlib import Path
from typing import Any

from torch import Tensor

from atoll.evaluate.compare import Difference, EvaluatedVariant, differences, likeness, open_evaluated
from atoll.report.page import document, image_sheet, number, table
from atoll.storage.artifact import write_bytes, write_json

FORMAT = 1


def compare_runs(a: str, b: str, out: Path | None = None) -> list[Difference]:
    """Compare two variants, each DIRECTORY or DIRECTORY:VARIANT; write a page to `out`, and a .json beside it.

    Raises:
        AtollError: one is not evaluated, or they were measured on different data.
    """
    # Compute all differences, then write page and JSON.
    one, two = open_evaluated(a), open_evaluated(b)
    all_differences, correlations = differences(one, two), likeness(one, two)
    if out is not None:
        # The .json holds the same numbers, for scripts.
        content = {
            "format": FORMAT,
            "kind": "comparison",
            "a": one.title,
            "b": two.title,
            "differences": [{**vars(d), "difference": d.difference} for d in all_differences],
            "likeness": {"same noise": correlations[0], "other noise": correlations[1]},
        }
        write_json(out.with_suffix(".json"), content)
        write_bytes(out, to_html(one, two, all_differences, correlations).encode())
    return all_differences


def lines(all_differences: list[Difference]) -> list[tuple[str, str, str, str]]:
    """(name, a, b, b - a with its interval) for each number."""
    return [(d.name, number(d.a), number(d.b), _difference_text(d)) for d in all_differences]


def _difference_text(d: Difference) -> str:
    """The difference with its sign, and half the width of its interval."""
    if d.difference is None:
        return ""
    # A minus sign comes with the number.
    sign = "+" if d.difference > 0 else ""
    return f"{sign}{number(d.difference)}" + (f" ± {number(d.half_width, 2)}" if d.half_width is not None else "")


def to_html(
    a: EvaluatedVariant, b: EvaluatedVariant, all_differences: list[Difference], correlations: tuple[float, float]
) -> str:
    """The page as one file, without scripts."""
    sections = [
        ("Numbers", _numbers(all_differences)),
        ("Images", _images(a, b)),
        ("How each was made", _settings_table(a, b)),
    ]
    # The first paragraph: what A and B are, and how similar their images are.
    lead = (
        f"<p><b>A</b>: {escape(a.title)}. <b>B</b>: {escape(b.title)}. Both drew the same prompts from the same noise "
        f"and denoised the same held-out latents. Mean correlation of images from the same noise: "
        f"{correlations[0]:.2f}; from other noise: {correlations[1]:.2f} (with the same prompt, if it was drawn more "
        "than once).</p>"
    )
    return document(f"{a.title} and {b.title}", lead, sections)


def _numbers(all_differences: list[Difference]) -> str:
    """The table of all numbers; differences beyond their interval are bold."""
    rows = "".join(
        f"<tr><th scope=row>{escape(d.name)}</th><td>{number(d.a)}</td><td>{number(d.b)}</td>"
        f"<td>{'<b>' if d.significant else ''}{_difference_text(d)}{'</b>' if d.significant else ''}</td></tr>"
        for d in all_differences
    )
    return (
        "<p>B − A with its 95 % confidence interval, paired image by image: for the denoising error and for diversity "
        "from paired differences, for metrics of features from a jackknife that leaves out one of 20 groups of images "
        "at a time. <b>Bold</b>: the interval excludes 0. The interval covers the choice of images, not of the "
        "training seed; another training may differ by more.</p>"
        + table("<tr><th></th><th>A</th><th>B</th><th>B − A</th></tr>", rows, "Scores of A and B and their difference")
    )


def _images(a: EvaluatedVariant, b: EvaluatedVariant) -> str:
    """The common prompts, with a row of images for A and one for B."""
    one, two = a.grid(), b.grid()
    # Only prompts that both reports show.
    prompts = [prompt for prompt in a.report["grid"]["prompts"] if prompt in b.report["grid"]["prompts"]]
    if one is None or two is None or not prompts:
        return "<p>The two reports show no prompt in common.</p>"
    cards = []
    for prompt in prompts:
        rows = ""
        for name, side, images in (("A", a, one), ("B", b, two)):
            # The same prompt may have another position in the other report.
            rows += _row(name, images[side.report["grid"]["prompts"].index(prompt)], prompt)
        cards.append(f'<figure class="card">{rows}<figcaption>{escape(prompt)}</figcaption></figure>')
    note = "as in the two reports; with equal seeds, a column starts from the same noise for A and B"
    return f'<p>One column per seed, {note}.</p>\n<div class="cards">{"".join(cards)}</div>'


def _row(name: str, images: Tensor, prompt: str) -> str:
    alt = escape(f"{len(images)} images of “{prompt}” by {name}")
    image = f'<img src="{image_sheet(images, len(images))}" alt="{alt}">'
    return f'<div class="row"><span>{name}</span><div>{image}</div></div>'


def _settings_table(a: EvaluatedVariant, b: EvaluatedVariant) -> str:
    """Sampling, machine and hashes of both."""
    rows = "".join(
        f"<tr><th scope=row>{escape(key)}</th><td>{escape(str(one))}</td><td>{escape(str(two))}</td></tr>"
        for key, one, two in _settings(a, b)
    )
    head = "<tr><th></th><th>A</th><th>B</th></tr>"
    return table(head, rows, "Settings of A and of B", "text")


def _settings(a: EvaluatedVariant, b: EvaluatedVariant) -> list[tuple[str, Any, Any]]:
    """(key, value of A, value of B); a value is "" if only the other side has it."""
    # Sampling, provenance and hashes of each side.
    sides = [
        {
            **{key: side.score[key] for key in ("description", "steps", "method", "guidance_scale")},
            **side.report["provenance"],
            **{f"sha256 of {what}": sha for what, sha in side.report["hashes"].items()},
        }
        for side in (a, b)
    ]
    return [(key, sides[0].get(key, ""), sides[1].get(key, "")) for key in dict.fromkeys([*sides[0], *sides[1]])]
