"""`--on ray`, on a local Ray of two workers: the same bytes as without it, and mistakes told in one line."""

import pytest

from atoll.data.encode import encode_run
from atoll.errors import AtollError
from atoll.manifest import load_manifest
from tests.data.test_encode_killed import content, new_run, write_images

pytest.importorskip("ray", reason="Ray is not installed")


def test_ray_gives_the_same_bytes(tmp_path) -> None:
    write_images(tmp_path / "images.parquet")
    here = new_run(tmp_path / "here", tmp_path / "images.parquet")
    there = new_run(tmp_path / "there", tmp_path / "images.parquet")
    encode_run(here, load_manifest(here), workers=0)
    told = []
    encode_run(there, load_manifest(there), on="ray", progress=lambda *news: told.append(news))
    assert content(there / "encoded") == content(here / "encoded")
    assert told[-1][:2] == (320, 320)
    assert "there already" in encode_run(there, load_manifest(there), on="ray")


def test_a_mistake_on_a_machine_is_told_in_one_line() -> None:
    from atoll.data.ray import _plain

    wrapped = RuntimeError("a long remote traceback\nwith many lines")
    wrapped.__cause__ = AtollError("codec 'kl': weights not found")
    assert str(_plain(wrapped)) == "codec 'kl': weights not found"
    assert str(_plain(RuntimeError("one\ntwo\n"))) == "Ray: two"
