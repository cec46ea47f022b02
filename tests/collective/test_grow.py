"""An open collective grows: the founder publishes another clustering, and members follow without disturbance."""

import itertools
import shutil
from pathlib import Path

import obstore
import pytest

from atoll.cluster import cluster
from atoll.collective import admit as admit_module
from atoll.collective.charter import publish_charter, read_collective
from atoll.collective.connect import open_store
from atoll.collective.gate.contents import check_contents
from atoll.collective.keys import Key
from atoll.collective.run_files import read_run
from atoll.collective.statements import Charter, Roles, Thresholds
from atoll.manifest import load_manifest
from atoll.storage.artifact import read_card
from atoll.storage.cards import ExpertCard
from atoll.storage.layout import CARD, WEIGHTS
from atoll.storage.shards import Shards
from tests.collective.growing import FLOW, GrowingReef, edit, write_probe


@pytest.fixture
def reef(growing) -> GrowingReef:
    return growing


def test_growth_uploads_what_is_new_and_members_follow(reef) -> None:
    reef.join("ada")
    reef("claim", "bucket", "--cluster", 0, "-r", "ada")
    reef.new_cluster()
    before = reef.objects()
    assert "charter 2 published: 3 clusters became 4" in reef("grow", "bucket", "-r", "run")
    new = reef.uploaded(before)
    assert {path.split("/")[1] for path in new if "/" in path} == {
        "cluster-003",
        "clusters.json",
        "centroids.safetensors",
    }
    # Everybody can verify it, and every file lies where a list says.
    store = open_store("bucket")
    collective = read_collective(store)
    run = read_run(store, collective)
    assert (run.lineage.k, run.lineage.ancestors[0].clusters) == (4, ((0,), (1,), (2,)))
    assert run.lineage.continues(read_run(store, collective, 1).lineage)
    assert all(store.exists(f"{run.places[name]}/{name}") for name in run.files)
    assert {name for name in run.files if name.startswith("router/")} == {f"router/{name}" for name in (CARD, WEIGHTS)}
    # A member who does not follow yet keeps what it has, and takes nothing new.
    assert "the collective has grown to 4; run `atoll collective follow" in reef.refused("claim", "bucket", "-r", "ada")
    assert "epoch 1" in reef("claim", "bucket", "--cluster", 0, "-r", "ada")
    shards = {path: path.stat().st_mtime_ns for path in (reef.root / "ada").rglob("*shard-*")}
    assert "ada knows 4 clusters, before 3; new work: 3" in reef("follow", "bucket", "-r", "ada")
    assert {path: path.stat().st_mtime_ns for path in (reef.root / "ada").rglob("*shard-*")} == shards
    assert (reef.root / "ada" / "atoll.yaml").read_bytes() == (reef.run / "atoll.yaml").read_bytes()
    assert "knows all 4 clusters" in reef("follow", "bucket", "-r", "ada")
    # The new work is offered, and only its shards are fetched. Whoever joins now is as far.
    reef.join("ben")
    assert "work 1 is yours" in reef("claim", "bucket", "-r", "ben")
    assert "work 2 is yours" in reef("claim", "bucket", "-r", "ben")
    assert "work 3 is yours" in reef("claim", "bucket", "-r", "ada")
    for name, clusters in (("ada", [0, 3]), ("ben", [1, 2])):
        here = sorted(path.name for path in (reef.root / name / "clusters").glob("cluster-*"))
        assert here == [f"cluster-{number:03d}" for number in clusters]
    assert "all 4 work items are held" in reef.refused("claim", "bucket", "-r", "ben")


