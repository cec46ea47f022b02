"""Captions from any file; the caption, key and split of a row are functions of its number."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atoll.errors import AtollError
from atoll.storage.shards import Shards
from atoll.synthesize.captions import CaptionOrder, ListedCaptions, load_captions
from atoll.synthesize.rows import Keys

HERE = "8950abfda7b727630760dd35bcf5c3daa7631aff223a90f7728c0d2521dde10c"  # the assignment of tests/conftest.py


def write(directory, **texts) -> None:
    directory.mkdir(exist_ok=True)
    for name, text in texts.items():
        (directory / f"{name.replace('_', '-')}.txt").write_text(text)


def test_one_list_for_all_clusters_or_one_for_each(tmp_path) -> None:
    write(tmp_path / "lists", cluster_000="moss\n", cluster_001="sand\nrain\n", cluster_002="rust", notes="")
    each, about = load_captions(tmp_path / "lists", tmp_path, 3, HERE)
    assert [list(one.lines) for one in each] == [["moss"], ["sand", "rain"], ["rust"]]
    assert about.counts == (1, 2, 1)
    assert len(set(about.sha256)) == 3
    alike, about = load_captions(tmp_path / "lists" / "cluster-001.txt", tmp_path, 3, HERE)
    assert [list(one.lines) for one in alike] == [["sand", "rain"]] * 3
    assert len(set(about.sha256)) == 1


def test_captions_of_shards_are_those_of_training_rows(run) -> None:
    captions, about = load_captions(None, run / "clusters", 3, HERE)
    assert about.origin == "of the clusters' shards: captions shared, images not"
    assert about.counts == tuple(len(one) for one in captions) == (14, 14, 14)
    rows = [i for i in range(60) if i % 3 == 1 and i % 10 < 7]
    words = ("moss", "sand", "rain", "rust")
    drawn = CaptionOrder(captions[1], 0, 1)(range(14))
    assert Counter(drawn) == Counter(f"{words[i % 4]} {words[i // 4 % 4]}" for i in rows)


def test_captions_of_images_that_are_left_out_are_not_drawn(run) -> None:
    """As if the shards had no such rows; another list is another origin, which a resumed run refuses."""
    cluster = Shards(run / "clusters" / "cluster-001")
    keys = cluster.keys
    gone = {keys[row] for row in cluster.rows("train").tolist()}
    kept = sorted(gone)[3:]
    captions, about = load_captions(None, run / "clusters", 3, HERE, skip=gone - set(kept))
    _, before = load_captions(None, run / "clusters", 3, HERE)
    assert about.counts == (14, 11, 14)
    caption = dict(zip(keys, cluster.captions, strict=True))
    assert sorted(captions[1].at(torch.arange(11))) == sorted(caption[key] for key in kept)
    assert [a == b for a, b in zip(about.sha256, before.sha256, strict=True)] == [True, False, True]
    # Keys of no row change nothing.
    assert load_captions(None, run / "clusters", 3, HERE, skip={"none"})[1] == before
    with pytest.raises(AtollError, match=r"cluster-001: holds no training rows that train\.skip leaves; name"):
        load_captions(None, run / "clusters", 3, HERE, skip=gone)


def test_missing_and_bad_captions_are_named(run, tmp_path) -> None:
    with pytest.raises(AtollError, match=r"no captions: .*cluster-000 does not exist; name them with --captions"):
        load_captions(None, tmp_path, 3, HERE)
    with pytest.raises(AtollError, match=r"its assignment is 8950\S+, the experts' is other; name the captions"):
        load_captions(None, run / "clusters", 3, "other")
    write(tmp_path / "lists", cluster_000="moss", cluster_001="sand")
    with pytest.raises(AtollError, match=r"cluster-002.txt: not found; write the captions there"):
        load_captions(tmp_path / "lists", tmp_path, 3, HERE)
    with pytest.raises(
        AtollError, match=r"cluster-001.txt: belongs to no cluster; expected cluster-000.txt to cluster-000.txt"
    ):
        load_captions(tmp_path / "lists", tmp_path, 1, HERE)
    for text, told in ((b"", "is empty"), (b"moss\n\nsand\n", "line 2 is empty"), (b"\xff\xfe\x00", "cannot be read")):
        (tmp_path / "list.txt").write_bytes(text)
        with pytest.raises(AtollError, match=told):
            load_captions(tmp_path / "list.txt", tmp_path, 3, HERE)


def test_a_list_of_empty_lines_is_allowed(tmp_path) -> None:
    (tmp_path / "none.txt").write_text("\n\n")
    (one,), _ = load_captions(tmp_path / "none.txt", tmp_path, 1, HERE)
    assert CaptionOrder(one, 0, 0)(range(5)) == [""] * 5


@given(st.binary(max_size=60))
def test_any_file_is_a_list_or_an_error(tmp_path_factory, content) -> None:
    file = tmp_path_factory.mktemp("any") / "captions.txt"
    file.write_bytes(content)
    try:
        (one,), _ = load_captions(file, file, 1, HERE)
    except AtollError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert len(one) > 0
        assert len(CaptionOrder(one, 0, 0)(range(3))) == 3


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 40), st.integers(0, 3))
def test_captions_come_equally_often_for_any_split_of_the_rows(size, rows, cut, seed) -> None:
    order = CaptionOrder(ListedCaptions([str(i) for i in range(size)], ""), seed, 2)
    whole = order(range(rows))
    cut = min(cut, rows - 1)
    assert (order(range(cut)) if cut else []) + order(range(cut, rows)) == whole
    counts = Counter(whole)
    assert max(counts.values()) - min(counts.get(str(i), 0) for i in range(size)) <= 1


def test_the_order_differs_between_seeds_clusters_and_passes() -> None:
    lines = ListedCaptions([str(i) for i in range(30)], "")
    orders = [CaptionOrder(lines, seed, cluster)(range(60)) for seed in (0, 1) for cluster in (0, 1)]
    assert len({tuple(part) for order in orders for part in (order[:30], order[30:])}) == 8


@given(st.integers(2, 300), st.floats(0, 0.5), st.integers(0, 5), st.integers(0, 4))
def test_keys_are_unique_and_some_are_held_out(rows, validation, seed, cluster) -> None:
    try:
        keys = Keys(seed, cluster, rows, validation)
    except AtollError as error:  # of two rows or so, a half may be all
        assert "holds out all" in str(error)  # noqa: PT017
        return
    names = keys(range(rows))
    assert len(set(names)) == rows
    held = [keys.split(name) == "val" for name in names]
    assert min(8, rows // 2) <= sum(held) < rows
    assert keys(range(rows // 2, rows)) == names[rows // 2 :]


def test_the_held_out_fraction_is_the_manifests() -> None:
    keys = Keys(0, 0, 5000, 0.2)
    assert 900 < sum(keys.split(key) == "val" for key in keys(range(5000))) < 1100
    with pytest.raises(AtollError, match="images is 1; expected at least 2"):
        Keys(0, 0, 1, 0.1)
    with pytest.raises(AtollError, match=r"data.validation 0.999 holds out all 5 images of cluster 3"):
        Keys(0, 3, 5, 0.999)
