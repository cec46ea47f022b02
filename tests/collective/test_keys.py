"""Keys and canonical JSON."""

import os

import pytest

from atoll.collective.keys import Key, canonical, is_signed
from atoll.errors import AtollError


def test_a_key_comes_back_from_its_file_and_is_never_replaced(tmp_path) -> None:
    key = Key.generate()
    key.save(tmp_path / "me.key")
    assert os.stat(tmp_path / "me.key").st_mode & 0o777 == 0o600
    assert Key.load(tmp_path / "me.key").id == key.id
    with pytest.raises(AtollError, match="never replaced"):
        Key.generate().save(tmp_path / "me.key")
    assert Key.load(tmp_path / "me.key").id == key.id


def test_a_key_that_others_can_read_is_refused(tmp_path) -> None:
    Key.generate().save(tmp_path / "me.key")
    (tmp_path / "me.key").chmod(0o644)
    with pytest.raises(AtollError, match="chmod 600"):
        Key.load(tmp_path / "me.key")


@pytest.mark.parametrize("content", [b"", b"no key", b"x" * 20_000, "rsa"])
def test_a_file_that_holds_no_ed25519_key_is_refused(content, tmp_path) -> None:
    if content == "rsa":
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import x25519

        content = x25519.X25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    (tmp_path / "me.key").write_bytes(content)
    (tmp_path / "me.key").chmod(0o600)
    with pytest.raises(AtollError, match="key"):
        Key.load(tmp_path / "me.key")


def test_a_missing_key_names_the_command_that_makes_one(tmp_path) -> None:
    with pytest.raises(AtollError, match="atoll collective key"):
        Key.load(tmp_path / "none.key")


def test_a_signature_is_of_one_key_and_one_text() -> None:
    key, other = Key.generate(), Key.generate()
    signature = key.sign(b"text")
    assert signature == key.sign(b"text")
    assert is_signed(key.id, signature, b"text")
    assert not is_signed(other.id, signature, b"text")
    assert not is_signed(key.id, signature, b"texT")
    assert not is_signed("ed25519:" + "ff" * 32, signature, b"text")


def test_equal_values_have_equal_bytes() -> None:
    first, second = {"b": 1, "a": [1.0, "é"]}, {"a": [1, "é"], "b": 1.0}
    assert canonical(first) == canonical(second) == '{"a":[1,"é"],"b":1}'.encode()


@pytest.mark.parametrize("value", [2**53, -(2**53), float("nan"), float("inf"), "\ud800"])
def test_what_json_cannot_hold_is_refused(value) -> None:
    with pytest.raises(AtollError, match="no canonical JSON"):
        canonical({"value": value})
