"""The commands as founder and contributors use them, and one line for each thing that goes wrong."""

import itertools
import json
import shutil
from pathlib import Path

import obstore
import pytest

from atoll.collective.charter import read_collective
from atoll.collective.connect import open_store
from atoll.collective.keys import Key
from atoll.collective.member import Membership
from tests.collective.founding import s3_bucket
from tests.conftest import write_run


class Reef:
    """A directory with a founder's run, a bucket, and the commands."""

    def __init__(self, root: Path, atoll, url: str = "bucket"):
        self.root, self.atoll, self.url = root, atoll, url
        self.run = write_run(root / "founder" / "run")
        (self.run / "clusters" / "centroids.safetensors").write_bytes(b"centroids")

    def __call__(self, *arguments: object) -> str:
        """Run a command of `atoll collective` that succeeds, and return what it prints."""
        code, out, err = self.atoll("collective", *arguments)
        assert (code, err) == (0, ""), err
        return out

    def refused(self, *arguments: object) -> str:
        """Run a command that fails in one line, and return the line."""
        code, _, err = self.atoll("collective", *arguments)
        assert code == 2, err
        assert err.count("\n") == 1
        assert err.startswith("atoll: ")
        return err

    def open(self, *options: object) -> str:
        """Open the bucket, and return its identity."""
        self("key", "founder.key")
        return self("open", self.url, "-r", self.run, "--key", "founder.key", *options).split()[-1]

    def join(self, name: str, *options: object) -> str:
        """Join as a new member, and return the key id."""
        key = self("key", f"{name}.key").split()[-1]
        self("join", self.url, "-o", name, "--key", f"{name}.key", *options)
        return key

    def objects(self) -> list[str]:
        return [entry.path for entry in open_store(self.url).list("") if not entry.path.startswith("clock/")]


@pytest.fixture
def reef(tmp_path, atoll) -> Reef:
    return Reef(tmp_path, atoll)


def test_founder_and_contributors_share_a_bucket(reef) -> None:
    identity = reef.open("--name", "atlantis")
    reef.join("ada", "--identity", identity)
    reef.join("ben")
    # Each has the manifest and no data; a claim brings the data of its cluster.
    assert sorted(path.name for path in (reef.root / "ada").iterdir()) == ["atoll.yaml", "clusters", "collective.json"]
    assert "work 1 is yours (epoch 1)" in reef("claim", reef.url, "--cluster", 1, "-r", "ada")
    assert [path.name for path in (reef.root / "ada" / "clusters").glob("cluster-*")] == ["cluster-001"]
    assert "work 1 is held by" in reef.refused("claim", reef.url, "--cluster", 1, "-r", "ben")
    assert "work 0 is yours" in reef("claim", reef.url, "-r", "ben")
    # Train, publish.
    assert reef.atoll("train", "expert", "1", "-r", "ada")[0] == 0
    submission = reef("publish", "ada/experts/1-flow-linear", reef.url).split()[0]
    assert {path.split("/")[2] for path in reef.objects() if submission in path} == {
        "card.json",
        "submission.json",
        "weights.safetensors",
    }
    text = reef("status", reef.url, "--identity", identity, "--page", "page.html", "--publish")
    assert "atlantis" in text
    page = (reef.root / "page.html").read_text()
    assert (reef.root / "bucket" / "status.html").read_text() == page
    assert f"<th scope=row>{submission}</th><td>1-flow-linear</td><td>1</td>" in page
    assert "finished" in text
    assert "offered" in text
    # The other gives back.
    assert "work 0 (epoch 1) is free again" in reef("release", reef.url, "-r", "ben")
    assert "holds no lease" in reef.refused("release", reef.url, "-r", "ben")
    assert "work 0 is yours (epoch 2)" in reef("claim", reef.url, "-r", "ada")