def test_a_training_goes_on_through_a_split(reef) -> None:
    reef.join("ada")
    reef("claim", "bucket", "--cluster", 1, "-r", "ada")
    lost = next((reef.root / "ada" / "clusters" / "cluster-001").glob("shard-*"))
    data = lost.read_bytes()
    lost.unlink()
    reef.split(1)
    before = reef.objects()
    reef("grow", "bucket", "-r", "run")
    parts = {path.split("/")[1] for path in reef.uploaded(before) if "cluster-" in path}
    assert parts == {"cluster-001", "cluster-003"}
    reef("follow", "bucket", "-r", "ada")
    # The claim that is held stays one of the old shards, also where a download has to be completed.
    assert "epoch 1" in reef("claim", "bucket", "--cluster", 1, "-r", "ada")
    assert lost.read_bytes() == data
    assert reef.atoll("train", "expert", "1", "-r", "ada")[0] == 0
    card = read_card(reef.root / "ada" / "experts" / "1-flow-linear", ExpertCard)
    assert (card.k, card.clusters) == (3, (1,))
    # A new claim of the same number is one of the part, whose shards never replace the old ones.
    reef("release", "bucket", "-r", "ada")
    assert "such as those of before a split" in reef.refused("claim", "bucket", "--cluster", 1, "-r", "ada")
    reef.join("ben")
    reef("claim", "bucket", "--cluster", 1, "-r", "ben")
    assert (reef.root / "ben" / "clusters" / "cluster-001" / lost.name).read_bytes() != data


def test_whole_shards_are_never_replaced_and_damaged_ones_are_fetched_again(reef) -> None:
    reef.join("ada")
    reef("claim", "bucket", "--cluster", 1, "-r", "ada")
    index = reef.root / "ada" / "clusters" / "cluster-001" / "index.json"
    data = index.read_bytes()
    index.write_bytes(data[:-9])
    reef("claim", "bucket", "--cluster", 1, "-r", "ada")
    assert index.read_bytes() == data
    reef("release", "bucket", "-r", "ada")
    # The founder has split a cluster, and published nothing yet.
    reef.split(1)
    index = reef.run / "clusters" / "cluster-001" / "index.json"
    data = index.read_bytes()
    assert "holds other shards than the collective's" in reef.refused("claim", "bucket", "--cluster", 1, "-r", "run")
    assert index.read_bytes() == data


def test_an_older_expert_is_admitted_as_what_its_clusters_are_now(reef, monkeypatch) -> None:
    reef.join("ada")
    expert = reef.train("ada", 1)
    write_probe(reef.root / "probe", reef.run, [0, 1, 2])
    reef.split(1)
    reef("grow", "bucket", "-r", "run")
    # Its training is finished also by the atoll.yaml of today, and would have gone on with it.
    before = (expert / CARD).read_bytes()
    reef("follow", "bucket", "-r", "ada")
    assert reef.atoll("train", "expert", "1", "-r", "ada", "--resume")[0] == 0
    assert (expert / CARD).read_bytes() == before
    submission = reef("publish", expert).split()[0]
    judged = []

    def judge(path, reference, *, clusters, name, known, **options):
        judged.append((reference.clusters, clusters, [shards.keys[0] for shards in reference.shards]))
        now = reference.clusters
        about = {"name": name, "clusters": clusters, "now": now, "known": known}
        return [check_contents(path, reference.data, reference.descent, **about)[0]]

    monkeypatch.setattr(admit_module, "judge", judge)
    # The admitter's directory has the shards of before the split, too: they stay, the parts are fetched apart.
    founders = [Shards(reef.run / "clusters" / f"cluster-{number:03d}").keys[0] for number in (1, 3)]
    before = (reef.root / "ada" / "clusters" / "cluster-001" / "index.json").read_bytes()
    admit = "admit", "bucket", "--probe", "probe", "-r", "ada", "--key", "founder.key"
    assert reef(*admit) == f"{submission} 1-flow-linear accepted, and in"
    assert judged == [((1, 3), (1,), founders)]
    assert (reef.root / "ada" / "clusters" / "cluster-001" / "index.json").read_bytes() == before
    # An expert of clusters that never were the collective's is not even uploaded.
    edit(expert / "card.json", lambda one: one.update(assignment="0" * 64, k=2, clusters=[1]))
    assert "is of 2 clusters, the collective has 4, which did not grow from them" in reef.refused("publish", expert)


