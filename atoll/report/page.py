"""What the HTML pages of the stages share: one document that needs no other file, images as data URIs, one style."""

import base64
import io
import math
from collections.abc import Iterable
from html import escape

from torch import Tensor

COLOURS = 8  # --c0 to --c7 of the style sheet


def document(title: str, lead: str, sections: Iterable[tuple[str, str]]) -> str:
    """The page: no scripts, no files beside it. lead and the sections' contents are HTML; titles are plain text."""
    title = escape(title)
    content = "".join(f"<section>\n<h2>{escape(name)}</h2>\n{content}\n</section>\n" for name, content in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style></head>\n<body><main>\n"
        f"<h1>{title}</h1>\n{lead}\n{content}</main></body></html>\n"
    )


def colour(index: int) -> str:
    """The CSS colour of the expert with this index: the same on the whole page."""
    return f"var(--c{index})" if index < COLOURS else f"hsl({index * 137.5 % 360:.0f} 55% 50%)"


def table(head: str, body: str, label: str, kind: str = "") -> str:
    """A table that no screen cuts: wider than the text where there is room, else it scrolls by itself.

    Args:
        head: HTML of the rows of the head, "" for a table without one.
        body: HTML of the other rows.
        label: what the table shows, in plain text, for who cannot see it.
        kind: a class of the style sheet: "usage" and "bars" for drawn cells, "text" for words that wrap, "images".
    """
    head = f"<thead>{head}</thead>" if head else ""
    return (
        f'<div class="wide {kind}" role="region" tabindex="0" aria-label="{escape(label)}">'
        f"<table>{head}<tbody>{body}</tbody></table></div>"
    )


