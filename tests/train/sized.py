"""A tiny run whose images have three sizes, laid out as the stages before training leave it."""

import hashlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

from atoll.storage.artifact import write_json
from atoll.storage.shards import ShardWriter
from tests.cards import cluster_shards_card, clusters_card, encoded_card
from tests.conftest import RUN, WORDS, K

MAIN, TALL, WIDE = (1, 4, 8), (1, 8, 4), (1, 2, 12)
SHAPES = (MAIN, MAIN, MAIN, TALL, TALL, WIDE)  # of every six rows of a cluster


def shape_of(row: int) -> tuple[int, ...]:
    return SHAPES[row // K % len(SHAPES)]


def split_of(row: int) -> str:
    return "val" if row // K % 8 == 7 else "train"


def write_sized_run(path: Path, rows: int = 108, **changes: Any) -> Path:
    """As `tests.conftest.write_run`, with several shapes in every cluster."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "atoll.yaml").write_text(yaml.safe_dump({**RUN, **changes}))
    g = torch.Generator().manual_seed(0)
    assignment = hashlib.sha256(b"tiny").hexdigest()
    frozen = {"codec": {"name": "pixels", "channels": 1}, "condition": RUN["condition"]}
    about = {**frozen, "latent_shape": list(MAIN), "assignment": assignment, "clusters": K}
    shapes = {"latent": MAIN}
    writers = {None: ShardWriter(path / "encoded", encoded_card(**frozen), 8, shapes)}
    for k in range(K):
        card = cluster_shards_card(**about, cluster=k)
        writers[k] = ShardWriter(path / "clusters" / f"cluster-{k:03d}", card, 8, shapes)
    for row in range(rows):
        latent = (row % K - 1 + 0.3 * torch.randn(1, *shape_of(row), generator=g)).half()
        text = (
            [f"image-{row:03d}"],
            [f"{WORDS[row % 4]} {WORDS[row // 4 % 4]}"],
            ["val" if row // K % 8 == 7 else "train"],
        )
        writers[None].append(*text, {"latent": latent, "feature": torch.eye(K)[[row % K]]})
        writers[row % K].append(*text, {"latent": latent})
    for writer in writers.values():
        writer.close()
    write_json(path / "clusters" / "clusters.json", clusters_card(K, assignment=assignment))
    keys, splits = (
        [f"image-{row:03d}" for row in range(rows)],
        ["val" if row // K % 8 == 7 else "train" for row in range(rows)],
    )
    table = pa.table({"key": keys, "cluster": [row % K for row in range(rows)], "split": splits})
    pq.write_table(table, path / "clusters" / "assignment.parquet")
    return path
