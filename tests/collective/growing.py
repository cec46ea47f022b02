"""A founder's run with real clusters, a bucket, and steps of growth, for tests of collectives that grow."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from atoll.cluster import add_cluster, cluster, split_cluster
from atoll.collective.connect import open_store
from atoll.manifest import load_manifest
from atoll.storage.cards import ClusterShardsCard
from atoll.storage.shards import Shards, ShardWriter
from atoll.train import extend_router as extend_module
from atoll.train.extend_router import extend_router
from atoll.train.router import train_router
from tests.cards import encoded_card
from tests.conftest import RUN, WORDS, write_run

NEW_MEAN = 0.5  # of the new cluster's latents; the old ones have -1, 0 and 1
FLOW = {"prediction": "flow", "schedule": "linear"}


def write_new(path: Path, rows: int = 80) -> Path:
    """Encoded images of the new cluster."""
    card = encoded_card(codec={"name": "pixels", "channels": 1}, condition=RUN["condition"])
    latents = NEW_MEAN + 0.3 * torch.randn(rows, 1, 4, 8, generator=torch.Generator().manual_seed(5))
    # Features are compared by direction: the new images have their own.
    features = latents.flatten(1) * torch.tensor([1.0, -1.0]).repeat(16)
    with ShardWriter(path, card) as writer:
        splits = ["val" if i % 10 >= 7 else "train" for i in range(rows)]
        text = [f"new-{i:03d}" for i in range(rows)], ["reef"] * rows, splits
        writer.append(*text, {"latent": latents.half(), "feature": features})
    return path


def write_founded(root: Path, rows: int = 180) -> Path:
    """A run with three real clusters and a router, and `new` beside it: images of a fourth cluster."""
    path = write_run(root / "run", rows)
    shutil.rmtree(path / "clusters")
    cluster(path / "encoded", path / "clusters", 3, fine=24)
    train_router(path, load_manifest(path))
    write_new(root / "new")
    return root


def write_probe(path: Path, run: Path, clusters: list[int], rows: int = 24) -> Path:
    """Secret rows of clusters, from the distribution of their data."""
    g = torch.Generator().manual_seed(77)
    for number in clusters:
        shards = Shards(run / "clusters" / f"cluster-{number:03d}")
        mean = shards.read("latent", slice(None)).float().mean()
        latents = (mean + 0.3 * torch.randn(rows, *shards.shape("latent"), generator=g)).half()
        captions = ["reef" if number == 3 else f"{WORDS[i % 4]} {WORDS[i // 4 % 4]}" for i in range(rows)]
        with ShardWriter(path / f"cluster-{number:03d}", shards.card(ClusterShardsCard)) as writer:
            writer.append([f"secret-{number}-{i}" for i in range(rows)], captions, ["val"] * rows, {"latent": latents})
    return path


class GrowingReef:
    """A directory with a founder's run and a bucket; the commands and the steps of growth.

    Args:
        root: of everything; holds `run` and `new`.
        atoll: runs a command.
    """

    def __init__(self, root: Path, atoll):
        self.root, self.atoll, self.run = root, atoll, root / "run"

    def __call__(self, *arguments: object) -> str:
        """Run a command of `atoll collective` that succeeds, and return what it prints."""
        code, out, err = self.atoll("collective", *arguments)
        assert (code, err) == (0, ""), err
        return " ".join(out.split())

    def refused(self, *arguments: object) -> str:
        """Run a command that fails in one line, and return the line."""
        before = self.objects()
        code, _, err = self.atoll("collective", *arguments)
        assert (code, err.count("\n")) == (2, 1), err
        assert self.objects() == before
        return err

    def open(self) -> None:
        self("key", "founder.key")
        self("open", "bucket", "-r", "run", "--key", "founder.key")

    def join(self, name: str) -> str:
        """Join as a new member, and return the key id."""
        key = self("key", f"{name}.key").split()[-1]
        self("join", "bucket", "-o", name, "--key", f"{name}.key")
        return key

    def train(self, name: str, expert: object) -> Path:
        """Claim and train an expert of a cluster, and return its directory."""
        self("claim", "bucket", "--cluster", expert, "-r", name)
        code, _, err = self.atoll("train", "expert", expert, "-r", name)
        assert code == 0, err
        (path,) = (self.root / name / "experts").glob(f"{expert}-*")
        return path

    def name_clusters(self, k: int, *experts: dict, **changes: object) -> None:
        """Set clusters.k in the founder's atoll.yaml, and add experts."""
        settings = yaml.safe_load((self.run / "atoll.yaml").read_text())
        settings |= {"clusters": {"k": k}, "experts": [*settings["experts"], *experts], **changes}
        (self.run / "atoll.yaml").write_text(yaml.safe_dump(settings))

    def new_cluster(self) -> None:
        """The founder adds a fourth cluster of new data."""
        add_cluster(self.run / "clusters", self.root / "new")
        self.name_clusters(4, {"cluster": 3, "objective": FLOW})

    def split(self, number: int) -> None:
        """The founder splits a cluster."""
        split_cluster(self.run / "clusters", number, [self.run / "encoded"])
        k = load_manifest(self.run).clusters.k
        self.name_clusters(k + 1, {"cluster": k, "objective": FLOW})

    def extend(self) -> None:
        """The founder extends the router."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(extend_module, "SAMPLES", 256)
            extend_router(self.run, load_manifest(self.run))

    def objects(self) -> list[str]:
        if not (self.root / "bucket").is_dir():
            return []
        return [entry.path for entry in open_store("bucket").list("") if not entry.path.startswith("clock/")]

    def uploaded(self, before: list[str]) -> list[str]:
        """The run's files that were uploaded since, without the hash of their list."""
        new = sorted(set(self.objects()) - set(before))
        return [path.split("/", 2)[2] for path in new if path.startswith("run/")]


def edit(file: Path, change) -> None:
    """Change a JSON file."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
