"""`atoll recaption`: captions by a program or a function, appended batch by batch, and joined at encoding."""

import base64
import io
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from atoll.data import captioner
from atoll.data.captioner import Command, Function
from atoll.data.captions_file import CaptionsFile
from atoll.data.encode import encode_run
from atoll.data.recaption import recaption
from atoll.data.sources import build_source
from atoll.errors import AtollError
from atoll.manifest import DataSettings, parse_manifest
from atoll.storage.layout import RunLayout
from atoll.storage.shards import Shards, unpack
from tests.waiting import run_to_end

COUNT = 10
# The example of docs/data.md.
EXAMPLE = """
import base64, io, json, sys
from PIL import Image

for line in sys.stdin:
    asked = json.loads(line)
    image = Image.open(io.BytesIO(base64.b64decode(asked["image"])))
    red, green, blue = image.resize((1, 1)).getpixel((0, 0))
    colour = max((red, "red"), (green, "green"), (blue, "blue"))[1]
    captions = [f"{colour}, {asked['caption']}", {"text": asked["caption"], "weight": 0.5}]
    print(json.dumps({"key": asked["key"], "captions": captions}), flush=True)
"""
RUN = """
name: recaptioned
data: {{source: folder, path: "{path}", size: 8, validation: 0{more}}}
codec: {{name: pixels, channels: 3}}
feature: {{name: hog, bins: 2, grid: 2}}
condition: {{name: hash, dim: 8, length: 4}}
experts: [{{cluster: 0, objective: {{prediction: flow, schedule: linear}}}}]
"""


@pytest.fixture
def images(tmp_path) -> Path:
    """Images of red, green or blue noise, each with a caption of its own."""
    (tmp_path / "images").mkdir()
    for number in range(COUNT):
        pixels = np.random.default_rng(number).integers(0, 100, (12, 16, 3), dtype=np.uint8)
        pixels[..., number % 3] += 100
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
        (tmp_path / "images" / f"{number}.txt").write_text(f"image {number}")
    return tmp_path / "images"


def program(tmp_path: Path, text: str, name: str = "caption.py") -> str:
    """The command line of a Python program."""
    (tmp_path / name).write_text(text)
    return shlex.join([sys.executable, str(tmp_path / name)])


def answering(answer: str) -> str:
    """A program that answers the n-th image, which it logs, with the value of an expression of n and the request."""
    return f"""
import json, os, sys, time
log = open(os.path.join(os.path.dirname(__file__), "asked.log"), "a")
for n, line in enumerate(sys.stdin):
    asked = json.loads(line)
    log.write(asked["key"] + "\\n"); log.flush()
    good = {{"key": asked["key"], "captions": ["new " + asked["caption"]]}}
    answer = {answer}
    if answer is not None:
        print(answer if isinstance(answer, str) else json.dumps(answer))
"""


def caption(images: Path, out: Path, command: str | Callable[..., Any], **options: Any) -> str:
    source = build_source(DataSettings(source="folder", path=str(images)))
    return recaption(source, Command(command), out, **{"batch": 4, **options})


def lines(out: Path) -> dict[str, Any]:
    return {record["key"]: record["captions"] for record in map(json.loads, out.read_text().splitlines())}


def test_the_documented_example_captions_images(tmp_path, images) -> None:
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    assert all(f"    {line}".rstrip() in text.splitlines() for line in EXAMPLE.strip().splitlines())
    said = caption(images, tmp_path / "out.jsonl", program(tmp_path, EXAMPLE))
    assert said.splitlines()[0] == f"{tmp_path}/out.jsonl: 10 images captioned"
    colours = ["red", "green", "blue"]
    assert lines(tmp_path / "out.jsonl") == {
        f"{n}.png": [f"{colours[n % 3]}, image {n}", {"text": f"image {n}", "weight": 0.5}] for n in range(COUNT)
    }
    # In the order of the source, whatever the batches.
    caption(images, tmp_path / "one.jsonl", program(tmp_path, EXAMPLE), batch=3)
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()


