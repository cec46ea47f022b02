"""Interrupted draws: one shard is lost at most, and the bytes equal those of an uninterrupted run."""

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


def test_drawing_twice_gives_equal_bytes_and_a_finished_run_is_kept(drawn, private, listed, tmp_path) -> None:
    synthesize(private, tmp_path / "again", listed)
    assert content(tmp_path / "again") == content(drawn)
    before = {file: file.stat().st_mtime_ns for file in drawn.rglob("*")}
    assert "is there already" in synthesize(private, drawn, listed)
    assert {file: file.stat().st_mtime_ns for file in drawn.rglob("*")} == before


@pytest.mark.parametrize("done", [0, 2, 3, 8])
def test_resume_after_any_shard_gives_the_same_bytes(drawn, private, listed, tmp_path, done) -> None:
    out, batches = tmp_path / "out", []

    def stop(rows, of, note):
        assert of == 22 * K
        if len(list((out / "synthesized.partial").glob("0*.safetensors"))) == done:
            raise Stop

    with pytest.raises(Stop):
        synthesize(private, out, listed, progress=stop)
    assert not (out / "encoded").exists()
    assert not (out / "clusters").exists()
    with pytest.raises(AtollError, match="unfinished draws; continue with --resume"):
        synthesize(private, out, listed)
    synthesize(private, out, listed, resume=True, progress=lambda rows, of, note: batches.append(rows))
    assert len(batches) == 9 - done  # a shard is drawn in one batch here
    assert content(out) == content(drawn)


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"force": True}])
def test_a_second_process_in_the_same_directory_is_refused(drawn, private, listed, tmp_path, options) -> None:
    out, tries = tmp_path / "out", []

    def second(rows, of, note):
        with pytest.raises(AtollError, match="another process is drawing here; wait for it, or stop it"):
            synthesize(private, out, listed, **options)
        tries.append(rows)

    synthesize(private, out, listed, progress=second)
    assert len(tries) == 9
    assert content(out) == content(drawn)


def test_resume_after_sigkill_gives_the_same_bytes(drawn, private, listed, tmp_path) -> None:
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
def test_resume_after_interrupted_sealing_gives_the_same_bytes(
    drawn, private, listed, tmp_path, monkeypatch, written
) -> None:
    class Writer(writing.ShardWriter):
        closed = 0

        def close(self):
            if Writer.closed == written:
                raise Stop
            Writer.closed += 1
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


@pytest.mark.parametrize("hashed", [True, False], ids=["with a hash", "of a version without hashes"])
def test_a_shard_that_changed_before_the_sealing_is_named(drawn, private, listed, tmp_path, hashed) -> None:
    out = tmp_path / "out"

    def damage(rows, of, note):
        file = out / "synthesized.partial" / "000-00001.safetensors"
        if file.is_file() and rows > 40:
            content = file.read_bytes()
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
            if not hashed:
                file.with_suffix(".sha256").unlink()
            raise Stop

    with pytest.raises(Stop):
        synthesize(private, out, listed, progress=damage)
    if not hashed:
        synthesize(private, out, listed, resume=True)
        return
    with pytest.raises(AtollError, match=r"000-00001\.safetensors: its contents are not .* remove it and --resume"):
        synthesize(private, out, listed, resume=True)
    assert not (out / "encoded").exists()
    assert not (out / "clusters").exists()
    # The advice helps.
    (out / "synthesized.partial" / "000-00001.safetensors").unlink()
    synthesize(private, out, listed, resume=True)
    assert content(out) == content(drawn)


def test_interrupted_cleanup_leaves_a_finished_run(drawn, private, listed, tmp_path, monkeypatch) -> None:
    out, rmtree = tmp_path / "out", shutil.rmtree

    def stop(path, **options):
        if path.name == "synthesized.partial":
            raise Stop
        rmtree(path, **options)

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", stop)
        with pytest.raises(Stop):
            synthesize(private, out, listed)
    assert [file.name for file in (out / "synthesized.partial").iterdir()] == [".lock"]  # nothing else is left
    assert "is there already" in synthesize(private, out, listed)
    assert content(out) == content(drawn)
