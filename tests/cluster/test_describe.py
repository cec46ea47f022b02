"""Quality measures against values computed by hand, and the words of a sample."""

import pytest
import torch

from atoll.cluster.describe import davies_bouldin, describe, silhouette
from atoll.cluster.report_rows import ReportRow

LINE = torch.tensor([[0.0], [1.0], [4.0], [6.0]])


def test_silhouette_equals_the_value_by_hand() -> None:
    # a: 1, 1, 2, 2; b: the mean distance to the other pair: 5, 4, 3.5, 5.5
    widths = silhouette(LINE, torch.tensor([0, 0, 1, 1]))
    expected = torch.tensor([4 / 5, 3 / 4, 1.5 / 3.5, 3.5 / 5.5], dtype=torch.float64)
    torch.testing.assert_close(widths, expected)


def test_silhouette_uses_the_nearest_other_cluster_and_is_0_for_a_single_point() -> None:
    labels = torch.tensor([2, 2, 7, 5])  # of the first: a = 1, b = min(4, 6)
    widths = silhouette(LINE, labels)
    torch.testing.assert_close(widths, torch.tensor([3 / 4, 2 / 3, 0, 0], dtype=torch.float64))
    assert silhouette(LINE, torch.tensor([1, 0, 1, 0])).max() < 0  # nearer to the other pair
    assert silhouette(LINE, torch.zeros(4, dtype=torch.int64)) is None


def test_davies_bouldin_equals_the_value_by_hand() -> None:
    # means 0.5 and 5, spreads 0.5 and 1: (0.5 + 1) / 4.5
    assert float(davies_bouldin(LINE, torch.tensor([0, 0, 3, 3]))) == pytest.approx(1.5 / 4.5)
    # means 0.5, 4, 6; spreads 0.5, 0, 0; the worst neighbours: 0.5/3.5, 0.5/3.5, 0.5/5.5
    labels = torch.tensor([0, 0, 1, 2])
    assert float(davies_bouldin(LINE, labels)) == pytest.approx((2 * 0.5 / 3.5 + 0.5 / 5.5) / 3)
    assert davies_bouldin(LINE, torch.zeros(4, dtype=torch.int64)) is None
    assert davies_bouldin(torch.zeros(4, 2), labels) is None


def row(key: int, cluster: int, caption: str, feature: list[float]) -> ReportRow:
    return ReportRow(key, str(key), caption, "train", cluster, 0.0, torch.tensor(feature))


def test_a_sample_is_described_by_quality_and_words() -> None:
    rows = [row(i, i % 2, ("a red fox", "a blue sea")[i % 2], [i % 2, 1 - i % 2 + 0.01 * i]) for i in range(10)]
    quality = describe(rows, 2)
    assert (quality["rows"], quality["silhouette_rows"]) == (10, 10)
    assert quality["silhouette"] > 0.9
    assert quality["clusters"][0]["words"] == [["fox", 1.0, 0.5], ["red", 1.0, 0.5]]
    assert quality["clusters"][1]["words"] == [["blue", 1.0, 0.5], ["sea", 1.0, 0.5]]


def test_undefined_quality_is_none() -> None:
    one = describe([row(i, 0, "", [1.0, 0.0]) for i in range(3)], 1)
    assert (one["silhouette"], one["davies_bouldin"], one["clusters"]) == (
        None,
        None,
        [{"silhouette": None, "words": []}],
    )
    absent = describe([row(i, 2 * (i % 2), "x", [float(i % 2), 1.0]) for i in range(6)], 3)  # none of cluster 1 drawn
    assert absent["clusters"][1] == {"silhouette": None, "words": []}