def test_answers_may_come_in_any_order_within_a_batch(tmp_path, images) -> None:
    text = """
import json, sys
waiting = []
for n, line in enumerate(sys.stdin):
    waiting.insert(0, json.loads(line)["key"])
    if n % 4 == 3 or n == 9:
        for key in waiting:
            print(json.dumps({"key": key, "captions": key}))
        waiting = []
"""
    caption(images, tmp_path / "out.jsonl", program(tmp_path, text))
    assert list(lines(tmp_path / "out.jsonl").items()) == [(f"{n}.png", f"{n}.png") for n in range(COUNT)]


def test_a_long_answer_does_not_block_a_long_question(tmp_path, images) -> None:
    """Both pipes hold 64 KiB: while the questions are sent, the answers are read."""
    caption(
        images,
        tmp_path / "out.jsonl",
        program(tmp_path, answering("good | {'captions': ['a' * 50_000] * 4}")),
        batch=10,
    )
    assert len(lines(tmp_path / "out.jsonl")) == COUNT


FAILING = [
    ("sys.exit(3) if n == 5 else good", "ended with exit code 3 after 1 of 4 answers to a batch", 4),
    ("os.kill(os.getpid(), 9) if n == 5 else good", "ended with signal 9 after 1 of 4 answers to a batch", 4),
    ("sys.exit() if n == 2 else good", "ended with exit code 0 after 2 of 4 answers to a batch", 0),
    ("(os.write(1, b'{\"key\":'), os._exit(0)) if n == 9 else good", r"in the middle of a line \('\{\"key\":'\)", 8),
    ("'hello' if n == 5 else good", r'line 6 of the answers is no JSON; expected \{"key": \.\.\., .*got \'hello\'', 4),
    ("[good] if n == 5 else good", r'line 6 of the answers: expected \{"key": .*got \'\[', 4),
    ("{'key': good['key']} if n == 5 else good", "line 6 of the answers: expected", 4),
    ("{**good, 'key': 5} if n == 5 else good", "line 6 of the answers: expected", 4),
    ("'' if n == 5 else good", "line 6 of the answers is no JSON", 4),
    (
        "good | {'key': 'x.png'} if n == 5 else good",
        "line 6 of the answers: the key 'x.png' is none of this batch, such as '4.png'",
        4,
    ),
    ("good | {'key': '4.png'} if n == 5 else good", "line 6 of the answers: the key '4.png' is answered twice", 4),
    ("good | {'captions': []} if n == 5 else good", "the answer to '5.png': caption: an empty list", 4),
    (
        "good | {'captions': [['a']]} if n == 5 else good",
        "the answer to '5.png': caption: item 1 of its list is a list",
        4,
    ),
    ("good | {'captions': 5} if n == 5 else good", "the answer to '5.png': caption: is int", 4),
    ("good | {'captions': float('nan')} if n == 5 else good", "the answer to '5.png': caption: is float", 4),
    ("'a' * 1_100_000 if n == 5 else good", "line 6 of the answers has more than 1,048,576 bytes", 4),
    ("'\\x1b[2J' if n == 5 else good", r"got '\\\\?\\x1b\[2J'", 4),
]


@pytest.mark.parametrize(("answer", "said", "kept"), FAILING)
def test_a_captioner_that_fails_is_named_and_what_is_done_is_kept(tmp_path, images, answer, said, kept) -> None:
    out = tmp_path / "out.jsonl"
    with pytest.raises(AtollError, match=said) as error:
        caption(images, out, program(tmp_path, answering(answer)))
    assert "\n" not in str(error.value)
    assert "what is done is kept: mend it, and run the same command again" in str(error.value)
    assert list(lines(out)) == [f"{n}.png" for n in range(kept)]


def test_a_mended_captioner_gets_what_is_left(tmp_path, images) -> None:
    out = tmp_path / "out.jsonl"
    with pytest.raises(AtollError, match="exit code 3"):
        caption(images, out, program(tmp_path, answering("sys.exit(3) if n == 5 else good")))
    (tmp_path / "asked.log").unlink()
    said = caption(images, out, program(tmp_path, answering("good")))
    assert said.startswith(f"{out}: 6 images captioned, 4 were there")
    assert (tmp_path / "asked.log").read_text().split() == [f"{n}.png" for n in range(4, COUNT)]
    assert lines(out) == {f"{n}.png": [f"new image {n}"] for n in range(COUNT)}


