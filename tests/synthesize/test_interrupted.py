"""The plug is pulled while experts draw: lost is a shard at most, and the bytes are those of an unbroken run."""

import os
import shutil
import signal
import sys

import pytest

import atoll.synthesize.write as writing
from atoll.errors import AtollError
from tests.conftest import K
from tests.synthesize.conftest import Stop, content, synthesize
from tests.waiting import run_to_end


def test_twice_gives_equal_bytes_and_is_done_once(drawn, private, listed, tmp_path) -> None:
    synthesize(private, tmp_path / "again", listed)
    assert content(tmp_path / "again") == content(drawn)
    before = {file: file.stat().st_mtime_ns for file in drawn.rglob("*")}
    assert "is there already" in synthesize(private, drawn, listed)
    assert {file: file.stat().st_mtime_ns for file in drawn.rglob("*")} == before


@pytest.mark.parametrize("done", [0, 2, 3, 8])
def test_interrupted_anywhere_it_goes_on_to_the_same_bytes(drawn, private, listed, tmp_path, done) -> None:
    out, asked = tmp_path / "out", []

    def stop(rows, of, note):
        assert of == 22 * K
        if len(list((out / "synthesized.partial").glob("0*"))) == done:
            raise Stop

    with pytest.raises(Stop):
        synthesize(private, out, listed, progress=stop)
    assert not (out / "encoded").exists()
    assert not (out / "clusters").exists()
    with pytest.raises(AtollError, match="unfinished draws; go on with --resume"):
        synthesize(private, out, listed)
    synthesize(private, out, listed, resume=True, progress=lambda rows, of, note: asked.append(rows))
    assert len(asked) == 9 - done  # a shard is drawn in one batch here
    assert content(out) == content(drawn)


@pytest.mark.parametrize("asked", [{}, {"resume": True}, {"force": True}])
def test_a_second_one_in_the_same_directory_is_refused(drawn, private, listed, tmp_path, asked) -> None:
    out, tries = tmp_path / "out", []

    def second(rows, of, note):
        with pytest.raises(AtollError, match="another process is drawing here; wait for it, or stop it"):
            synthesize(private, out, listed, **asked)
        tries.append(rows)

    synthesize(private, out, listed, progress=second)
    assert len(tries) == 9
    assert content(out) == content(drawn)


def test_killed_with_signal_9_it_goes_on_to_the_same_bytes(drawn, private, listed, tmp_path) -> None:
    out = tmp_path / "out"
    program = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom atoll.manifest import load_manifest\n"
        "from atoll.synthesize import synthesize_run\nrun, out, captions = map(Path, sys.argv[1:])\n"
        "def kill(rows, of, note):\n    if rows > 40: os.kill(os.getpid(), signal.SIGKILL)\n"
        "synthesize_run(run, load_manifest(run), out, captions=captions, images=22, steps=2, shard_rows=8, "
        "progress=kill)\n"
    )
    command = [sys.executable, "-c", program, str(private), str(out), str(listed)]
    killed = run_to_end(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert killed.returncode == -signal.SIGKILL
    assert len(list((out / "synthesized.partial").glob("0*.safetensors"))) == 5
    synthesize(private, out, listed, resume=True)
    assert content(out) == content(drawn)


@pytest.mark.parametrize("written", [0, 1, 2, 3])
def test_interrupted_while_it_is_sealed_it_goes_on_to_the_same_bytes(
    drawn, private, listed, tmp_path, monkeypatch, written
) -> None:
    class Writer(writing.ShardWriter):
        made = 0

        def close(self):
            if Writer.made == written:
                raise Stop
            Writer.made += 1
            return super().close()

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(writing, "ShardWriter", Writer)
        with pytest.raises(Stop):
            synthesize(private, out, listed)
    assert (out / "clusters").exists() == (written == 3)
    assert not (out / "encoded").exists()
    synthesize(private, out, listed, resume=True)
    assert content(out) == content(drawn)


def test_interrupted_while_it_tidies_up_it_is_done(drawn, private, listed, tmp_path, monkeypatch) -> None:
    out, rmtree = tmp_path / "out", shutil.rmtree

    def stop(path, **options):
        if path.name == "synthesized.partial":
            raise Stop
        rmtree(path, **options)

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", stop)
        with pytest.raises(Stop):
            synthesize(private, out, listed)
    assert [file.name for file in (out / "synthesized.partial").iterdir()] == [".lock"]  # nothing that could be lost
    assert "is there already" in synthesize(private, out, listed)
    assert content(out) == content(drawn)
