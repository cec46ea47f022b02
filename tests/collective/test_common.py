"""A collective whose experts start from a common model: it is published with the run, and comes with a lease."""

import shutil
from pathlib import Path

import pytest
import yaml

from atoll.collective.grow import grow_collective
from atoll.collective.join import join_collective
from atoll.collective.keys import Key
from atoll.collective.open import open_collective
from atoll.collective.work import claim_work
from atoll.errors import AtollError
from atoll.manifest import load_manifest
from atoll.storage.artifact import read_card
from atoll.storage.cards import ExpertCard
from atoll.storage.layout import CARD, WEIGHTS
from atoll.train.expert import train_common, train_expert
from tests.collective.growing import FLOW, GrowingReef

COMMON = {"objective": FLOW, "train": {"steps": 2}}


@pytest.fixture
def reef(founded, tmp_path, atoll) -> GrowingReef:
    """A run that is not published yet, whose experts start from a common model; and the founder's key."""
    shutil.copytree(founded, tmp_path, dirs_exist_ok=True)
    reef = GrowingReef(tmp_path, atoll)
    content = yaml.safe_load((reef.run / "atoll.yaml").read_text())
    content |= {"common": COMMON, "train": {**content["train"], "init": "common"}}
    (reef.run / "atoll.yaml").write_text(yaml.safe_dump(content))
    Key.generate().save(tmp_path / "founder.key")
    return reef


def test_a_lease_brings_the_common_model(reef, tmp_path) -> None:
    bucket, key = str(tmp_path / "bucket"), tmp_path / "founder.key"
    with pytest.raises(
        AtollError, match="common: not found, and experts start from it; run `atoll train common` first"
    ):
        open_collective(bucket, reef.run, key)
    assert not Path(bucket).exists()
    train_common(reef.run, load_manifest(reef.run))
    card = read_card(reef.run / "common", ExpertCard)
    open_collective(bucket, reef.run, key)
    # A member gets it with its shards.
    ada = tmp_path / "ada"
    join_collective(bucket, ada, key, name="ada")
    assert not (ada / "common").exists()
    claim_work(ada, cluster=1)
    assert sorted(path.name for path in (ada / "common").iterdir()) == [CARD, WEIGHTS]
    trained = read_card(train_expert(ada, load_manifest(ada), "1"), ExpertCard)
    assert trained.training.init.sha256 == card.weights_sha256
    # Growth leaves it as it was published, whatever the founder has now, or has no more.
    shutil.rmtree(reef.run / "common")
    reef.new_cluster()
    grow_collective(reef.run)
    ben = tmp_path / "ben"
    join_collective(bucket, ben, key, name="ben")
    claim_work(ben, cluster=3)
    assert read_card(ben / "common", ExpertCard).weights_sha256 == card.weights_sha256


def test_without_a_start_nothing_is_published(reef, tmp_path) -> None:
    """A common model from which no expert starts is the founder's own affair."""
    text = (reef.run / "atoll.yaml").read_text()
    (reef.run / "atoll.yaml").write_text(text.replace("init: common", "init: null"))
    open_collective(str(tmp_path / "bucket"), reef.run, tmp_path / "founder.key")
    join_collective(str(tmp_path / "bucket"), tmp_path / "ada", tmp_path / "founder.key", name="ada")
    claim_work(tmp_path / "ada", cluster=1)
    assert not (tmp_path / "ada" / "common").exists()