def test_a_captioner_that_hangs_up_is_stopped(tmp_path, images, monkeypatch) -> None:
    monkeypatch.setattr(captioner, "_PATIENCE", 0.2)
    hangs_up = "(os.close(1), os.close(0), time.sleep(3600)) if n == 5 else good"
    with pytest.raises(AtollError, match=r"closed its output, and was stopped, after 1 of 4 answers"):
        caption(images, tmp_path / "out.jsonl", program(tmp_path, answering(hangs_up)))
    assert len(lines(tmp_path / "out.jsonl")) == 4
    # It hangs up while much is sent to it, which it does not read.
    text = "import os, time; os.close(1); time.sleep(3600)"
    with pytest.raises(AtollError, match=r"closed its output, and was stopped, after 0 of 10 answers"):
        caption(images, tmp_path / "two.jsonl", program(tmp_path, text), batch=COUNT, side=16)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (answering("good") + "print('done'); print('bye')", "note: the captioner wrote 2 more lines than images"),
        (answering("good") + "sys.exit(4)", "note: the captioner ended with exit code 4 after its last answer"),
        (answering("good") + "time.sleep(3600)", "note: the captioner went on after its last answer, and was stopped"),
    ],
)
def test_what_comes_after_the_last_answer_is_said(tmp_path, images, monkeypatch, text, said) -> None:
    if "sleep" in said or "went on" in said:
        monkeypatch.setattr(captioner, "_PATIENCE", 0.2)
    assert said in caption(images, tmp_path / "out.jsonl", program(tmp_path, text))
    assert len(lines(tmp_path / "out.jsonl")) == COUNT


def test_a_killed_run_goes_on_and_only_the_batch_in_flight_is_repeated(tmp_path, images) -> None:
    """The program kills its parent at the seventh image, as `kill -9` of atoll does."""
    environment = {**os.environ, "PYTHONPATH": str(Path(captioner.__file__).parents[2]), "OMP_NUM_THREADS": "1"}

    command = program(tmp_path, answering("(os.kill(os.getppid(), 9), os._exit(1)) if n == 6 else good"))
    options = ["--command", command, "--out", str(tmp_path / "out.jsonl"), "--batch", "4", "--quiet"]
    killed = run_to_end([sys.executable, "-m", "atoll", "recaption", str(images), *options], env=environment)
    assert killed.returncode == -signal.SIGKILL
    assert list(lines(tmp_path / "out.jsonl")) == [f"{n}.png" for n in range(4)]
    # The kill may come while a line is written.
    with (tmp_path / "out.jsonl").open("a") as file:
        file.write('{"key": "4.png", "capt')
    before = (tmp_path / "asked.log").read_text().split()
    said = caption(images, tmp_path / "out.jsonl", program(tmp_path, answering("good")))
    assert "6 images captioned, 4 were there" in said
    assert "the last line was incomplete" in said
    asked = (tmp_path / "asked.log").read_text().split()
    assert set(before) & set(asked[len(before) :]) == {"4.png", "5.png", "6.png"}
    caption(images, tmp_path / "whole.jsonl", program(tmp_path, answering("good")))
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_new_images_are_captioned_alone_and_restart_discards(tmp_path, images) -> None:
    out, good = tmp_path / "out.jsonl", program(tmp_path, answering("good"))
    caption(images, out, good)
    Image.new("RGB", (12, 12), "red").save(images / "x.png")
    assert "1 images captioned, 10 were there" in caption(images, out, good)
    assert "0 images captioned, 11 were there" in caption(images, out, good)
    other = program(tmp_path, answering("good | {'captions': 'other'}"))
    assert f"{out}: 11 images captioned" in caption(images, out, other, restart=True)
    assert set(lines(out).values()) == {"other"}


def test_images_that_cannot_be_read_are_counted(tmp_path, images) -> None:
    (images / "3.png").write_bytes(b"no image")
    (images / "4.png").write_bytes((images / "5.png").read_bytes()[:200])
    said = caption(images, tmp_path / "out.jsonl", program(tmp_path, answering("good")))
    assert "8 images captioned" in said
    assert "without captions, as they cannot be read: 1 " in said
    assert {"3.png", "4.png"}.isdisjoint(lines(tmp_path / "out.jsonl"))


