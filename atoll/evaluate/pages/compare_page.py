"""`atoll compare`: the page and the lines for the terminal."""

from html import escape
from pathlib import Path
from typing import Any

from torch import Tensor

from atoll.evaluate.compare import Difference, Measured, differences, likeness, open_measured
from atoll.report.page import document, image_sheet, number, table
from atoll.storage.artifact import write_bytes, write_json

FORMAT = 1


def compare_runs(a: str, b: str, out: Path | None = None) -> list[Difference]:
    """Compares what `a` and `b` name, DIRECTORY or DIRECTORY:VARIANT; writes a page to `out` and a .json beside it.

    Raises:
        AtollError: either was not evaluated, or they were measured on different things.
    """
    one, two = open_measured(a), open_measured(b)
    found, alike = differences(one, two), likeness(one, two)
    if out is not None:
        content = {
            "format": FORMAT,
            "kind": "comparison",
            "a": one.title,
            "b": two.title,
            "differences": [{**vars(d), "difference": d.difference} for d in found],
            "likeness": {"same noise": alike[0], "other noise": alike[1]},
        }
        write_json(out.with_suffix(".json"), content)
        write_bytes(out, to_html(one, two, found, alike).encode())
    return found


def lines(found: list[Difference]) -> list[tuple[str, str, str, str]]:
    """(name, a, b, b - a with its interval) of each number."""
    return [(d.name, _say(d.a), _say(d.b), _say_difference(d)) for d in found]


def _say(value: float | None) -> str:
    return number(value)


def _say_difference(d: Difference) -> str:
    if d.difference is None:
        return ""
    sign = "+" if d.difference > 0 else ""
    return f"{sign}{number(d.difference)}" + (f" ± {number(d.half, 2)}" if d.half is not None else "")


def to_html(a: Measured, b: Measured, found: list[Difference], alike: tuple[float, float]) -> str:
    """The page: no scripts, no files beside it."""
    sections = [("Numbers", _numbers(found)), ("Images", _images(a, b)), ("How each was made", _made(a, b))]
    lead = (
        f"<p><b>A</b>: {escape(a.title)}. <b>B</b>: {escape(b.title)}. Both drew the same prompts from the same noise "
        f"and denoised the same held-out latents. Images from the same noise correlate by {alike[0]:.2f}, those "
        f"from other noise by {alike[1]:.2f} (of the same prompt, where it was drawn more than once).</p>"
    )
    return document(f"{a.title} and {b.title}", lead, sections)


def _numbers(found: list[Difference]) -> str:
    rows = "".join(
        f"<tr><th scope=row>{escape(d.name)}</th><td>{_say(d.a)}</td><td>{_say(d.b)}</td>"
        f"<td>{'<b>' if d.tells else ''}{_say_difference(d)}{'</b>' if d.tells else ''}</td></tr>"
        for d in found
    )
    return (
        "<p>B − A with its 95 % confidence interval, image by image: of the denoising error and of diversity by "
        "the paired differences, of what is computed from all features by a jackknife that leaves out one of 20 groups "
        "of images after the other. <b>Bold</b>: the interval leaves 0 out. The interval is of the images drawn, "
        "not of trainings: another seed of training may differ by more.</p>"
        + table("<tr><th></th><th>A</th><th>B</th><th>B − A</th></tr>", rows, "Scores of A and B and their difference")
    )


def _images(a: Measured, b: Measured) -> str:
    one, two = a.grid(), b.grid()
    prompts = [prompt for prompt in a.report["grid"]["prompts"] if prompt in b.report["grid"]["prompts"]]
    if one is None or two is None or not prompts:
        return "<p>The two reports show no prompt in common.</p>"
    cards = []
    for prompt in prompts:
        rows = ""
        for name, side, images in (("A", a, one), ("B", b, two)):
            rows += _row(name, images[side.report["grid"]["prompts"].index(prompt)], prompt)
        cards.append(f'<figure class="card">{rows}<figcaption>{escape(prompt)}</figcaption></figure>')
    said = "as the two reports drew them; in a column both began with the same noise where their seeds are the same"
    return f'<p>One column per seed, {said}.</p>\n<div class="cards">{"".join(cards)}</div>'


def _row(name: str, images: Tensor, prompt: str) -> str:
    alt = escape(f"{len(images)} images of “{prompt}” by {name}")
    image = f'<img src="{image_sheet(images, len(images))}" alt="{alt}">'
    return f'<div class="row"><span>{name}</span><div>{image}</div></div>'


def _made(a: Measured, b: Measured) -> str:
    rows = "".join(
        f"<tr><th scope=row>{escape(key)}</th><td>{escape(_plain(one))}</td><td>{escape(_plain(two))}</td></tr>"
        for key, one, two in _settings(a, b)
    )
    head = "<tr><th></th><th>A</th><th>B</th></tr>"
    return table(head, rows, "Settings of A and of B", "text")


def _settings(a: Measured, b: Measured) -> list[tuple[str, Any, Any]]:
    sides = [
        {
            **{key: side.score[key] for key in ("made_by", "steps", "method", "guidance_scale")},
            **side.report["made"],
            **{f"sha256 of {what}": sha for what, sha in side.report["hashes"].items()},
        }
        for side in (a, b)
    ]
    return [(key, sides[0].get(key, ""), sides[1].get(key, "")) for key in dict.fromkeys([*sides[0], *sides[1]])]


def _plain(value: Any) -> str:
    return str(value)