def test_the_walk_works_on_s3(tmp_path, atoll, monkeypatch) -> None:
    with s3_bucket(monkeypatch) as url:
        reef = Reef(tmp_path, atoll, url)
        reef.open()
        reef.join("ada")
        assert "epoch 1" in reef("claim", url, "--cluster", 1)  # the only directory here that joined
        assert reef.atoll("train", "expert", "1", "-r", "ada")[0] == 0
        assert "for admission" in reef("publish", "ada/experts/1-flow-linear", url)
        assert "offered" in reef("status", url)
        assert "finished" in reef.refused("claim", url, "--cluster", 1)


def test_a_claim_again_renews_and_a_lost_answer_is_recovered(reef) -> None:
    reef.open()
    reef.join("ada")
    reef("claim", reef.url, "--cluster", 1)
    assert "epoch 1" in reef("claim", reef.url, "--cluster", 1)
    # The process was killed after the claim, before it could record that it succeeded.
    file = reef.root / "ada" / "collective.json"
    content = json.loads(file.read_text())
    content["leases"]["1"]["epoch"] = None
    file.write_text(json.dumps(content))
    assert "epoch 1" in reef("claim", reef.url, "--cluster", 1)
    assert [path for path in reef.objects() if path.startswith("work/")] == ["work/1/000001.beat", "work/1/000001.json"]


def test_an_expert_without_its_lease_is_a_replica(reef) -> None:
    reef.open()
    reef.join("ada")
    reef.join("ben")
    reef("claim", reef.url, "--cluster", 1, "-r", "ada")
    assert reef.atoll("train", "expert", "1", "-r", "ada")[0] == 0
    lease = Membership(reef.root / "ada").leases["1"]
    reef("release", reef.url, "-r", "ada")
    reef("claim", reef.url, "--cluster", 1, "-r", "ben")
    # Ada's machine wakes up, and does not know.
    file = reef.root / "ada" / "collective.json"
    content = json.loads(file.read_text())
    content["leases"]["1"] = {"epoch": lease.epoch, "nonce": lease.nonce}
    file.write_text(json.dumps(content))
    code, out, err = reef.atoll("collective", "publish", "ada/experts/1-flow-linear", reef.url)
    assert (code, err) == (0, "")
    assert "as a replica" in out
    assert "replica" in reef("status", reef.url)
    assert "held" in reef("status", reef.url)


def test_the_same_expert_is_published_once(reef) -> None:
    reef.open()
    reef.join("ada")
    reef("claim", reef.url, "--cluster", 1)
    reef.atoll("train", "expert", "1", "-r", "ada")
    reef("publish", "ada/experts/1-flow-linear")
    before = reef.objects()
    assert "is published already as" in reef.refused("publish", "ada/experts/1-flow-linear")
    assert reef.objects() == before


def test_two_founders_cannot_open_one_bucket(reef) -> None:
    reef.open()
    before = reef.objects()
    other = write_run(reef.root / "other")
    reef("key", "other.key")
    line = reef.refused("open", reef.url, "-r", other, "--key", "other.key")
    assert "a collective is here already" in line
    assert reef.objects() == before
    assert not (other / "collective.json").exists()


def test_invited_members_are_added_and_removed(reef) -> None:
    reef.open("--joining", "invited")
    ada = reef.join("ada")
    assert f"--add {ada}" in reef.refused("claim", reef.url, "--cluster", 1, "-r", "ada")
    assert f"{ada}  asked to join  ada" in reef("members", reef.url, "-r", reef.run)
    assert "charter 2 published" in reef("members", reef.url, "-r", reef.run, "--add", ada)
    reef("claim", reef.url, "--cluster", 1, "-r", "ada")
    # Removed while training: the numbers are there, and nobody takes them.
    reef("members", reef.url, "-r", reef.run, "--remove", ada)
    assert reef.atoll("train", "expert", "1", "-r", "ada")[0] == 0
    for command in (("publish", "ada/experts/1-flow-linear"), ("claim", reef.url, "-r", "ada")):
        assert "was removed from 'tiny'" in reef.refused(*command)
    assert not [path for path in reef.objects() if path.startswith("submissions/")]
    assert "1    │ 1-flow-linear    │ free" in reef("status", reef.url)
    assert "no founder" in reef.refused("members", reef.url, "-r", "ada", "--add", ada)


