"""Leases on work items: work/<work>/<epoch>.json, .beat and .end. No server, and no member's clock, takes part.

A lease is a creation: whoever creates the claim of an epoch holds it, and creation is atomic on every store. It lasts
until `lease_seconds` after the last change of its heartbeat, by the store's own times. The next claim has the next
epoch, so a machine that wakes up late finds a higher epoch than its own: its result is then offered as a replica.
"""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from atoll.collective.charter import Collective, read_collective
from atoll.collective.keys import Key, hex_of
from atoll.collective.signed import Signed, read_signed, sign
from atoll.collective.statements import MAX_NUMBER, STATEMENT_BYTES, Claim, End, StatementT
from atoll.collective.store import Store, StoredObject, StoreError
from atoll.errors import AtollError

WORK = "work"
_JUNK = 1024  # claims without effect that are skipped, from the last one back
LeaseState = Literal["free", "held", "expired", "released", "finished"]


@dataclass(frozen=True)
class Lease:
    """A member's hold on a work item.

    Attributes:
        work: "3", or "3.1" for a replica.
        epoch: the number of the claim.
        nonce: tells this claim from any other of the same key.
    """

    work: str
    epoch: int
    nonce: str


@dataclass(frozen=True)
class WorkStatus:
    """Where a work item stands.

    Attributes:
        work: its name.
        epoch: of the claim that counts; 0 if there is none.
        holder: the key id of that claim, None if there is none.
        nonce: of that claim.
        until: when its lease ends, in Unix seconds by the store's clock.
        end: how its holder ended it, None if it did not.
        claims: the number of claims, with those that have no effect.
    """

    work: str
    epoch: int = 0
    holder: str | None = None
    nonce: str = ""
    until: float = 0.0
    end: Literal["released", "finished"] | None = None
    claims: int = 0

    def state(self, now: float) -> LeaseState:
        """Return the state at a time by the store's clock."""
        if self.holder is None:
            return "free"
        return self.end or ("held" if now <= self.until else "expired")


def work_status(store: Store, collective: Collective, work: str) -> WorkStatus:
    """Read where a work item stands.

    Claims that no member signed have no effect: junk in a bucket takes no lease away. Epochs count without gaps, so
    that a claim of epoch 999999 does not end them.

    Raises:
        AtollError: more junk than is read, or the store fails.
    """
    objects = {entry.path: entry for entry in store.list(f"{WORK}/{work}")}
    claims = 0
    while _claim_path(work, claims + 1) in objects:
        claims += 1
    # The last claim that a member signed.
    for epoch in range(claims, max(0, claims - _JUNK), -1):
        signed = _statement(store, collective, Claim, objects[_claim_path(work, epoch)])
        if signed is None or (signed.statement.work, signed.statement.epoch) != (work, epoch):
            continue
        holder = next(iter(signed.signers))
        if len(signed.signers) > 1 or not collective.may_work(holder):
            continue
        return WorkStatus(
            work=work,
            epoch=epoch,
            holder=holder,
            nonce=signed.statement.nonce,
            until=_last_sign(objects, work, epoch) + collective.charter.lease_seconds,
            end=_end_of(store, collective, objects, work, epoch, holder),
            claims=claims,
        )
    # An earlier claim may count; to call the work free would take its lease away.
    if claims > _JUNK:
        raise AtollError(f"{store.place(f'{WORK}/{work}')}: its last {_JUNK:,} claims are of no member; remove them")
    return WorkStatus(work, claims=claims)


def claim(store: Store, collective: Collective, key: Key, work: str, nonce: str, *, again: bool = False) -> Lease:
    """Take a work item.

    Args:
        store: the collective's.
        collective: as read before; the charter is read again, after the claims.
        key: the claimant's.
        work: the work item.
        nonce: from `new_nonce`, recorded by the caller before: after a crash, the same call returns the lease that was
            created.
        again: also take finished work.

    Raises:
        AtollError: somebody else holds it, it is finished, or the key may not work.
    """
    status = work_status(store, collective, work)
    # The charter after the claims: a claim was created after its holder became a member, never before.
    latest = read_collective(store, collective.identity, collective.position)
    if latest.position != collective.position:
        collective, status = latest, work_status(store, latest, work)
    collective.check_may_work(key.id)
    now = store.now(hex_of(key.id))
    collective.check_date(now)
    # The claim of an earlier attempt, whose answer was lost.
    if (status.holder, status.nonce) == (key.id, nonce):
        return Lease(work, status.epoch, nonce)
    state = status.state(now)
    if state == "held":
        assert status.holder is not None
        raise AtollError(
            f"work {work} is held by {collective.name_of(status.holder)} until {when(status.until)} (store's clock)"
        )
    if state == "finished" and not again:
        raise AtollError(
            f"work {work} is finished (epoch {status.epoch}); claim a replica with --replica, or it again with --again"
        )
    # The next epoch. Only one claimant can create it.
    epoch = status.claims + 1
    if epoch > MAX_NUMBER:
        raise AtollError(f"work {work} has had {MAX_NUMBER:,} claims; claim a replica with --replica")
    statement = Claim(work=work, epoch=epoch, nonce=nonce)
    if not store.create(_claim_path(work, epoch), sign(statement, [key], collective.identity)):
        raise AtollError(f"work {work}: another member claimed epoch {epoch} first; claim again, or other work")
    return Lease(work, epoch, nonce)


