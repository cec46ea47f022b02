"""The chain of indices: which experts the model has. Nothing in it counts because an admitter says so alone.

index/000001.json, ... Each version names the hash of the one before. An expert enters with accepting reports of enough
admitters, and leaves with the retirements of enough retirers; a reader checks both.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import TypeVar

from atoll.collective.charter import Collective, chain, check_seen, numbered
from atoll.collective.keys import Key, hex_of, short
from atoll.collective.routers import check_router
from atoll.collective.signed import Signed, read_signed, sign
from atoll.collective.statements import (
    STATEMENT_BYTES,
    AdmissionReport,
    Charter,
    Index,
    IndexedExpert,
    Position,
    RetiredExpert,
    Retirement,
    Submission,
)
from atoll.collective.store import Store
from atoll.errors import AtollError
from atoll.storage.layout import CARD

INDEX, SUBMISSIONS, REPORTS, RETIREMENTS = "index", "submissions", "reports", "retirements"
SUBMISSION = "submission.json"
JudgementT = TypeVar("JudgementT", AdmissionReport, Retirement)


@dataclass(frozen=True)
class VerifiedIndex:
    """The latest index, checked back to the first one.

    Attributes:
        index: its content.
        position: its place in the chain.
        router_since: the index that brought its router; 0: none did.
        problem: why only those who publish the next index may build on it; "" if everybody may.
    """

    index: Index
    position: Position
    router_since: int = 0
    problem: str = ""


def read_index(
    store: Store, collective: Collective, seen: Position | None = None, *, publishing: bool = False
) -> VerifiedIndex | None:
    """Read and verify all indices.

    An expert is checked against the charter that was in force when it entered: an admitter who leaves later does not
    take it away. The latest index must be signed by an admitter of the latest charter, so one who was removed cannot
    go on, and name a charter with the same roles and thresholds, so nobody admits by those of before.

    Args:
        store: the collective's.
        collective: its verified charters.
        seen: the highest index that this member has seen before.
        publishing: whether the caller publishes the next index, which confirms one of before a change of the roles.

    Returns:
        The latest index; None if nothing was admitted yet.

    Raises:
        AtollError: a rolled-back, exchanged or forged index, or one whose experts or router were not properly admitted.
    """
    latest: VerifiedIndex | None = None
    hashes: list[str] = []
    signers: frozenset[str] = frozenset()
    for signed in chain(store, INDEX, Index, collective.identity):
        # What this member has seen was checked then; its hash pins everything before it.
        new = seen is None or len(hashes) >= seen.version
        _check_link(store, collective, signed, latest, thorough=new)
        hashes.append(signed.sha256)
        since, before = (latest.router_since, latest.index.router) if latest else (0, None)
        since = since if signed.statement.router == before else len(hashes)
        latest = VerifiedIndex(signed.statement, Position(version=len(hashes), sha256=signed.sha256), since)
        signers = signed.signers
    check_seen(hashes, seen, store.place(INDEX), "index")
    if latest is None:
        return None
    problem = _of_before(collective, latest.index, signers)
    if problem and not publishing:
        where = store.place(numbered(INDEX, len(hashes)))
        raise AtollError(f"{where}: {problem}; an admitter must publish a new one with `atoll collective admit`")
    return replace(latest, problem=problem)


def _of_before(collective: Collective, index: Index, signers: frozenset[str]) -> str:
    """Why the latest index is of before a change of the charter's roles; "" if it is not."""
    if not signers & set(collective.charter.roles.admitters):
        return f"signed by {short(next(iter(signers)))}, who is no admitter any more"
    now, then = collective.charter, collective.history[index.charter.version - 1]
    if (then.roles, then.thresholds) != (now.roles, now.thresholds):
        return f"names charter {then.version}; others admit, or more must agree, since charter {now.version}"
    return ""


def check_date(index: Index, now: float) -> None:
    """Raise AtollError if an index has expired. now: by the store's clock."""
    if now > index.expires:
        raise AtollError(
            f"index {index.version} has expired: this may be an old copy of the collective; an admitter renews it"
        )


def append_index(store: Store, collective: Collective, index: Index, key: Key) -> Position:
    """Publish the next index.

    Raises:
        AtollError: another admitter published this version, or the index would be refused by readers.
    """
    data = sign(index, [key], collective.identity)
    place = numbered(INDEX, index.version)
    # Checked as every reader will check it, before it is there for good.
    signed = read_signed(Index, data, store.place(place), collective.identity)
    _check_link(store, collective, signed, read_index(store, collective, publishing=True), thorough=True)
    if not store.create(place, data):
        raise AtollError(f"{store.place(place)}: another admitter published it first; start again from theirs")
    return Position(version=index.version, sha256=sha256(data).hexdigest())


def read_submission(store: Store, collective: Collective, submission: str) -> Signed[Submission]:
    """Read a submission. Raises AtollError if it is not whole, or not signed by one key."""
    place = f"{SUBMISSIONS}/{submission}/{SUBMISSION}"
    data = store.read(place, STATEMENT_BYTES)
    if data is None:
        raise AtollError(f"{store.place(place)}: not found; the submission is not whole, publish it again")
    signed = read_signed(Submission, data, store.place(place), collective.identity)
    expected = submission_id(signed.signer(store.place(place)), signed.statement.files[CARD].sha256)
    if expected != submission:
        raise AtollError(f"{store.place(place)}: belongs to {expected}; it was copied from there")
    return signed


