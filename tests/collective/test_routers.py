"""A router enters the model by the word of enough admitters or founders, and no older one comes back."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from atoll.collective.charter import numbered, publish_charter, read_collective
from atoll.collective.connect import open_store
from atoll.collective.index import read_index
from atoll.collective.keys import Key
from atoll.collective.routers import approval_path
from atoll.collective.signed import sign
from atoll.collective.statements import Charter, Index, Roles, RouterApproval, Thresholds
from atoll.errors import AtollError
from atoll.storage.artifact import read_card, read_tensors, save_artifact, sha256_file
from atoll.storage.cards import RouterCard
from atoll.storage.layout import CARD
from tests.collective.founding import FAR
from tests.collective.growing import GrowingReef, edit


class Routers:
    """A collective with a router to publish, and attackers.

    Args:
        reef: the collective.
    """

    def __init__(self, reef: GrowingReef):
        self.reef, self.store = reef, open_store("bucket")
        self.founder = Key.load(Path("founder.key"))

    def appoint(self, *, admitters: int = 1, founders: int = 1) -> tuple[Key, Key]:
        """Ada becomes an admitter and Ben a founder beside the founder; as many of them must sign."""
        ada, ben = (self.reef.join(name) for name in ("ada", "ben"))
        now = read_collective(self.store)
        values = {
            "version": 2,
            "previous": now.position.sha256,
            "roles": Roles(founders=(self.founder.id, ben), admitters=(self.founder.id, ada), retirers=(ada,)),
            "thresholds": Thresholds(admitters=admitters, founders=founders),
        }
        publish_charter(self.store, Charter(**{**now.charter.model_dump(), **values}), [self.founder], now.identity)
        return Key.load(Path("ada.key")), Key.load(Path("ben.key"))

    def version(self, number: int) -> Path:
        """Another router of the same step: the run's with other weights."""
        path = self.reef.root / f"version-{number}" / "router"
        card = read_card(self.reef.run / "router", RouterCard)
        tensors = {name: value + number * 1e-3 for name, value in read_tensors(self.reef.run / "router", card).items()}
        save_artifact(path, card, tensors)
        shutil.copy(self.reef.run / "collective.json", path.parent)
        return path

    def latest(self):
        latest = read_index(self.store, read_collective(self.store))
        assert latest is not None
        return latest

    def forge(self, router: dict | None, key: Key | None = None) -> None:
        """Write the next index with a router, without the checks of `append_index`."""
        collective, latest = read_collective(self.store), self.latest()
        values = {"version": latest.position.version + 1, "previous": latest.position.sha256, "expires": FAR}
        index = Index(**{**latest.index.model_dump(), **values, "charter": collective.position, "router": router})
        file = self.reef.root / "bucket" / numbered("index", index.version)
        file.write_bytes(sign(index, [key or self.founder], collective.identity))

    def unverified(self) -> str:
        with pytest.raises(AtollError) as error:
            read_index(self.store, read_collective(self.store))
        return str(error.value)


@pytest.fixture
def routers(growing) -> Routers:
    return Routers(growing)


def test_the_founders_router_is_confirmed_and_replaced_by_the_grown_one(routers) -> None:
    reef = routers.reef
    old = sha256_file(reef.run / "router" / CARD)
    assert reef("publish", "run/router") == f"{old} is the model's router: index 1 names it"
    assert "is the model's router already" in reef.refused("publish", "run/router")
    shutil.copytree(reef.run / "router", reef.root / "old" / "router")
    # The grown one is of the run only once the collective has grown, and the old one is a step back then.
    reef.new_cluster()
    reef.extend()
    assert "is not in the lineage of the collective's 3" in reef.refused("publish", "run/router")
    reef("grow", "bucket", "-r", "run")
    assert "index 2 names it" in reef("publish", "run/router", "bucket")
    latest = routers.latest()
    assert latest.index.router["card.json"].sha256 == sha256_file(reef.run / "router" / CARD)
    shutil.copy(reef.run / "collective.json", reef.root / "old")
    assert "knows 3 clusters, the model's router 4; it is of an older step" in reef.refused("publish", "old/router")
    assert "the model's, since index 2" in reef("status", "bucket", "--page", "page.html")
    assert "since index 2" in (reef.root / "page.html").read_text()


def _other_clusters(card):
    return card.model_copy(update={"assignment": "0" * 64})


def _other_codec(card):
    return card.model_copy(update={"codec": {"name": "pixels", "channels": 1, "scale": 2.0}})


def _no_assignment(card):
    return card.model_copy(update={"assignment": None})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (_other_clusters, "is not in the lineage of the collective's 3"),
        (_no_assignment, "is of the assignment None to 3 clusters"),
        (_other_codec, "its codec is"),
    ],
)
def test_a_router_of_another_run_is_refused(routers, change, problem) -> None:
    path = routers.reef.run / "router"
    card = read_card(path, RouterCard)
    save_artifact(path, change(card), {name: value.clone() for name, value in read_tensors(path, card).items()})
    assert problem in routers.reef.refused("publish", "run/router")


def test_a_router_that_is_not_whole_is_refused(routers) -> None:
    path = routers.reef.run / "router"
    card = read_card(path, RouterCard)
    tensors = {name: value.clone() for name, value in read_tensors(path, card).items()}
    name = next(name for name, value in tensors.items() if value.is_floating_point())
    save_artifact(path, card, {**tensors, name: torch.full_like(tensors[name], torch.nan)})
    assert f"the weights {name} are not finite" in routers.reef.refused("publish", "run/router")
    (path / "weights.safetensors").write_bytes(b"other")
    assert "sha256 is" in routers.reef.refused("publish", "run/router")


