"""The chain of indices: experts enter and leave by the word of enough keys, and nothing goes back."""

from hashlib import sha256
from pathlib import Path

import pytest

from atoll.collective.charter import Collective, numbered, read_collective
from atoll.collective.entry import IndexChanges, update_index
from atoll.collective.index import (
    SUBMISSION,
    SUBMISSIONS,
    append_index,
    check_date,
    read_index,
    report_path,
    retirement_path,
    submission_id,
)
from atoll.collective.keys import Key
from atoll.collective.signed import sign
from atoll.collective.statements import (
    AdmissionReport,
    FileDigest,
    Index,
    IndexedExpert,
    Position,
    RetiredExpert,
    Retirement,
    Roles,
    Submission,
    Thresholds,
)
from atoll.collective.store import Store
from atoll.errors import AtollError
from tests.collective.founding import FAR, NOBODY, amend, found, put

ADA, BEN, CY, EVE = (Key.generate() for _ in range(4))


class World:
    """A collective of three admitters, two of whom must agree."""

    def __init__(self, store: Store):
        self.store = store
        ids = (ADA.id, BEN.id, CY.id)
        self.roles = Roles(founders=(ADA.id,), admitters=ids, retirers=ids)
        self.collective: Collective = found(
            store, ADA, roles=self.roles, thresholds=Thresholds(admitters=2, retirers=2)
        )

    def submit(self, key: Key = EVE, card: str = NOBODY) -> tuple[str, str]:
        """A submission's id, and the hash of its statement."""
        files = {name: FileDigest(sha256=card, size=1) for name in ("card.json", "weights.safetensors")}
        name = submission_id(key.id, card)
        statement = Submission(name="1-flow", clusters=(1,), work="1", epoch=1, files=files)
        data = put(self.store, f"{SUBMISSIONS}/{name}/{SUBMISSION}", statement, key, self.collective)
        return name, sha256(data).hexdigest()

    def report(self, name: str, digest: str, key: Key, accepted: bool = True, place: str = "") -> str:
        statement = AdmissionReport(
            submission=digest, charter=1, accepted=accepted, reasons=(), statistics={"error": 1.0}, seed=2**63
        )
        path = place or report_path(name, key.id)
        return sha256(put(self.store, path, statement, key, self.collective)).hexdigest()

    def expert(self, key: Key = EVE, card: str = NOBODY) -> IndexedExpert:
        """An expert that two admitters accepted."""
        name, digest = self.submit(key, card)
        reports = tuple(self.report(name, digest, admitter) for admitter in (ADA, BEN))
        return IndexedExpert(submission=name, sha256=digest, clusters=(1,), reports=reports)

    def index(self, *experts: IndexedExpert, **changes: object) -> Index:
        latest = read_index(self.store, self.collective)
        values = {
            "version": latest.position.version + 1 if latest else 1,
            "previous": latest.position.sha256 if latest else None,
            "charter": self.collective.position,
            "expires": FAR,
            "experts": experts,
            "retired": latest.index.retired if latest else (),
        }
        return Index(**{**values, **changes})

    def force(self, index: Index, key: Key = ADA) -> None:
        """Write an index without the checks of `append_index`, as an attacker would."""
        file = Path(self.store.url, numbered("index", index.version))
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(sign(index, [key], self.collective.identity))

    def assert_refused(self, problem: str, seen: Position | None = None) -> None:
        with pytest.raises(AtollError, match=problem) as error:
            read_index(self.store, self.collective, seen)
        assert "\n" not in str(error.value)


@pytest.fixture
def world(local) -> World:
    return World(local)


def test_an_expert_enters_with_the_reports_of_two_admitters(world) -> None:
    assert read_index(world.store, world.collective) is None
    expert = world.expert()
    position = append_index(world.store, world.collective, world.index(expert), CY)
    latest = read_index(world.store, world.collective, position)
    assert latest is not None
    assert (latest.index.experts, latest.position) == ((expert,), position)


def test_one_report_is_not_enough(world) -> None:
    name, digest = world.submit()
    reports = (world.report(name, digest, ADA), world.report(name, digest, BEN, accepted=False))
    expert = IndexedExpert(submission=name, sha256=digest, clusters=(1,), reports=reports)
    with pytest.raises(AtollError, match="accepted by 1 admitters, expected 2"):
        append_index(world.store, world.collective, world.index(expert), ADA)
    world.force(world.index(expert))
    world.assert_refused("accepted by 1 admitters, expected 2")


def test_an_unknown_key_admits_nothing(world) -> None:
    expert = world.expert()
    with pytest.raises(AtollError, match="who is no admitter"):
        append_index(world.store, world.collective, world.index(expert), EVE)
    world.force(world.index(expert), EVE)
    world.assert_refused("who is no admitter")


