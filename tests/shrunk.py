"""Recipes made so small that a test can train them: fewer clusters, narrower networks, few steps, no downloads."""

import hashlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

from atoll.manifest import Manifest, load_manifest, recipe_path
from atoll.plan.recipe import latent_shape
from atoll.storage.artifact import write_json
from atoll.storage.shards import ShardWriter
from tests.cards import cluster_shards_card, clusters_card, encoded_card

K = 2
STEPS = 4
CODEC = {"name": "pixels", "channels": 1}  # nothing is decoded


def shrunk(recipe: str, **train: Any) -> dict[str, Any]:
    """The content of a recipe with everything that makes it large replaced; objectives, network and switches stay.

    Args:
        recipe: its name.
        train: keys of `train` to set.
    """
    content: dict[str, Any] = yaml.safe_load(recipe_path(recipe).read_text())
    content["clusters"] = {"k": K}
    content["experts"] = content["experts"][:K]
    content["network"] |= {"width": 32, "depth": 2, "heads": 2}
    # A router of another width than the experts', as in the recipe.
    content["router"]["network"] |= {"width": 16, "depth": 1, "heads": 2}
    content["router"]["train"] = {"steps": STEPS, "batch": 6}
    # Encoders of pretrained weights give way to words by their hash.
    if content["condition"]["name"] not in ("label", "wordllama"):
        content["condition"] = {"name": "hash", "dim": 16, "length": 6}
    parts = 2 if content["train"].get("accumulate", 1) > 1 else 1
    small = {"steps": STEPS, "batch": 4 * parts, "accumulate": parts, "warmup": 1, "compile": False, "track": "none"}
    content["train"] |= small | {"checkpoint_every": 2, "log_every": 1, "validate_every": 0, **train}
    content["router"]["train"]["accumulate"] = 1
    return content


def write_shrunk_run(path: Path, recipe: str, side: int = 8, **train: Any) -> Manifest:
    """Write atoll.yaml and clusters/ with random latents: of squares, and with buckets of a second shape.

    Args:
        path: the run.
        recipe: its name.
        side: of the main size, in latent pixels.
        train: keys of `train` to set.
    """
    path.mkdir(parents=True)
    content = shrunk(recipe, **train)
    (path / "atoll.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    manifest = load_manifest(path)
    channels = latent_shape(load_manifest(recipe_path(recipe)))[0]
    shapes = [(channels, side, side), (channels, side, side // 2)][: 1 if manifest.data.buckets is None else 2]
    g, assignment = torch.Generator().manual_seed(0), hashlib.sha256(b"tiny").hexdigest()
    frozen = {"codec": CODEC, "condition": content["condition"]}
    if content["condition"]["name"] == "label":
        frozen["condition"] = {"name": "label", "labels": list(map(str, range(1000)))}
    about = {**frozen, "latent_shape": list(shapes[0]), "assignment": assignment, "clusters": K}
    columns = ("latent", "latent_flip")[: 2 if manifest.data.flips else 1]
    writers = {None: ShardWriter(path / "encoded", encoded_card(**frozen), 16, dict.fromkeys(columns, shapes[0]))}
    for k in range(K):
        card = cluster_shards_card(**about, cluster=k)
        places = path / "clusters" / f"cluster-{k:03d}"
        writers[k] = ShardWriter(places, card, 16, dict.fromkeys(columns, shapes[0]))
    rows = [(f"image-{row:03d}", row % K, "val" if row // K % 8 == 7 else "train") for row in range(48)]
    for row, (key, cluster, split) in enumerate(rows):
        latent = (cluster - 0.5 + 0.3 * torch.randn(1, *shapes[row // K % len(shapes)], generator=g)).half()
        images = {"latent": latent, "latent_flip": latent.flip(-1)}
        named = {name: images[name] for name in columns}
        text = [key], [str(row % 7)], [split]
        writers[cluster].append(*text, named)
        writers[None].append(*text, {**named, "feature": torch.eye(K)[[cluster]]})
    for writer in writers.values():
        writer.close()
    write_json(path / "clusters" / "clusters.json", clusters_card(K, assignment=assignment))
    table = pa.table(dict(zip(("key", "cluster", "split"), zip(*rows, strict=True), strict=True)))
    pq.write_table(table, path / "clusters" / "assignment.parquet")
    return manifest
