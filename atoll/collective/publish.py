"""Offer a trained expert to a collective: `atoll collective publish`."""

import warnings
from dataclasses import dataclass
from pathlib import Path

from atoll.collective.charter import Collective
from atoll.collective.files import FileProgress, digests_of, upload_files
from atoll.collective.heartbeat import works_of
from atoll.collective.index import SUBMISSION, SUBMISSIONS, submission_id
from atoll.collective.keys import Key, hex_of
from atoll.collective.leases import end, work_status
from atoll.collective.member import Membership, changing, full_url
from atoll.collective.run_files import read_run
from atoll.collective.signed import sign
from atoll.collective.statements import Submission
from atoll.collective.store import Store, StoreError
from atoll.errors import AtollError
from atoll.manifest import load_manifest
from atoll.storage.artifact import read_card
from atoll.storage.cards import ExpertCard
from atoll.storage.layout import CARD, EXPERTS, WEIGHTS


@dataclass(frozen=True)
class Published:
    """A submission. replica: it was trained without the work's current lease."""

    submission: str
    replica: bool


def publish_expert(expert: Path, url: str | None = None, *, progress: FileProgress | None = None) -> Published:
    """Upload an expert, then the signed submission, which makes it whole.

    Args:
        expert: its directory, in experts/ of a member's directory.
        url: the collective's; None: the one that the member joined.
        progress: called before each file.

    Raises:
        AtollError: no trained expert, another collective, the same expert again, or the store fails. Without
            submission.json nobody sees what was uploaded, and running this again continues.
    """
    directory = expert.absolute().parents[1]
    member = Membership(directory)
    if url is not None and full_url(url) != member.record.url:
        raise AtollError(f"{directory}: has joined {member.record.url}, not {url}; publish it there")
    # The expert is whole, and of this collective.
    card = read_card(expert, ExpertCard)
    files = digests_of(expert, [CARD, WEIGHTS])
    if files[WEIGHTS].sha256 != card.weights_sha256:
        raise AtollError(f"{expert / WEIGHTS}: is not what {CARD} names; train or copy the expert again")
    with changing(directory, "publishing") as member:
        store, key = member.open(), member.key()
        collective = member.read(store)
        collective.check_may_work(key.id)
        collective.check_date(store.now(hex_of(key.id)))
        _check_clusters(expert, card, store, collective)
        # The lease that it was trained under.
        work = _work_of(directory, expert, card)
        lease = member.leases.get(work)
        submission = submission_id(key.id, files[CARD].sha256)
        prefix = f"{SUBMISSIONS}/{submission}"
        if store.exists(f"{prefix}/{SUBMISSION}"):
            # The process may have been killed before it could say that the work is finished.
            _finish(member, store, collective, key, work)
            raise AtollError(f"{expert}: is published already as {submission}; train another one, or claim a replica")
        # Files first; the statement about them makes them a submission.
        upload_files(store, prefix, expert, files, progress)
        statement = Submission(
            name=card.name, clusters=card.clusters, work=work, epoch=lease.epoch if lease else 0, files=files
        )
        if not store.create(f"{prefix}/{SUBMISSION}", sign(statement, [key], collective.identity)):
            raise AtollError(f"{store.place(prefix)}/{SUBMISSION}: something else is at its place; remove it")
        # It is published now, whatever happens to the lease.
        try:
            current = _finish(member, store, collective, key, work)
        except StoreError as error:
            warnings.warn(f"published, but the lease on work {work} is not ended ({error})", stacklevel=2)
            current = lease is not None
    return Published(submission, replica=not current)


def _check_clusters(expert: Path, card: ExpertCard, store: Store, collective: Collective) -> None:
    """Raise AtollError unless an expert is of the collective's clusters, or of clusters that they grew from."""
    clusters = collective.charter.founded.clusters
    if card.k == clusters:
        return
    lineage = read_run(store, collective).lineage
    if not lineage.knows(card.assignment) or card.k != lineage.clusters_of(card.assignment):
        raise AtollError(
            f"{expert}: is of {card.k} clusters, the collective has {clusters}, which did not grow from them"
        )


def _finish(member: Membership, store: Store, collective: Collective, key: Key, work: str) -> bool:
    """End the lease on finished work. Returns False if there is none, or another member took the work over."""
    lease = member.leases.get(work)
    if lease is None:
        return False
    status = work_status(store, collective, work)
    current = (status.epoch, status.nonce) == (lease.epoch, lease.nonce)
    # An epoch that is over needs no end.
    if current and status.end is None:
        end(store, collective, lease, key, "finished")
    member.with_lease(work, None)
    return current


def _work_of(directory: Path, expert: Path, card: ExpertCard) -> str:
    """Return the work item that an expert is the result of."""
    if expert.absolute().parent.name != EXPERTS:
        raise AtollError(f"{expert}: expected an expert in {EXPERTS}/ of the directory that joined")
    names = {name: work for work, name in works_of(load_manifest(directory)).items()}
    return names.get(card.name, str(card.clusters[0]))
