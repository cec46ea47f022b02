"""Change the charter: `atoll collective members` adds and removes members, and renews the charter's date."""

from dataclasses import dataclass
from pathlib import Path

from atoll.collective.charter import check_founders, publish_charter, read_collective
from atoll.collective.join import REQUESTS
from atoll.collective.keys import Key, hex_of, short
from atoll.collective.member import Membership
from atoll.collective.signed import read_signed
from atoll.collective.statements import STATEMENT_BYTES, Charter, MemberRecord, Position, Request
from atoll.collective.store import Store
from atoll.errors import AtollError
from atoll.storage.cards import parse_record

_DAY = 86_400
_SHOWN = 1000  # requests that are read


@dataclass(frozen=True)
class Person:
    """A key with its name. role: what the charter says of it."""

    key: str
    name: str
    role: str


def list_members(directory: Path) -> list[Person]:
    """List the members of a charter, those it removed, and the keys that asked to join."""
    member = Membership(directory)
    store = member.open()
    collective = member.read(store)
    charter = collective.charter
    people = [Person(key, one.name, _role(charter, key)) for key, one in charter.members.items()]
    people += [Person(key, "", "removed") for key in charter.removed if key not in charter.members]
    known = {person.key for person in people}
    return people + [one for one in _requests(store, collective.identity) if one.key not in known]


def change_members(
    directory: Path,
    *,
    add: tuple[str, ...] = (),
    remove: tuple[str, ...] = (),
    expires_days: float = 365.0,
    more_keys: tuple[Path, ...] = (),
) -> Charter:
    """Publish the next charter.

    Args:
        directory: a founder's.
        add: key ids, which may have been removed before.
        remove: key ids. Their claims have no effect from now on; what was admitted stays.
        expires_days: from now, by the store's clock.
        more_keys: files of further founders' keys, where several must sign.

    Returns:
        The new charter.

    Raises:
        AtollError: not enough founders, or somebody changed the charter meanwhile.
    """
    member = Membership(directory)
    store, keys = member.open(), [member.key(), *(Key.load(file) for file in more_keys)]
    collective = member.read(store)
    old = collective.charter
    # What must hold before anything is signed.
    check_founders(old, keys)
    for key in remove:
        if key in {*old.roles.founders, *old.roles.admitters, *old.roles.retirers}:
            raise AtollError(f"{short(key)} has a role in the charter; give that to another key first")
    # The new members, by the names that they gave.
    names = {one.key: one.name for one in _requests(store, collective.identity)} if add else {}
    members = {key: one for key, one in old.members.items() if key not in remove}
    members |= {key: MemberRecord(name=names.get(key, "member")) for key in add}
    values = old.model_dump() | {
        "version": collective.position.version + 1,
        "members": members,
        "removed": tuple(key for key in dict.fromkeys((*old.removed, *remove)) if key not in add),
        "previous": collective.position.sha256,
        "expires": int(store.now(hex_of(keys[0].id)) + expires_days * _DAY),
    }
    charter = parse_record(Charter, values, "the charter")
    digest = publish_charter(store, charter, keys, collective.identity)
    member.update(charter=Position(version=charter.version, sha256=digest))
    # Read it as all others will.
    read_collective(store, collective.identity, member.record.charter)
    return charter


def _role(charter: Charter, key: str) -> str:
    names = {"founder": charter.roles.founders, "admitter": charter.roles.admitters, "retirer": charter.roles.retirers}
    return ", ".join(name for name, keys in names.items() if key in keys) or "member"


def _requests(store: Store, identity: str) -> list[Person]:
    """The keys that introduced themselves. Anything else among them is skipped: anybody can write there."""
    people = []
    for entry in store.list(REQUESTS)[:_SHOWN]:
        try:
            data = store.read(entry.path, STATEMENT_BYTES)
            signed = read_signed(Request, data or b"", entry.path, identity)
        except AtollError:
            continue
        key = next(iter(signed.signers))
        if entry.path == f"{REQUESTS}/{hex_of(key)}.json" and len(signed.signers) == 1:
            people.append(Person(key, signed.statement.name, "asked to join"))
    return people
