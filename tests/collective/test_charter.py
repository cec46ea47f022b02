"""The chain of charters: only founders change it, and it never goes back."""

from pathlib import Path

import pytest

from atoll.collective.charter import numbered, read_collective
from atoll.collective.keys import Key
from atoll.collective.signed import sign
from atoll.collective.statements import MemberRecord, Position, Roles, Thresholds
from atoll.errors import AtollError
from tests.collective.founding import NOBODY, amend, charter_of, found

ADA, BEN, EVE = (Key.generate() for _ in range(3))


def test_the_hash_of_the_first_charter_is_the_identity(store) -> None:
    collective = found(store, ADA)
    assert read_collective(store, collective.identity) == collective
    assert collective.position == Position(version=1, sha256=collective.identity)
    with pytest.raises(AtollError, match="it was exchanged, or the address is of another collective"):
        read_collective(store, NOBODY)


def test_of_two_founders_one_opens_the_collective(store) -> None:
    collective = found(store, ADA)
    with pytest.raises(AtollError, match="another founder opened a collective here first"):
        found(store, EVE)
    assert read_collective(store) == collective


def test_an_empty_store_is_one_line(local) -> None:
    with pytest.raises(AtollError, match="no collective here"):
        read_collective(local)


def test_members_come_and_go_by_the_founders_word(local) -> None:
    collective = found(local, ADA, joining="invited")
    assert not collective.may_work(BEN.id)
    with pytest.raises(AtollError, match=f"--add {BEN.id}"):
        collective.check_may_work(BEN.id)
    collective = amend(local, collective, ADA, members={BEN.id: MemberRecord(name="ben")})
    assert collective.may_work(BEN.id)
    assert collective.name_of(BEN.id).startswith("ben (")
    collective = amend(local, collective, ADA, members={}, removed=(BEN.id,))
    with pytest.raises(AtollError, match="was removed"):
        collective.check_may_work(BEN.id)
    assert collective.may_work(ADA.id)


def test_anybody_may_work_where_joining_is_open_until_removed(local) -> None:
    collective = found(local, ADA)
    assert collective.may_work(EVE.id)
    assert not amend(local, collective, ADA, removed=(EVE.id,)).may_work(EVE.id)


def test_a_charter_that_founders_did_not_sign_is_refused(local) -> None:
    collective = found(local, ADA)
    roles = Roles(founders=(EVE.id,), admitters=(EVE.id,), retirers=(EVE.id,))
    with pytest.raises(AtollError, match="signed by 0 founders, expected 1"):
        amend(local, collective, EVE, roles=roles)


def test_as_many_founders_sign_as_the_charter_before_says(local) -> None:
    collective = found(local, ADA, BEN, thresholds=Thresholds(founders=2))
    with pytest.raises(AtollError, match="signed by 1 founders, expected 2"):
        amend(local, collective, ADA, thresholds=Thresholds(founders=1))


def test_two_founders_change_the_charter_together(local) -> None:
    collective = found(local, ADA, BEN, thresholds=Thresholds(founders=2))
    assert amend(local, collective, ADA, BEN, lease_seconds=60).charter.lease_seconds == 60
    # The first charter of two founders needs both, too.
    alone = sign(charter_of([ADA, BEN], thresholds=Thresholds(founders=2)), [ADA], "")
    Path(local.url, numbered("charter", 1)).write_bytes(alone)
    with pytest.raises(AtollError, match="signed by 1 founders, expected 2"):
        read_collective(local)


def test_a_charter_of_another_place_in_the_chain_is_refused(local) -> None:
    collective = found(local, ADA)
    with pytest.raises(AtollError, match="does not follow the charter before it"):
        amend(local, collective, ADA, previous=NOBODY)
    file = Path(local.url, numbered("charter", 2))
    file.unlink()
    file.write_bytes(Path(local.url, numbered("charter", 1)).read_bytes())
    with pytest.raises(AtollError, match="another collective or purpose"):
        read_collective(local)


def test_a_rolled_back_charter_is_refused(local) -> None:
    collective = found(local, ADA)
    later = amend(local, collective, ADA, removed=(EVE.id,))
    Path(local.url, numbered("charter", 2)).unlink()
    assert read_collective(local).may_work(EVE.id)  # who never saw it cannot know
    with pytest.raises(AtollError, match="but version 2 was here; the charter was rolled back"):
        read_collective(local, collective.identity, later.position)


def test_a_fork_of_the_charter_is_refused(local) -> None:
    collective = found(local, ADA)
    later = amend(local, collective, ADA, removed=(EVE.id,))
    Path(local.url, numbered("charter", 2)).unlink()
    amend(local, collective, ADA, lease_seconds=60)
    with pytest.raises(AtollError, match="version 2 is not the one seen before; the charter was exchanged"):
        read_collective(local, collective.identity, later.position)


def test_an_expired_charter_is_one_line(local) -> None:
    collective = found(local, ADA, expires=1000)
    collective.check_date(1000)
    with pytest.raises(AtollError, match="has expired"):
        collective.check_date(1001)


def test_a_huge_charter_is_not_read(local) -> None:
    found(local, ADA)
    with Path(local.url, numbered("charter", 2)).open("wb") as file:
        file.truncate(40 << 20)
    with pytest.raises(AtollError, match="expected at most"):
        read_collective(local)
