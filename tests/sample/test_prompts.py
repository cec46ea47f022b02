"""Prompt files, and the seeds of each prompt's images."""

import io
import os
import sys
from pathlib import Path

import pytest

from atoll.errors import AtollError
from atoll.sample.options import ImageOptions, PromptImages, check_output, parse_range, parse_seeds
from atoll.sample.prompts import open_requests


def read(file: Path, options: ImageOptions | None = None) -> list[PromptImages]:
    with open_requests(None, str(file), options or ImageOptions()) as requests:
        first = list(requests())
        assert list(requests()) == first  # it is read several times
        return first


def test_one_prompt_per_line(tmp_path) -> None:
    (tmp_path / "p.txt").write_bytes("\ufeffa\tlighthouse\r\n{a|b} été\nlast".encode())
    requests = read(tmp_path / "p.txt", ImageOptions("fog", 2, 10))
    assert [(one.number, one.prompt) for one in requests] == [(1, "a\tlighthouse"), (2, "{a|b} été"), (3, "last")]
    assert [list(one.seeds) for one in requests] == [[10, 11], [12, 13], [14, 15]]
    assert {one.negative_prompt for one in requests} == {"fog"}


def test_json_lines_have_settings_of_their_own(tmp_path) -> None:
    lines = ['{"prompt": "a"}', '{"prompt": "b", "seed": 7, "n": 3}', '{"prompt": "", "negative_prompt": ""}']
    (tmp_path / "p.txt").write_text("\n".join(lines))
    requests = read(tmp_path / "p.txt", ImageOptions("fog"))
    assert [(one.prompt, one.negative_prompt) for one in requests] == [("a", "fog"), ("b", "fog"), ("", "")]
    assert [list(one.seeds) for one in requests] == [[0], [7, 8, 9], [4]]


def test_prompts_come_from_standard_input_and_pipes(monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"moss\nrain\n")))
    assert [one.prompt for one in read(Path("-"))] == ["moss", "rain"]
    assert not sys.stdin.closed
    receiver, sender = os.pipe()
    os.write(sender, b"sand\n")
    os.close(sender)
    assert [one.prompt for one in read(Path(f"/dev/fd/{receiver}"))] == ["sand"]
    os.close(receiver)


def test_a_file_is_read_line_by_line(tmp_path) -> None:
    (tmp_path / "p.txt").write_bytes(b"a\nb\n\xff\n")
    with open_requests(None, str(tmp_path / "p.txt"), ImageOptions()) as requests:
        lines = iter(requests())
        assert [next(lines).prompt, next(lines).prompt] == ["a", "b"]
        with pytest.raises(AtollError, match="line 3"):
            next(lines)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"p\.txt: is empty; expected one prompt per line"),
        (b"a\n\nb\n", "line 2 is empty; remove it"),
        (b"\x89PNG\r\n\x1a\n", "line 1 is no UTF-8 text"),
        (b"a\nb\0c\n", "line 2 is no UTF-8 text"),
        (b"a" * 70_000, "line 1: a prompt of 70,000 bytes; expected at most 65,536"),
        (b"a" * (3 << 20), "line 1 has more than 2,097,152 bytes"),
        (b'{"prompt": "a"}\nb\n', "line 2 is no JSON object"),
        (b'{"promt": "a"}\n', "line 1: lacks prompt"),
        (b'{"prompt": "a", "steps": 3}\n', "line 1: unknown key steps"),
        (b'{"prompt": "a", "n": 0}\n', "line 1: n: got 0"),
        (b'{"prompt": "a\\u0000"}\n', "NUL"),
        (b'{"prompt": "\\ud800"}\n', "line 1: a prompt that is no valid Unicode"),
    ],
    ids=range(12),
)
def test_bad_lines_are_named(tmp_path, content, message) -> None:
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(AtollError, match=message) as error:
        read(tmp_path / "p.txt")
    assert len(str(error.value)) < 250


def test_a_file_that_cannot_be_read_is_refused(tmp_path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(AtollError, match=r"cannot be read \((Is a directory|No such file or directory)\)"):
            read(path)


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("7", [7]), ("0,1,2", [0, 1, 2]), ("0-3, 9", [0, 1, 2, 3, 9]), ("-5", [-5]), ("-2-1", [-2, -1, 0, 1])],
)
def test_seeds_are_numbers_and_ranges(text, seeds) -> None:
    assert parse_seeds(text) == tuple(seeds)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected numbers and ranges"),
        ("1..3", "expected numbers and ranges"),
        ("9-1", "expected the lower seed first, such as 1-9"),
        ("0-99999999999", "at most 100,000 seeds"),
        ("0-60000,100000-160000", "at most 100,000 seeds"),
        ("9999999999999999999", "of 64 bits"),
        ("1,2,1", "3, 2 of them different"),
    ],
)
def test_seeds_of_another_form_are_refused(text, message) -> None:
    with pytest.raises(AtollError, match=message):
        parse_seeds(text)


def test_options_that_contradict_each_other_are_refused(tmp_path) -> None:
    with pytest.raises(AtollError, match="--n is 0"):
        ImageOptions(n=0)
    with pytest.raises(AtollError, match="--n is 2 but --seeds has 3"):
        ImageOptions(n=2, seeds=(1, 2, 3))
    with pytest.raises(AtollError, match="--seed and --seeds"):
        ImageOptions(seed=2, seeds=(1, 2, 3))
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "a", "seed": 1}')
    with pytest.raises(AtollError, match=r"p\.jsonl: line 2 has a seed or n of its own"):
        read(tmp_path / "p.jsonl", ImageOptions(seeds=(1, 2)))
    for text in ("0.2", "0.8,0.2", "0,2", "a,b", "nan,1", "0,0.5,1"):
        with pytest.raises(AtollError, match="expected two times from 0 to 1"):
            parse_range(text)
    assert parse_range("0.2, 0.8") == (0.2, 0.8)


def test_a_directory_and_a_grid_have_options_of_their_own(tmp_path) -> None:
    none = {"side": None, "trace": None, "batch": None}
    assert check_output("new/", ["a"], None, **none)
    assert check_output(str(tmp_path), None, "p.txt", **none)
    assert not check_output("a.png", ["a"], None, **none)
    for out, prompts, file, options, message in [
        ("new/", ["a"], None, {"side": 64}, "--side belongs to a grid"),
        ("new/", ["a"], None, {"trace": Path("t.json")}, "--trace belongs to a grid"),
        ("a.png", ["a"], None, {"batch": 2}, "--batch writes one file per image"),
        ("a.png", None, "p.txt", {}, "--prompts writes one file per image"),
        ("new/", ["a"], "p.txt", {}, "both given"),
        ("new/", None, None, {}, "no prompts"),
    ]:
        with pytest.raises(AtollError, match=message):
            check_output(out, prompts, file, **none | options)
