"""A member's own directory: a run, and collective.json, which remembers what this member has seen of its collective."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import Field

from atoll.collective.charter import Collective, read_collective
from atoll.collective.connect import open_store
from atoll.collective.keys import Key, KeyId
from atoll.collective.leases import Lease
from atoll.collective.statements import Nonce, Numbered, Position, WorkName
from atoll.collective.store import Store
from atoll.errors import AtollError
from atoll.storage.artifact import read_json, write_json
from atoll.storage.bounds import FreeText, Sha256
from atoll.storage.cards import CardRecord, parse_record
from atoll.storage.layout import COLLECTIVE
from atoll.storage.lock import hold


class LeaseRecord(CardRecord):
    """A lease of this member.

    Attributes:
        epoch: None while its claim is under way.
        share: training also publishes its checkpoints.
    """

    epoch: Numbered | None
    nonce: Nonce
    share: bool = False


class MemberRecordFile(CardRecord):
    """collective.json.

    Attributes:
        url: the collective's store.
        identity: the hash of its first charter.
        key: path of the key's file. key_id: its id.
        charter: the highest charter seen. index: the highest index seen.
        leases: by work item.
    """

    format: Literal[1] = 1
    url: FreeText
    identity: Sha256
    key: FreeText
    key_id: KeyId
    charter: Position
    index: Position | None = None
    leases: dict[WorkName, LeaseRecord] = Field(default_factory=dict, max_length=10_000)


class Membership:
    """A member's directory.

    Args:
        directory: holds collective.json.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        file = directory / COLLECTIVE
        if not file.is_file():
            raise AtollError(f"{directory}: no member's directory; make one with `atoll collective join`")
        self.record = parse_record(MemberRecordFile, read_json(file, 8 << 20), str(file))

    @property
    def leases(self) -> dict[str, Lease]:
        """The leases whose claims succeeded, by work item."""
        return {
            work: Lease(work, one.epoch, one.nonce) for work, one in self.record.leases.items() if one.epoch is not None
        }

    def open(self) -> Store:
        """Open the collective's store."""
        return open_store(self.record.url)

    def key(self) -> Key:
        """Load the member's key. Raises AtollError if it is not the one that joined."""
        key = Key.load(Path(self.record.key))
        if key.id != self.record.key_id:
            raise AtollError(f"{self.record.key}: is another key than the one that joined; restore it, or join again")
        return key

    def read(self, store: Store) -> Collective:
        """Read the collective, refuse an older state than the one seen before, and remember the newer one."""
        collective = read_collective(store, self.record.identity, self.record.charter)
        if collective.position != self.record.charter:
            self.update(charter=collective.position)
        return collective

    def update(self, **changes: object) -> None:
        """Change the record, on disk too."""
        self.record = self.record.model_copy(update=changes)
        write_record(self.directory, self.record)

    def with_lease(self, work: str, lease: LeaseRecord | None) -> None:
        """Record a lease, or remove it."""
        leases = {name: one for name, one in self.record.leases.items() if name != work}
        self.update(leases={**leases, **({} if lease is None else {work: lease})})


def write_record(directory: Path, record: MemberRecordFile) -> None:
    """Write collective.json atomically."""
    write_json(directory / COLLECTIVE, record.model_dump(mode="json"))


def find_member(url: str, run: Path | None) -> Path:
    """Find the directory that joined a collective.

    Args:
        url: the collective's.
        run: the directory if the user named one; None: the current one, or one directly below it.

    Raises:
        AtollError: none, or several.
    """
    if run is not None:
        return run
    candidates = [Path(), *sorted(path for path in Path().iterdir() if path.is_dir())]
    joined = [path for path in candidates if (path / COLLECTIVE).is_file() and Membership(path).record.url == url]
    if len(joined) != 1:
        problem = f"{len(joined)} directories here have joined it" if joined else "no directory here has joined it"
        raise AtollError(f"{url}: {problem}; name yours with --run, or make one with `atoll collective join`")
    return joined[0]


@contextmanager
def changing(directory: Path, doing: str) -> Iterator[Membership]:
    """Lock a member's directory while a command changes it."""
    Membership(directory)
    lock = hold(directory, doing)
    try:
        yield Membership(directory)
    finally:
        lock.close()


def full_url(url: str) -> str:
    """Return a URL that means the same from every directory."""
    return url if "://" in url else os.path.abspath(os.path.expanduser(url))