def test_a_store_that_fails_shows_no_half_of_a_growth(reef, monkeypatch) -> None:
    reef.new_cluster()
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    put = obstore.put
    # The store fails after none, one, ... of the writes.
    for allowed in range(100):
        count = itertools.count()

        def failing(*values, **options):
            if next(count) >= allowed:  # noqa: B023
                raise obstore.exceptions.GenericError("Generic error: 500 Internal Server Error")
            return put(*values, **options)

        monkeypatch.setattr(obstore, "put", failing)
        code, _, err = reef.atoll("collective", "grow", "bucket", "-r", "run")
        monkeypatch.setattr(obstore, "put", put)
        if code == 0:
            break
        assert (code, err.count("\n")) == (2, 1), err
        store = open_store("bucket")
        collective = read_collective(store)
        assert (collective.position.version, read_run(store, collective).lineage.k) == (1, 3)
    # The same command went on where it stopped.
    assert allowed > 2
    store = open_store("bucket")
    assert read_run(store, read_collective(store)).lineage.k == 4


def test_two_steps_can_be_published_at_once(reef) -> None:
    reef.new_cluster()
    reef.split(1)
    assert "3 clusters became 5" in reef("grow", "bucket", "-r", "run")
    assert "has the collective's 5 clusters; grow them with" in reef.refused("grow", "bucket", "-r", "run")


def other_clusters(reef) -> None:
    shutil.rmtree(reef.run / "clusters")
    cluster(reef.run / "encoded", reef.run / "clusters", 4, fine=24, seed=3)
    reef.name_clusters(4, {"cluster": 3, "objective": FLOW})


def other_shards(reef) -> None:
    reef.new_cluster()
    edit(reef.run / "clusters" / "cluster-000" / "index.json", lambda one: one["card"].update(source={"name": "x"}))


def other_training(reef) -> None:
    reef.new_cluster()
    reef.name_clusters(4, train={"steps": 9})


def other_order(reef) -> None:
    reef.new_cluster()
    reef.name_clusters(4, experts=load_manifest(reef.run).model_dump(mode="json")["experts"][::-1])


def no_expert(reef) -> None:
    reef.new_cluster()
    reef.name_clusters(4, experts=load_manifest(reef.run).model_dump(mode="json")["experts"][:3])


def another_k(reef) -> None:
    reef.new_cluster()
    reef.name_clusters(5)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda reef: None, "has the collective's 3 clusters"),
        (other_clusters, "of another clustering, which did not grow from the collective's"),
        (other_shards, "cluster-000: differs from what the collective trains on"),
        (other_training, "train differs from the collective's"),
        (other_order, "the collective's experts must stay as they are"),
        (no_expert, "names no expert of cluster 3"),
        (another_k, "clusters.k is 5"),
    ],
)
def test_what_is_no_growth_is_refused(change, problem, reef) -> None:
    change(reef)
    assert problem in reef.refused("grow", "bucket", "-r", "run")
    assert read_collective(open_store("bucket")).position.version == 1


def test_only_enough_founders_let_it_grow(reef) -> None:
    other = reef.join("ada")
    store = open_store("bucket")
    now, founder = read_collective(store), Key.load(Path("founder.key"))
    values = {
        "version": 2,
        "previous": now.position.sha256,
        "roles": Roles(founders=(founder.id, other), admitters=(founder.id,), retirers=(founder.id,)),
        "thresholds": Thresholds(founders=2),
    }
    publish_charter(store, Charter(**{**now.charter.model_dump(), **values}), [founder], now.identity)
    reef.new_cluster()
    assert "2 founders must sign, 1 keys are here" in reef.refused("grow", "bucket", "-r", "run")
    reef.join("eve")
    assert "is no founder" in reef.refused("grow", "bucket", "-r", "run", "--key", "eve.key")
    assert "charter 3 published" in reef("grow", "bucket", "-r", "run", "--key", "ada.key")


def test_a_directory_of_other_clusters_does_not_follow(reef) -> None:
    reef.join("ada")
    reef.new_cluster()
    assert "is ahead of the collective" in reef.refused("follow", "bucket", "-r", "run")
    reef("grow", "bucket", "-r", "run")
    file = reef.root / "ada" / "atoll.yaml"
    mine = file.read_text() + "\n# mine\n"
    file.write_text(mine)
    assert "was changed here; move it away" in reef.refused("follow", "bucket", "-r", "ada")
    assert file.read_text() == mine
    file.unlink()
    edit(reef.root / "ada" / "clusters" / "clusters.json", lambda one: one.update(assignment="0" * 64))
    assert "did not grow from these" in reef.refused("follow", "bucket", "-r", "ada")
    assert not file.exists()
