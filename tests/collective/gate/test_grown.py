"""The gate where clusters grew: what an older probe and an older expert are worth now."""

from hashlib import sha256
from pathlib import Path

import pytest
import torch

from atoll.collective.gate.contents import check_contents
from atoll.collective.gate.judge import ClusterReference
from atoll.collective.gate.probe import Probe
from atoll.encoders.text import build_encoder
from atoll.errors import AtollError
from atoll.storage.artifact import read_card, read_tensors, save_artifact
from atoll.storage.cards import ClusterShardsCard, ExpertCard, Lineage
from atoll.storage.shards import Shards, ShardWriter
from tests.cards import cluster_shards_card
from tests.conftest import RUN, K

OLD = Lineage(sha256(b"tiny").hexdigest(), K)  # that of `trained_run`
GROWN, SPLIT = OLD.grown("grown", None), OLD.grown("split", 1)


def write_probe(path: Path, assignment: str | None, k: int, clusters: list[int], rows: int = 12) -> Path:
    """Secret rows whose latents are the number of their cluster."""
    for number in clusters:
        about = cluster_shards_card(cluster=number, clusters=k, assignment=assignment, latent_shape=[1, 4, 8])
        with ShardWriter(path / f"cluster-{number:03d}", about) as writer:
            latents = torch.full((rows, 1, 4, 8), float(number)).half()
            writer.append([f"{number}-{i}" for i in range(rows)], ["moss"] * rows, ["val"] * rows, {"latent": latents})
    return path


def numbers(probe: Probe, *clusters: int) -> set[float]:
    return set(probe.rows(clusters, 64, 0).latents.flatten().tolist())


def test_older_rows_stand_for_what_their_cluster_is_now(tmp_path) -> None:
    path = write_probe(tmp_path / "probe", OLD.assignment, 3, [0, 1, 2])
    # A new cluster takes nothing from the others, and has no rows.
    probe = Probe(path, GROWN)
    assert [numbers(probe, number) for number in range(3)] == [{0}, {1}, {2}]
    assert not probe.has([3])
    with pytest.raises(AtollError, match=r"0 rows of clusters \[3\], .* `atoll collective probe` assign its images"):
        numbers(probe, 3)
    # A split cluster's rows are of both parts together, and of neither alone.
    probe = Probe(path, SPLIT)
    assert (numbers(probe, 1, 3), numbers(probe, 0)) == ({1}, {0})
    for part in (1, 3):
        with pytest.raises(AtollError, match="older than the growth"):
            numbers(probe, part)


def test_rows_of_other_clusters_are_of_no_cluster_of_the_expert(tmp_path) -> None:
    encoder = build_encoder(RUN["condition"])
    path = write_probe(tmp_path / "probe", OLD.assignment, 3, [0, 1, 2])
    for lineage, own, others in (
        (SPLIT, (0,), {1, 2}),
        (SPLIT, (1, 3), {0, 2}),
        (SPLIT, (3,), {0, 2}),
        (OLD, (1,), {0, 2}),
    ):
        rows = ClusterReference(own, Probe(path, lineage), (), encoder, lineage).others(100, 0)
        assert rows is not None
        assert set(rows.latents.flatten().tolist()) == others
    alone = Probe(write_probe(tmp_path / "alone", OLD.assignment, 3, [1]), SPLIT)
    assert ClusterReference((1, 3), alone, (), encoder, SPLIT).others(100, 0) is None


def test_a_probe_of_today_has_rows_of_every_part(tmp_path) -> None:
    probe = Probe(write_probe(tmp_path / "probe", SPLIT.assignment, 4, [0, 1, 2, 3]), SPLIT)
    assert (numbers(probe, 1), numbers(probe, 3), numbers(probe, 1, 3)) == ({1}, {3}, {1, 3})


@pytest.mark.parametrize(
    ("assignment", "k"), [("elsewhere", 3), (OLD.assignment, 4), (GROWN.assignment, 3)], ids=["unknown", "k", "now"]
)
def test_a_probe_that_did_not_grow_into_the_collectives_is_refused(tmp_path, assignment, k) -> None:
    with pytest.raises(AtollError, match="another clustering"):
        Probe(write_probe(tmp_path / "probe", assignment, k, [0, 1]), GROWN)


@pytest.fixture
def expert(trained_run, tmp_path) -> Path:
    source = trained_run / "experts" / "1-flow-linear"
    card = read_card(source, ExpertCard)
    save_artifact(tmp_path / "expert", card, read_tensors(source, card))
    return tmp_path / "expert"


def refusal(run: Path, expert: Path, lineage: Lineage, now: tuple[int, ...], clusters: tuple[int, ...] = (1,)) -> str:
    data = Shards(run / "clusters" / "cluster-001").card(ClusterShardsCard)
    check, _ = check_contents(expert, data, lineage, name="1-flow-linear", clusters=clusters, now=now, known={})
    return "" if check.passed else check.reason


def change(expert: Path, **changes: object) -> None:
    card = read_card(expert, ExpertCard)
    save_artifact(
        expert, card.model_copy(update=changes), {k: v.clone() for k, v in read_tensors(expert, card).items()}
    )


def test_an_older_expert_is_judged_as_what_its_clusters_are_now(trained_run, expert) -> None:
    assert refusal(trained_run, expert, OLD, (1,)) == ""
    assert refusal(trained_run, expert, GROWN, (1,)) == ""
    assert refusal(trained_run, expert, SPLIT, (1, 3)) == ""
    # Not as one part, nor as clusters that it was not trained on.
    assert "its clusters [1] are [1, 3] now, expected [1]" in refusal(trained_run, expert, SPLIT, (1,))
    assert "the submission names" in refusal(trained_run, expert, SPLIT, (2,), (2,))


def test_an_expert_of_another_lineage_is_refused(trained_run, expert) -> None:
    other = Lineage("other", 2).grown("grown", None)
    assert f"its assignment is {OLD.assignment}, the collective's is grown" in refusal(trained_run, expert, other, (1,))
    # The number of clusters must be that of its own assignment.
    change(expert, k=4)
    assert "is of 4 clusters, the collective has 3" in refusal(trained_run, expert, GROWN, (1,))
    change(expert, k=4, assignment=GROWN.assignment)
    assert refusal(trained_run, expert, GROWN, (1,)) == ""
    assert "is of 4 clusters, the collective has 3" in refusal(trained_run, expert, OLD, (1,))
