"""clusters/report.html: the content, quality and size of the clusters on one page."""

from collections.abc import Callable, Iterable, Sequence
from html import escape

import torch
from torch import Tensor
from torch.nn import functional as F

from atoll.cluster.nearest import Workers
from atoll.cluster.report_rows import ReportRow, ReportRows
from atoll.encoders.codec import Codec, build_codec
from atoll.encoders.trust import STRANGER, Trust
from atoll.errors import AtollError
from atoll.report.page import colour, document, image_sheet, number, table
from atoll.report.words import cut_captions
from atoll.runtime.device import best_device
from atoll.storage.cards import ClustersCard

FAIR = 2.0  # times its fair share; a warning is raised above that
_SIDE = 64  # pixels of the longer side of an image on the page, at most
_LOSSLESS = 32  # pixels; smaller images are drawings, larger ones photographs
_COLUMNS = 8


def imbalance(card: ClustersCard) -> str | None:
    """Return a warning if a cluster holds more than `FAIR` times its share of the training images, else None."""
    # The largest cluster, compared with an even share.
    counts = [count.train for count in card.counts]
    largest, total = max(range(len(counts)), key=counts.__getitem__), sum(counts)
    times = counts[largest] * len(counts) / total
    if times <= FAIR:
        return None
    return (
        f"cluster {largest} holds {counts[largest] / total:.1%} of the training images, {times:.1f} times its fair "
        f"share of {1 / len(counts):.1%}; its expert will see each image that much less often than the others"
    )


def to_html(
    card: ClustersCard,
    selected: ReportRows,
    workers: Workers,
    progress: Callable[[str], None],
    trust: Trust = STRANGER,
) -> str:
    """Return the page of a clustering.

    Args:
        card: of the clustering, clusters.json.
        selected: the rows to show.
        workers: threads that decode images.
        progress: called with a note.
        trust: what the codec's entry may reach.
    """
    progress("decoding images for the report")
    # Random clusters have no centroid to be near to.
    nearest = [rows.rows() if card.method != "random" else [] for rows in selected.nearest]
    random = [rows.rows() for rows in selected.random]
    try:
        # The codec may be missing on this machine; the page then has no images but all numbers.
        draw, why = _drawer(build_codec(card.codec, trust), workers), ""
    except AtollError as error:
        draw, why = None, f"<p><b>No images:</b> {escape(str(error))}</p>"
    cards = (_cluster(card, number, nearest[number], random[number], draw) for number in range(card.k))
    # An uneven clustering is explained at the top of the page.
    warning = imbalance(card)
    lead = _lead(card) + (f'<p class="card"><b>Warning:</b> {escape(warning)}.</p>' if warning else "")
    sections = [
        ("Shares", _shares(card)),
        ("Quality", _quality(card)),
        ("Content", why + _explained(card) + "\n".join(cards)),
        ("Provenance", _made(card)),
    ]
    return document(f"{card.k} clusters", lead, sections)


def _lead(card: ClustersCard) -> str:
    images = sum(count.train + count.val for count in card.counts)
    how = {
        "balanced": f"by {card.fine} fine centroids, none above 1.25 times the mean, or an even share, when fitted",
        "free": f"by {card.fine} fine centroids, of any size",
        "random": "at random, by a hash of the key: without meaning, and equal in expectation only",
    }[card.method]
    cut = f" {cut_captions(card.cut.captions, card.cut.fraction)}." if card.cut is not None else ""
    return (
        f"<p>{images:,} images in {card.k} clusters, {how}. The largest holds {card.largest_over_mean:.2f} times "
        f"the mean.{cut}</p>"
    )


def _shares(card: ClustersCard) -> str:
    """A table with each cluster's share of the training images as a bar; a line marks the fair share."""
    counts, rows = card.counts, []
    # The longest bar fills the width; the line marks the fair share on the same scale.
    total = sum(count.train for count in counts)
    largest = max(count.train for count in counts) / total
    scale = 100 / max(largest, 1 / len(counts))
    for c, count in enumerate(counts):
        share = count.train / total
        # An inline SVG: the page has no other files.
        bar = (
            f'<svg class="strip" viewBox="0 0 100 10" preserveAspectRatio="none" role="img" '
            f'aria-label="cluster {c}: {share:.1%}"><rect width="{share * scale:.2f}" height="10" fill="{colour(c)}"/>'
            f'<rect x="{scale / len(counts) - 0.2:.2f}" width="0.4" height="10" fill="currentColor"/></svg>'
        )
        rows.append(
            f"<tr><th scope=row>cluster {c}</th><td>{count.train:,}</td><td>{count.val:,}</td>"
            f"<td>{share:.1%}</td><td>{share * len(counts):.2f}</td><td>{bar}</td></tr>"
        )
    head = "<th></th><th>training images</th><th>held out</th><th>share</th><th>times fair</th><th></th>"
    shares = table(f"<tr>{head}</tr>", "".join(rows), "Images of each cluster", "bars")
    return f"{shares}\n<p>Shares of the training images; the rule is the fair share, {1 / len(counts):.1%}.</p>"


