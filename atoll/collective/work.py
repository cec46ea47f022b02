"""Take work and give it back: `atoll collective claim` and `release`."""

from dataclasses import dataclass
from pathlib import Path

from atoll.collective.charter import Collective
from atoll.collective.checkpoints import fetch_checkpoint
from atoll.collective.files import FileProgress, fetch_files, files_prefix, read_list
from atoll.collective.heartbeat import works_of
from atoll.collective.keys import Key
from atoll.collective.leases import Lease, claim, claim_next, end, new_nonce, renew, when, work_status
from atoll.collective.member import LeaseRecord, Membership, changing
from atoll.collective.store import Store
from atoll.errors import AtollError
from atoll.manifest import load_manifest
from atoll.storage.layout import CLUSTERS, MANIFEST, RunLayout, TrainingLayout, cluster_name


@dataclass(frozen=True)
class Claimed:
    """A successful claim.

    Attributes:
        lease: the lease.
        expert: its name in atoll.yaml; None for a further replica.
        until: when the lease ends.
        checkpoint: whose checkpoint was fetched, None if none was.
    """

    lease: Lease
    expert: str | None
    until: str
    checkpoint: str | None = None


def claim_work(
    directory: Path,
    *,
    cluster: int | None = None,
    replica: int = 0,
    again: bool = False,
    share: bool = False,
    resume: bool = False,
    progress: FileProgress | None = None,
) -> Claimed:
    """Take a work item, and fetch the shards of its cluster.

    Args:
        directory: the member's.
        cluster: the wanted one; None: the first work item that nobody has.
        replica: number of the replica; 0 is the cluster's first expert.
        again: also take finished work.
        share: training publishes its checkpoints, for whoever takes over.
        resume: fetch the last checkpoint that an earlier holder shared.
        progress: called before each file.

    Raises:
        AtollError: nobody may have it now, or the store fails. A claim that succeeded is remembered: the same command
            continues with the shards.
    """
    Membership(directory)
    manifest = load_manifest(directory)
    works = works_of(manifest)
    if cluster is not None and not 0 <= cluster < manifest.clusters.k:
        raise AtollError(f"cluster {cluster}: expected 0 to {manifest.clusters.k - 1}")
    if cluster is None and (replica or again):
        raise AtollError("--replica and --again need --cluster")
    wanted = None if cluster is None else (f"{cluster}.{replica}" if replica else f"{cluster}")
    with changing(directory, "claiming work") as member:
        store, key = member.open(), member.key()
        collective = member.read(store)
        _recover(member, store, collective)
        # A lease that this member holds, or a new one. Its nonce is on disk before the claim is in the store.
        held = _held(member, store, collective, key, wanted)
        if held is None:
            if wanted is None:
                held = claim_next(store, collective, key, list(works), lambda work: _prepare(member, work))
            else:
                held = claim(store, collective, key, wanted, _prepare(member, wanted), again=again)
        member.with_lease(held.work, LeaseRecord(epoch=held.epoch, nonce=held.nonce, share=share))
        # The shards of its cluster and of no other.
        _fetch_cluster(store, collective, directory, int(held.work.split(".")[0]), progress)
        expert = works.get(held.work)
        source = _fetch_checkpoint(store, collective, directory, held, expert) if resume else None
        status = work_status(store, collective, held.work)
    return Claimed(held, expert, when(status.until), source)


def release_work(directory: Path, work: str | None) -> list[Lease]:
    """Give up leases of this member.

    Args:
        directory: the member's.
        work: the work item; None: all of them.

    Returns:
        The leases that were given up.

    Raises:
        AtollError: there is no such lease, or the store fails.
    """
    with changing(directory, "releasing work") as member:
        store, key = member.open(), member.key()
        collective = member.read(store)
        _recover(member, store, collective)
        leases = [lease for name, lease in member.leases.items() if work in (None, name)]
        if not leases:
            raise AtollError(f"{directory}: holds no lease{f' on work {work}' if work else ''}")
        for lease in leases:
            end(store, collective, lease, key, "released")
            member.with_lease(lease.work, None)
    return leases


def _prepare(member: Membership, work: str) -> str:
    """Record a claim that is about to be made, and return its nonce."""
    nonce = new_nonce()
    member.with_lease(work, LeaseRecord(epoch=None, nonce=nonce))
    return nonce


def _recover(member: Membership, store: Store, collective: Collective) -> None:
    """Complete or forget claims whose outcome an earlier command did not see."""
    for work, record in list(member.record.leases.items()):
        if record.epoch is not None:
            continue
        status = work_status(store, collective, work)
        won = (status.holder, status.nonce) == (member.record.key_id, record.nonce)
        member.with_lease(work, LeaseRecord(epoch=status.epoch, nonce=record.nonce) if won else None)


def _held(member: Membership, store: Store, collective: Collective, key: Key, wanted: str | None) -> Lease | None:
    """Return the lease that this member has on the wanted work, renewed; forget one that is over."""
    lease = None if wanted is None else member.leases.get(wanted)
    if lease is None:
        return None
    ended = work_status(store, collective, lease.work).end is not None
    if not ended and renew(store, collective, lease, key):
        return lease
    member.with_lease(lease.work, None)
    return None


def _fetch_cluster(
    store: Store, collective: Collective, directory: Path, cluster: int, progress: FileProgress | None
) -> None:
    """Download the shards of one cluster."""
    files = read_list(store, collective.charter.files)
    prefix = f"{CLUSTERS}/{cluster_name(cluster)}/"
    shards = {name: digest for name, digest in files.items() if name.startswith(prefix)}
    if not shards:
        raise AtollError(f"{store.url}: its list of files has no shards of cluster {cluster}; ask the founder")
    fetch_files(store, files_prefix(collective.charter.files), shards, directory, progress)


def _fetch_checkpoint(store: Store, collective: Collective, directory: Path, lease: Lease, expert: str | None) -> str:
    """Download the checkpoint of an earlier holder to where training looks for it."""
    if expert is None:
        raise AtollError(f"work {lease.work}: {MANIFEST} has no such expert, so no checkpoint fits")
    file = TrainingLayout.of(RunLayout(directory).expert(expert)).checkpoint
    return fetch_checkpoint(store, collective, lease.work, lease.epoch, file)
