"""The sheet of images."""

import errno
import os

import pytest
from PIL import Image

from atoll.errors import AtollError
from atoll.sample.sheet import sample_to_file


def test_images_are_sampled_to_a_file(trained_run, tmp_path) -> None:
    sample_to_file(trained_run / "ensemble", ["moss", "rain"], tmp_path / "out.png", steps=2)
    assert Image.open(tmp_path / "out.png").size == (2 * 128 + 8, 64)
    assert [file.name for file in tmp_path.iterdir()] == ["out.png"]
    with pytest.raises(AtollError, match="no image format"):
        sample_to_file(trained_run / "ensemble", ["moss"], tmp_path / "out.txt")
    with pytest.raises(AtollError, match="no such directory"):
        sample_to_file(trained_run / "ensemble", ["moss"], tmp_path / "no" / "out.png")
    with pytest.raises(AtollError, match="no image format"):  # Pillow reads it only
        sample_to_file(trained_run / "ensemble", ["moss"], tmp_path / "out.psd")


def test_a_full_disk_leaves_the_earlier_image(trained_run, tmp_path, monkeypatch) -> None:
    (tmp_path / "out.png").write_bytes(b"earlier")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(AtollError, match=r"out\.png: cannot be written \(No space left.*untouched"):
        sample_to_file(trained_run / "ensemble", ["moss"], tmp_path / "out.png", steps=1)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("out.png", b"earlier")]
