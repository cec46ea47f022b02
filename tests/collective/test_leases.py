"""Leases: one holder per epoch, ended by time, release or a successor; junk and strangers take nothing away."""

import os
from pathlib import Path

import pytest

from atoll.collective.charter import Collective
from atoll.collective.keys import Key
from atoll.collective.leases import Lease, claim, claim_next, end, new_nonce, renew, when, work_status
from atoll.collective.signed import sign
from atoll.collective.statements import Claim, End, MemberRecord
from atoll.collective.store import Store, StoreError
from atoll.errors import AtollError
from tests.collective.faults import FaultyClient
from tests.collective.founding import amend, found, put

ADA, BEN, EVE = (Key.generate() for _ in range(3))


def take(store: Store, collective: Collective, key: Key, work: str = "3", **options: bool) -> Lease:
    return claim(store, collective, key, work, new_nonce(), **options)


def age(store: Store, seconds: float, path: str = "") -> None:
    """Let time pass: what is in the directory (or one object of it) becomes older by so many seconds."""
    for file in [Path(store.url, path)] if path else Path(store.url).rglob("*.*"):
        stat = file.stat()
        os.utime(file, (stat.st_atime - seconds, stat.st_mtime - seconds))


def test_a_lease_is_held_by_one(store) -> None:
    collective = found(store, ADA)
    lease = take(store, collective, ADA)
    assert (lease.work, lease.epoch) == ("3", 1)
    with pytest.raises(AtollError, match=r"work 3 is held by founder .* until 2"):
        take(store, collective, BEN)
    assert take(store, collective, BEN, "3.1").epoch == 1
    assert take(store, collective, BEN, "30").epoch == 1
    assert renew(store, collective, lease, ADA)


def test_two_processes_of_one_member_are_told_apart(store) -> None:
    collective = found(store, ADA)
    nonce = new_nonce()
    lease = claim(store, collective, ADA, "3", nonce)
    # The same attempt again, whose answer was lost: the same lease.
    assert claim(store, collective, ADA, "3", nonce) == lease
    with pytest.raises(AtollError, match="is held by"):
        claim(store, collective, ADA, "3", new_nonce())


def test_a_lease_ends_by_the_clock_of_the_store(local) -> None:
    collective = found(local, ADA)
    lease = take(local, collective, ADA)
    age(local, 3500)
    assert renew(local, collective, lease, ADA)  # the heartbeat alone is young now
    age(local, 3500)
    with pytest.raises(AtollError, match="is held by"):
        take(local, collective, BEN)
    age(local, 200)
    assert take(local, collective, BEN).epoch == 2
    assert not renew(local, collective, lease, ADA)
    assert work_status(local, collective, "3").holder == BEN.id


def test_a_machine_that_wakes_up_after_a_week_has_lost_its_lease(local) -> None:
    collective = found(local, ADA)
    old = take(local, collective, ADA)
    age(local, 7 * 86_400)
    new = take(local, collective, BEN)
    assert not renew(local, collective, old, ADA)
    end(local, collective, old, ADA, "finished")
    # Its late heartbeat and its late end change nothing for the successor.
    assert renew(local, collective, new, BEN)
    status = work_status(local, collective, "3")
    assert (status.epoch, status.holder, status.end) == (2, BEN.id, None)


def test_an_expired_lease_that_nobody_took_comes_back_by_a_heartbeat(local) -> None:
    collective = found(local, ADA)
    lease = take(local, collective, ADA)
    age(local, 7200)
    assert work_status(local, collective, "3").state(local.now("x")) == "expired"
    assert renew(local, collective, lease, ADA)
    assert work_status(local, collective, "3").state(local.now("x")) == "held"


def test_released_work_is_free_at_once(store) -> None:
    collective = found(store, ADA)
    lease = take(store, collective, ADA)
    end(store, collective, lease, ADA, "released")
    end(store, collective, lease, ADA, "released")
    assert take(store, collective, BEN).epoch == 2


def test_finished_work_is_taken_again_only_on_purpose(store) -> None:
    collective = found(store, ADA)
    lease = take(store, collective, ADA)
    end(store, collective, lease, ADA, "finished")
    with pytest.raises(AtollError, match=r"work 3 is finished \(epoch 1\); claim a replica"):
        take(store, collective, BEN)
    with pytest.raises(AtollError, match="ended in another way"):
        end(store, collective, lease, ADA, "released")
    assert take(store, collective, BEN, again=True).epoch == 2


def test_only_the_holder_ends_a_lease(local) -> None:
    collective = found(local, ADA)
    take(local, collective, ADA)
    put(local, "work/3/000001.end", End(work="3", epoch=1, state="released"), EVE, collective)
    with pytest.raises(AtollError, match="is held by"):
        take(local, collective, BEN)