def image_sheet(images: Tensor, columns: int, side: int = 64, gap: int = 1, lossy: bool = False) -> str:
    """A data URI of images [B, 1 or 3, h, w] in [0, 1] on one sheet, row by row.

    Small images are enlarged without smoothing until their longer side has `side` pixels; gaps (in images' pixels)
    and missing places are transparent. PNG or, if `lossy`, WebP: a tenth of the bytes for photographs.
    """
    from PIL import Image

    height, width = images.shape[-2:]
    rows = -(-len(images) // columns)
    sheet = Image.new("RGBA", (columns * (width + gap) - gap, rows * (height + gap) - gap))
    pixels = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    for number, image in enumerate(pixels):
        place = (number % columns * (width + gap), number // columns * (height + gap))
        sheet.paste(Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image), place)
    factor = max(1, -(-side // max(height, width)))
    sheet = sheet.resize((sheet.width * factor, sheet.height * factor), Image.Resampling.NEAREST)
    out = io.BytesIO()
    if lossy:
        sheet.save(out, format="WEBP", quality=80)
    else:
        sheet.save(out, format="PNG", optimize=True)
    return f"data:image/{'webp' if lossy else 'png'};base64," + base64.b64encode(out.getvalue()).decode()


def weight_strip(weights: Tensor, label: str) -> str:
    """An SVG of who was asked when: a column per step, weights [T, E] stacked from the first expert (top) down."""
    parts = [
        f'<svg class="strip" viewBox="0 0 {len(weights)} 1" preserveAspectRatio="none" shape-rendering="crispEdges" '
        f'role="img" aria-label="{escape(label)}">'
    ]
    for step, row in enumerate(weights.tolist()):
        top = 0.0
        for expert, weight in enumerate(row):
            if weight > 0.002:
                parts.append(
                    f'<rect x="{step}" y="{top:.3f}" width="1" height="{weight:.3f}" fill="{colour(expert)}"/>'
                )
            top += weight
    return "".join(parts) + "</svg>"


def number(value: float | None, digits: int = 3, missing: str = "diverged") -> str:
    """`digits` significant digits, without an exponent where it reads as well without."""
    if value is None or not math.isfinite(value):
        return missing
    if 100 <= abs(value) < 1e5:
        return f"{value:.0f}"
    return f"{value:#.{digits}g}".rstrip(".")


STYLE = """
:root{color-scheme:light dark;--ink:#1c1c1a;--soft:#8b8a83;--rule:#dcdbd5;--page:#fbfbf9;--box:#f2f1ec;--shade:#0004;
--c0:#2a78d6;--c1:#eb6834;--c2:#1baf7a;--c3:#eda100;--c4:#e87ba4;--c5:#008300;--c6:#4a3aa7;--c7:#e34948}
@media(prefers-color-scheme:dark){:root{--ink:#eceae3;--soft:#908f87;--rule:#3a3934;--page:#191917;--box:#24231f;--shade:#fff4;
--c0:#3987e5;--c1:#d95926;--c2:#199e70;--c3:#c98500;--c4:#d55181;--c5:#2fa02f;--c6:#9085e9;--c7:#e66767}}
*{box-sizing:border-box}code{overflow-wrap:anywhere}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:64rem;margin:auto;padding:1rem}
h1{font-size:1.6rem;margin:.5rem 0}h2{font-size:1.25rem;margin:2.5rem 0 .5rem}h3{font-size:1rem;margin:1rem 0 .3rem}
p{max-width:46rem}figure{margin:1rem 0}figcaption{color:var(--ink);font-size:.9rem;max-width:46rem}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,19rem),1fr));gap:1rem}
.card{margin:0;padding:.7rem;background:var(--box);border-radius:.4rem}
.card figcaption{margin-top:.5rem;font-weight:600}
.row{display:grid;grid-template-columns:4.7rem 1fr;align-items:center;margin-bottom:2px;font-size:.8rem}
.cards figure,.pair figure{margin:0}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr));gap:1rem}
img{display:block;width:100%;image-rendering:pixelated}
.wide{width:max-content;min-width:100%;max-width:calc(100vw - 3rem);position:relative;left:50%;
transform:translateX(-50%);overflow-x:auto;background:
linear-gradient(to left,var(--page) 40%,transparent) right/2.5rem 100% no-repeat local,
linear-gradient(to left,var(--shade),transparent) right/.9rem 100% no-repeat scroll}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem}
th,td{padding:.3rem .6rem;text-align:right;border-bottom:1px solid var(--rule);white-space:nowrap}
th[scope=row]{text-align:left;font-weight:500;white-space:normal;min-width:8rem;background:var(--page)}
.wide th[scope=row]{position:sticky;left:0}
thead th{font-weight:600;vertical-align:bottom;white-space:normal}
tr.ensemble+tr.expert>*,tr.expert+tr.monolith>*{border-top:2px solid var(--rule)}
small{display:block;color:var(--soft);font-weight:400}
.chart{display:block;width:100%;max-width:40rem;overflow:visible}
.chart text{fill:var(--ink);font-size:14px}.rule{stroke:var(--rule)}
.legend{list-style:none;margin:.4rem 0;padding:0;display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;font-size:.9rem}
.legend svg{width:1.75rem;height:.65rem;margin-right:.4rem}
i{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin-right:.4em}
.strip{display:block;width:100%;min-width:6rem;height:2rem}
.usage table{width:100%}.usage td{width:36%;padding:.2rem .4rem}.usage thead th{text-align:left;padding-left:.4rem}
.bars table{width:100%}.bars td:last-child{width:50%}
.usage,.bars,.text{width:auto}
.images td{padding:.15rem}.images thead th{text-align:center}.images img{width:auto;max-width:none;height:5.5rem}
.images th[scope=row]{min-width:4.5rem}.smooth img{image-rendering:auto}
.text :is(td,thead th){text-align:left;vertical-align:top}
.text td{white-space:normal;overflow-wrap:anywhere;min-width:9rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1rem 1rem;font-size:.9rem}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
@media(max-width:30rem){dl{display:block}dd{margin-bottom:.4rem}
table{font-size:.8rem}th,td{padding:.3rem .35rem}th[scope=row]{min-width:6.5rem}
.usage td{width:32%}.wide{max-width:calc(100vw - 2rem)}}
""".strip()
