"""Offer a trained expert to a collective: `atoll collective publish`."""

from dataclasses import dataclass
from pathlib import Path

from atoll.collective.files import FileProgress, digests_of, upload_files
from atoll.collective.heartbeat import works_of
from atoll.collective.index import SUBMISSION, SUBMISSIONS, submission_id
from atoll.collective.keys import hex_of
from atoll.collective.leases import end, work_status
from atoll.collective.member import Membership, changing, full_url
from atoll.collective.statements import Submission, sign
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
        if card.k != (clusters := collective.charter.founded.clusters):
            raise AtollError(f"{expert}: is of {card.k} clusters, the collective has {clusters}")
        # The lease that it was trained under.
        work = _work_of(directory, expert, card)
        lease = member.leases.get(work)
        submission = submission_id(key.id, files[CARD].sha256)
        prefix = f"{SUBMISSIONS}/{submission}"
        if store.exists(f"{prefix}/{SUBMISSION}"):
            raise AtollError(f"{expert}: is published already as {submission}; nothing was changed")
        # Files first; the statement about them makes them a submission.
        upload_files(store, prefix, expert, files, progress)
        statement = Submission(
            name=card.name, clusters=card.clusters, work=work, epoch=lease.epoch if lease else 0, files=files
        )
        if not store.create(f"{prefix}/{SUBMISSION}", sign(statement, [key], collective.identity)):
            raise AtollError(f"{store.place(prefix)}/{SUBMISSION}: something else is at its place; remove it")
        # A lease that another member took over meanwhile makes this a replica.
        status = work_status(store, collective, work)
        current = lease is not None and (status.epoch, status.nonce) == (lease.epoch, lease.nonce)
        if lease is not None:
            end(store, collective, lease, key, "finished")
            member.with_lease(work, None)
    return Published(submission, replica=not current)


def _work_of(directory: Path, expert: Path, card: ExpertCard) -> str:
    """Return the work item that an expert is the result of."""
    if expert.absolute().parent.name != EXPERTS:
        raise AtollError(f"{expert}: expected an expert in {EXPERTS}/ of the directory that joined")
    names = {name: work for work, name in works_of(load_manifest(directory)).items()}
    return names.get(card.name, str(card.clusters[0]))