def test_junk_takes_no_lease_away(local) -> None:
    collective = found(local, ADA)
    lease = take(local, collective, ADA)
    local.create("work/3/000002.json", b"junk")
    local.create("work/3/000003.json", b"")
    local.create("work/3/999999.json", b"the end of all epochs")
    with Path(local.url, "work/3/000004.json").open("wb") as file:
        file.truncate(2 << 20)
    # A claim of another work item, or of another epoch, is junk too.
    put(local, "work/3/000005.json", Claim(work="2", epoch=5, nonce="0" * 32), EVE, collective)
    put(local, "work/3/000006.json", Claim(work="3", epoch=1, nonce="0" * 32), EVE, collective)
    with pytest.raises(AtollError, match="is held by"):
        take(local, collective, BEN)
    assert renew(local, collective, lease, ADA)
    end(local, collective, lease, ADA, "released")
    assert take(local, collective, BEN).epoch == 7


def test_more_junk_than_is_read_takes_no_lease_away(local, monkeypatch) -> None:
    monkeypatch.setattr("atoll.collective.leases._JUNK", 3)
    collective = found(local, ADA)
    take(local, collective, ADA)
    for epoch in (2, 3, 4):
        local.create(f"work/3/{epoch:06d}.json", b"junk")
    with pytest.raises(AtollError, match="its last 3 claims are of no member; remove them"):
        take(local, collective, BEN)
    # The next work is another one.
    assert claim_next(local, collective, BEN, ["3", "4"], lambda work: new_nonce()).work == "4"
    Path(local.url, "work/3/000004.json").unlink()
    with pytest.raises(AtollError, match="is held by"):
        take(local, collective, BEN)


def test_a_member_removed_while_training_loses_the_lease(local) -> None:
    collective = found(local, ADA, joining="invited", members={BEN.id: MemberRecord(name="ben")})
    lease = take(local, collective, BEN)
    later = amend(local, collective, ADA, members={}, removed=(BEN.id,))
    assert not renew(local, later, lease, BEN)
    assert take(local, later, ADA).epoch == 2
    with pytest.raises(AtollError, match="was removed"):
        take(local, later, BEN, "2")


def test_a_claim_reads_the_charter_after_the_claims(local) -> None:
    collective = found(local, ADA, joining="invited")
    # Ada does not know yet that Ben is a member now, and holds the work.
    later = amend(local, collective, ADA, members={BEN.id: MemberRecord(name="ben")})
    take(local, later, BEN)
    with pytest.raises(AtollError, match="is held by ben"):
        take(local, collective, ADA)


def test_strangers_claim_nothing_where_members_are_invited(local) -> None:
    collective = found(local, ADA, joining="invited")
    with pytest.raises(AtollError, match="is no member"):
        take(local, collective, EVE)
    put(local, "work/3/000001.json", Claim(work="3", epoch=1, nonce="0" * 32), EVE, collective)
    assert take(local, collective, ADA).epoch == 2


def test_the_next_work_is_the_first_that_nobody_has(store) -> None:
    collective = found(store, ADA)
    works = ["0", "1", "1.1", "2"]
    finished = take(store, collective, ADA, "0")
    end(store, collective, finished, ADA, "finished")
    nonces = []

    def nonce_of(work: str) -> str:
        nonces.append(work)
        return new_nonce()

    leases = [claim_next(store, collective, key, works, nonce_of).work for key in (ADA, BEN, ADA)]
    assert leases == ["1", "1.1", "2"]
    assert nonces == leases
    with pytest.raises(AtollError, match="all 4 work items are held or finished"):
        claim_next(store, collective, BEN, works, nonce_of)


def test_the_next_work_is_another_one_if_somebody_is_faster(local) -> None:
    collective = found(local, ADA)

    class Slow(FaultyClient):
        def put_new(self, path: str, data: bytes) -> None:
            if path == "work/0/000001.json":
                self.client.put_new(path, sign(Claim(work="0", epoch=1, nonce="1" * 32), [BEN], collective.identity))
            self.client.put_new(path, data)

    lease = claim_next(Store(Slow(local.client, 0)), collective, ADA, ["0", "1"], lambda work: new_nonce())
    assert lease.work == "1"
    assert work_status(local, collective, "0").holder == BEN.id


@pytest.mark.parametrize("seed", range(8))
def test_a_claim_whose_answer_was_lost_is_not_lost(seed, local) -> None:
    collective = found(local, ADA)
    faulty = Store(FaultyClient(local.client, seed, rate=0.2), pause=0)
    nonce = new_nonce()
    for _ in range(100):
        try:
            lease = claim(faulty, collective, ADA, "3", nonce)
            break
        except StoreError:
            continue
    assert lease == Lease("3", 1, nonce)
    assert [entry.path for entry in local.list("work/3")] == ["work/3/000001.json"]


def test_no_clock_of_a_member_takes_part(local, monkeypatch) -> None:
    collective = found(local, ADA)
    for now in (0.0, 4e9):
        monkeypatch.setattr("time.time", lambda now=now: now)
        lease = take(local, collective, ADA)
        assert renew(local, collective, lease, ADA)
        with pytest.raises(AtollError, match="is held by"):
            take(local, collective, BEN)
        end(local, collective, lease, ADA, "released")


def test_an_expired_charter_gives_no_leases(local) -> None:
    collective = found(local, ADA, expires=1000)
    with pytest.raises(AtollError, match="the charter of 'reef' has expired"):
        take(local, collective, ADA)


def test_a_time_beyond_all_calendars_is_shown() -> None:
    assert when(1e18) == "9999-12-31 23:59 UTC"
    assert when(0) == "1970-01-01 00:00 UTC"
