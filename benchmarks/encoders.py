"""Text encoders and features that need no download, on real images: what do `wordllama` and `efficientnet-lite0` know?

    ATOLL_DATA=... python benchmarks/encoders.py features prompts router --json out.json

features: do the clusters follow the labels? Images of flowers, emoji and EuroSAT at the data set's own size and at 32
pixels; vectors of each feature; Atoll's balanced k-means with K = 4, 8, 16. Purity is the fraction of the images that
have the most frequent label of their cluster; NMI is the mutual information of cluster and label over the mean of
their entropies. Labels are flower, emoji group and land use. Mean and standard deviation over seeds of the k-means.

prompts: does an encoder place words that no caption had?
- emoji: each seed holds out a fifth of the words of the concepts' names. A linear probe (logistic regression on the
  pooled vector, its weight decay chosen by holding out further words) learns the group of an emoji from the names
  without any of these words. It is tested on each other name, reduced to its held-out words. The baseline is to guess
  the most frequent group of the training.
- paraphrases, by land use and flower: the list in paraphrases.py, written before the first run, shares no word with
  the captions but "a", "an", "the", "of", "in", "with", "and", "for". The caption of the nearest pooled vector (cosine)
  must be that of its class. The interval is Wilson's, 95 %.

router: the same, by Atoll's own router. Emoji at 32 pixels, K = 8 clusters of efficientnet-lite0. The images whose
names have a held-out word are left out of the router's training (`train.skip`). Then the router gets noise (t = 1,
where sampling starts) and a prompt: the name of such an image, whole or reduced to its held-out words. It is right if
the most probable cluster is the image's own. "known words" are held-out images with names of training words only: no
router can be expected to be better with new words.
"""

import argparse
import json
import math
import os
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
import yaml
from paraphrases import PARAPHRASES
from torch import Tensor
from torch.nn import functional as F

from atoll.cluster.fit import survey, two_stages
from atoll.cluster.nearest import Workers
from atoll.cluster.run import cluster
from atoll.data.image import Framing, frame
from atoll.encoders.feature import build_feature
from atoll.encoders.text import build_encoder
from atoll.ensemble.loading import load_router
from atoll.errors import AtollError
from atoll.manifest import load_manifest
from atoll.storage.layout import RunLayout
from atoll.storage.shards import Shards, ShardWriter
from atoll.train.router import train_router

DATA = Path(os.environ.get("ATOLL_DATA", "."))
SETS = {
    "flowers": ("flowers128.parquet", 128),
    "emoji": ("emoji64.parquet", 64),
    "eurosat": ("eurosat64_*.parquet", 64),
}
LABELS = {"flowers": "class_name", "emoji": "group", "eurosat": "class_name"}
FEATURES: dict[str, dict[str, Any]] = {
    "hog": {"name": "hog"},
    "mobilenetv2": {"name": "mobilenetv2", "weights": str(DATA / "weights" / "mobilenetv2_tf_int8.npz")},
    "efficientnet-lite0": {"name": "efficientnet-lite0"},
}
ENCODERS: dict[str, dict[str, Any]] = {
    "hash": {"name": "hash", "dim": 64, "length": 16},
    "hash, dim 256": {"name": "hash", "dim": 256, "length": 32},
    "wordllama": {"name": "wordllama"},
}
WORD = re.compile(r"[^\W\d_]{3,}")  # a word of a name that may be held out
HELD_OUT = 0.2  # of the words
DECAYS = (1e-2, 1e-3, 1e-4, 1e-5)  # of the probe's weights
PLAIN = {"a", "an", "the", "of", "in", "with", "and", "for"}


class Images(NamedTuple):
    """Images of a set. pixels: [N, 3, size, size] uint8; rows: columns of the parquet file by name."""

    pixels: Tensor
    rows: dict[str, list[str]]


def read(name: str, count: int, size: int) -> Images:
    """Read `count` random images of a set."""
    columns = [LABELS[name], "caption", *(["name", "split"] if name == "emoji" else [])]
    paths = sorted(DATA.glob(SETS[name][0]))
    if not paths:
        raise SystemExit(f"{DATA / SETS[name][0]}: not found; set ATOLL_DATA to the directory of the data")
    image = next(column for column in pq.read_schema(paths[0]).names if column.startswith("image"))
    table = pq.ParquetDataset(paths).read(columns=[*columns, image])
    chosen = np.sort(np.random.default_rng(0).permutation(len(table))[:count])
    table = table.take(chosen)
    framing = Framing(size, 3, 1)
    pixels = torch.from_numpy(np.stack([frame(file, framing) for file in table[image].to_pylist()]))
    return Images(pixels, {column: table[column].to_pylist() for column in columns})


