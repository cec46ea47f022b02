"""The pool: order, laziness, bounded work ahead; and what happens when a process, or this one, dies."""

import hashlib
import io
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from atoll.data import pool as pool_module
from atoll.data.crop import Framing
from atoll.data.pool import AHEAD, CHUNK, Decoders, Framed
from atoll.data.types import Raw, Skipped
from atoll.errors import AtollError
from tests.waiting import communicate, wait_until

FRAMING = Framing(size=6, channels=3, smallest_side=4)

# Decoders with a will of their own, in a module that the processes can import. A file is its pixels' value, or a word.
MISCHIEF = """
import os, signal, sys
from pathlib import Path
import numpy as np
from atoll.data.containers import Unusable
from atoll.data.crop import Frames

def decode(data, framing):
    if data == b"kill": os.kill(os.getpid(), signal.SIGKILL)
    if data == b"exit": os._exit(3)
    if data == b"bad": raise Unusable("no image")
    if data == b"bug": raise RuntimeError("a bug")
    if data == b"hang": import time; time.sleep(3600)
    if data == b"talk": print("to stdout")
    if data == b"who": return Frames(np.full((3, 6, 6), 1 + ("torch" in sys.modules), np.uint8))
    if data.startswith(b"pid:"): Path(data[4:].decode()).write_text(str(os.getpid()))
    return Frames(np.full((3, 6, 6), len(data), np.uint8))
"""


@pytest.fixture
def decode(tmp_path, monkeypatch):
    (tmp_path / "mischief.py").write_text(MISCHIEF)
    monkeypatch.syspath_prepend(str(tmp_path))
    import mischief

    yield mischief.decode
    del sys.modules["mischief"]


def raw(key: str, image: bytes | np.ndarray) -> Raw:
    return Raw(key, image, f"caption of {key}", "val" if key.endswith("7") else "train")


def jpeg(seed: int) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(noise).save(sink, "JPEG")
    return sink.getvalue()


def mixed(count: int) -> Iterator[Raw | Skipped]:
    """Images, among them arrays, damaged ones and such as their source skipped."""
    for i in range(count):
        if i % 11 == 4:
            yield Skipped(str(i), "no caption")
        elif i % 11 == 6:
            yield raw(str(i), np.full((3, 6, 6), i % 256, np.uint8))
        else:
            yield raw(str(i), jpeg(i)[: 40 if i % 11 == 9 else None])


def plain(samples) -> list[tuple]:
    return [(s.key, s.reason) if isinstance(s, Skipped) else (s.key, s.caption, s.split, s.sha) for s in samples]


