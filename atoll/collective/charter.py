"""The chain of charters: who may do what. The hash of the first one is the collective's identity.

charter/000001.json, 000002.json, ... Each version names the hash of the one before and is signed by its founders.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256

from atoll.collective.keys import Key, short
from atoll.collective.signed import Signed, read_signed, sign
from atoll.collective.statements import MAX_NUMBER, Charter, Position, StatementT
from atoll.collective.store import Store
from atoll.errors import AtollError

CHARTERS = "charter"


@dataclass(frozen=True)
class Collective:
    """A collective as its verified charters describe it.

    Attributes:
        identity: the hash of the first charter.
        history: all charters, in order.
        hashes: of all charters, in order.
    """

    identity: str
    history: tuple[Charter, ...]
    hashes: tuple[str, ...]

    @property
    def charter(self) -> Charter:
        """The latest charter."""
        return self.history[-1]

    @property
    def position(self) -> Position:
        """The place of the latest charter."""
        return Position(version=len(self.hashes), sha256=self.hashes[-1])

    def may_work(self, key: str) -> bool:
        """Return whether a key may claim and publish."""
        charter = self.charter
        roles = {*charter.roles.founders, *charter.roles.admitters, *charter.roles.retirers}
        known = key in charter.members or key in roles
        return key not in charter.removed and (charter.joining == "open" or known)

    def check_may_work(self, key: str) -> None:
        """Raise AtollError unless a key may claim and publish."""
        if key in self.charter.removed:
            raise AtollError(f"{short(key)} was removed from {self.charter.name!r}; a founder can add it again")
        if not self.may_work(key):
            raise AtollError(
                f"{short(key)} is no member of {self.charter.name!r}; a founder adds it with "
                f"`atoll collective members URL --add {key}`"
            )

    def check_date(self, now: float) -> None:
        """Raise AtollError if the charter has expired. now: by the store's clock."""
        if now > self.charter.expires:
            raise AtollError(
                f"the charter of {self.charter.name!r} has expired: this may be an old copy of the collective; "
                "a founder renews it with `atoll collective members URL`"
            )

    def name_of(self, key: str) -> str:
        """Return a member's name with the beginning of the key, for messages."""
        member = self.charter.members.get(key)
        return f"{member.name} ({short(key)})" if member else short(key)


def numbered(prefix: str, version: int) -> str:
    """Return the place of a version in a chain: charter/000001.json."""
    return f"{prefix}/{version:06d}.json"


def chain(store: Store, prefix: str, kind: type[StatementT], collective: str) -> Iterator[Signed[StatementT]]:
    """Yield the statements of a chain from the first to the last; signatures are checked, meanings are not.

    Args:
        store: where it is.
        prefix: its directory.
        kind: the class of its statements.
        collective: the identity; "" where the first statement defines it.
    """
    for version in range(1, MAX_NUMBER + 1):
        place = numbered(prefix, version)
        data = store.read(place, kind.most)
        if data is None:
            return
        signed = read_signed(kind, data, store.place(place), collective)
        # The identity of charters is known after the first one.
        collective = collective or signed.sha256
        yield signed


def read_collective(store: Store, identity: str | None = None, seen: Position | None = None) -> Collective:
    """Read and verify all charters.

    Args:
        store: the collective's.
        identity: the expected identity; None to accept any, as when joining without a pin.
        seen: the highest charter that this member has seen before.

    Raises:
        AtollError: no collective, another one, a charter that its founders did not sign, or one older than `seen`.
    """
    history: list[Charter] = []
    hashes: list[str] = []
    for signed in chain(store, CHARTERS, Charter, ""):
        charter, where = signed.statement, store.place(numbered(CHARTERS, len(history) + 1))
        # The first charter is pinned by its hash, each other one by the founders before it.
        if not history and identity is not None and signed.sha256 != identity:
            raise AtollError(
                f"{where}: the collective {signed.sha256[:16]}..., expected {identity[:16]}...; "
                "it was exchanged, or the address is of another collective"
            )
        if charter.version != len(history) + 1 or charter.previous != (hashes[-1] if hashes else None):
            raise AtollError(f"{where}: does not follow the charter before it; the store was tampered with")
        before = history[-1] if history else charter
        count = len(signed.signers & set(before.roles.founders))
        if count < before.thresholds.founders:
            raise AtollError(f"{where}: signed by {count} founders, expected {before.thresholds.founders}; remove it")
        history.append(charter)
        hashes.append(signed.sha256)
    if not history:
        raise AtollError(f"{store.url}: no collective here; `atoll collective open` founds one")
    check_seen(hashes, seen, store.place(CHARTERS), "charter")
    return Collective(hashes[0], tuple(history), tuple(hashes))


def check_seen(hashes: Sequence[str], seen: Position | None, where: str, what: str) -> None:
    """Raise AtollError if a chain is older than the one seen before, or another one."""
    if seen is None:
        return
    if len(hashes) < seen.version:
        raise AtollError(
            f"{where}: ends at version {len(hashes)}, but version {seen.version} was here; the {what} was rolled back"
        )
    if hashes[seen.version - 1] != seen.sha256:
        raise AtollError(f"{where}: version {seen.version} is not the one seen before; the {what} was exchanged")


def check_founders(charter: Charter, keys: Sequence[Key]) -> None:
    """Raise AtollError unless these keys may sign the next charter."""
    if missing := [key.id for key in keys if key.id not in charter.roles.founders]:
        raise AtollError(f"{short(missing[0])} is no founder of {charter.name!r}; only founders change the charter")
    if len(keys) < (need := charter.thresholds.founders):
        raise AtollError(f"{need} founders must sign, {len(keys)} keys are here; name the others with --key")


def publish_charter(store: Store, charter: Charter, keys: Sequence[Key], identity: str) -> str:
    """Create a charter.

    Args:
        store: the collective's.
        charter: the new version.
        keys: its signers.
        identity: of the collective; "" for the first charter.

    Returns:
        The hash of the new charter.

    Raises:
        AtollError: somebody else created this version.
    """
    data = sign(charter, keys, identity)
    place = numbered(CHARTERS, charter.version)
    if not store.create(place, data):
        problem = "another founder opened a collective here first" if charter.version == 1 else "it exists already"
        raise AtollError(f"{store.place(place)}: {problem}; read it, and start again from there")
    return sha256(data).hexdigest()