def vectors(feature: dict[str, Any], pixels: Tensor) -> tuple[Tensor, float]:
    """Return the features [N, D] of images, and images per second of one core."""
    network, start = build_feature(feature), time.process_time()
    found = torch.cat([network(part.float() / 255) for part in pixels.split(16)])
    return found, len(pixels) / (time.process_time() - start)


@cache
def vectors_of(name: str, count: int, size: int, feature: str) -> tuple[Tensor, float]:
    """Return the features [N, D] of `count` images of a set, and images per second of one core."""
    return vectors(FEATURES[feature], read(name, count, size).pixels)


def write_features(path: Path, features: Tensor) -> Shards:
    """Write shards of features, as clustering reads them."""
    with ShardWriter(path, {"feature": {"name": "benchmark"}}) as writer:
        keys = [f"{i:06d}" for i in range(len(features))]
        writer.append(keys, [""] * len(keys), ["train"] * len(keys), {"feature": features})
    return Shards(path)


def clusters_of(shards: Shards, k: int, seed: int) -> Tensor:
    """Return the cluster [N] of each row, by Atoll's balanced k-means."""
    fine = max(16 * k, min(1024, len(shards) // 2))
    options: dict[str, Any] = {"k": k, "method": "balanced", "seed": seed, "progress": lambda *_: None}
    with Workers() as workers:
        surveyed = survey(shards, seed, len(shards))
        try:
            assignment = two_stages(shards, surveyed, fine=fine, workers=workers, **options)
        except AtollError:
            # A fine centroid has too many images for balance: do what the message says.
            assignment = two_stages(shards, surveyed, fine=len(shards), workers=workers, **options)
    return torch.cat([assignment(part, shards.path).clusters for part in shards.parts()])


def table_of(clusters: Tensor, labels: Sequence[str]) -> np.ndarray:
    """Return how often each cluster and label meet [K, L]."""
    numbers = np.unique(np.array(labels), return_inverse=True)[1]
    table = np.zeros((int(clusters.max()) + 1, numbers.max() + 1))
    np.add.at(table, (clusters.numpy(), numbers), 1)
    return table


def purity(table: np.ndarray) -> float:
    return float(table.max(1).sum() / table.sum())


def nmi(table: np.ndarray) -> float:
    """Normalised mutual information, by the mean of the entropies."""
    joint = table / table.sum()
    rows, columns, cells = (-(p[p > 0] * np.log(p[p > 0])).sum() for p in (joint.sum(1), joint.sum(0), joint))
    return float(2 * (rows + columns - cells) / (rows + columns))


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}


def features(options: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    results = []
    for name in options.sets:
        for size in (SETS[name][1], 32):
            images = read(name, options.images, size)
            labels = images.rows[LABELS[name]]
            for title in FEATURES:
                found, rate = vectors_of(name, options.images, size, title)
                shards = write_features(scratch / f"{name}-{size}-{title}", found)
                row: dict[str, Any] = {"set": name, "size": size, "feature": title, "images_per_s": rate}
                for k in (4, 8, 16):
                    tables = [table_of(clusters_of(shards, k, seed), labels) for seed in range(options.seeds)]
                    row[f"purity {k}"], row[f"NMI {k}"] = (spread([*map(score, tables)]) for score in (purity, nmi))
                results.append(row)
                print_row(row)
    return results


class Words(NamedTuple):
    """A seed's split of the words of names.

    Attributes:
        held_out: the words.
        known: names without any of them.
        reduced: the other names -> their held-out words alone.
    """

    held_out: set[str]
    known: list[str]
    reduced: dict[str, str]


def split_words(names: Sequence[str], seed: int) -> Words:
    """Hold a fifth of the words of names out."""
    found = {name: WORD.findall(name.lower()) for name in sorted(set(names))}
    vocabulary = sorted({word for words in found.values() for word in words})
    order = np.random.default_rng(seed).permutation(len(vocabulary))
    held_out = {vocabulary[i] for i in order[: round(HELD_OUT * len(vocabulary))]}
    reduced = {name: " ".join(word for word in words if word in held_out) for name, words in found.items()}
    known = [name for name, words in found.items() if words and not reduced[name]]
    return Words(held_out, known, {name: words for name, words in reduced.items() if words})


def pooled(encoder: Any, prompts: Sequence[str]) -> Tensor:
    vectors = encoder(list(prompts)).pooled
    assert vectors is not None
    return F.normalize(vectors)


def fit_probe(x: Tensor, y: Tensor, classes: int, decay: float) -> Tensor:
    """Return the weights [D + 1, classes] of a logistic regression with the given weight decay."""
    x = F.pad(x, (0, 1), value=1.0).double()
    weights = torch.zeros(x.shape[1], classes, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(x @ weights, y) + decay * weights[:-1].square().sum()
        value.backward()
        return value

    solver.step(loss)
    return weights.detach()


def right(x: Tensor, y: Tensor, weights: Tensor) -> float:
    return float(((F.pad(x, (0, 1), value=1.0).double() @ weights).argmax(1) == y).double().mean())


def probe(encoder: Any, group: dict[str, str], words: Words, seed: int) -> tuple[float, float]:
    """Return the accuracy of a probe on the reduced names, and that of the most frequent group of its training."""
    groups = sorted(set(group.values()))

    def numbers(names: Iterable[str]) -> Tensor:
        return torch.tensor([groups.index(group[name]) for name in names])

    def accuracy(words: Words, decay: float) -> float:
        weights = fit_probe(pooled(encoder, words.known), numbers(words.known), len(groups), decay)
        return right(pooled(encoder, list(words.reduced.values())), numbers(words.reduced), weights)

    inner = split_words(words.known, 100 + seed)
    best = max(DECAYS, key=lambda decay: accuracy(inner, decay))
    guess = numbers(words.known).mode().values
    return accuracy(words, best), float((numbers(words.reduced) == guess).double().mean())


def wilson(hits: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a fraction."""
    z, p = 1.96, hits / count
    centre, half = p + z * z / (2 * count), z * math.sqrt(p * (1 - p) / count + (z / (2 * count)) ** 2)
    return (centre - half) / (1 + z * z / count), (centre + half) / (1 + z * z / count)


def prompts(options: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    results = []
    table = pq.read_table(DATA / SETS["emoji"][0], columns=["name", "group"]).to_pylist()
    group = {row["name"]: row["group"] for row in table if row["group"] != "Other"}
    for title, config in ENCODERS.items():
        encoder = build_encoder(config)
        split = [split_words(list(group), seed) for seed in range(options.seeds)]
        scores, guessing = zip(*(probe(encoder, group, words, seed) for seed, words in enumerate(split)), strict=True)
        row = {"test": "emoji groups", "encoder": title, "right": spread(scores), "guessing": spread(guessing)}
        results.append({**row, "prompts": statistics.mean(len(words.reduced) for words in split)})
        print_row(results[-1])
        for name, lists in PARAPHRASES.items():
            results.append({"test": f"paraphrases, {name}", "encoder": title, **paraphrased(encoder, name, lists)})
            print_row(results[-1])
    return results


def paraphrased(encoder: Any, name: str, lists: dict[str, list[str]]) -> dict[str, Any]:
    """Count the paraphrases whose nearest caption is that of their class."""
    paths = sorted(DATA.glob(SETS[name][0]))
    table = pq.ParquetDataset(paths).read(columns=["class_name", "caption"]).to_pylist()
    caption = dict(sorted({(row["class_name"], row["caption"]) for row in table}))
    used = {word for text in caption.values() for word in re.findall(r"\w+", text.lower())} - PLAIN
    texts = [(label, text) for label in lists for text in lists[label]]
    shared = {text for _, text in texts if used & set(re.findall(r"\w+", text.lower()))}
    assert not shared, f"paraphrases with a caption's word: {shared}"
    nearest = (pooled(encoder, [text for _, text in texts]) @ pooled(encoder, list(caption.values())).T).argmax(1)
    hits = sum(list(caption)[i] == label for (label, _), i in zip(texts, nearest.tolist(), strict=True))
    return {"right": hits / len(texts), "interval": wilson(hits, len(texts)), "prompts": len(texts),
            "guessing": 1 / len(caption)}  # fmt: skip


def write_router_run(run: Path, images: Images, features: Tensor, condition: dict[str, Any], seed: int) -> Words:
    """Write encoded/, clusters/ and atoll.yaml of emoji, whose captions are the names, and the list of rows to skip."""
    names = images.rows["name"]
    words = split_words(names, seed)
    size = images.pixels.shape[-1]
    codec = {"name": "pixels", "channels": 3, "scale": 2.0}
    card = {
        "source": {"name": "parquet", "sha256": "0" * 64},
        "images": {"size": size, "channels": 3, "smallest_side": 1, "duplicates": "keep", "flips": False},
        "codec": codec,
        "condition": condition,
        "feature": FEATURES["efficientnet-lite0"],
        "precision": "fp32",
        "counts": {"good": len(names), "uncaptioned": 0, "skipped": {}},
    }
    layout, keys = RunLayout(run), [f"{i:06d}" for i in range(len(names))]
    latents = ((images.pixels.float() / 255 * 2 - 1) * codec["scale"]).half()
    with ShardWriter(layout.encoded, card) as writer:
        # Some names of known words are held out, to compare with.
        known = set(words.known[::10])
        splits = ["val" if name in known else "train" for name in names]
        writer.append(keys, names, splits, {"latent": latents, "feature": features})
    cluster(layout.encoded, layout.clusters, 8, "balanced", seed=seed)
    skipped = [key for key, name in zip(keys, names, strict=True) if name in words.reduced]
    (run / "skip.txt").write_text("\n".join(skipped) + "\n")
    manifest = {
        "name": "benchmark",
        "condition": condition,
        "codec": codec,
        "clusters": {"k": 8},
        "seed": seed,
        "train": {"steps": 600, "batch": 64, "lr": 1e-3, "warmup": 50, "ema": 0.99, "track": "none",
                  "skip": "skip.txt", "validate_every": 0, "checkpoint_every": 10_000},
        "experts": [{"cluster": 0, "objective": {"prediction": "flow", "schedule": "linear"}}],
        "router": {"network": {"patch": 16, "width": 64, "depth": 2, "heads": 2, "pooled": True}},
    }  # fmt: skip
    (run / "atoll.yaml").write_text(yaml.safe_dump(manifest))
    return words


@torch.no_grad()
def routed(run: Path, prompts: Sequence[str], truth: Tensor, seed: int) -> float:
    """Return how often the router sends a prompt with pure noise to the right cluster."""
    layout = RunLayout(run)
    router, shards = load_router(layout.router).eval(), Shards(layout.encoded)
    encoder = build_encoder(shards.data_card.condition)
    noise = torch.randn(len(prompts), *shards.shape("latent"), generator=torch.Generator().manual_seed(seed))
    log_p = router(noise, torch.ones(len(prompts)), encoder(list(prompts)).pooled)
    return float((log_p.argmax(1) == truth).double().mean())


def router(options: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    images = read("emoji", options.images, 32)
    found, _ = vectors_of("emoji", options.images, 32, "efficientnet-lite0")
    results = []
    for title, config in ENCODERS.items():
        scores: dict[str, list[float]] = {}
        for seed in range(options.seeds):
            run = scratch / f"router-{title}-{seed}"
            words = write_router_run(run, images, found, config, seed)
            train_router(run, load_manifest(run))
            assigned = pq.read_table(RunLayout(run).assignment, columns=["key", "cluster"]).to_pylist()
            cluster_of = {row["key"]: row["cluster"] for row in assigned}
            clusters = torch.tensor([cluster_of[f"{i:06d}"] for i in range(len(found))])
            names, known = images.rows["name"], set(words.known[::10])
            new = torch.tensor([i for i, name in enumerate(names) if name in words.reduced])
            old = torch.tensor([i for i, name in enumerate(names) if name in known])
            for kind, rows, texts in (
                ("known words", old, [names[i] for i in old]),
                ("names with a new word", new, [names[i] for i in new]),
                ("new words alone", new, [words.reduced[names[i]] for i in new]),
            ):
                scores.setdefault(kind, []).append(routed(run, texts, clusters[rows], seed))
            trained = Counter(clusters[[i for i in range(len(names)) if names[i] not in words.reduced]].tolist())
            largest = trained.most_common(1)[0][0]
            scores.setdefault("guessing", []).append(float((clusters[new] == largest).double().mean()))
        results.append({"encoder": title, **{kind: spread(values) for kind, values in scores.items()}})
        print_row(results[-1])
    return results


def print_row(row: dict[str, Any]) -> None:
    def text(value: Any) -> str:
        if isinstance(value, dict):
            return f"{value['mean']:.3f} ± {value['std']:.3f}"
        return " to ".join(f"{x:.2f}" for x in value) if isinstance(value, tuple) else (
            f"{value:.3f}" if isinstance(value, float) else str(value))  # fmt: skip

    print("| " + " | ".join(f"{key}: {text(value)}" for key, value in row.items()) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"features": features, "prompts": prompts, "router": router}
    parser.add_argument("parts", nargs="*", choices=[*parts], default=[*parts])
    parser.add_argument("--images", type=int, default=1000, help="of each set")
    parser.add_argument("--sets", nargs="*", choices=[*SETS], default=[*SETS], help="of the part features")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        results = {part: parts[part](options, Path(scratch)) for part in options.parts}
    if options.json:
        about = {"images": options.images, "seeds": options.seeds, "torch": torch.__version__}
        options.json.write_text(json.dumps({**about, **results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