def alive(pid: int) -> bool:
    """Whether a process runs; one that is dead and not yet waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_processes_give_what_this_process_gives_in_order() -> None:
    count = (2 * AHEAD + 2) * CHUNK + 5  # more than is read ahead
    with Decoders(FRAMING, 0) as here, Decoders(FRAMING, 2) as there:
        expected = list(here.frames(mixed(count)))
        found = list(there.frames(mixed(count)))
        again = list(there.frames(mixed(7)))  # the processes serve one block after another
    assert [sample.key for sample in found] == [str(i) for i in range(count)]
    assert plain(found) == plain(expected)
    assert plain(again) == plain(expected[:7])
    for one, other in zip(found, expected, strict=True):
        if isinstance(one, Framed):
            assert isinstance(other, Framed)
            assert np.array_equal(one.pixels, other.pixels)
            assert (one.pixels.shape, one.pixels.dtype) == ((3, 6, 6), np.uint8)
            assert one.sha == hashlib.blake2b(one.pixels.tobytes(), digest_size=16).digest()
    reasons = {s.key: s.reason for s in found if isinstance(s, Skipped)}
    assert reasons["4"] == "no caption"
    assert reasons["9"].startswith("truncated")
    assert found[6].pixels[0, 0, 0] == 6
    assert (found[7].caption, found[7].split) == ("caption of 7", "val")


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_comes_of_nothing(workers) -> None:
    with Decoders(FRAMING, workers) as decoders:
        assert list(decoders.frames([])) == []


@pytest.mark.parametrize(
    "pixels",
    [np.zeros((2, 6, 6), np.uint8), np.zeros((3, 6, 7), np.uint8), np.zeros((3, 6, 6), np.float32)],
    ids=["two channels", "oblong", "float"],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_pixels_of_another_shape_are_refused(pixels, workers) -> None:
    with Decoders(FRAMING, workers) as decoders, pytest.raises(AtollError, match=r"'odd'.*uint8 \[3, 6, 6\]"):
        list(decoders.frames([raw("odd", pixels)]))


def test_pixels_that_are_not_contiguous_hash_as_their_values() -> None:
    pixels = np.arange(108, dtype=np.uint8).reshape(6, 6, 3).transpose(2, 0, 1)
    with Decoders(FRAMING, 0) as decoders:
        one, two = decoders.frames([raw("a", pixels), raw("b", pixels.copy())])
    assert one.sha == two.sha


@pytest.mark.parametrize("workers", [0, 2])
def test_the_source_is_read_only_a_little_ahead(workers) -> None:
    read = 0

    def endless() -> Iterator[Raw]:
        nonlocal read
        while True:
            read += 1
            assert read < 1000
            yield raw(str(read), np.zeros((3, 6, 6), np.uint8))

    with Decoders(FRAMING, workers) as decoders:
        samples = decoders.frames(endless())
        assert read == 0
        for taken in range(1, 5 * CHUNK):
            next(samples)
            assert taken <= read <= taken + CHUNK * (AHEAD * workers + 1)
        samples.close()


def test_large_files_travel_in_small_chunks(monkeypatch) -> None:
    monkeypatch.setattr(pool_module, "CHUNK_BYTES", 1000)
    sizes = [400, 400, 400, 5000, 10, *[1] * (CHUNK + 3)]
    chunks = list(pool_module._chunks([raw(str(i), bytes(size)) for i, size in enumerate(sizes)]))
    assert [len(chunk) for chunk in chunks] == [3, 1, CHUNK, 4]


@pytest.mark.parametrize(("word", "how"), [(b"kill", "signal 9"), (b"exit", "exit code 3")])
def test_an_image_that_kills_its_process_is_skipped_and_no_other(decode, word, how) -> None:
    files = [b"x" * (1 + i % 5) for i in range(3 * CHUNK)]
    files[3] = files[CHUNK + 1] = files[CHUNK + 2] = word
    with Decoders(FRAMING, 2, decode) as decoders:
        found = list(decoders.frames([raw(str(i), file) for i, file in enumerate(files)]))
    assert [sample.key for sample in found] == [str(i) for i in range(len(files))]
    for file, sample in zip(files, found, strict=True):
        if file == word:
            assert sample == Skipped(sample.key, f"its decoder crashed ({how})")
        else:
            assert isinstance(sample, Framed)
            assert (sample.pixels == len(file)).all()


def test_processes_killed_from_outside_are_replaced(decode, tmp_path) -> None:
    note = tmp_path / "pid"
    with Decoders(FRAMING, 1, decode) as decoders:
        list(decoders.frames([raw("a", b"pid:" + str(note).encode())]))
        os.kill(int(note.read_text()), signal.SIGKILL)
        (found,) = decoders.frames([raw("b", b"xy")])
    assert isinstance(found, Framed)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bug_is_not_a_damaged_image(decode, workers) -> None:
    with Decoders(FRAMING, workers, decode) as decoders:
        assert next(decoders.frames([raw("a", b"bad")])) == Skipped("a", "no image")
        with pytest.raises(RuntimeError, match="a bug"):
            list(decoders.frames([raw("a", b"bug")]))


def test_workers_import_no_torch_and_may_print(decode) -> None:
    assert "torch" in sys.modules
    with Decoders(FRAMING, 1, decode) as decoders:
        who, talk, _ = decoders.frames([raw(word, word.encode()) for word in ("who", "talk", "x")])
    assert who.pixels.max() == 1
    assert talk.pixels.max() == 4


def test_a_decoder_that_cannot_be_imported_there(decode, tmp_path) -> None:
    (tmp_path / "mischief.py").unlink()
    with (
        Decoders(FRAMING, 1, decode) as decoders,
        pytest.raises(AtollError, match=r"cannot be started.*No module named 'mischief'"),
    ):
        list(decoders.frames([raw("a", b"x")]))


def test_leaving_early_ends_the_processes_even_one_that_hangs(decode, tmp_path) -> None:
    note = tmp_path / "pid"
    with Decoders(FRAMING, 1, decode) as decoders:
        samples = decoders.frames(
            [raw("a", b"x")] * CHUNK
            + [raw("b", b"pid:" + str(note).encode()), raw("c", b"hang")]
            + [raw("d", b"x")] * 90
        )
        next(samples)
        wait_until(note.exists)
        samples.close()
    wait_until(lambda: not alive(int(note.read_text())))


# A program that decodes; the image "slow" keeps a process busy until the test is done with it.
PROGRAM = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in what it runs in the background
import numpy as np
from atoll.data.types import Raw
from atoll.data.pool import Decoders
from atoll.data.crop import Framing
from mischief import decode

raws = [Raw(n, b"pid:" + n.encode(), "", "train") for n in sys.argv[1:]]
with Decoders(Framing(6, 3, 4), 1, decode) as one, Decoders(Framing(6, 3, 4), 1, decode) as two:
    list(one.frames(raws[:1]))
    list(two.frames([*raws[1:], Raw("hang", b"hang", "", "train")]))
"""


@pytest.fixture
def program(decode, tmp_path):
    """A process with two that decode for it: one waits, one is busy. Yields it and the others' process numbers."""
    notes = [tmp_path / "idle", tmp_path / "busy"]
    (tmp_path / "program.py").write_text(textwrap.dedent(PROGRAM))
    path = os.pathsep.join([str(tmp_path), *sys.path])
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py"), *map(str, notes)],
        env={**os.environ, "PYTHONPATH": path},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a terminal's Ctrl-C goes to a whole group of processes
    )
    try:
        wait_until(lambda: all(note.exists() and note.read_text() for note in notes))
        yield process, [int(note.read_text()) for note in notes]
    finally:
        process.kill()
        for note in notes:
            if note.exists() and alive(int(note.read_text())):
                os.kill(int(note.read_text()), signal.SIGKILL)
        process.communicate()


def test_killing_the_parent_leaves_no_process(program) -> None:
    parent, workers = program
    assert all(map(alive, workers))
    parent.kill()
    wait_until(lambda: not any(map(alive, workers)))


def test_ctrl_c_ends_everything_and_only_the_parent_speaks(program) -> None:
    parent, workers = program
    assert all(map(alive, workers))
    os.killpg(parent.pid, signal.SIGINT)
    _, said = communicate(parent)
    wait_until(lambda: not any(map(alive, workers)))
    assert said.count("Traceback") == 1
    assert said.rstrip().endswith("KeyboardInterrupt")