def test_large_images_are_reduced_and_turned_upright(tmp_path, images) -> None:
    image = Image.new("RGB", (600, 300), "green")
    exif = image.getexif()
    exif[274] = 6  # rotated by a quarter turn
    image.save(images / "a.jpg", exif=exif)
    size = "good | {'captions': __import__('base64').b64decode(asked['image'])[16:24].hex()}"
    caption(images, tmp_path / "out.jsonl", program(tmp_path, answering(size)), side=100)
    found = lines(tmp_path / "out.jsonl")
    assert [int(found["a.jpg"][i : i + 8], 16) for i in (0, 8)] == [50, 100]
    assert [int(found["0.png"][i : i + 8], 16) for i in (0, 8)] == [16, 12]  # none is enlarged


def test_paths_are_sent_of_local_files_alone(tmp_path, images) -> None:
    path = program(tmp_path, answering("good | {'captions': asked['path']}"))
    caption(images, tmp_path / "out.jsonl", path, send="path")
    assert lines(tmp_path / "out.jsonl")["3.png"] == str(images / "3.png")
    source = build_source(DataSettings(source="glyphs", size=8))
    with pytest.raises(AtollError, match="--send path: the keys of these images are no paths of local files"):
        recaption(source, Command(path), tmp_path / "no.jsonl", send="path")


def test_two_processes_do_not_write_one_file(tmp_path, images) -> None:
    import fcntl

    with (tmp_path / "out.jsonl").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(AtollError, match=r"out\.jsonl: another process writes it"):
            caption(images, tmp_path / "out.jsonl", program(tmp_path, EXAMPLE))


def test_a_file_that_holds_something_else_is_not_written_to(tmp_path, images) -> None:
    (tmp_path / "out.jsonl").write_text('{"key": "a"}\n')
    with pytest.raises(AtollError, match=r'out\.jsonl:1: expected \{"key": "\.\.\.", "captions": \[\.\.\.\]\}; got'):
        caption(images, tmp_path / "out.jsonl", program(tmp_path, EXAMPLE))
    assert (tmp_path / "out.jsonl").read_text() == '{"key": "a"}\n'


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("", "--command: is empty"),
        ("python 'open", r"cannot be split into arguments \(No closing quotation\)"),
        ("no-such-program --x", "'no-such-program' cannot be started"),
        ("echo hello; rm -rf x", "line 1 of the answers is no JSON.*got 'hello; rm -rf x'"),  # no shell reads it
    ],
)
def test_a_command_that_cannot_run_is_named(tmp_path, images, command, said) -> None:
    with pytest.raises(AtollError, match=said):
        caption(images, tmp_path / "out.jsonl", command)


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module `mine_N` in the current directory with a function `describe`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    numbers = iter(range(100))

    def write(body: str) -> str:
        name = f"mine_{os.getpid()}_{next(numbers)}_{tmp_path.name}"
        (tmp_path / f"{name}.py").write_text(body)
        return f"{name}:describe"

    return write


def test_a_python_function_captions_images(tmp_path, images, module) -> None:
    body = "def describe(images):\n    return [[f'{i[\"image\"].size} {i[\"caption\"]}', i['key']] for i in images]\n"
    source = build_source(DataSettings(source="folder", path=str(images)))
    recaption(source, Function(module(body)), tmp_path / "out.jsonl", batch=4)
    assert lines(tmp_path / "out.jsonl")["2.png"] == ["(16, 12) image 2", "2.png"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("def describe(images):\n    raise ValueError('out of\\nwords')", "raised ValueError: out of words"),
        ("def describe(images):\n    return []", "returned 0 for 4 images"),
        ("def describe(images):\n    return {}", "returned a dict for 4 images"),
        ("def describe(images):\n    return [[3]] * 4", "the answer to '0.png': caption: item 1 of its list is a int"),
        ("def describe(images):\n    return [object()] * 4", "the answer to '0.png': caption: is object"),
        ("describe = 3", "is a int, expected a function"),
        ("raise RuntimeError('no GPU')", r"cannot be imported \(RuntimeError: no GPU\)"),
        ("other = 3", r"cannot be imported \(AttributeError: "),
    ],
)
def test_a_function_that_fails_is_named(tmp_path, images, module, body, said) -> None:
    name = module(body)
    source = build_source(DataSettings(source="folder", path=str(images)))
    with pytest.raises(AtollError, match=said):
        recaption(source, Function(name), tmp_path / "out.jsonl", batch=4)


