"""Cost of comparing the hashes of shards, against an epoch of training on them.

    python benchmarks/verify.py                       # DiT-S/2 on 16,384 latents 4x32x32 with flips: 4 shards of 64 MiB
    python benchmarks/verify.py --size B/2 --shards 16

"open" is the time to open and read all shards of a cluster in a process that has not seen them, "verified" the same
with the comparison of hashes, interleaved, files in the page cache. An epoch is the number of rows over the images/s of
`atoll train` in this run. A process compares each file once, so later epochs cost nothing. "limit" is the training
speed at which the comparison would take 3 % of the first epoch.
"""

import argparse
import json
import statistics
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml

from atoll.manifest import load_manifest
from atoll.nn import SIZES
from atoll.storage import verified
from atoll.storage.layout import MANIFEST, RunLayout
from atoll.storage.shards import Shards, ShardWriter
from atoll.train.expert import train_expert

ROWS, SHAPE = 4096, (4, 32, 32)  # of one shard, as `atoll encode` writes them
GOAL = 0.03  # of an epoch


def write_run(path: Path, size: str, shards: int, train: dict[str, Any]) -> RunLayout:
    """A run with one cluster of random latents and their mirror images."""
    condition = {"name": "hash", "dim": 768, "length": 77}
    manifest = {
        "name": "benchmark",
        "condition": condition,
        "clusters": {"k": 1},
        "network": {**SIZES[size], "pooled": False},
        "train": {"track": "none", "validate_every": 0, **train},
        "experts": [{"cluster": 0, "objective": {"prediction": "flow", "schedule": "linear"}}],
    }
    path.mkdir(parents=True)
    (path / MANIFEST).write_text(yaml.safe_dump(manifest))
    frozen = {"codec": {"name": "pixels", "channels": 4}, "condition": condition}
    card = {**frozen, "latent_shape": list(SHAPE), "assignment": "none", "cluster": 0, "clusters": 1, "source": {}}
    generator, layout = torch.Generator().manual_seed(0), RunLayout(path)
    with ShardWriter(layout.cluster(0), card, ROWS) as writer:
        for shard in range(shards):
            latents = torch.randn(ROWS, *SHAPE, generator=generator).half()
            keys = [f"{shard:03d}-{row:05d}" for row in range(ROWS)]
            splits = ["val" if row < 8 else "train" for row in range(ROWS)]
            writer.append(keys, keys, splits, {"latent": latents, "latent_flip": latents.flip(-1)})
    return layout


def seconds_to_open(directory: Path, verify: bool) -> float:
    """Seconds to open all shards and read every row once, as a process that has not seen them."""
    verified._hashes.clear()
    start = time.perf_counter()
    if not verify:
        # As if they had been compared before.
        hashes = {entry.file: entry.sha256 for entry in Shards(directory)._index.shards}
        start = time.perf_counter()
        verified._hashes.update({verified._stamp(directory / file): sha256 for file, sha256 in hashes.items()})
    for part in Shards(directory).parts():
        for column in part.columns.values():
            column.view(torch.uint8).max()
    return time.perf_counter() - start


class Stop(Exception):
    """Ends the training once its speed is known: the calibration at the end takes minutes."""


def images_per_second(layout: RunLayout, lines: int) -> float:
    """The speed of `atoll train expert 0`, without the first of `lines` lines of metrics, which holds the warm-up."""
    rates: list[float] = []

    def collect(line: dict[str, Any]) -> None:
        rates.append(line["images_per_s"])
        if len(rates) == lines:
            raise Stop

    with suppress(Stop):
        train_expert(layout.root, load_manifest(layout.root), "0", progress=collect)
    return statistics.median(rates[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="S/2", choices=sorted(SIZES))
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lines", type=int, default=4, help="of metrics, three steps each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        train = {"steps": 1000, "batch": options.batch, "log_every": 3, "threads": options.threads}
        layout = write_run(Path(directory) / "run", options.size, options.shards, train)
        cluster = layout.cluster(0)
        size = sum(file.stat().st_size for file in cluster.iterdir())
        times = [[seconds_to_open(cluster, verify) for verify in (False, True)] for _ in range(options.rounds)]
        opened, checked = (statistics.median(column) for column in zip(*times, strict=True))
        cost = statistics.median(both - alone for alone, both in times)
        rate = images_per_second(layout, options.lines)
    rows = options.shards * ROWS
    result = {
        "size": options.size,
        "bytes": size,
        "rows": rows,
        "open_seconds": opened,
        "verified_seconds": checked,
        "bytes_per_second": size / cost,
        "images_per_second": rate,
        "fraction_of_epoch": cost / (rows / rate),
        "limit_images_per_second": GOAL * rows / cost,
    }
    speed, limit = size / cost / 1e6, result["limit_images_per_second"]
    print(f"{rows:,} rows, {size / 1e6:,.0f} MB: open {opened:.2f} s, verified {checked:.2f} s, {speed:,.0f} MB/s")
    print(f"{options.size} trains at {rate:.1f} images/s on {options.threads} threads")
    print(f"{100 * result['fraction_of_epoch']:.3f} % of the first epoch; limit {limit:,.0f} images/s")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
