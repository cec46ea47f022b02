"""Take an expert out of the model: `atoll collective retire`."""

from dataclasses import dataclass
from pathlib import Path

from atoll.collective.entry import update_index
from atoll.collective.index import read_index, read_submission, retirement_path
from atoll.collective.keys import Key, hex_of
from atoll.collective.member import changing
from atoll.collective.signed import sign
from atoll.collective.statements import Retirement
from atoll.errors import AtollError
from atoll.storage.cards import parse_record


@dataclass(frozen=True)
class Retired:
    """A signed retirement. submission: its id. out: whether the expert is out of the index now."""

    submission: str
    out: bool


def retire_expert(directory: Path, wanted: str, why: str, key_file: Path | None = None) -> Retired:
    """Sign that an expert must leave; it leaves when enough retirers did.

    Args:
        directory: the retirer's, which joined or opened the collective.
        wanted: the id of its submission, or its name if only one admitted expert has it.
        why: for people.
        key_file: the retirer's key, if it is not the one that joined.

    Returns:
        The retirement.

    Raises:
        AtollError: the key is no retirer's, no such expert is in, or this key has retired it already.
    """
    with changing(directory, "retiring an expert") as member:
        store, key = member.open(), member.key() if key_file is None else Key.load(key_file)
        collective = member.read(store)
        if key.id not in collective.charter.roles.retirers:
            raise AtollError(f"{collective.name_of(key.id)} may retire nobody in {collective.charter.name!r}")
        collective.check_date(store.now(hex_of(key.id)))
        latest = read_index(store, collective, member.record.index, publishing=True)
        experts = {one.submission: one for one in latest.index.experts} if latest else {}
        # By name, if it is unambiguous.
        names = {name: read_submission(store, collective, name).statement.name for name in experts}
        matches = [name for name in experts if wanted in (name, names[name])]
        if len(matches) != 1:
            problem = "several experts have this name; name the submission" if matches else "no such expert is in"
            raise AtollError(f"{wanted:.60}: {problem}; `atoll collective status` lists them")
        expert = experts[matches[0]]
        values = {"submission": expert.sha256, "charter": collective.position.version, "why": why}
        statement = parse_record(Retirement, values, "the retirement")
        place = retirement_path(expert.submission, key.id)
        if not store.create(place, sign(statement, [key], collective.identity)):
            raise AtollError(f"{expert.submission}: this key has retired it already, for whatever reason")
        # Only admitters publish an index; the next one that they publish leaves it out.
        out = False
        if key.id in collective.charter.roles.admitters:
            latest, changes = update_index(store, collective, key, ())
            out = expert.submission in changes.left
            if latest is not None:
                member.update(index=latest.position)
    return Retired(expert.submission, out)
