"""Where a collective stands: `atoll collective status`. It needs no key, and only rights to read."""

from dataclasses import dataclass
from itertools import pairwise

from atoll.collective.charter import Collective, read_collective
from atoll.collective.connect import open_store
from atoll.collective.heartbeat import works_of
from atoll.collective.index import SUBMISSION, SUBMISSIONS, VerifiedIndex, read_index, read_submission, report_path
from atoll.collective.leases import WORK, WorkStatus, work_status
from atoll.collective.routers import approvals, offered_routers, read_router_card
from atoll.collective.run_files import PublishedRun, current_router, read_run
from atoll.collective.signed import read_signed
from atoll.collective.statements import STATEMENT_BYTES, AdmissionReport
from atoll.collective.store import Store, StoreRefusedError
from atoll.errors import AtollError
from atoll.storage.bounds import MAX_CLUSTERS
from atoll.storage.layout import CARD

_SHOWN = 1000  # submissions that are read
_MODEL = "the model's"


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
class RouterStatus:
    """A router. router: the hash of its card; "" for the one in the founders' files. state: for people."""

    router: str
    clusters: int
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
        routers: the model's, and those that wait for approvals.
    """

    collective: Collective
    now: float
    exact: bool
    experts: dict[str, str]
    works: list[WorkStatus]
    submissions: list[SubmissionStatus]
    routers: list[RouterStatus]

    @property
    def growth(self) -> list[str]:
        """The steps of growth, for people."""
        steps = pairwise(self.collective.history)
        return [
            f"grew from {before.founded.clusters} to {after.founded.clusters} clusters with charter {after.version}"
            for before, after in steps
            if before.founded.clusters != after.founded.clusters
        ]


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
    run = read_run(store, collective)
    experts = works_of(run.manifest)
    names = [entry.path.split("/")[1] for entry in store.list(WORK)]
    further = sorted({name for name in names if name not in experts and _is_work(name)})
    works = [work_status(store, collective, work) for work in (*experts, *further)]
    latest = read_index(store, collective)
    routers = _routers(run, latest)
    # The number of clusters that the model draws; without a router, a single expert draws alone.
    known = next((one.clusters for one in routers if one.state.startswith(_MODEL)), MAX_CLUSTERS)
    submissions = _submissions(store, collective, works, latest, known)
    return CollectiveStatus(collective, now, exact, experts, works, submissions, routers)


def _routers(run: PublishedRun, latest: VerifiedIndex | None) -> list[RouterStatus]:
    """The model's router first, if there is one, then those that wait."""
    rows, store, since = [], run.store, latest.router_since if latest else 0
    # Whatever is wrong with it is a row, not an error: the status is for finding out.
    try:
        current = current_router(run, latest)
    except AtollError as error:
        current = None
        rows.append(RouterStatus("", 0, f"cannot be read: {error}"))
    if current is not None:
        files = latest.index.router if latest else None
        state = f"{_MODEL}, since index {since}" if files else f"{_MODEL}, of the founders' files"
        rows.append(RouterStatus(files[CARD].sha256 if files else "", current.clusters, state))
    for router in offered_routers(store, since)[:_SHOWN]:
        signed = approvals(store, run.collective, run.collective.charter, router, since)
        if not signed:
            continue
        names = ", ".join(map(run.collective.name_of, signed))
        try:
            clusters = read_router_card(store, next(iter(signed.values())).statement.files).clusters
        except AtollError as error:
            rows.append(RouterStatus(router, 0, f"refused: {error}"))
            continue
        rows.append(RouterStatus(router, clusters, f"waits, approved by {names}"))
    return rows


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


def _submissions(
    store: Store, collective: Collective, works: list[WorkStatus], latest: VerifiedIndex | None, known: int
) -> list[SubmissionStatus]:
    """All submissions with their state. A broken one is a row, not an error: anybody can write one.

    Args:
        store, collective: where to look.
        works: the work items.
        latest: the index.
        known: the number of clusters that the model's router knows.
    """
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
        if name in admitted and max(statement.clusters) >= known:
            state = "admitted, and waits for a router that knows its cluster"
        rows.append(SubmissionStatus(name, statement.name, statement.work, collective.name_of(key), state))
    return rows
