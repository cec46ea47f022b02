"""The quality of clusters and the words of their captions, measured on a uniform sample of rows."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from atoll.cluster.report_rows import ReportRow
from atoll.report.words import count_words, distinctive_words

SILHOUETTE_ROWS = 4096  # all distances between them are measured


def describe(sample: Sequence[ReportRow], k: int) -> dict[str, Any]:
    """Measure the quality of k clusters.

    Args:
        sample: rows with features, a uniform sample in the order of their draws.
        k: number of clusters.

    Returns:
        Plain values for the card. silhouette and davies_bouldin are None where they are undefined, as for a single
        cluster. words are (word, fraction of the cluster's captions, fraction of all captions).
    """
    # The quality is measured on the features of the sample.
    labels = torch.tensor([row.cluster for row in sample])
    features = torch.stack([row.tensor for row in sample])
    few = slice(0, SILHOUETTE_ROWS)  # the rows come in the order of their draws: these are a uniform sample too
    widths = silhouette(features[few], labels[few])
    # Words are counted per cluster, and compared with all captions.
    counts = [count_words(row.caption for row in sample if row.cluster == c) for c in range(k)]
    rows = labels.bincount(minlength=k).tolist()
    overall = sum(counts, Counter[str]())
    score = None if widths is None else _rounded(widths.mean())
    return {
        "rows": len(sample),
        "silhouette": score,
        "silhouette_rows": min(len(sample), SILHOUETTE_ROWS),
        "davies_bouldin": _rounded(davies_bouldin(features, labels)),
        "clusters": [
            {
                "silhouette": _rounded(widths[labels[few] == c].mean()) if widths is not None else None,
                "words": [
                    [word, round(inside, 4), round(everywhere, 4)]
                    for word, inside, everywhere in distinctive_words(counts[c], max(rows[c], 1), overall, len(sample))
                ],
            }
            for c in range(k)
        ],
    }


def silhouette(points: Tensor, labels: Tensor) -> Tensor | None:
    """Return the silhouette (b - a) / max(a, b) of each point (Rousseeuw 1987).

    a is the mean distance to the other points of its label, b the least mean distance to the points of another label.
    1: well inside its cluster; 0: between two clusters; below 0: nearer to another cluster.

    Args:
        points: [n, D].
        labels: [n].

    Returns:
        [n] float64, 0 for a point that is alone; None for fewer than two labels.
    """
    members = F.one_hot(labels.unique(return_inverse=True)[1]).double()  # [n,K]
    # A silhouette compares clusters, so it needs two.
    counts, own = members.sum(0), members.bool()
    if len(counts) < 2:
        return None
    # Blocks of rows: all distances at once would need n^2 numbers.
    sums = torch.cat([torch.cdist(block, points.double()) @ members for block in points.double().split(512)])  # [n,K]
    # Own points: without the point itself.
    a = sums[own] / (counts[own.long().argmax(1)] - 1).clamp(min=1)
    # Other clusters: the nearest one.
    b = (sums / counts).masked_fill(own, torch.inf).amin(1)
    # A point alone has no distance to its own cluster: its silhouette is 0 by definition.
    alone = counts[own.long().argmax(1)] == 1
    return ((b - a) / torch.maximum(a, b).clamp(min=1e-300)).masked_fill(alone, 0.0)


def davies_bouldin(points: Tensor, labels: Tensor) -> Tensor | None:
    """Return the mean over i of the maximum over j != i of (s_i + s_j) / d_ij (Davies and Bouldin 1979).

    s_i is the mean distance of the points of label i to their mean m_i, and d_ij the distance of m_i and m_j. Small
    values mean compact clusters far apart.

    Args:
        points: [n, D].
        labels: [n].

    Returns:
        A float64 scalar; None for fewer than two labels, or if two means coincide.
    """
    number, points = labels.unique(return_inverse=True)[1], points.double()
    members = F.one_hot(number).double()  # [n,K]
    if members.shape[1] < 2:
        return None
    # Means and spreads of the clusters, then the worst neighbour of each.
    means = members.T @ points / members.sum(0)[:, None]
    spread = members.T @ (points - means[number]).norm(dim=1) / members.sum(0)
    ratio = (spread[:, None] + spread) / torch.cdist(means, means)
    worst = ratio.fill_diagonal_(-torch.inf).amax(1).mean()
    # Two equal means divide by zero.
    return worst if worst.isfinite() else None


def _rounded(value: Tensor | None) -> float | None:
    return None if value is None or not value.isfinite() else round(float(value), 4)
