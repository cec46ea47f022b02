"""Bring the index up to date: who enough admitters accepted enters, who enough retirers want out leaves.

A router that was approved by enough keys takes the place of the one before.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

from atoll.collective.charter import Collective
from atoll.collective.index import (
    SUBMISSION,
    SUBMISSIONS,
    VerifiedIndex,
    append_index,
    read_index,
    read_submission,
    report_path,
    retirement_path,
)
from atoll.collective.keys import Key, hex_of
from atoll.collective.routers import approved_router
from atoll.collective.signed import Signed, read_signed
from atoll.collective.statements import (
    STATEMENT_BYTES,
    AdmissionReport,
    Index,
    IndexedExpert,
    RetiredExpert,
    Retirement,
    StatementT,
    Submission,
)
from atoll.collective.store import Store
from atoll.errors import AtollError
from atoll.storage.layout import CARD

_DAY = 86_400
INDEX_DAYS = 365.0  # after which an admitter must publish a new index
_ATTEMPTS = 5  # against other admitters who publish at the same time


@dataclass(frozen=True)
class IndexChanges:
    """What a new index changed.

    Attributes:
        entered, left: submission ids of experts that are in, and out, now.
        router: the hash of the new router's card; None if it is the one of before.
    """

    entered: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    router: str | None = None


def whole_submissions(store: Store) -> list[str]:
    """List the ids of all submissions that are whole, sorted."""
    paths = (entry.path.split("/") for entry in store.list(SUBMISSIONS))
    return sorted({parts[1] for parts in paths if parts[2:] == [SUBMISSION]})


def update_index(
    store: Store, collective: Collective, key: Key, submissions: Sequence[str], *, renew: bool = False
) -> tuple[VerifiedIndex | None, IndexChanges]:
    """Publish the next index if something changed.

    Args:
        store: the collective's.
        collective: its verified charters.
        key: an admitter's, who signs it.
        submissions: ids that may enter; retirements and approvals of routers are looked for in any case.
        renew: publish a new one in any case, for its date.

    Returns:
        The latest index, and what this call changed.

    Raises:
        AtollError: the key is no admitter's, the store was tampered with, or other admitters were faster each time.
    """
    if key.id not in collective.charter.roles.admitters:
        raise AtollError(f"{collective.name_of(key.id)} is no admitter; an admitter must publish the index")
    for attempt in range(_ATTEMPTS):
        latest = read_index(store, collective, publishing=True)
        index, changes = _next(store, collective, latest, key, submissions)
        # One of before a change of the roles needs a new one, which confirms it.
        if not renew and changes == IndexChanges() and not (latest and latest.problem):
            return latest, changes
        try:
            position = append_index(store, collective, index, key)
        # Another admitter published this version first: start again from theirs.
        except AtollError:
            now = read_index(store, collective, publishing=True)
            if attempt == _ATTEMPTS - 1 or now is None or (latest is not None and now.position == latest.position):
                raise
            continue
        since = position.version if changes.router else latest.router_since if latest else 0
        return VerifiedIndex(index, position, since), changes
    raise AssertionError("the last attempt returns or raises")


def _next(
    store: Store, collective: Collective, latest: VerifiedIndex | None, key: Key, submissions: Sequence[str]
) -> tuple[Index, IndexChanges]:
    """Return the index that follows from all reports and retirements."""
    experts = {one.submission: one for one in latest.index.experts} if latest else {}
    retired = {one.submission: one for one in latest.index.retired} if latest else {}
    # Who leaves.
    left = []
    for name, one in list(experts.items()):
        hashes = _votes(store, collective, Retirement, name, one.sha256)
        if len(hashes) >= collective.charter.thresholds.retirers:
            retired[name] = RetiredExpert(submission=name, sha256=one.sha256, retirements=tuple(hashes))
            del experts[name]
            left.append(name)
    # Who enters.
    entered = []
    for name in submissions:
        if name in experts or name in retired:
            continue
        signed = _readable(store, collective, name)
        if signed is None or signed.signers & set(collective.charter.removed):
            continue
        hashes = _votes(store, collective, AdmissionReport, name, signed.sha256)
        if len(hashes) >= collective.charter.thresholds.admitters:
            experts[name] = IndexedExpert(
                submission=name, sha256=signed.sha256, clusters=signed.statement.clusters, reports=tuple(hashes)
            )
            entered.append(name)
    index = Index(
        version=latest.position.version + 1 if latest else 1,
        previous=latest.position.sha256 if latest else None,
        charter=collective.position,
        expires=int(store.now(hex_of(key.id)) + INDEX_DAYS * _DAY),
        router=latest.index.router if latest else None,
        experts=tuple(experts.values()),
        retired=tuple(retired.values()),
    )
    # A router that enough admitters or founders want, and that knows these experts.
    before, since = (latest.index, latest.router_since) if latest else (None, 0)
    router = approved_router(store, collective, index, before, since)
    if router is not None:
        index = index.model_copy(update={"router": router})
    return index, IndexChanges(tuple(entered), tuple(left), None if router is None else router[CARD].sha256)


def _readable(store: Store, collective: Collective, name: str) -> Signed[Submission] | None:
    """A submission, or None if it is broken: anybody can leave junk."""
    try:
        return read_submission(store, collective, name)
    except AtollError:
        return None


def _votes(store: Store, collective: Collective, kind: type[StatementT], submission: str, expected: str) -> list[str]:
    """The hashes of accepting reports, or of retirements, by keys that the charter names; junk does not count."""
    roles = collective.charter.roles
    keys, place = (roles.admitters, report_path) if kind is AdmissionReport else (roles.retirers, retirement_path)
    hashes = []
    for voter in keys:
        data = store.read(place(submission, voter), STATEMENT_BYTES)
        if data is None:
            continue
        try:
            signed = read_signed(kind, data, store.place(place(submission, voter)), collective.identity)
        except AtollError:
            continue
        statement = signed.statement
        accepted = not isinstance(statement, AdmissionReport) or statement.accepted
        same = isinstance(statement, AdmissionReport | Retirement) and statement.submission == expected
        if signed.signers == {voter} and accepted and same:
            hashes.append(sha256(data).hexdigest())
    return hashes