@pytest.mark.parametrize("name", ["describe", ":describe", "module:", ""])
def test_a_function_without_a_module_is_named(name) -> None:
    with pytest.raises(AtollError, match="expected MODULE:FUNCTION, such as captions:describe"):
        Function(name)


# Joining the captions when images are encoded


def encoded(tmp_path: Path, images: Path, more: str = "", **options: Any) -> tuple[str, dict[str, list[Any]]]:
    """What is said, and all captions by key."""
    (tmp_path / "run").mkdir(exist_ok=True)
    said = encode_run(
        tmp_path / "run", parse_manifest(RUN.format(path=images, more=more), "here"), workers=0, **options
    )
    shards = Shards(RunLayout(tmp_path / "run").encoded)
    (part,) = shards.parts()
    return said, {
        key: [(first, 1.0), *unpack(other)]
        for key, first, other in zip(part.keys, part.captions, part.others, strict=True)
    }


def captions_file(tmp_path: Path, captions: dict[str, Any]) -> str:
    records = [{"key": key, "captions": value} for key, value in captions.items()]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return f', captions_from: "{tmp_path / "c.jsonl"}"'


def test_captions_from_a_file_replace_the_images_own(tmp_path, images) -> None:
    more = captions_file(
        tmp_path, {"1.png": "one", "2.png": ["two", {"text": "zwei", "weight": 3}], "3.png": None, "y": "y"}
    )
    said, found = encoded(tmp_path, images, more)
    assert found["1.png"] == [("one", 1.0)]
    assert found["2.png"] == [("two", 1.0), ("zwei", 3.0)]
    assert found["3.png"] == [("image 3", 1.0)]
    assert found["4.png"] == [("image 4", 1.0)]
    assert "7 images: images without a line in the captions file, which keep their own caption (0.png)" in said


def test_own_captions_take_their_fraction_of_the_draws(tmp_path, images) -> None:
    more = captions_file(tmp_path, {"1.png": ["one", "uno"], "2.png": "two"}) + ", own_captions: 0.2"
    _, found = encoded(tmp_path, images, more)
    assert [(text, round(weight, 9)) for text, weight in found["1.png"]] == [("one", 1), ("uno", 1), ("image 1", 0.5)]
    assert [(text, round(weight, 9)) for text, weight in found["2.png"]] == [("two", 1), ("image 2", 0.25)]
    assert found["3.png"] == [("image 3", 1.0)]


def test_another_captions_file_is_another_encoding(tmp_path, images) -> None:
    more = captions_file(tmp_path, {"1.png": "one"})
    encoded(tmp_path, images, more)
    assert "is there already" in encode_run(
        tmp_path / "run", parse_manifest(RUN.format(path=images, more=more), "here"), workers=0
    )
    captions_file(tmp_path, {"1.png": "two"})
    with pytest.raises(AtollError, match=r"was encoded with source .*replace it with --force"):
        encoded(tmp_path, images, more)
    assert encoded(tmp_path, images, more, force=True)[1]["1.png"] == [("two", 1.0)]


