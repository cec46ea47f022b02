"""A collective from three clusters to four, through the commands: old and new experts, the grown router, images."""

import shutil
import warnings
from pathlib import Path

import pytest
import yaml

from atoll.collective.charter import read_collective
from atoll.collective.connect import open_store
from atoll.collective.files import digests_of, upload_files
from atoll.collective.index import append_index, read_index
from atoll.collective.keys import Key
from atoll.collective.model import open_model
from atoll.collective.routers import approval_path, router_prefix
from atoll.collective.signed import sign
from atoll.collective.statements import Index, RouterApproval
from atoll.ensemble.loading import load_ensemble
from atoll.errors import AtollError
from atoll.storage.artifact import load_card, sha256_file
from atoll.storage.cards import EnsembleCard
from atoll.storage.layout import CARD, ENSEMBLE_CARD, WEIGHTS, RunLayout
from tests.collective.growing import GrowingReef, write_probe
from tests.conftest import RUN

STEPS = 150


def approve_unseen(router: Path, key: Key) -> None:
    """Sign a router into the bucket without the checks of `publish`; an index with it is refused all the same."""
    store = open_store("bucket")
    collective, files = read_collective(store), digests_of(router, [CARD, WEIGHTS])
    latest = read_index(store, collective)
    assert latest is not None
    upload_files(store, router_prefix(files[CARD].sha256), router, files)
    statement = RouterApproval(files=files, after=0, charter=2)
    store.create(approval_path(files[CARD].sha256, 0, key.id), sign(statement, [key], collective.identity))
    values = {"version": 3, "previous": latest.position.sha256, "router": files}
    with pytest.raises(AtollError, match="its router does not know the clusters of"):
        append_index(store, collective, Index(**{**latest.index.model_dump(), **values}), key)


def test_a_collective_of_three_clusters_becomes_one_of_four(founded, tmp_path, atoll, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("atoll.collective.admit.secrets.randbits", lambda bits: 7)
    # Founded on three clusters; experts that learn enough to pass the gate.
    shutil.copytree(founded, tmp_path, dirs_exist_ok=True)
    train = {**RUN["train"], "steps": STEPS, "lr": 8e-3, "batch": 32, "calibration_holdout": 0.2, "log_every": 100}
    (tmp_path / "run" / "atoll.yaml").write_text(yaml.safe_dump({**RUN, "train": train}))
    reef = GrowingReef(tmp_path, atoll)
    reef.open()
    reef.join("ada")
    admit = "admit", "bucket", "--probe", "probe", "-r", "run"

    def model() -> EnsembleCard:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return load_card(open_model("bucket").directory / ENSEMBLE_CARD, EnsembleCard)

    def sample() -> str:
        """Sample the bucket, and return the warnings."""
        (tmp_path / "out.png").unlink(missing_ok=True)
        code, out, err = atoll("sample", "bucket", "moss", "-o", "out.png")
        assert (code, out) == (0, "out.png written\n"), err
        assert (tmp_path / "out.png").is_file()
        return err

    # An expert of the three is admitted, and drawn with the founder's router.
    write_probe(tmp_path / "probe", reef.run, [0, 1, 2])
    reef("publish", reef.train("ada", 1))
    assert "1-flow-linear accepted, and in" in reef(*admit)
    sample()
    assert (model().clusters, model().lineage) == (3, None)

    # The founder adds a cluster. The model is as it was: the grown router is not in it yet.
    shutil.copytree(reef.run / "router", tmp_path / "old" / "router")
    shutil.copy(reef.run / "collective.json", tmp_path / "old")
    reef.new_cluster()
    reef.extend()
    assert "is not in the lineage of the collective's 3" in " ".join(reef.refused("publish", "run/router").split())
    reef("grow", "bucket", "-r", "run")
    assert "without" not in sample()
    assert model().clusters == 3
    # The expert of the new cluster is trained, judged with a probe that knows it, and waits for the router.
    reef("follow", "bucket", "-r", "ada")
    reef("publish", reef.train("ada", 3))
    line = reef(*admit)
    assert "3-flow-linear not judged: probe: 0 rows of clusters [3], expected at least 8" in line
    assert line.endswith("`atoll collective probe` assign its images anew")
    write_probe(tmp_path / "probe", reef.run, [3])
    assert "3-flow-linear accepted, and in" in reef(*admit)
    assert "without 3-flow-linear: the router does not know their clusters yet" in " ".join(sample().split())
    assert [one.name for one in model().experts] == ["1-flow-linear"]
    text = reef("status", "bucket")
    assert "grew from 3 to 4 clusters with charter 2" in text
    assert "waits" in text

    # A router without the new cluster cannot come now, whoever signs it.
    assert "does not know the clusters of 3-flow-linear" in reef.refused("publish", "old/router")
    approve_unseen(tmp_path / "old" / "router", Key.load(Path("founder.key")))
    assert "nothing to judge" in reef(*admit)

    # The router comes: old and new expert are drawn by it.
    assert "is the model's router: index 3 names it" in reef("publish", "run/router", "bucket")
    sample()
    card, opened = model(), open_model("bucket")
    assert (card.clusters, [one.clusters for one in card.experts]) == (4, [(1,), (3,)])
    assert card.router is not None
    assert card.router.sha256 == sha256_file(RunLayout(reef.run).router / CARD)
    experts = load_ensemble(opened.directory, fetch=opened.fetch).ensemble.experts
    assert [expert.clusters for expert in experts] == [(1,), (3,)]
    latest = read_index(open_store("bucket"), read_collective(open_store("bucket")))
    assert latest is not None
    assert latest.router_since == 3
    text = reef("status", "bucket")
    assert "the model's, since index 3" in text
    assert "waits" not in text