def submission_id(key: str, card: str) -> str:
    """Return the name of a submission: nobody else can occupy it, whatever card they copy.

    Args:
        key: the submitter's key id.
        card: the hash of card.json.
    """
    return sha256(f"{key} {card}".encode()).hexdigest()[:32]


def report_path(submission: str, key: str) -> str:
    """Return the place of a key's report on a submission."""
    return f"{REPORTS}/{submission}/{hex_of(key)}.json"


def retirement_path(submission: str, key: str) -> str:
    """Return the place of a key's retirement of a submission."""
    return f"{RETIREMENTS}/{submission}/{hex_of(key)}.json"


def _check_link(
    store: Store, collective: Collective, signed: Signed[Index], latest: VerifiedIndex | None, *, thorough: bool
) -> None:
    """Check one index against the one before it and the charter that it names.

    Args:
        store, collective: as for `read_index`.
        signed: the index.
        latest: the one before it.
        thorough: also read the submissions, reports, retirements and approvals of what changed.
    """
    index, before = signed.statement, latest.index if latest else None
    where = store.place(numbered(INDEX, latest.position.version + 1 if latest else 1))
    # Its place in the chain.
    expected = (latest.position.version + 1, latest.position.sha256) if latest else (1, None)
    if (index.version, index.previous) != expected:
        raise AtollError(
            f"{where}: does not follow the index before it; read that and start again, or the store was tampered with"
        )
    # The charter that it names exists, and is no older than the one before named.
    named = index.charter
    oldest = before.charter.version if before else 1
    if not oldest <= named.version <= len(collective.hashes) or collective.hashes[named.version - 1] != named.sha256:
        raise AtollError(f"{where}: names charter {named.version}, which is older or another one; it is forged")
    charter = collective.history[named.version - 1]
    if not signed.signers & set(charter.roles.admitters):
        raise AtollError(f"{where}: signed by {short(next(iter(signed.signers)))}, who is no admitter; remove it")
    if thorough:
        _check_changes(store, collective, charter, index, before, where)
        check_router(store, collective, charter, index, before, latest.router_since if latest else 0, where)


def _check_changes(
    store: Store, collective: Collective, charter: Charter, index: Index, before: Index | None, where: str
) -> None:
    """Check the experts that entered since the index before, and those that left."""
    known = {one.submission: one for one in before.experts} if before else {}
    gone = {one.submission: one for one in before.retired} if before else {}
    for expert in index.experts:
        if known.get(expert.submission) != expert:
            if expert.submission in gone:
                raise AtollError(f"{where}: {expert.submission} was retired before; it must be submitted again")
            _check_admitted(store, collective, charter, expert, where)
    retired = {one.submission: one for one in index.retired}
    if any(retired.get(name) != one for name, one in gone.items()):
        raise AtollError(f"{where}: leaves out an expert that was retired; it is forged")
    remaining = {one.submission for one in index.experts}
    for name, one in known.items():
        if name not in remaining:
            if name not in retired or retired[name].sha256 != one.sha256:
                raise AtollError(f"{where}: {name} is gone without retirements; it is forged")
            _check_retired(store, collective, charter, retired[name], where)
    if extra := set(retired) - set(gone) - set(known):
        raise AtollError(f"{where}: retires {min(extra)}, which was not in; it is forged")


def _check_admitted(store: Store, collective: Collective, charter: Charter, expert: IndexedExpert, where: str) -> None:
    """Check that enough admitters accepted an expert."""
    signed = read_submission(store, collective, expert.submission)
    if signed.sha256 != expert.sha256 or signed.statement.clusters != expert.clusters:
        raise AtollError(f"{where}: {expert.submission} is not the submission that was admitted; it was exchanged")
    if signed.signers & set(charter.removed):
        raise AtollError(f"{where}: {expert.submission} is of a key that was removed; an admitter must leave it out")
    reports = _statements(
        store, collective, AdmissionReport, report_path, charter.roles.admitters, expert, expert.reports
    )
    count = sum(report.accepted for report in reports)
    if count < charter.thresholds.admitters:
        need = charter.thresholds.admitters
        raise AtollError(f"{where}: {expert.submission} was accepted by {count} admitters, expected {need}")


def _check_retired(store: Store, collective: Collective, charter: Charter, expert: RetiredExpert, where: str) -> None:
    """Check that enough retirers want an expert out."""
    retirements = _statements(
        store, collective, Retirement, retirement_path, charter.roles.retirers, expert, expert.retirements
    )
    count = len(list(retirements))
    if count < charter.thresholds.retirers:
        need = charter.thresholds.retirers
        raise AtollError(f"{where}: {expert.submission} was retired by {count} retirers, expected {need}")


def _statements(
    store: Store,
    collective: Collective,
    kind: type[JudgementT],
    place_of: Callable[[str, str], str],
    keys: Sequence[str],
    expert: IndexedExpert | RetiredExpert,
    hashes: Sequence[str],
) -> Iterator[JudgementT]:
    """Yield the statements of some keys on an expert, as far as the index lists their hashes."""
    for key in keys:
        place = place_of(expert.submission, key)
        data = store.read(place, STATEMENT_BYTES)
        if data is None or sha256(data).hexdigest() not in hashes:
            continue
        signed = read_signed(kind, data, store.place(place), collective.identity)
        # It counts for one submission only, and for the key whose name it has.
        if signed.signers != {key} or signed.statement.submission != expert.sha256:
            raise AtollError(f"{store.place(place)}: is on another submission or of another key; remove it")
        yield signed.statement
