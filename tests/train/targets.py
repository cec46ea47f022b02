"""Targets of representation for tests: those that say where a latent is large."""

import json
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F

from atoll.storage.shards import Shards, ShardWriter
from tests.cards import SHA

FEATURE = {"name": "mobilenetv2", "size": 64, "sha256": SHA}
RECORD = {"feature": FEATURE, "dims": 3, "grid": 2, "sha256": "1" * 64}


def with_targets(run: Path, record: dict = RECORD) -> Path:
    """Store targets beside the latents of all clusters of a run."""
    for path in sorted((run / "clusters").glob("cluster-*")):
        shards = Shards(path)
        card = json.loads((path / "index.json").read_text())["card"] | {"targets": record}
        latents = shards.read("latent", slice(None))
        with ShardWriter(path.with_name("new"), card) as writer:
            columns = {"latent": latents, "target": targets_of(latents)}
            writer.append(shards.keys, shards.captions, shards.splits, columns)
        shutil.rmtree(path)
        path.with_name("new").rename(path)
    return run


def targets_of(latents: torch.Tensor) -> torch.Tensor:
    """Targets [n,3,2,2] float16 that say where the latents [n,1,h,w] are large."""
    means = F.adaptive_avg_pool2d(latents.float(), 2)
    return torch.cat([means, means.flip(-2), torch.ones_like(means)], 1).half()
