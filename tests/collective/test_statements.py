"""Signed statements: bounded, canonical, and worth nothing for another purpose, collective or content."""

import json

import pytest
from pydantic import ValidationError

from atoll.collective import statements
from atoll.collective.keys import Key, canonical
from atoll.collective.signed import read_signed, sign
from atoll.collective.statements import AdmissionReport, Charter, Claim, End, FileDigest, Request, Submission, safe_path
from atoll.errors import AtollError
from tests.collective.founding import NOBODY, charter_of

KEY = Key.generate()
CLAIM = Claim(work="3", epoch=1, nonce="0" * 32)
REEF, OTHER = "1" * 64, "2" * 64


def edited(data: bytes, edit) -> bytes:
    content = json.loads(data)
    edit(content)
    return canonical(content)


def test_a_statement_comes_back_with_its_signers() -> None:
    data = sign(CLAIM, [KEY], REEF)
    assert data == sign(CLAIM, [KEY], REEF)
    signed = read_signed(Claim, data, "claim", REEF)
    assert (signed.statement, signed.signers) == (CLAIM, {KEY.id})


def test_a_signature_for_another_collective_is_refused() -> None:
    with pytest.raises(AtollError, match="another collective or purpose"):
        read_signed(Claim, sign(CLAIM, [KEY], OTHER), "claim", REEF)


def test_a_signature_for_another_purpose_is_refused() -> None:
    data = sign(End(work="3", epoch=1, state="released"), [KEY], REEF)
    with pytest.raises(AtollError, match="a signed 'end', expected a signed 'claim'"):
        read_signed(Claim, data, "claim", REEF)
    # Also if the type is exchanged.
    with pytest.raises(AtollError, match="does not fit"):
        read_signed(Claim, edited(data, lambda one: one.update(type="claim")), "claim", REEF)


def test_every_changed_byte_is_noticed() -> None:
    data = sign(CLAIM, [KEY], REEF)
    for place in range(len(data)):
        for change in (1, 0x20):
            damaged = data[:place] + bytes([data[place] ^ change]) + data[place + 1 :]
            with pytest.raises(AtollError) as error:
                read_signed(Claim, damaged, "claim", REEF)
            assert "\n" not in str(error.value)
    for cut in (0, 1, len(data) // 2, len(data) - 1):
        with pytest.raises(AtollError, match="no canonical JSON"):
            read_signed(Claim, data[:cut], "claim", REEF)


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda one: one["statement"].update(epoch=2), "does not fit"),
        (lambda one: one["signatures"][0].update(key=Key.generate().id), "does not fit"),
        (lambda one: one["signatures"].append(one["signatures"][0]), "signed twice"),
        (lambda one: one.update(signatures=[]), "signatures"),
        (lambda one: one.update(format=2), "format 2, this version of atoll reads format 1; update atoll"),
        (lambda one: one.update(more=1), "unknown key more"),
        (lambda one: one["signatures"][0].update(key="rsa:1"), "expected string"),
    ],
)
def test_an_edited_statement_is_refused_in_one_line(edit, problem) -> None:
    with pytest.raises(AtollError, match=problem) as error:
        read_signed(Claim, edited(sign(CLAIM, [KEY], REEF), edit), "claim", REEF)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"null",
        b"\xff",
        b'{"format":1,"format":1}',
        b'{"a":NaN}',
        b"[" * 100_000,
        b'{"a": 1}',
        b"1e400",
        b'{"format":99999999999999999999}',
        json.dumps({"a": "\ud800"}).encode(),
    ],
)
def test_junk_is_refused_in_one_line(data) -> None:
    with pytest.raises(AtollError) as error:
        read_signed(Claim, data, "s3://reef/junk", REEF)
    assert str(error.value).startswith("s3://reef/junk: ")
    assert len(str(error.value)) < 300


def test_a_wrong_value_is_refused_even_if_it_is_signed() -> None:
    claim = CLAIM.model_copy(update={"work": "../3"})
    with pytest.raises(AtollError, match="work"):
        read_signed(Claim, sign(claim, [KEY], REEF), "claim", REEF)


def test_integers_of_64_bits_are_strings_where_json_cannot_hold_them() -> None:
    report = {"submission": NOBODY, "charter": 1, "accepted": True, "reasons": (), "statistics": {"error": 1.25}}
    for seed, spelled in ((7, 7), (2**53 - 1, 2**53 - 1), (2**53, str(2**53)), (2**64 - 1, str(2**64 - 1))):
        data = sign(AdmissionReport(**report, seed=seed), [KEY], REEF)
        assert json.loads(data)["statement"]["seed"] == spelled
        assert read_signed(AdmissionReport, data, "report", REEF).statement.seed == seed
    for spelled in ("7", "-1", str(2**64), "1" * 30, "0x10", 2**64, 1.5, True):
        with pytest.raises(ValidationError):
            AdmissionReport(**report, seed=spelled)


@pytest.mark.parametrize(
    "path",
    ["", ".", "..", "../x", "a/../b", "/etc/passwd", "a//b", "a/", "a\\b", "C:x", "a/.hidden", "a b", "a\x00b",
     "é", "a/" * 20 + "b", "x" * 300, "~/x", "a\nb"],
)  # fmt: skip
def test_paths_in_files_cannot_leave_the_directory(path) -> None:
    with pytest.raises(ValueError, match="expected"):
        safe_path(path)
    with pytest.raises(ValidationError):
        Submission(
            name="x",
            clusters=(0,),
            work="0",
            epoch=1,
            files={path: FileDigest(sha256=NOBODY, size=1), "card.json": FileDigest(sha256=NOBODY, size=1)},
        )


def test_ordinary_paths_are_safe() -> None:
    for path in ("card.json", "clusters/cluster-003/shard-00000.safetensors", "a_b/C-1..2"):
        assert safe_path(path) == path


def test_a_submission_without_card_or_weights_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"files lacks weights\.safetensors"):
        Submission(
            name="x",
            clusters=(0,),
            work="0",
            epoch=1,
            files={name: FileDigest(sha256=NOBODY, size=1) for name in ("card.json", "other")},
        )


def test_a_submission_names_a_cluster_once() -> None:
    files = {name: FileDigest(sha256=NOBODY, size=1) for name in ("card.json", "weights.safetensors")}
    with pytest.raises(ValidationError, match="a cluster is named twice"):
        Submission(name="x", clusters=(0, 0), work="0", epoch=1, files=files)


def test_a_charter_cannot_lock_everybody_out() -> None:
    with pytest.raises(ValidationError, match="as many different keys"):
        charter_of([KEY], thresholds=statements.Thresholds(founders=2))
    with pytest.raises(ValidationError, match="removed key"):
        charter_of([KEY], removed=(KEY.id,))
    assert isinstance(charter_of([KEY]), Charter)


@pytest.mark.parametrize("name", ["", "a\nb", "\x1b[2J", "\u202e", "x" * 300])
def test_a_name_that_would_act_in_a_terminal_is_refused(name) -> None:
    with pytest.raises(ValidationError):
        Request(name=name)


def test_a_statement_has_one_spelling() -> None:
    data = sign(CLAIM, [KEY], REEF)
    twice = data.replace(b'"format":1', b'"format":1,"format":1')
    for spelling in (json.dumps(json.loads(data)).encode(), data + b"\n", twice):
        assert json.loads(spelling) == json.loads(data)
        with pytest.raises(AtollError, match="no canonical JSON"):
            read_signed(Claim, spelling, "claim", REEF)
