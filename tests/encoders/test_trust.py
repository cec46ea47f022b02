"""A card's frozen network is found locally and matched by its hash; the hub is reached only if the user allows it."""

import json
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from atoll.encoders.codec import build_codec
from atoll.encoders.text import build_encoder
from atoll.encoders.trust import STRANGER, Trust
from atoll.encoders.weights import also_found_in, find_weights
from atoll.errors import AtollError
from atoll.manifest import Manifest
from atoll.storage.cards import ClusterShardsCard, EncodedCard, ExpertCard, RouterCard, parse_record
from tests.cards import SHA, cluster_shards_card, encoded_card, expert_card, router_card
from tests.conftest import RUN

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB = Trust(hub=True)


@pytest.fixture
def hub(monkeypatch, tmp_path) -> list:
    """A hub that has every repository, with an empty cache; the calls to it."""
    calls: list = []

    def download(repository: str, *, local_files_only: bool = False, revision: str | None = None, **_: object) -> str:
        calls.append((repository, local_files_only, revision))
        if local_files_only:
            raise FileNotFoundError("not in the cache")
        return str(tmp_path / "hub" / "snapshots" / (revision or COMMIT))

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=download))
    monkeypatch.delenv("ATOLL_WEIGHTS", raising=False)
    monkeypatch.chdir(tmp_path)
    return calls


def test_a_card_does_not_reach_the_hub_by_default(hub) -> None:
    with pytest.raises(AtollError, match=r"'org/name': not found; set \$ATOLL_WEIGHTS .*or add --allow-hub"):
        find_weights("org/name", trust=STRANGER, sha256=SHA, revision=COMMIT)
    assert all(local for _, local, _ in hub)


def test_a_card_is_fetched_at_its_commit_if_the_user_allows_it(hub) -> None:
    assert find_weights("org/name", trust=HUB, sha256=SHA, revision=COMMIT).name == COMMIT
    assert hub == [("org/name", False, COMMIT)]


@pytest.mark.parametrize(("sha256", "revision"), [(None, COMMIT), (SHA, None), (None, None)])
def test_a_card_is_not_fetched_without_hash_or_commit(hub, sha256, revision) -> None:
    with pytest.raises(AtollError, match=r"the card states no (sha256|revision)"):
        find_weights("org/name", trust=HUB, sha256=sha256, revision=revision)
    assert all(local for _, local, _ in hub)


def test_a_card_without_a_commit_says_how_to_get_the_weights_and_then_finds_them(hub, tmp_path, monkeypatch) -> None:
    advice = r"not found; the card states no revision .*`hf download org/name`, or set \$ATOLL_WEIGHTS to a directory"
    with pytest.raises(AtollError, match=advice):
        find_weights("org/name", trust=HUB, sha256=SHA)

    # After that command, the cache has them.
    def cached(*_: object, local_files_only: bool, **options: object) -> str:
        assert local_files_only
        return str(tmp_path)

    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=cached))
    assert find_weights("org/name", trust=HUB, sha256=SHA) == tmp_path


def test_the_users_own_atoll_yaml_still_reaches_the_hub(hub) -> None:
    assert find_weights("org/name").name == COMMIT
    content = {**RUN, "condition": {"name": "clip", "weights": "org/name"}}
    trust = Manifest(**content).trust_in_cards()
    assert find_weights("org/name", trust=trust).name == COMMIT  # a card of that run
    with pytest.raises(AtollError, match="not found"):
        find_weights("org/other", trust=trust, sha256=SHA)


@pytest.mark.parametrize("name", ["~/net", "$SOMEWHERE/net", "{tmp}/net", "../here/net", "net", "org/net"])
def test_a_card_names_no_path_of_this_machine(hub, tmp_path, monkeypatch, name) -> None:
    for place in ("net", "org/net"):
        (tmp_path / "here" / place).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "here"))
    monkeypatch.setenv("SOMEWHERE", str(tmp_path / "here"))
    with pytest.raises(AtollError, match="not found"):
        find_weights(name.format(tmp=tmp_path / "here"), trust=STRANGER, sha256=SHA)


