"""Where a collective stands: `atoll collective status`. It needs no key, and only rights to read."""

from dataclasses import dataclass

from atoll.collective.charter import Collective, read_collective
from atoll.collective.connect import open_store
from atoll.collective.heartbeat import works_of
from atoll.collective.index import SUBMISSION, SUBMISSIONS, read_index, read_submission, report_path
from atoll.collective.leases import WORK, WorkStatus, work_status
from atoll.collective.run_files import read_run
from atoll.collective.signed import read_signed
from atoll.collective.statements import STATEMENT_BYTES, AdmissionReport
from atoll.collective.store import Store, StoreRefusedError
from atoll.errors import AtollError

_SHOWN = 1000  # submissions that are read


@dataclass(frozen=True)
class SubmissionStatus:
    """A submission. state: "admitted", "refused" and why, "offered", "replica" (its lease was
    taken over), "not whole", or why not."""

    submission: str
    name: str
    work: str
    submitter: str
    state: str


@dataclass(frozen=True)
class CollectiveStatus:
    """A collective at one time.

    Attributes:
        collective: its charters.
        now: by the store's clock.
        exact: False if the store could only be read, so that `now` is the time of its last change.
        experts: by work item.
        works: work items, those of the manifest first.
        submissions: everything that was offered.
    """

    collective: Collective
    now: float
    exact: bool
    experts: dict[str, str]
    works: list[WorkStatus]
    submissions: list[SubmissionStatus]


def collective_status(url: str, identity: str | None = None) -> CollectiveStatus:
    """Read where a collective stands.

    Args:
        url: its store.
        identity: the expected one; None accepts any.

    Raises:
        AtollError: no collective, or one that was tampered with.
    """
    store = open_store(url)
    collective = read_collective(store, identity)
    now, exact = _now(store)
    # Work items: those of the manifest, and replicas beyond it.
    experts = works_of(read_run(store, collective).manifest)
    names = [entry.path.split("/")[1] for entry in store.list(WORK)]
    further = sorted({name for name in names if name not in experts and _is_work(name)})
    works = [work_status(store, collective, work) for work in (*experts, *further)]
    return CollectiveStatus(collective, now, exact, experts, works, _submissions(store, collective, works))


def _now(store: Store) -> tuple[float, bool]:
    """The store's time; where nothing may be written, the time of its last change, which is earlier."""
    try:
        return store.now("reader"), True
    except StoreRefusedError:
        return max((entry.modified for entry in store.list(WORK)), default=0.0), False


def _is_work(name: str) -> bool:
    cluster, _, replica = name.partition(".")
    return cluster.isdigit() and len(name) <= 7 and (not replica or replica.isdigit())


def _refusal(store: Store, collective: Collective, submission: str, digest: str) -> str:
    """Say which admitter refused a submission, and why; "" if none did."""
    for key in collective.charter.roles.admitters:
        place = report_path(submission, key)
        data = store.read(place, STATEMENT_BYTES)
        if data is None:
            continue
        try:
            report = read_signed(AdmissionReport, data, store.place(place), collective.identity)
        except AtollError:  # anybody can write one; it counts for nothing
            continue
        if report.signers == {key} and report.statement.submission == digest and not report.statement.accepted:
            return f"refused by {collective.name_of(key)}: {'; '.join(report.statement.reasons)}"
    return ""


def _submissions(store: Store, collective: Collective, works: list[WorkStatus]) -> list[SubmissionStatus]:
    """All submissions with their state. A broken one is a row, not an error: anybody can write one."""
    latest = read_index(store, collective)
    admitted = {one.submission for one in latest.index.experts} if latest else set()
    retired = {one.submission for one in latest.index.retired} if latest else set()
    epochs = {status.work: status.epoch for status in works}
    paths = [entry.path.split("/") for entry in store.list(SUBMISSIONS)]
    whole = {parts[1] for parts in paths if parts[2:] == [SUBMISSION]}
    rows = []
    for name in sorted({parts[1] for parts in paths if len(parts) > 2})[:_SHOWN]:
        if name not in whole:
            rows.append(SubmissionStatus(name, "", "", "", "not whole"))
            continue
        try:
            signed = read_submission(store, collective, name)
        except AtollError as error:
            rows.append(SubmissionStatus(name, "", "", "", f"refused: {error}"))
            continue
        statement, key = signed.statement, next(iter(signed.signers))
        # Removed members' offers are not looked at; what was admitted before stays.
        state = "offered" if statement.epoch == epochs.get(statement.work, 0) > 0 else "replica"
        state = state if collective.may_work(key) else "its owner was removed"
        state = _refusal(store, collective, name, signed.sha256) or state
        state = "admitted" if name in admitted else "retired" if name in retired else state
        rows.append(SubmissionStatus(name, statement.name, statement.work, collective.name_of(key), state))
    return rows