def _quality(card: ClustersCard) -> str:
    quality, blank = card.quality, card.blank
    zero = f"<p>The feature of {blank:,} images is a zero vector; they are all in one cluster.</p>"
    return (
        f"<p><b>Silhouette {_score(quality.silhouette)}</b> on {quality.silhouette_rows:,} images drawn "
        "uniformly (1: every image is far nearer to its own cluster than to any other; 0: it is between two; below 0: "
        f"nearer to another). <b>Davies–Bouldin {_score(quality.davies_bouldin)}</b> on {quality.rows:,} (the "
        "spread of two clusters over the distance of their means, for each cluster's worst neighbour; small is good). "
        f"Both on features at unit length.</p>{zero if blank else ''}"
    )


def _explained(card: ClustersCard) -> str:
    nearest = "" if card.method == "random" else "First the images nearest to the centroid, then others "
    return (
        f"<p>{nearest or 'Images '}drawn uniformly. Words by p log(p / q), p being the share of the cluster's "
        f"captions that have the word and q the share of all; from {card.quality.rows:,} captions.</p>"
    )


def _cluster(
    card: ClustersCard, number: int, nearest: Sequence[ReportRow], random: Sequence[ReportRow], draw: "Drawer | None"
) -> str:
    described, count = card.quality.clusters[number], card.counts[number]
    # Captions come from the data: escape them.
    words = ", ".join(f"{escape(w)} ({p:.0%}, overall {q:.0%})" for w, p, q in described.words) or "none"
    sheets = []
    if draw is not None:
        # Two sheets of images: typical ones, and a fair sample.
        for what, rows in (("nearest the centroid", nearest), ("at random", random)):
            if rows:
                images = draw(rows)
                uri = image_sheet(images, _COLUMNS, lossy=max(images.shape[-2:]) > _LOSSLESS)
                alt = f"{len(rows)} images of cluster {number}, {what}"
                columns = 100 * min(len(rows), _COLUMNS) / _COLUMNS
                sheets.append(
                    f'<figure><img src="{uri}" alt="{alt}" style="width:{columns:.4g}%"><figcaption>{what}'
                    "</figcaption></figure>"
                )
    return (
        f'<h3><i style="background:{colour(number)}"></i>Cluster {number}: {count.train + count.val:,} images, '
        f"silhouette {_score(described.silhouette)}</h3>\n<p>Words: {words}</p>\n"
        f'<div class="pair">{"".join(sheets)}</div>'
    )


def _made(card: ClustersCard) -> str:
    feature = ", ".join(f"{key} {value}" for key, value in card.feature.items())
    rows = {
        "method": card.method,
        "feature": feature,
        "seed": card.seed,
        "assignment": card.assignment,
        "encoded": ", ".join(card.encoded),
    }
    return "<dl>" + "".join(f"<dt>{name}</dt><dd>{escape(str(value))}</dd>" for name, value in rows.items()) + "</dl>"


Drawer = Callable[[Sequence[ReportRow]], Tensor]


def _drawer(codec: Codec, workers: Workers) -> Drawer:
    """The function from rows with latents to images [n,c,h,w] in [0,1], at most `_SIDE` pixels high and wide."""
    # Decode on a GPU if there is one.
    device = best_device()
    if device.type != "cpu":
        codec = codec.to(device)

    @torch.inference_mode()
    def decode(latents: Tensor) -> Tensor:
        # Small images stay as they are; large ones are reduced to keep the page small.
        images = codec.decode(latents.float().to(device)).float().cpu()
        height, width = images.shape[-2:]
        if (longer := max(height, width)) <= _SIDE:
            return images
        # Area averaging, which does not alias, unlike bilinear sampling.
        size = max(1, round(height * _SIDE / longer)), max(1, round(width * _SIDE / longer))
        return F.interpolate(images, size, mode="area")

    def draw(rows: Sequence[ReportRow]) -> Tensor:
        # Two images per task keep all threads busy; of several shapes, one.
        latents = [row.tensor for row in rows]
        alike = len({latent.shape for latent in latents}) == 1
        batches: Iterable[Tensor] = torch.stack(latents).split(2) if alike else (latent[None] for latent in latents)
        images = list(workers.map(decode, batches))
        return torch.cat(images if alike else _on_one_canvas(images))

    return draw


def _on_one_canvas(images: Sequence[Tensor]) -> list[Tensor]:
    """Centre images [n,c,h,w] of several sizes on white, as high as the highest and as wide as the widest."""
    height, width = (max(image.shape[axis] for image in images) for axis in (2, 3))
    padded = []
    for image in images:
        above, left = (height - image.shape[2]) // 2, (width - image.shape[3]) // 2
        margins = (left, width - image.shape[3] - left, above, height - image.shape[2] - above)
        padded.append(F.pad(image, margins, value=1.0))
    return padded


def _score(value: float | None) -> str:
    return number(value, missing="not defined")
