"""Shared checkpoints: a successor continues bit for bit, and trusts only what an earlier holder signed."""

import os
import signal
from pathlib import Path

import pytest

from atoll.collective.charter import Collective
from atoll.collective.checkpoints import fetch_checkpoint, share_checkpoint
from atoll.collective.connect import open_store
from atoll.collective.keys import Key
from atoll.collective.leases import Lease, claim, end, new_nonce
from atoll.collective.statements import Claim
from atoll.collective.store import Store
from atoll.errors import AtollError
from atoll.manifest import load_manifest
from atoll.train.expert import train_expert
from atoll.train.loop import Interrupted
from tests.collective.founding import found, put
from tests.waiting import wait_until

ADA, BEN, EVE = (Key.generate() for _ in range(3))


@pytest.fixture
def lost(local, tmp_path) -> tuple[Store, Collective, Lease, Lease]:
    """A collective in which Ada shared three checkpoints of work 3, and Ben took over."""
    collective = found(local, ADA)
    old = claim(local, collective, ADA, "3", new_nonce())
    last = None
    for state in (b"one", b"one", b"two", b"three"):
        (tmp_path / "checkpoint.safetensors").write_bytes(state)
        last = share_checkpoint(local, collective, old, ADA, tmp_path / "checkpoint.safetensors", last)
    end(local, collective, old, ADA, "released")
    return local, collective, old, claim(local, collective, BEN, "3", new_nonce())


def test_a_successor_gets_the_last_checkpoint(lost, tmp_path) -> None:
    store, collective, _, new = lost
    owner = fetch_checkpoint(store, collective, "3", new.epoch, tmp_path / "mine" / "file")
    assert (tmp_path / "mine" / "file").read_bytes() == b"three"
    assert owner.startswith("founder")
    # Two files at most, however long the training.
    assert len(list((Path(store.url) / "checkpoints").rglob("*.safetensors"))) == 2
    assert len(list((Path(store.url) / "checkpoints").rglob("*.json"))) == 3
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["checkpoint.safetensors"]


def test_a_checkpoint_that_is_being_written_gives_way_to_the_one_before(lost, tmp_path) -> None:
    store, collective, _, new = lost
    (Path(store.url) / "checkpoints" / "3" / "000001" / "1.safetensors").write_bytes(b"half")
    fetch_checkpoint(store, collective, "3", new.epoch, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"two"


def test_a_checkpoint_of_another_than_the_holder_is_not_taken(lost, tmp_path) -> None:
    store, collective, old, new = lost
    (tmp_path / "bad").write_bytes(b"poison")
    share_checkpoint(store, collective, old, EVE, tmp_path / "bad")
    # Ada's last one lies in the other slot.
    fetch_checkpoint(store, collective, "3", new.epoch, tmp_path / "whole")
    assert (tmp_path / "whole").read_bytes() == b"three"
    (Path(store.url) / "checkpoints" / "3" / "000001" / "1.safetensors").write_bytes(b"poison")
    with pytest.raises(AtollError, match="no earlier holder shared a whole checkpoint"):
        fetch_checkpoint(store, collective, "3", new.epoch, tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_a_checkpoint_of_no_member_is_not_taken(local, tmp_path) -> None:
    """Whoever may write in the store can sign a claim of the next epoch, which has no effect."""
    collective = found(local, ADA, joining="invited")
    for key, state in ((ADA, b"mine"), (EVE, b"poison")):
        (tmp_path / "state").write_bytes(state)
        lease = Lease("3", 1 if key is ADA else 2, new_nonce())
        claimed = Claim(work="3", epoch=lease.epoch, nonce=lease.nonce)
        put(local, f"work/3/{lease.epoch:06d}.json", claimed, key, collective)
        share_checkpoint(local, collective, lease, key, tmp_path / "state")
    fetch_checkpoint(local, collective, "3", 3, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_no_checkpoint_replaces_ones_own(lost, tmp_path) -> None:
    store, collective, _, new = lost
    with pytest.raises(AtollError, match="continue from it with --resume"):
        fetch_checkpoint(store, collective, "3", new.epoch, tmp_path / "checkpoint.safetensors")
    with pytest.raises(AtollError, match="no earlier holder"):
        fetch_checkpoint(store, collective, "2", 5, tmp_path / "file")


def test_a_successor_continues_bit_for_bit(tmp_path, run, atoll) -> None:
    (run / "clusters" / "centroids.safetensors").write_bytes(b"centroids")
    commands = [("key", name) for name in ("founder", "ada", "ben")]
    commands += [("open", "bucket", "-r", run, "--key", "founder")]
    commands += [("join", "bucket", "-o", f"{name}-run", "--key", name) for name in ("ada", "ben")]
    commands += [("claim", "bucket", "--cluster", 1, "-r", "ada-run", "--share-checkpoints")]
    for command in commands:
        code, _, err = atoll("collective", *command)
        assert code == 0, err
    # Ada is lost in the middle of the training.
    from atoll.collective.heartbeat import renewed

    def lose(line: dict[str, object]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train_expert(tmp_path / "ada-run", load_manifest(tmp_path / "ada-run"), "1", progress=lose)
    with renewed(tmp_path / "ada-run", "1") as thread:
        assert thread is not None
        wait_until(lambda: thread.beats > 0)
    # Ben takes over.
    assert atoll("collective", "release", "bucket", "-r", "ada-run")[0] == 0
    code, out, err = atoll("collective", "claim", "bucket", "--cluster", 1, "-r", "ben-run", "--resume")
    assert (code, err) == (0, "")
    assert "epoch 1" in out
    assert "--resume" in out
    assert atoll("train", "expert", "1", "-r", "ben-run", "--resume")[0] == 0
    metrics = (tmp_path / "ben-run" / "experts" / ".train-1-flow-linear" / "metrics.jsonl").read_text()
    assert '"step": 2' not in metrics  # which Ada had done
    # The founder trains the same without interruption.
    assert atoll("train", "expert", "1", "-r", run)[0] == 0
    weights = [path / "experts" / "1-flow-linear" / "weights.safetensors" for path in (tmp_path / "ben-run", run)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert open_store("bucket").exists("checkpoints/1/000001/000001.json")
