"""The report of a clustering: self-contained, safe, and honest about what is missing."""

import re
from dataclasses import replace

import pytest
import torch

from atoll.cluster import report
from atoll.cluster.nearest import Workers
from atoll.cluster.report import imbalance, to_html
from atoll.cluster.report_rows import ReportRow, ReportRows
from atoll.storage.cards import ClustersCard, parse_card
from tests.cards import clusters_card

EVIL = "<script>alert(1)</script>"


def card(counts=(30, 10), method="free", codec=None) -> ClustersCard:
    clusters = [{"silhouette": 0.5, "words": [[EVIL, 0.5, 0.1]]}, {"silhouette": None, "words": []}]
    scores = {"rows": 40, "silhouette": 0.25, "silhouette_rows": 40, "davies_bouldin": None}
    values = clusters_card(
        2,
        method=method,
        counts=[{"train": n, "val": 1} for n in counts],
        blank=3,
        largest_over_mean=2 * max(counts) / sum(counts),
        codec=codec or {"name": "pixels", "channels": 3},
        quality={**scores, "clusters": clusters},
    )
    return parse_card(ClustersCard, values, "clusters.json")


def selected(side: int = 8) -> ReportRows:
    g, rows = torch.Generator().manual_seed(0), ReportRows(2, 0)
    for i in range(12):
        row = ReportRow(i, f"k{i}", EVIL, "train", i % 2, 0.1 * i, torch.randn(3, side, side + 2, generator=g).half())
        rows.nearest[i % 2].offer([row])
        rows.random[i % 2].offer([replace(row, score=12 - i)])
    return rows


def page(card: ClustersCard, rows: ReportRows) -> str:
    with Workers() as workers:
        return to_html(card, rows, workers, lambda note: None)


def test_the_page_is_self_contained_and_runs_no_script() -> None:
    html = page(card(), selected())
    assert "<script" not in html
    assert "http" not in html.replace("https://", "http")
    assert set(re.findall(r'src="([^"]{10})', html)) == {"data:image"}
    assert html.count("<img") == 4
    assert "6 images of cluster 1, nearest the centroid" in html
    for text in ("75.0%", "0.25", "not defined", "The feature of 3 images is a zero vector"):
        assert text in html


def test_large_images_are_reduced_and_small_ones_are_exact() -> None:
    assert page(card(), selected(8)).count("data:image/png") == 4
    large = page(card(), selected(300))
    assert large.count("data:image/webp") == 4
    assert len(large) < 150_000


def test_a_random_clustering_has_no_centroid() -> None:
    html = page(card(method="random"), selected())
    assert html.count("<img") == 2
    assert "nearest the centroid" not in html


def test_a_missing_codec_is_reported(tmp_path) -> None:
    codec = {"name": "taef2", "weights": str(tmp_path / "nothing"), "sha256": "0" * 64}
    html = page(card(codec=codec), selected())
    assert "<img" not in html
    assert "No images:" in html
    assert "nothing" in html


@pytest.mark.parametrize(("counts", "warned"), [((30, 10), False), ((100, 0), False), ((95, 3, 2), True)])
def test_more_than_twice_the_fair_share_raises_a_warning(counts, warned) -> None:
    rows = [{"train": n, "val": 99} for n in counts]
    warning = imbalance(parse_card(ClustersCard, clusters_card(len(counts), counts=rows), "clusters.json"))
    assert bool(warning) == warned
    if warning:
        assert "cluster 0 holds 95.0% of the training images, 2.9 times its fair share of 33.3%" in warning


def test_the_warning_is_on_the_page(monkeypatch) -> None:
    assert "Warning" not in page(card(), selected())
    monkeypatch.setattr(report, "FAIR", 1.4)
    assert "<b>Warning:</b> cluster 0 holds 75.0%" in page(card(), selected())
