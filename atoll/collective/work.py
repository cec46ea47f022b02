"""Take work and give it back: `atoll collective claim` and `release`."""

from dataclasses import dataclass
from pathlib import Path

from atoll.collective.charter import Collective
from atoll.collective.checkpoints import fetch_checkpoint
from atoll.collective.files import FileProgress
from atoll.collective.heartbeat import works_of
from atoll.collective.keys import Key
from atoll.collective.leases import Lease, claim, claim_next, end, new_nonce, renew, when, work_status
from atoll.collective.member import LeaseRecord, Membership, changing
from atoll.collective.run_files import PublishedRun, read_run
from atoll.collective.store import Store
from atoll.errors import AtollError
from atoll.manifest import Manifest, load_manifest
from atoll.storage.layout import MANIFEST, RunLayout, TrainingLayout


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
    """Take a work item, and fetch the shards of its cluster, and the common model if experts start from it.

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
    if cluster is None and (replica or again):
        raise AtollError("--replica and --again need --cluster")
    wanted = None if cluster is None else (f"{cluster}.{replica}" if replica else f"{cluster}")
    with changing(directory, "claiming work") as member:
        store, key = member.open(), member.key()
        collective = member.read(store)
        _recover(member, store, collective)
        run, clusters = read_run(store, collective), collective.charter.founded.clusters
        if cluster is not None and not 0 <= cluster < clusters:
            raise AtollError(f"cluster {cluster}: expected 0 to {clusters - 1}")
        # A lease that this member holds, or a new one. Its nonce is on disk before the claim is in the store.
        held = _held(member, store, collective, key, wanted)
        if held is not None:
            run = _claimed_run(run, directory, _cluster_of(held.work))
        else:
            _check_followed(directory, manifest, collective)
            works_here = [work for work in works if not run.holds_other(_cluster_of(work), directory)]
            if wanted is None:
                held = claim_next(store, collective, key, works_here, lambda work: _prepare(member, work))
            else:
                _check_shards(run, directory, _cluster_of(wanted))
                held = claim(store, collective, key, wanted, _prepare(member, wanted), again=again)
        member.with_lease(held.work, LeaseRecord(epoch=held.epoch, nonce=held.nonce, share=share))
        # The shards of its cluster and of no other, and what its expert starts from.
        run.fetch([*run.cluster(_cluster_of(held.work)), *run.common()], directory, progress)
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


def _check_followed(directory: Path, manifest: Manifest, collective: Collective) -> None:
    """Raise AtollError if the collective grew since a directory followed it."""
    if manifest.clusters.k < (clusters := collective.charter.founded.clusters):
        raise AtollError(
            f"{directory}: knows {manifest.clusters.k} clusters, the collective has grown to {clusters}; run "
            "`atoll collective follow URL`"
        )


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


def _cluster_of(work: str) -> int:
    return int(work.split(".")[0])


def _check_shards(run: PublishedRun, directory: Path, cluster: int) -> None:
    """Raise AtollError if a directory holds other shards of a cluster than a new claim is for."""
    if run.holds_other(cluster, directory):
        raise AtollError(
            f"{RunLayout(directory).cluster(cluster)}: holds other shards than the collective's, such as those of "
            "before a split, which a training may be reading; remove it, or join in another directory"
        )


def _claimed_run(run: PublishedRun, directory: Path, cluster: int) -> PublishedRun:
    """Return the version of the run whose shards of a cluster are in a directory: a split changes them.

    The shards of a lease that is held stay those that it was claimed with, so that a training can go on.
    """
    for version in range(run.version, 0, -1):
        earlier = run if version == run.version else read_run(run.store, run.collective, version)
        if not earlier.holds_other(cluster, directory):
            return earlier
    raise AtollError(
        f"{RunLayout(directory).cluster(cluster)}: holds shards that no charter names; move them away, and claim again"
    )


def _fetch_checkpoint(store: Store, collective: Collective, directory: Path, lease: Lease, expert: str | None) -> str:
    """Download the checkpoint of an earlier holder to where training looks for it."""
    if expert is None:
        raise AtollError(f"work {lease.work}: {MANIFEST} has no such expert, so no checkpoint fits")
    file = TrainingLayout.of(RunLayout(directory).expert(expert)).checkpoint
    return fetch_checkpoint(store, collective, lease.work, lease.epoch, file)