def claim_next(
    store: Store, collective: Collective, key: Key, works: Sequence[str], nonce_of: Callable[[str], str]
) -> Lease:
    """Take the first work item that nobody holds and nobody has finished.

    Args:
        store, collective, key: as for `claim`.
        works: the work items, in order of preference.
        nonce_of: returns the nonce for a work item that is claimed next, and records it.

    Raises:
        AtollError: there is none.
    """
    now = store.now(hex_of(key.id))
    for work in works:
        try:
            status = work_status(store, collective, work)
        except StoreError:
            raise
        # Full of junk: the others are as good.
        except AtollError:
            continue
        if status.state(now) in ("held", "finished"):
            continue
        try:
            return claim(store, collective, key, work, nonce_of(work))
        except StoreError:
            raise
        # Another member was faster: the next work item. Any other reason holds for all of them.
        except AtollError:
            if work_status(store, collective, work).claims == status.claims:
                raise
    raise AtollError(f"all {len(works)} work items are held or finished; claim a replica with --cluster N --replica M")


def renew(store: Store, collective: Collective, lease: Lease, key: Key) -> bool:
    """Renew a lease.

    Returns:
        Whether it is still the highest claim of its work; if not, training may go on, and its result is a replica.

    Raises:
        StoreError: the store failed; the lease lasts until its time is up.
    """
    # The content counts for nothing, but a repository sees equal bytes as no change.
    store.write(_path(lease.work, lease.epoch, "beat"), secrets.token_hex(8).encode())
    status = work_status(store, collective, lease.work)
    return (status.epoch, status.holder, status.nonce) == (lease.epoch, key.id, lease.nonce)


def end(store: Store, collective: Collective, lease: Lease, key: Key, state: Literal["released", "finished"]) -> None:
    """End a lease, so that nobody needs to wait for its time. Ending it twice in the same way does nothing."""
    statement = End(work=lease.work, epoch=lease.epoch, state=state)
    place = _path(lease.work, lease.epoch, "end")
    if not store.create(place, sign(statement, [key], collective.identity)):
        raise AtollError(f"{store.place(place)}: the lease was ended in another way before; nothing was changed")


def claim_at(store: Store, collective: Collective, work: str, epoch: int) -> str | None:
    """Return the key id that claimed an epoch, whether or not it still may; None for junk."""
    data = store.read(_claim_path(work, epoch), STATEMENT_BYTES)
    try:
        where = store.place(_claim_path(work, epoch))
        signed = read_signed(Claim, data or b"", where, collective.identity)
        fits = (signed.statement.work, signed.statement.epoch) == (work, epoch)
        return signed.signer(where) if fits else None
    except AtollError:
        return None


def new_nonce() -> str:
    """Return a fresh nonce for `claim`."""
    return secrets.token_hex(16)


def when(time: float) -> str:
    """Format a time by the store's clock."""
    return datetime.fromtimestamp(min(time, 253_402_300_799), UTC).strftime("%Y-%m-%d %H:%M UTC")


def _path(work: str, epoch: int, suffix: str) -> str:
    return f"{WORK}/{work}/{epoch:06d}.{suffix}"


def _claim_path(work: str, epoch: int) -> str:
    return _path(work, epoch, "json")


def _last_sign(objects: dict[str, StoredObject], work: str, epoch: int) -> float:
    """The last change of a claim or its heartbeat, by the store's clock."""
    beat = objects.get(_path(work, epoch, "beat"))
    return max(objects[_claim_path(work, epoch)].modified, beat.modified if beat else 0.0)


def _end_of(
    store: Store, collective: Collective, objects: dict[str, StoredObject], work: str, epoch: int, holder: str
) -> Literal["released", "finished"] | None:
    """How the holder ended a lease; None if it did not, or if somebody else says so."""
    entry = objects.get(_path(work, epoch, "end"))
    signed = None if entry is None else _statement(store, collective, End, entry)
    if signed is None or signed.signers != {holder}:
        return None
    fits = (signed.statement.work, signed.statement.epoch) == (work, epoch)
    return signed.statement.state if fits else None


def _statement(
    store: Store, collective: Collective, kind: type[StatementT], entry: StoredObject
) -> Signed[StatementT] | None:
    """Read a signed statement; None for junk, which anybody with access to the store can leave."""
    if entry.size > STATEMENT_BYTES:
        return None
    data = store.read(entry.path, STATEMENT_BYTES)
    try:
        return None if data is None else read_signed(kind, data, store.place(entry.path), collective.identity)
    except AtollError:
        return None
