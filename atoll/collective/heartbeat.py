"""The thread that renews a lease while training runs. It reads nothing of the training and changes nothing in it."""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from atoll.collective.charter import read_collective
from atoll.collective.checkpoints import share_checkpoint
from atoll.collective.leases import Lease, renew
from atoll.collective.member import Membership
from atoll.collective.statements import FileDigest
from atoll.errors import AtollError
from atoll.manifest import Manifest, load_manifest
from atoll.storage.layout import COLLECTIVE, RunLayout, TrainingLayout
from atoll.storage.memory import one_line

_BEATS = 8  # per lease, so that a store may be away for most of a lease
_LONGEST_PAUSE = 3600.0  # seconds between two heartbeats


class Heartbeat(threading.Thread):
    """Renews one lease until it is stopped or the lease is lost.

    A store that is away costs nothing but the lease: errors are logged once, and the next attempts follow after growing
    pauses. The thread is a daemon, so a request that hangs never keeps the process from ending.

    Args:
        directory: the member's.
        lease: to renew.
        checkpoint: a file to share with each heartbeat; None for none.
    """

    def __init__(self, directory: Path, lease: Lease, checkpoint: Path | None = None):
        super().__init__(name=f"lease-{lease.work}", daemon=True)
        self._directory, self._lease, self._checkpoint = directory, lease, checkpoint
        self._shared: FileDigest | None = None
        self._stopped = threading.Event()
        self._failing = False
        self.beats = 0

    def run(self) -> None:
        """Beat until stopped."""
        failures, longest = 0, _LONGEST_PAUSE
        while True:
            try:
                held, lease_seconds = self._beat()
            # Whatever goes wrong with the store, training goes on.
            except Exception as error:
                failures += 1
                self._log_once(error)
                pause = min(2.0 ** min(failures, 12), longest)
            else:
                if not held:
                    warnings.warn(
                        f"the lease on work {self._lease.work} is lost: another member took it over, or this key was "
                        "removed; training goes on, and its result can be offered as a replica",
                        stacklevel=2,
                    )
                    return
                failures, self._failing = 0, False
                pause = longest = min(lease_seconds / _BEATS, _LONGEST_PAUSE)
            if self._stopped.wait(pause):
                return

    def stop(self) -> None:
        """Let the thread end at its next pause. This does not wait for it."""
        self._stopped.set()

    def _beat(self) -> tuple[bool, int]:
        """Renew once. Returns whether the lease is held, and its length in seconds."""
        # Nothing is kept between beats, and nothing is written: commands in this directory may change it meanwhile.
        member = Membership(self._directory)
        store = member.open()
        collective = read_collective(store, member.record.identity, member.record.charter)
        held = renew(store, collective, self._lease, member.key())
        if held and self._checkpoint is not None:
            self._shared = share_checkpoint(
                store, collective, self._lease, member.key(), self._checkpoint, self._shared
            )
        self.beats += 1
        return held, collective.charter.lease_seconds

    def _log_once(self, error: Exception) -> None:
        if not self._failing:
            self._failing = True
            reason = one_line(error) or f"{type(error).__name__}: {error}"
            warnings.warn(
                f"the lease on work {self._lease.work} was not renewed ({reason}); training goes on, trying again",
                stacklevel=3,
            )


@contextmanager
def renewed(run: Path, expert: str) -> Iterator[Heartbeat | None]:
    """Renew the lease of an expert's work item within the block, if this run has one.

    Args:
        run: the run's directory.
        expert: its name or cluster, as for `atoll train expert`.

    Yields:
        The thread; None without a lease.
    """
    thread = _heartbeat_of(run, expert) if (run / COLLECTIVE).is_file() else None
    if thread is not None:
        thread.start()
    try:
        yield thread
    finally:
        if thread is not None:
            thread.stop()


def works_of(manifest: Manifest) -> dict[str, str]:
    """Return the expert of each work item: {"0": "0-flow-linear", "0.1": "0-eps-cosine", ...}, in order.

    The first expert of a cluster is its work item; further ones are replicas.
    """
    works: dict[str, str] = {}
    for expert in manifest.experts:
        replica = sum(work.split(".")[0] == str(expert.cluster) for work in works)
        works[f"{expert.cluster}.{replica}" if replica else f"{expert.cluster}"] = expert.full_name
    return works


def _heartbeat_of(run: Path, expert: str) -> Heartbeat | None:
    """Return the heartbeat of the lease under which an expert is trained."""
    # A mistake in atoll.yaml or in the name is reported by training itself.
    try:
        manifest = load_manifest(run)
        wanted = manifest.find_expert(expert)
    except AtollError:
        return None
    try:
        member = Membership(run)
    except AtollError as error:
        warnings.warn(f"no lease is renewed: {error}", stacklevel=3)
        return None
    leases = member.leases
    exact = [work for work, name in works_of(manifest).items() if name == wanted.full_name and work in leases]
    # A replica that the manifest does not list is trained under whatever lease its cluster has.
    others = [work for work in leases if work.split(".")[0] == str(wanted.cluster)]
    if not exact and not others:
        return None
    lease = leases[(exact or others)[0]]
    artifact = RunLayout(run).expert(wanted.full_name)
    shares = member.record.leases[lease.work].share
    return Heartbeat(run, lease, TrainingLayout.of(artifact).checkpoint if shares else None)