def test_images_without_captions_of_their_own_get_them_from_the_file(tmp_path, images) -> None:
    """Captions that lie there and are not read stop no encoding then."""
    for file in images.glob("*.txt"):
        file.rename(file.with_suffix(".cap2"))
    with pytest.raises(AtollError, match="captions lie there and none of them is read"):
        encoded(tmp_path, images)
    said, found = encoded(tmp_path, images, captions_file(tmp_path, {f"{n}.png": f"new {n}" for n in range(COUNT)}))
    assert found["9.png"] == [("new 9", 1.0)]
    assert "no image has a caption" not in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            '{"key": "1.png", "captions": "a"}\n{"key": "1.png", "captions": "b"}\n',
            r"c\.jsonl:2: the key '1\.png' again",
        ),
        ("\n\nnonsense\n", r"c\.jsonl:3: this line is no JSON"),
        ('{"key": "1.png"}\n', r'c\.jsonl:1: expected \{"key"'),
        ('{"key": 1, "captions": "a"}\n', r'c\.jsonl:1: expected \{"key"'),
        ("[1]\n", r'c\.jsonl:1: expected \{"key"'),
        ('{"key": "1.png", "captions": "a"}\n{"key": "2.png", "ca', r"c\.jsonl:2: this line is no JSON"),
        (
            '{"key": "1.png", "captions": "' + "a" * 1_100_000 + '"}\n',
            r"c\.jsonl:1: a line of more than 1,048,576 bytes",
        ),
        (
            '{"key": "x.png", "captions": "a"}\n',
            r"c\.jsonl: names none of 10 images, such as '0\.png'; it names such as 'x\.png'",
        ),
        ("", r"names none of 10 images, such as '0\.png'; it names such as ''"),
        ('{"key": "1.png", "captions": [["a"]]}\n', r"1 caption; .*item 1 of its list is a list.*\(c\.jsonl:1\)"),
        ('{"key": "1.png", "captions": []}\n', r"an empty list, expected at least one caption; .*\(c\.jsonl:1\)"),
    ],
)
def test_a_captions_file_that_does_not_fit_is_named(tmp_path, images, text, said) -> None:
    more = captions_file(tmp_path, {})
    (tmp_path / "c.jsonl").write_text(text)
    with pytest.raises(AtollError, match=said):
        encoded(tmp_path, images, more)


def test_a_captions_file_that_is_missing_is_named(tmp_path, images) -> None:
    with pytest.raises(AtollError, match=r"/none\.jsonl: cannot be read \(No such file"):
        encoded(tmp_path, images, ", captions_from: /none.jsonl")
    with pytest.raises(AtollError, match="own_captions: there are only the images' own captions"):
        encoded(tmp_path, images, ", own_captions: 0.5")


def test_keys_whose_hashes_are_equal_are_told_apart(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("atoll.data.captions_file._hash", lambda key: len(key))
    captions_file(tmp_path, {"a": "1", "b": "2", "cc": "3", "d": "4"})
    file = CaptionsFile(tmp_path / "c.jsonl")
    assert [file.captions(key, DataSettings()) for key in ("a", "b", "d", "cc", "e")] == [
        *([(text, 1.0)] for text in "1243"),
        None,
    ]


def test_the_command_line(tmp_path, images, monkeypatch) -> None:
    from typer.testing import CliRunner

    from atoll.cli import app

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "atoll.yaml").write_text(RUN.format(path=images, more=""))
    command = program(tmp_path, EXAMPLE)
    done = CliRunner().invoke(app, ["recaption", str(tmp_path / "run"), "--command", command])
    assert done.exit_code == 0, done.output
    assert f"to encode with them: data.captions_from: {tmp_path}/run/captions.jsonl" in done.output
    assert len(lines(RunLayout(tmp_path / "run").captions)) == COUNT
    # Of a run that has them, the images' own captions are sent again.
    (tmp_path / "run" / "atoll.yaml").write_text(
        RUN.format(path=images, more=f", captions_from: {tmp_path}/run/captions.jsonl")
    )
    done = CliRunner().invoke(
        app, ["recaption", str(tmp_path / "run"), "--command", command, "-o", str(tmp_path / "b.jsonl")]
    )
    assert (tmp_path / "b.jsonl").read_bytes() == RunLayout(tmp_path / "run").captions.read_bytes()
    for options, said in (
        ([], "name the captioner: either --command"),
        (["--command", "a", "--python", "b:c"], "name the captioner: either"),
        (["--command", "a", "--send", "x"], "--send x: expected image or path"),
    ):
        failed = CliRunner().invoke(app, ["recaption", str(images), *options])
        assert said in str(failed.exception)


def test_pngs_hold_the_pixels_exactly(tmp_path, images) -> None:
    sent = "good | {'captions': asked['image']}"
    caption(images, tmp_path / "out.jsonl", program(tmp_path, answering(sent)))
    data = base64.b64decode(lines(tmp_path / "out.jsonl")["7.png"])
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(Image.open(images / "7.png")))
