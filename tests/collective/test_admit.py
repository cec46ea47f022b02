"""Admission from the command line: honest experts enter, others are refused with reasons, and reports stay."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from atoll.collective.charter import read_collective
from atoll.collective.connect import open_store
from atoll.collective.gate.check import Check
from atoll.collective.index import read_index, report_path
from atoll.collective.keys import Key
from atoll.collective.signed import read_signed, sign
from atoll.collective.statements import STATEMENT_BYTES, AdmissionReport
from atoll.collective.status import collective_status
from atoll.storage.artifact import read_card, read_tensors, save_artifact
from atoll.storage.cards import ClusterShardsCard, ExpertCard
from atoll.storage.shards import Shards, ShardWriter
from tests.conftest import RUN, WORDS, K, write_run

STEPS = 400


def write_probe(path: Path, run: Path, rows: int = 24) -> Path:
    """Secret rows of each cluster, from the distribution that `write_run` draws from."""
    g = torch.Generator().manual_seed(77)
    for k in range(K):
        shards = Shards(run / "clusters" / f"cluster-{k:03d}")
        latents = (k - 1.0 + 0.3 * torch.randn(rows, *shards.shape("latent"), generator=g)).half()
        with ShardWriter(path / f"cluster-{k:03d}", shards.card(ClusterShardsCard)) as writer:
            captions = [f"{WORDS[i % 4]} {WORDS[i // 4 % 4]}" for i in range(rows)]
            writer.append([f"secret-{k}-{i}" for i in range(rows)], captions, ["train"] * rows, {"latent": latents})
    return path


class Reef:
    """A founder's run with an open bucket and one trained expert; the commands."""

    def __init__(self, root: Path, atoll):
        self.root, self.atoll = root, atoll
        self.run = root / "run"

    def __call__(self, *arguments: object) -> str:
        code, out, err = self.atoll("collective", *arguments)
        assert code == 0, err
        return out

    def refused(self, *arguments: object) -> str:
        code, _, err = self.atoll("collective", *arguments)
        assert (code, err.count("\n")) == (2, 1), err
        return err

    def offer(self, change=None) -> str:
        """Publish the run's expert 1, changed; return the submission."""
        expert = self.run / "experts" / "1-flow-linear"
        if change is not None:
            card = read_card(expert, ExpertCard)
            tensors = {name: value.clone() for name, value in read_tensors(expert, card).items()}
            shutil.rmtree(expert)
            save_artifact(expert, *change(card, tensors))
        return self("publish", "run/experts/1-flow-linear", "bucket").split()[0]

    def admit(self, *options: object) -> str:
        return self("admit", "bucket", *options, "--probe", "probe", "-r", "run")

    def report(self, submission: str, key: str) -> AdmissionReport:
        store = open_store("bucket")
        place = report_path(submission, key)
        data = store.read(place, STATEMENT_BYTES)
        assert data is not None
        return read_signed(AdmissionReport, data, place, read_collective(store).identity).statement


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run whose expert 1 has learned its cluster."""
    from atoll.cli import main

    run = write_run(tmp_path_factory.mktemp("trained") / "run", rows=180)
    train = {**RUN["train"], "steps": STEPS, "lr": 3e-3, "batch": 32, "calibration_holdout": 0.2, "log_every": 100}
    (run / "atoll.yaml").write_text(yaml.safe_dump({**RUN, "train": train}))
    (run / "clusters" / "centroids.safetensors").write_bytes(b"centroids")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["atoll", "train", "expert", "1", "-r", str(run), "--quiet"])
        with pytest.raises(SystemExit) as end:
            main()
        assert not end.value.code
    return run


@pytest.fixture
def reef(trained, tmp_path, atoll) -> Reef:
    shutil.copytree(trained, tmp_path / "run")
    write_probe(tmp_path / "probe", trained)
    reef = Reef(tmp_path, atoll)
    reef("key", "founder.key")
    reef("open", "bucket", "-r", "run", "--key", "founder.key")
    return reef


def test_an_honest_expert_enters_and_leaves(reef) -> None:
    submission = reef.offer()
    before = {path: path.stat().st_mtime_ns for path in (reef.root / "probe").rglob("*")}
    assert reef.admit() == f"{submission} 1-flow-linear accepted, and in\n"
    # The report says what was measured, and nothing of the probe is in the bucket.
    key = Key.load(Path("founder.key")).id
    report = reef.report(submission, key)
    assert report.accepted
    assert {"contents", "card.worst", "null.threshold", "others", "error", "captions", "single"} <= set(
        report.statistics
    )
    # The captions of these rows are random words.
    assert "prompt" not in report.statistics
    text = " ".join(report.reasons)
    assert not any(word in text for word in WORDS)
    assert not [entry for entry in open_store("bucket").list("") if "secret" in entry.path or "probe" in entry.path]
    assert before == {path: path.stat().st_mtime_ns for path in (reef.root / "probe").rglob("*")}
    assert not list(reef.run.glob(".admit-*"))
    # Everybody can verify that it is in.
    store = open_store("bucket")
    latest = read_index(store, read_collective(store))
    assert latest is not None
    assert [one.submission for one in latest.index.experts] == [submission]
    assert "admitted" in reef("status", "bucket")
    # Nothing is left to judge, and a judgement is not repeated.
    assert reef.admit() == "nothing to judge: every submission has a report of yours\n"
    assert "has a report of this key already" in reef.refused(
        "admit", "bucket", submission, "--probe", "probe", "-r", "run"
    )
    # It leaves by name, once, and for a reason.
    assert "the retirement: why" in reef.refused("retire", "bucket", "1-flow-linear", "--why", "", "-r", "run")
    assert "no such expert" in reef.refused("retire", "bucket", "9-none", "--why", "test", "-r", "run")
    assert reef("retire", "bucket", "1-flow-linear", "--why", "test", "-r", "run") == f"{submission} is out\n"
    assert "no such expert is in" in reef.refused("retire", "bucket", submission, "--why", "again", "-r", "run")
    assert "retired" in reef("status", "bucket")


def _reversed(card, tensors):
    return card, {**tensors, "network.final.weight": -tensors["network.final.weight"]}


def _infinite(card, tensors):
    value = tensors["network.embed.weight"].clone()
    value[0, 0] = torch.inf
    return card, {**tensors, "network.embed.weight": value}


def _complex(card, tensors):
    return card, {**tensors, "network.embed.weight": tensors["network.embed.weight"].to(torch.complex64)}


def _of_two_types(card, tensors):
    return card, {**tensors, "network.final.weight": tensors["network.final.weight"].double()}


def _of_8_bits(card, tensors):
    return card, {name: value.to(torch.float8_e4m3fn) for name, value in tensors.items()}


def _other_codec(card, tensors):
    return card.model_copy(update={"codec": {"name": "pixels", "channels": 1, "scale": 2.0}}), tensors


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_reversed, "card: at t ="),
        (_infinite, "contents: the weights network.embed.weight are not finite"),
        (_complex, "contents: the weights network.embed.weight are complex"),
        (_of_two_types, "contents: its network cannot be evaluated"),
        (_of_8_bits, "contents: its network cannot be evaluated"),
        (_other_codec, "contents: the expert: its latents are normalised by scale 2.0"),
    ],
)
def test_a_bad_expert_is_refused_with_its_reason(reef, change, reason) -> None:
    submission = reef.offer(change)
    line = reef.admit()
    assert line.startswith(f"{submission} 1-flow-linear refused: {reason}"), line
    assert line.count("\n") == 1
    report = reef.report(submission, Key.load(Path("founder.key")).id)
    assert not report.accepted
    assert all(str(reef.root) not in one for one in report.reasons)
    (row,) = collective_status("bucket").submissions
    assert row.state.startswith(f"refused by founder ({Key.load(Path('founder.key')).id[:20]}...): {reason}")
    assert read_index(open_store("bucket"), read_collective(open_store("bucket"))) is None


def test_captions_are_compared_with_exchanged_ones_on_the_same_noise(reef, monkeypatch) -> None:
    errors = []

    def refuse(*arguments: torch.Tensor) -> Check:
        errors.extend(arguments)
        return Check("prompt", 9.0, 4.0, False, "captions mean nothing to it")

    monkeypatch.setattr("atoll.collective.gate.judge.check_prompt", refuse)
    # Captions of this run say nothing; otherwise the check would be left out.
    monkeypatch.setattr("atoll.collective.gate.judge.quantile", lambda *_: -1e9)
    submission = reef.offer()
    assert reef.admit() == f"{submission} 1-flow-linear refused: prompt: captions mean nothing to it\n"
    true, other, linear, linear_other = errors
    assert {one.shape for one in errors} == {(2, 24)}
    # The same rows and noise: other captions change an error, but not by as much as other noise would.
    for one, two in ((true, other), (linear, linear_other)):
        assert not torch.equal(one, two)
        assert float(torch.corrcoef(torch.stack([one.log().flatten(), two.log().flatten()]))[0, 1]) > 0.9


def test_junk_and_exchanged_weights_are_lines_of_their_own(reef) -> None:
    submission = reef.offer()
    weights = reef.root / "bucket" / "submissions" / submission / "weights.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))
    junk = reef.root / "bucket" / "submissions" / ("f" * 32) / "submission.json"
    junk.parent.mkdir()
    junk.write_text("{}")
    lines = reef.admit().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"{submission} 1-flow-linear not judged: ")
    assert lines[1].startswith(f"{'f' * 32} (broken) not judged: ")
    # No report: the owner may repair what was damaged on the way.
    assert not open_store("bucket").list("reports")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("not enough memory: you tried to allocate 9 bytes")])
def test_an_expert_that_is_too_large_for_a_machine_keeps_no_other_from_being_judged(error, reef, monkeypatch) -> None:
    def judge(*arguments: object, **options: object) -> list[Check]:
        raise error

    monkeypatch.setattr("atoll.collective.admit.judge", judge)
    submission = reef.offer()
    assert reef.admit().startswith(f"{submission} 1-flow-linear not judged: out of memory (")
    assert not open_store("bucket").list("reports")


def test_the_same_weights_do_not_enter_twice(reef) -> None:
    reef.offer()
    assert "accepted" in reef.admit()
    again = reef.offer(lambda card, tensors: (card.model_copy(update={"training": None}), tensors))
    assert "has the weights of 1-flow-linear, which is in already" in reef.admit(again)


def test_the_weights_of_a_retired_expert_do_not_enter_again(reef) -> None:
    reef.offer()
    assert "accepted" in reef.admit()
    reef("retire", "bucket", "1-flow-linear", "--why", "draws watermarks", "-r", "run")
    again = reef.offer(lambda card, tensors: (card.model_copy(update={"training": None}), tensors))
    assert "has the weights of 1-flow-linear, which was retired" in reef.admit(again)


def test_two_admitters_must_agree(reef, monkeypatch) -> None:
    """The second report completes the threshold; a report of somebody else is worth nothing."""
    submission = reef.offer()
    other = reef("key", "ada.key").split()[-1]
    monkeypatch.setattr(
        "atoll.collective.admit.judge", lambda *a, **k: [Check("error", 1.0, 4.0, True, "fine", "t = 0.5", 0.9)]
    )
    # ada is no admitter yet: her key is refused.
    assert "is no admitter" in reef.refused("admit", "bucket", "--probe", "probe", "-r", "run", "--key", "ada.key")
    from atoll.collective.charter import publish_charter
    from atoll.collective.statements import Charter, Roles, Thresholds

    store = open_store("bucket")
    now, founder = read_collective(store), Key.load(Path("founder.key"))
    both = (founder.id, other)
    changes = {
        "version": 2,
        "previous": now.position.sha256,
        "roles": Roles(founders=(founder.id,), admitters=both, retirers=both),
        "thresholds": Thresholds(admitters=2, retirers=2),
    }
    charter = Charter(**{**now.charter.model_dump(), **changes})
    publish_charter(store, charter, [founder], now.identity)
    assert reef.admit() == f"{submission} 1-flow-linear accepted\n"
    # A report that a stranger signed for ada.
    stranger, place = Key.generate(), report_path(submission, other)
    report = reef.report(submission, founder.id)
    forged = sign(report, [stranger], now.identity)
    (reef.root / "bucket" / place).write_bytes(forged)
    assert "nothing to judge" in reef.admit()
    (reef.root / "bucket" / place).unlink()
    assert reef.admit("--key", "ada.key") == f"{submission} 1-flow-linear accepted, and in\n"
    # Leaving takes two as well.
    assert "leaves when" in reef("retire", "bucket", submission, "--why", "test", "-r", "run")
    assert "is out" in reef("retire", "bucket", submission, "--why", "test", "-r", "run", "--key", "ada.key")


def test_a_probe_of_another_clustering_is_refused(reef) -> None:
    reef.offer()
    line = "admit", "bucket", "--probe", "elsewhere", "-r", "run"
    assert "expected secret shards" in reef.refused(*line)
    write_probe(reef.root / "elsewhere", reef.run, rows=4)
    assert "expected at least 8" in reef.refused(*line)
    index = reef.root / "elsewhere" / "cluster-002" / "index.json"
    content = json.loads(index.read_text())
    content["card"]["assignment"] = "0" * 64
    index.write_text(json.dumps(content))
    assert "another clustering" in reef.refused(*line)
