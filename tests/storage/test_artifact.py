import errno
import json
import os
import socket
import subprocess
from contextlib import suppress

import pytest
import torch

from atoll.errors import AtollError
from atoll.storage.artifact import (
    CARD,
    WEIGHTS,
    read_card,
    read_tensors,
    save_artifact,
    whole_directory,
    write_bytes,
)
from atoll.storage.cards import FORMAT, ExpertCard, RouterCard, TrainingRecord
from tests.cards import expert_card


def expert(name: str, **changes) -> ExpertCard:
    card = ExpertCard(**expert_card(name=name))
    return card.model_copy(update={"weights": None, **changes})


@pytest.fixture
def artifact(tmp_path):
    path = tmp_path / "parts" / "one"
    save_artifact(path, expert("one"), {"a": torch.arange(6.0).reshape(2, 3).T})
    return path


def test_round_trip(artifact) -> None:
    card = read_card(artifact, ExpertCard)
    assert card.name == "one"
    torch.testing.assert_close(read_tensors(artifact, card)["a"], torch.arange(6.0).reshape(2, 3).T)
    assert sorted(os.listdir(artifact.parent)) == ["one"]


def test_saving_again_replaces_the_whole(artifact) -> None:
    save_artifact(artifact, expert("two"), {"b": torch.zeros(1)})
    card = read_card(artifact, ExpertCard)
    assert (card.name, list(read_tensors(artifact, card))) == ("two", ["b"])


@pytest.mark.parametrize("position", [0, 8, -1])
def test_a_tampered_weight_file_is_refused(artifact, position) -> None:
    data = bytearray((artifact / WEIGHTS).read_bytes())
    data[position] ^= 1
    (artifact / WEIGHTS).write_bytes(data)
    with pytest.raises(AtollError, match="sha256"):
        read_tensors(artifact, read_card(artifact, ExpertCard))


def test_a_missing_weight_file_is_named(artifact) -> None:
    (artifact / WEIGHTS).unlink()
    with pytest.raises(AtollError, match=WEIGHTS):
        read_tensors(artifact, read_card(artifact, ExpertCard))


def edit(artifact, **changes) -> None:
    card = json.loads((artifact / CARD).read_text())
    (artifact / CARD).write_text(json.dumps({**card, **changes}))


def test_a_card_of_another_format_or_kind_is_refused(artifact) -> None:
    with pytest.raises(AtollError, match="kind 'expert'; expected 'router'"):
        read_card(artifact, RouterCard)
    edit(artifact, format=FORMAT + 1)
    with pytest.raises(AtollError, match=f"format {FORMAT + 1}.*update atoll"):
        read_card(artifact, ExpertCard)


@pytest.mark.parametrize("text", ["", "{", "[]", '"card"', "{}", '{"format": 1}'])
def test_a_damaged_card_is_refused(artifact, text) -> None:
    (artifact / CARD).write_text(text)
    with pytest.raises(AtollError, match=r"card\.json"):
        read_card(artifact, ExpertCard)


@pytest.mark.parametrize("weights", [None, {}, "x", {"file": WEIGHTS}, {"file": "../../etc/passwd", "sha256": "0"}])
def test_a_card_without_sound_weights_is_refused(artifact, weights) -> None:
    edit(artifact, weights=weights)
    with pytest.raises(AtollError, match="weights"):
        read_tensors(artifact, read_card(artifact, ExpertCard))


def test_a_full_disk_leaves_the_old_file_whole(tmp_path, monkeypatch) -> None:
    file = tmp_path / "state"
    write_bytes(file, b"old")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(AtollError, match="No space left"):
        write_bytes(file, b"new and longer")
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["state"]


def test_a_failure_while_saving_leaves_nothing_half_written(tmp_path, monkeypatch) -> None:
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(AtollError, match="No space left"):
        save_artifact(tmp_path / "one", expert("one"), {"a": torch.zeros(3)})
    assert os.listdir(tmp_path) == []


def test_nan_does_not_go_into_a_card(tmp_path) -> None:
    loss = TrainingRecord(mark="x", steps=1).model_copy(update={"loss": float("nan")})
    with pytest.raises(AtollError, match=r"training\.loss: got nan"):
        save_artifact(tmp_path / "one", expert("one", training=loss), {})
    assert os.listdir(tmp_path) == []


def test_what_a_killed_process_left_is_removed_and_what_lives_is_kept(tmp_path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    host = socket.gethostname()
    dead = tmp_path / f".out.{host}-{ended.pid}.abc.tmp"
    alive = tmp_path / f".out.{host}-{os.getppid()}.abc.tmp"
    elsewhere = tmp_path / f".out.another-{ended.pid}.abc.tmp"
    longer = tmp_path / f".out.{host}-2-{ended.pid}.abc.tmp"  # of a host whose name begins like this one's
    for left in (dead, alive, elsewhere, longer):
        left.mkdir()
        (left / "part").write_text("x")
    with whole_directory(tmp_path / "out") as directory:
        (directory / "whole").write_text("x")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(
        [alive.name, elsewhere.name, longer.name, "out"]
    )


def test_what_was_replaced_when_the_process_was_killed_is_removed_once_there_is_another(tmp_path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    old = tmp_path / f".out.{socket.gethostname()}-{ended.pid}.abc.old"
    old.mkdir()
    (old / "part").write_text("x")
    with suppress(KeyError), whole_directory(tmp_path / "out"):
        raise KeyError("the new one fails too")
    assert old.exists()  # as long as it is all that there is
    for _ in range(2):
        with whole_directory(tmp_path / "out") as directory:
            (directory / "whole").write_text("x")
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
