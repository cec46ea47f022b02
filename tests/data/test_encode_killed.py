"""The plug is pulled while `atoll encode` works: nothing is lost but the block under way, nothing is there twice."""

import io
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from atoll.storage.shards import Shards

ROWS, BLOCK = 320, 16
MANIFEST = """
name: killed
data: {{source: parquet, path: "{path}", size: 8, block: {block}, key: name}}
codec: {{name: pixels, channels: 3}}
feature: {{name: hog, bins: 2, grid: 2}}
experts: [{{cluster: 0, objective: {{prediction: flow, schedule: linear}}}}]
"""


def write_images(path: Path) -> None:
    """Some are too small, some are duplicates of others far away."""
    random_numbers = np.random.default_rng(0)
    images = []
    for row in range(ROWS):
        side = 2 if row % 61 == 7 else 12
        pixels = random_numbers.integers(0, 256, (side, side, 3), dtype=np.uint8)
        sink = io.BytesIO()
        Image.fromarray(pixels).save(sink, "png")
        images.append(images[row - 100] if row % 53 == 52 and row > 100 else sink.getvalue())
    names = [f"image {row}" for row in range(ROWS)]
    pq.write_table(pa.table({"name": names, "image": images, "caption": names}), path, row_group_size=40)


def start(run: Path, *options: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "atoll", "encode", "--run", str(run), "--quiet", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)


def new_run(path: Path, images: Path) -> Path:
    path.mkdir()
    (path / "atoll.yaml").write_text(MANIFEST.format(path=images, block=BLOCK))
    return path


def content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize(
    "blocks",  # kill when so many are done, one life after the other
    [(3, 19, 20), pytest.param(tuple(range(0, 21)), marks=pytest.mark.slow)],
    ids=["thrice", "at every block"],
)
def test_killed_and_resumed_equals_never_killed(tmp_path, blocks) -> None:
    write_images(tmp_path / "images.parquet")
    whole = new_run(tmp_path / "whole", tmp_path / "images.parquet")
    assert start(whole).wait() == 0
    run = new_run(tmp_path / "run", tmp_path / "images.parquet")
    partial, delay = run / "encoded.partial", random.Random(len(blocks))
    for wanted in blocks:
        before = {file.name: file.stat().st_mtime_ns for file in partial.glob("[0-9]*.parquet")}
        process = start(run, "--resume", "--workers", "1")
        while process.poll() is None and len(list(partial.glob("[0-9]*.parquet"))) < wanted:
            time.sleep(0.001)
        time.sleep(delay.uniform(0, 0.02))
        process.send_signal(signal.SIGKILL)
        process.wait()
        # What was done before is still there, and was not done again.
        assert (run / "encoded").exists() or before.items() <= {
            file.name: file.stat().st_mtime_ns for file in partial.glob("[0-9]*.parquet")
        }.items()
    last = start(run, "--resume")
    assert last.wait() == 0, last.stderr.read()
    assert content(run / "encoded") == content(whole / "encoded")
    keys = Shards(run / "encoded", verify=True).keys
    assert len(keys) == len(set(keys)) == ROWS - 6 - 5
    assert sorted(entry.name for entry in run.iterdir()) == ["atoll.yaml", "encoded"]
