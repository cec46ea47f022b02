"""The heartbeat renews a lease beside the training, and never touches the training."""

import shutil
import warnings
from pathlib import Path

import pytest

from atoll.collective import heartbeat
from atoll.collective.connect import open_store
from atoll.collective.heartbeat import Heartbeat, renewed, works_of
from atoll.collective.keys import Key
from atoll.collective.member import Membership
from atoll.collective.signed import sign
from atoll.collective.statements import Claim
from atoll.manifest import Manifest
from tests.conftest import RUN
from tests.waiting import wait_until


@pytest.fixture
def mine(tmp_path, run, atoll) -> Path:
    """A directory that holds a lease on work 1."""
    (run / "clusters" / "centroids.safetensors").write_bytes(b"centroids")
    for name in ("founder", "me"):
        atoll("collective", "key", f"{name}.key")
    atoll("collective", "open", "bucket", "-r", run, "--key", "founder.key")
    atoll("collective", "join", "bucket", "-o", "mine", "--key", "me.key")
    code, _, err = atoll("collective", "claim", "bucket", "--cluster", 1, "-r", "mine")
    assert code == 0, err
    return tmp_path / "mine"


def beat_of(mine: Path) -> Path:
    return mine.parent / "bucket" / "work" / "1" / "000001.beat"


def weights_of(run: Path) -> bytes:
    return (run / "experts" / "1-flow-linear" / "weights.safetensors").read_bytes()


def test_training_renews_the_lease_and_its_numbers_are_the_same(mine, run, atoll) -> None:
    # Without a collective: what the founder's run would give.
    (run / "collective.json").unlink()
    assert atoll("train", "expert", "1", "-r", run)[0] == 0
    assert not beat_of(mine).exists()
    code, _, err = atoll("train", "expert", "1", "-r", mine)
    assert (code, err) == (0, "")
    wait_until(beat_of(mine).exists)
    assert weights_of(mine) == weights_of(run)


def test_a_store_that_is_away_costs_nothing_but_the_lease(mine, run, atoll) -> None:
    (run / "collective.json").unlink()
    assert atoll("train", "expert", "1", "-r", run)[0] == 0
    shutil.rmtree(mine.parent / "bucket")
    code, out, _ = atoll("train", "expert", "1", "-r", mine)
    assert (code, out) == (0, "mine/experts/1-flow-linear written\n".replace("mine", str(mine)))
    assert weights_of(mine) == weights_of(run)


def test_a_heartbeat_logs_an_absent_store_once_and_goes_on_when_it_is_back(mine, monkeypatch) -> None:
    bucket, away = mine.parent / "bucket", mine.parent / "away"
    bucket.rename(away)
    thread = Heartbeat(mine, Membership(mine).leases["1"])
    # All pauses end at once.
    attempts = []
    monkeypatch.setattr(thread._stopped, "wait", lambda pause: attempts.append(pause) or thread._stopped.is_set())
    with warnings.catch_warnings(record=True) as logged:
        warnings.simplefilter("always")
        thread.start()
        wait_until(lambda: len(attempts) > 20 or not thread.is_alive())
        away.rename(bucket)
        wait_until(lambda: thread.beats > 0 or not thread.is_alive())
        thread.stop()
        wait_until(lambda: not thread.is_alive())
    assert len(logged) == 1
    assert "was not renewed" in str(logged[0].message)
    assert attempts[:4] == [2.0, 4.0, 8.0, 16.0]
    assert max(attempts) <= heartbeat._LONGEST_PAUSE


def test_a_heartbeat_names_lack_of_memory(mine) -> None:
    with pytest.warns(match=r"was not renewed \(out of memory \(MemoryError\); free some memory"):
        Heartbeat(mine, Membership(mine).leases["1"])._log_once(MemoryError())


def test_a_lost_lease_is_a_warning_and_the_thread_ends(mine) -> None:
    store = open_store(str(mine.parent / "bucket"))
    identity = Membership(mine).record.identity
    store.create("work/1/000002.json", sign(Claim(work="1", epoch=2, nonce="0" * 32), [Key.generate()], identity))
    with warnings.catch_warnings(record=True) as logged:
        warnings.simplefilter("always")
        with renewed(mine, "1") as thread:
            assert thread is not None
            wait_until(lambda: not thread.is_alive())
    assert ["is lost" in str(one.message) for one in logged] == [True]


@pytest.mark.parametrize("damage", ["", "{}", '{"format": 2}'])
def test_a_damaged_memory_of_the_collective_does_not_stop_training(damage, mine, atoll) -> None:
    (mine / "collective.json").write_text(damage)
    code, _, err = atoll("train", "expert", "1", "-r", mine)
    assert code == 0
    assert "no lease is renewed" in err


def test_an_expert_without_a_lease_has_no_heartbeat(mine) -> None:
    for expert in ("0", "nothing"):
        with renewed(mine, expert) as thread:
            assert thread is None


def test_further_experts_of_a_cluster_are_replicas() -> None:
    flow, x0 = {"prediction": "flow", "schedule": "linear"}, {"prediction": "x0", "schedule": "cosine"}
    experts = [{"cluster": 1, "objective": flow}, {"cluster": 0, "objective": x0}, {"cluster": 1, "objective": x0}]
    manifest = Manifest(**{**RUN, "experts": experts})
    assert works_of(manifest) == {"1": "1-flow-linear", "0": "0-x0-cosine", "1.1": "1-x0-cosine"}