def test_a_value_that_no_statement_holds_is_one_line(reef) -> None:
    reef("key", "founder.key")
    assert "expected printable" in reef.refused(
        "open", reef.url, "-r", reef.run, "--key", "founder.key", "--name", "\x1b"
    )
    assert not (reef.root / reef.url).exists()
    reef("open", reef.url, "-r", reef.run, "--key", "founder.key")
    assert "expected printable" in reef.refused("join", reef.url, "-o", "a", "--key", "founder.key", "--name", "\x1b")
    assert not (reef.root / "a").exists()
    assert "the charter: members" in reef.refused("members", reef.url, "-r", reef.run, "--add", "nonsense")


def test_a_collective_that_was_exchanged_is_noticed(reef) -> None:
    identity = reef.open()
    reef.join("ada")
    shutil.rmtree(reef.root / "bucket")
    (reef.run / "collective.json").unlink()
    reef("key", "second.key")
    reef("open", reef.url, "-r", reef.run, "--key", "second.key")
    assert "it was exchanged" in reef.refused("claim", reef.url, "-r", "ada")
    assert "it was exchanged" in reef.refused("status", reef.url, "--identity", identity)
    assert "it was exchanged" in reef.refused("join", reef.url, "-o", "x", "--key", "ada.key", "--identity", identity)
    assert not (reef.root / "x").exists()


def test_a_rolled_back_charter_is_noticed(reef) -> None:
    reef.open()
    reef.join("ada")
    eve = Key.generate().id
    reef("members", reef.url, "-r", reef.run, "--remove", eve)
    reef("claim", reef.url, "--cluster", 0, "-r", "ada")
    (reef.root / "bucket" / "charter" / "000002.json").unlink()
    assert "the charter was rolled back" in reef.refused("claim", reef.url, "--cluster", 1, "-r", "ada")


FULL = ("Generic error: No space left on device (os error 28)", "is full")
RIGHTS = ("The operation lacked the necessary privileges: 403 Forbidden", "refuses access")
CLOCK = ("RequestTimeTooSkewed: the difference is too large", "clock is off")
AWAY = ("Generic error: 500 Internal Server Error", "the store failed")


@pytest.mark.parametrize(
    ("command", "message", "line"),
    [("open", *FULL), ("open", *RIGHTS), ("join", *RIGHTS), ("claim", *AWAY), ("claim", *CLOCK), ("publish", *FULL)],
)
def test_a_store_that_fails_is_one_line_and_leaves_nothing_half(command, message, line, reef, monkeypatch) -> None:
    commands = {
        "open": ("open", reef.url, "-r", reef.run, "--key", "founder.key"),
        "join": ("join", reef.url, "-o", "mine", "--key", "founder.key"),
        "claim": ("claim", reef.url, "--cluster", 1, "-r", "mine"),
        "publish": ("publish", "mine/experts/1-flow-linear"),
    }
    # Everything before the command works.
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    reef("key", "founder.key")
    for before in list(commands)[: list(commands).index(command)]:
        reef(*commands[before])
    if command == "publish":
        assert reef.atoll("train", "expert", "1", "-r", "mine")[0] == 0
    put = obstore.put
    failures = 0
    # The store fails after none, one, ... of the writes.
    for allowed in range(100):
        left = statements_of(reef)
        count = itertools.count()

        def failing(*values, **options):
            if next(count) >= allowed:  # noqa: B023
                raise obstore.exceptions.GenericError(message)
            return put(*values, **options)

        monkeypatch.setattr(obstore, "put", failing)
        code, _, err = reef.atoll("collective", *commands[command])
        monkeypatch.setattr(obstore, "put", put)
        if code == 0:
            break
        failures += 1
        assert (code, err.count("\n")) == (2, 1), err
        assert line in err
        # Nothing that readers would take for whole.
        last = {"open": "charter/000001.json", "claim": "work/1/000001.json"}.get(command, "submission.json")
        assert statements_of(reef) == left or not any(path.endswith(last) for path in statements_of(reef))
        assert command != "join" or not (reef.root / "mine").exists()
    # The same command continued where it failed, and has succeeded.
    assert failures > 0
    assert read_collective(open_store(reef.url)).position.version == 1