def test_as_many_admitters_as_for_an_expert_bring_a_router_in(routers) -> None:
    reef = routers.reef
    routers.appoint(admitters=2, founders=2)
    router = sha256_file(reef.run / "router" / CARD)
    assert f"{router} has 1 approvals; the next index" in reef("publish", "run/router")
    assert "waits, approved by founder" in reef("status", "bucket")
    # The same key does not count twice, a founder is no second admitter, and a member counts for nothing.
    assert "has 1 approvals" in reef("publish", "run/router")
    assert "no such router waits" in reef.refused("approve", "bucket", "f" * 64, "-r", "ada")
    reef.join("eve")
    assert "is neither admitter nor founder" in reef.refused("approve", "bucket", router, "-r", "eve")
    shutil.copytree(reef.run / "router", reef.root / "eve" / "router")
    assert "is neither admitter nor founder" in reef.refused("publish", "eve/router")
    assert read_index(routers.store, read_collective(routers.store)) is None
    assert "index 1 names it" in reef("approve", "bucket", router[:8], "-r", "ada")
    assert not list((reef.root / "ada").glob(".approve-*"))


def test_enough_founders_bring_a_router_in_with_the_next_index(routers) -> None:
    reef = routers.reef
    routers.appoint(admitters=2, founders=2)
    router = sha256_file(reef.run / "router" / CARD)
    reef("publish", "run/router")
    # Ben is a founder alone, so an admitter publishes the index that names it.
    assert "has 2 approvals" in reef("approve", "bucket", router, "-r", "ben")
    assert read_index(routers.store, read_collective(routers.store)) is None
    assert "index 1 names it" in reef("approve", "bucket", router, "-r", "run")


def test_a_router_without_enough_approvals_is_refused_by_readers(routers) -> None:
    ada, _ = routers.appoint(admitters=2, founders=2)
    first, second = routers.version(1), routers.version(2)
    for router in (first, second):
        routers.reef("publish", router)
        digest = sha256_file(router / CARD)
        assert "names it" in routers.reef("approve", "bucket", digest, "-r", "ada")
    latest = routers.latest()
    assert latest.router_since == 2
    index = routers.reef.root / "bucket" / numbered("index", 3)
    # One admitter alone, by a new router or by the one that was replaced.
    routers.reef("publish", third := routers.version(3))
    place = approval_path(sha256_file(third / CARD), 2, routers.founder.id)
    new = json.loads((routers.reef.root / "bucket" / place).read_text())["statement"]["files"]
    for files in (new, routers_of(routers, 1)):
        routers.forge(files)
        assert "expected 2 admitters or 2 founders" in routers.unverified()
        index.unlink()
    # Old approvals at a new place, and approvals that a stranger signed for others.
    old, collective = sha256_file(first / CARD), read_collective(routers.store)
    for key in (routers.founder, ada):
        data = routers.store.read(approval_path(old, 0, key.id), 10_000)
        assert data is not None
        routers.store.create(approval_path(old, 2, key.id), data)
    routers.forge(routers_of(routers, 1))
    assert "was approved by 0 keys" in routers.unverified()
    index.unlink()
    approval = RouterApproval(files=new, after=2, charter=2)
    routers.store.create(
        approval_path(sha256_file(third / CARD), 2, ada.id), sign(approval, [Key.generate()], collective.identity)
    )
    routers.forge(new)
    assert "was approved by 1 keys" in routers.unverified()
    index.unlink()
    # It cannot be dropped, and whoever is no admitter names none.
    routers.forge(None)
    assert "leaves out the router" in routers.unverified()


def routers_of(routers: Routers, version: int) -> dict:
    """The files of the router of an index."""
    return json.loads((routers.reef.root / "bucket" / numbered("index", version)).read_text())["statement"]["router"]


def test_an_older_step_is_refused_by_readers_whoever_signed_it(routers) -> None:
    reef = routers.reef
    reef("publish", "run/router")
    old = routers_of(routers, 1)
    reef.new_cluster()
    reef.extend()
    reef("grow", "bucket", "-r", "run")
    reef("publish", "run/router")
    approval = RouterApproval(files=old, after=2, charter=2)
    place = approval_path(old["card.json"]["sha256"], 2, routers.founder.id)
    routers.store.create(place, sign(approval, [routers.founder], read_collective(routers.store).identity))
    routers.forge(old)
    assert "its router is of an older growth step, or of other clusters" in routers.unverified()
    (reef.root / "bucket" / numbered("index", 3)).unlink()
    # Nor does an admitter's own command take it.
    assert routers.latest().router_since == 2
    # A card that was exchanged in the store is noticed before it is used.
    digest = sha256_file(reef.run / "router" / CARD)
    edit(reef.root / "bucket" / "router" / digest / CARD, lambda one: one.update(clusters=3))
    assert "was changed" in routers.unverified()


def test_statements_have_the_keys_that_older_versions_read(growing) -> None:
    """Growth adds no key to charters and indices: every version of Atoll can verify the chains."""
    growing("publish", "run/router")
    growing.new_cluster()
    growing("grow", "bucket", "-r", "run")
    bucket = growing.root / "bucket"
    keys = {name: set(json.loads((bucket / name).read_text())["statement"]) for name in CHAIN_KEYS}
    assert keys == CHAIN_KEYS


_CHARTER = {
    "version", "name", "founded", "files", "roles", "thresholds", "joining", "members", "removed", "lease_seconds",
    "previous", "expires",
}  # fmt: skip
CHAIN_KEYS = {
    "charter/000001.json": _CHARTER,
    "charter/000002.json": _CHARTER,
    "index/000001.json": {"version", "previous", "charter", "expires", "router", "experts", "retired"},
}