def test_variables_and_the_home_are_not_expanded_in_cards_that_the_user_trusts(hub, tmp_path, monkeypatch) -> None:
    (tmp_path / "net").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SOMEWHERE", str(tmp_path))
    trust = Trust(paths=True)
    assert find_weights(str(tmp_path / "net"), trust=trust, sha256=SHA) == tmp_path / "net"
    for name in ("~/net", "$SOMEWHERE/net"):
        with pytest.raises(AtollError, match="not found"):
            find_weights(name, trust=trust, sha256=SHA)


def test_a_directory_that_the_user_names_is_searched_and_not_left(hub, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("ATOLL_WEIGHTS", str(tmp_path / "mine"))
    for place in ("mine/net", "secret"):
        (tmp_path / place).mkdir(parents=True)
    for name in ("org/net", "/elsewhere/net", "net"):
        assert find_weights(name, trust=STRANGER, sha256=SHA) == tmp_path / "mine" / "net"
    for name in ("../secret", "net/../../secret", str(tmp_path / "secret"), "..", "/", "."):
        with pytest.raises(AtollError, match="not found"):
            find_weights(name, trust=STRANGER, sha256=SHA)
    with pytest.raises(AtollError, match="states no sha256"):
        find_weights("org/net", trust=STRANGER)


def test_weights_beside_the_card_do_not_lead_out_of_it(hub, tmp_path) -> None:
    frozen, secret = tmp_path / "e" / "frozen", tmp_path / "secret.json"
    (frozen / "net").mkdir(parents=True)
    secret.write_text("{}")
    with also_found_in(frozen):
        assert find_weights("org/net", trust=STRANGER) == frozen / "net"
        (frozen / "net" / "config.json").symlink_to(secret)
        with pytest.raises(AtollError, match=r"leads out of .*--trust-paths"):
            find_weights("org/net", trust=STRANGER)


def test_other_weights_than_the_card_states_are_refused(tmp_path, monkeypatch) -> None:
    from tests.encoders.codec.test_codec import save_taef2

    monkeypatch.setenv("ATOLL_WEIGHTS", str(tmp_path))
    save_taef2(tmp_path / "taef2")
    codec = build_codec({"name": "taef2", "weights": str(tmp_path / "taef2")}).config()
    elsewhere: dict[str, Any] = {**codec, "weights": "/gone/taef2"}
    assert build_codec(elsewhere, STRANGER).config()["sha256"] == codec["sha256"]
    with pytest.raises(AtollError, match="sha256"):
        build_codec({**elsewhere, "sha256": SHA}, STRANGER)
    assert "revision" not in codec


@pytest.mark.parametrize(
    ("kind", "card"),
    [
        (ExpertCard, expert_card),
        (RouterCard, router_card),
        (EncodedCard, encoded_card),
        (ClusterShardsCard, cluster_shards_card),
    ],
)
def test_a_card_with_a_path_of_labels_is_refused_and_the_file_is_not_read(tmp_path, kind, card) -> None:
    secret = tmp_path / "passwords.txt"
    secret.write_text("swordfish\nswordfish\n")
    content = card(condition={"name": "label", "labels": str(secret)})
    with pytest.raises(AtollError, match=r"condition: labels is no list; .*write the card again") as refused:
        parse_record(kind, content, "card.json")
    assert "swordfish" not in str(refused.value)
    parse_record(kind, json.loads(json.dumps(card(condition={"name": "label", "labels": ["moss"]}))), "card.json")


def test_labels_in_a_file_are_the_users_alone_and_end_up_in_the_card(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("moss\nrain\n")
    config = {"name": "label", "labels": str(tmp_path / "labels.txt")}
    assert build_encoder(config).config() == {"name": "label", "labels": ["moss", "rain"]}
    with pytest.raises(AtollError, match="labels is no list"):
        build_encoder(config, STRANGER)


def test_the_offline_switch_holds_although_the_user_allows_the_hub(tmp_path, monkeypatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the network was touched"))
    monkeypatch.delenv("ATOLL_WEIGHTS", raising=False)
    with pytest.raises(AtollError, match=r"'org/name': not found.*the hub does not provide them"):
        find_weights("org/name", trust=HUB, sha256=SHA, revision=COMMIT)