def statements_of(reef: Reef) -> list[str]:
    """The signed objects of a bucket."""
    if not (reef.root / "bucket").exists():
        return []
    return [path for path in reef.objects() if path.endswith(".json") and not path.startswith("run/")]


@pytest.mark.parametrize(
    ("object_name", "problem"),
    [("charter/000001.json", "no canonical JSON"), ("files.json", "is not the list"), ("atoll.yaml", "has "),
     ("clusters.json", "has ")],
)  # fmt: skip
def test_half_written_objects_are_one_line(object_name, problem, reef) -> None:
    reef.open()
    [file] = [path for path in (reef.root / "bucket").rglob("*.*") if path.as_posix().endswith(object_name)]
    file.write_bytes(file.read_bytes()[:-7])
    reef("key", "me.key")
    assert problem in reef.refused("join", reef.url, "-o", "mine", "--key", "me.key")
    assert not (reef.root / "mine").exists()


def test_a_changed_shard_is_not_trained_on(reef) -> None:
    reef.open()
    reef.join("ada")
    [shard] = (reef.root / "bucket").rglob("cluster-001/shard-00000.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert "it was changed or damaged, and was not kept" in reef.refused("claim", reef.url, "--cluster", 1)
    assert not (reef.root / "ada" / "clusters" / "cluster-001" / shard.name).exists()
    # The lease is held: once the shard is repaired, the same command goes on.
    data[-1] ^= 1
    shard.write_bytes(data)
    assert "epoch 1" in reef("claim", reef.url, "--cluster", 1)


def test_a_submission_that_is_not_whole_is_a_row_of_the_status(reef) -> None:
    reef.open()
    store = open_store(reef.url)
    store.write(f"submissions/{'0' * 32}/card.json", b"{}")
    store.write(f"submissions/{'1' * 32}/submission.json", b"{}")
    store.write("submissions/stray", b"")
    text = reef("status", reef.url)
    assert "not whole" in text
    assert "refused" in text


def test_an_index_of_a_later_format_names_the_fix(reef) -> None:
    reef.open()
    charter = (reef.root / "bucket" / "charter" / "000001.json").read_bytes()
    open_store(reef.url).create("index/000001.json", charter.replace(b'"format":1', b'"format":2', 1))
    assert "reads format 1; update atoll" in reef.refused("status", reef.url)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("status", "nowhere"), "no such directory"),
        (("status", "empty"), "no collective here"),
        (("claim", "bucket"), "no directory here has joined it"),
        (("claim", "bucket", "-r", "empty"), "no member's directory"),
        (("claim", "bucket", "-r", "ada", "--cluster", "9"), "cluster 9: expected 0 to 2"),
        (("claim", "bucket", "-r", "ada", "--again"), "need --cluster"),
        (("join", "bucket", "-o", "ada", "--key", "ada.key"), "join into a new directory"),
        (("join", "bucket", "-o", "new", "--key", "none.key"), "no such key"),
        (("key", "ada.key"), "never replaced"),
        (("open", "other", "-r", "empty", "--key", "ada.key"), "not found"),
        (("open", "other", "-r", "founder/run", "--key", "ada.key"), "has joined a collective already"),
        (("open", "other", "-r", "founder/run", "--key", "ada.key", "--joining", "never"), "expected open or invited"),
        (("publish", "ada/experts/none"), "not found"),
        (("publish", "ada/experts/none", "other"), "has joined"),
    ],
)
def test_a_mistake_is_one_line(arguments, problem, reef) -> None:
    reef.open()
    reef.join("ada")
    (reef.root / "empty").mkdir()
    if arguments == ("claim", "bucket"):
        shutil.rmtree(reef.root / "ada")
    assert problem in reef.refused(*arguments)
    assert not (reef.root / "other").exists()


def test_what_strangers_write_is_text_on_the_page(reef) -> None:
    reef.open("--name", "<script>alert(1)</script>")
    reef.join("ada")
    reef("status", reef.url, "--page", "page.html")
    page = (reef.root / "page.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