def test_reports_of_unknown_keys_do_not_count(world) -> None:
    name, digest = world.submit()
    reports = (world.report(name, digest, ADA), world.report(name, digest, EVE))
    world.force(world.index(IndexedExpert(submission=name, sha256=digest, clusters=(1,), reports=reports)))
    world.assert_refused("accepted by 1 admitters, expected 2")


def test_a_replayed_report_is_refused(world) -> None:
    good = world.expert()
    name, digest = world.submit(card="cd" * 32)
    # Reports on the good expert, copied to the other one's place.
    for admitter in (ADA, BEN):
        data = world.store.read(report_path(good.submission, admitter.id), 10_000)
        world.store.create(report_path(name, admitter.id), data)
    world.force(world.index(IndexedExpert(submission=name, sha256=digest, clusters=(1,), reports=good.reports)))
    world.assert_refused("is on another submission or of another key")


def test_one_admitters_report_under_two_names_counts_once(world) -> None:
    name, digest = world.submit()
    report = world.report(name, digest, ADA)
    world.store.create(report_path(name, BEN.id), world.store.read(report_path(name, ADA.id), 10_000))
    world.force(world.index(IndexedExpert(submission=name, sha256=digest, clusters=(1,), reports=(report, report))))
    world.assert_refused("of another key")


def test_an_exchanged_submission_is_refused(world) -> None:
    expert = world.expert()
    append_index(world.store, world.collective, world.index(expert), ADA)
    file = Path(world.store.url, SUBMISSIONS, expert.submission, SUBMISSION)
    file.unlink()
    files = {name: FileDigest(sha256=NOBODY, size=1) for name in ("card.json", "weights.safetensors")}
    bad = Submission(name="bad", clusters=(1,), work="1", epoch=1, files=files)
    put(world.store, f"{SUBMISSIONS}/{expert.submission}/{SUBMISSION}", bad, EVE, world.collective)
    world.assert_refused("is not the submission that was admitted; it was exchanged")


def test_a_copied_submission_belongs_to_its_owner(world) -> None:
    name, _ = world.submit(BEN)
    file = Path(world.store.url, SUBMISSIONS, name, SUBMISSION)
    file.unlink()
    files = {part: FileDigest(sha256=NOBODY, size=1) for part in ("card.json", "weights.safetensors")}
    stolen = Submission(name="1-flow", clusters=(1,), work="1", epoch=1, files=files)
    put(world.store, f"{SUBMISSIONS}/{name}/{SUBMISSION}", stolen, EVE, world.collective)
    with pytest.raises(AtollError, match="it was copied from there"):
        append_index(
            world.store,
            world.collective,
            world.index(IndexedExpert(submission=name, sha256=NOBODY, clusters=(1,), reports=(NOBODY,))),
            ADA,
        )


def test_a_rolled_back_index_is_refused(world) -> None:
    first = world.expert()
    append_index(world.store, world.collective, world.index(first), ADA)
    position = append_index(world.store, world.collective, world.index(first, world.expert(card="cd" * 32)), ADA)
    Path(world.store.url, numbered("index", 2)).unlink()
    world.assert_refused("but version 2 was here; the index was rolled back", position)
    Path(world.store.url, numbered("index", 2)).write_bytes(Path(world.store.url, numbered("index", 1)).read_bytes())
    world.assert_refused("does not follow the index before it", position)


def test_a_fork_of_the_index_is_refused(world) -> None:
    first = world.expert()
    position = append_index(world.store, world.collective, world.index(first), ADA)
    world.force(Index(**{**world.index().model_dump(), "version": 1, "previous": None, "experts": ()}), BEN)
    world.assert_refused("version 1 is not the one seen before; the index was exchanged", position)


def test_of_two_admitters_one_publishes_a_version(world) -> None:
    mine, yours = world.index(world.expert()), world.index()
    append_index(world.store, world.collective, mine, ADA)
    with pytest.raises(AtollError, match="does not follow the index before it"):
        append_index(world.store, world.collective, yours, BEN)


def test_an_expert_leaves_by_two_retirements_only(world) -> None:
    expert = world.expert()
    append_index(world.store, world.collective, world.index(expert), ADA)
    with pytest.raises(AtollError, match="is gone without retirements"):
        append_index(world.store, world.collective, world.index(), ADA)
    digests = []
    for number, key in enumerate((ADA, BEN), 1):
        statement = Retirement(submission=expert.sha256, charter=1, why="backdoor")
        data = put(world.store, retirement_path(expert.submission, key.id), statement, key, world.collective)
        digests.append(sha256(data).hexdigest())
        retired = RetiredExpert(submission=expert.submission, sha256=expert.sha256, retirements=tuple(digests))
        index = world.index(retired=(retired,))
        if number == 1:
            with pytest.raises(AtollError, match="retired by 1 retirers, expected 2"):
                append_index(world.store, world.collective, index, ADA)
    append_index(world.store, world.collective, index, ADA)
    # It cannot come back under the same reports, and cannot be forgotten.
    for next_index, problem in (
        (world.index(expert, retired=()), "was retired before"),
        (world.index(retired=()), "leaves out an expert that was retired"),
    ):
        with pytest.raises(AtollError, match=problem):
            append_index(world.store, world.collective, next_index, ADA)


def test_an_admitter_who_was_removed_publishes_nothing_more(world) -> None:
    expert = world.expert()
    append_index(world.store, world.collective, world.index(expert), BEN)
    old = world.collective.position
    roles = Roles(founders=(ADA.id,), admitters=(ADA.id, CY.id), retirers=(ADA.id, CY.id))
    amend(world.store, world.collective, ADA, roles=roles, removed=(BEN.id,))
    world.collective = read_collective(world.store)
    world.assert_refused("who is no admitter any more")
    # An admitter of today confirms what was admitted under the charter of then.
    world.force(Index(**{**_second(world, expert).model_dump(), "charter": world.collective.position}), CY)
    latest = read_index(world.store, world.collective)
    assert latest is not None
    assert latest.index.experts == (expert,)
    # The removed one names the old charter, under which their signature would count.
    third = {"version": 3, "previous": latest.position.sha256, "charter": old}
    world.force(Index(**{**_second(world, expert).model_dump(), **third}), BEN)
    world.assert_refused("names charter 1, which is older or another one")


def test_an_admitter_confirms_the_index_of_one_who_left(world) -> None:
    expert = world.expert()
    append_index(world.store, world.collective, world.index(expert), BEN)
    roles = Roles(founders=(ADA.id,), admitters=(ADA.id, CY.id), retirers=(ADA.id, CY.id))
    collective = world.collective = amend(world.store, world.collective, ADA, roles=roles, removed=(BEN.id,))
    world.assert_refused("who is no admitter any more; an admitter must publish a new one")
    latest, changes = update_index(world.store, collective, CY, ())
    assert latest is not None
    assert (latest.position.version, latest.index.experts, changes) == (2, (expert,), IndexChanges())
    assert read_index(world.store, collective) == latest
    # Once is enough.
    assert update_index(world.store, collective, ADA, ()) == (latest, IndexChanges())


@pytest.mark.parametrize("change", ["thresholds", "roles"])
def test_nobody_admits_by_the_charter_of_before(change, world) -> None:
    """An admitter of both charters names the older one, under which two reports, or those of one who left, count."""
    append_index(world.store, world.collective, world.index(), ADA)
    old, expert = world.collective.position, world.expert()
    roles = world.roles.model_copy(update={"admitters": (ADA.id, CY.id)})
    changes = {"thresholds": {"thresholds": Thresholds(admitters=3, retirers=2)}, "roles": {"roles": roles}}
    world.collective = amend(world.store, world.collective, ADA, **changes[change])
    stale = Index(
        version=2,
        previous=sha256(Path(world.store.url, numbered("index", 1)).read_bytes()).hexdigest(),
        charter=old,
        expires=FAR,
        experts=(expert,),
        retired=(),
    )
    world.force(stale, ADA)
    world.assert_refused("names charter 1; others admit, or more must agree, since charter 2; an admitter must publish")


def _second(world: World, expert: IndexedExpert) -> Index:
    first = Path(world.store.url, numbered("index", 1)).read_bytes()
    return Index(
        version=2,
        previous=sha256(first).hexdigest(),
        charter=world.collective.position,
        expires=FAR,
        experts=(expert,),
        retired=(),
    )


def test_an_index_of_a_later_format_names_the_fix(world) -> None:
    append_index(world.store, world.collective, world.index(), ADA)
    file = Path(world.store.url, numbered("index", 1))
    file.write_bytes(file.read_bytes().replace(b'"format":1', b'"format":2'))
    world.assert_refused("format 2, this version of atoll reads format 1; update atoll")


def test_a_half_written_index_is_refused(world) -> None:
    append_index(world.store, world.collective, world.index(), ADA)
    file = Path(world.store.url, numbered("index", 1))
    file.write_bytes(file.read_bytes()[:-10])
    world.assert_refused("no canonical JSON")


def test_an_expired_index_is_one_line(world) -> None:
    with pytest.raises(AtollError, match="has expired"):
        check_date(world.index(expires=10), 11)
