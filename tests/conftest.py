"""A tiny run on disk, made without images: three clusters of latents, for networks of a few thousand weights."""

import hashlib
import os
import sys
import warnings
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import HealthCheck, settings

from atoll.manifest import Manifest, load_manifest
from atoll.storage.artifact import write_json
from atoll.storage.shards import ShardWriter
from tests.cards import cluster_shards_card, clusters_card, encoded_card

# `make test` tries the same examples every time: it is green or red by the code alone. `make test-all` draws new
# ones. Neither depends on speed. Several examples share a test's `tmp_path` on purpose.
_CHECKS = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]}
settings.register_profile("same", derandomize=True, **_CHECKS)
settings.register_profile("new", **_CHECKS)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What a test draws without a generator is the same every time, whatever ran before it."""
    torch.manual_seed(0)


K, SHAPE = 3, (1, 4, 8)
WORDS = ("moss", "sand", "rain", "rust")

RUN = {
    "name": "tiny",
    "condition": {"name": "hash", "dim": 8, "length": 4, "seed": 0},
    "clusters": {"k": K},
    "network": {"patch": 2, "width": 16, "depth": 1, "heads": 2},
    "train": {"steps": 8, "batch": 6, "checkpoint_every": 3, "log_every": 2, "precision": "fp32", "track": "none"},
    "experts": [
        {"cluster": 0, "objective": {"prediction": "eps", "schedule": "cosine"}},
        {"cluster": 1, "objective": {"prediction": "flow", "schedule": "linear"}},
        {"cluster": 2, "objective": {"prediction": "x0", "schedule": "linear-beta"}},
    ],
    "router": {"network": {"patch": 2, "width": 16, "depth": 1, "heads": 2}},
    "monolith": {"objective": {"prediction": "flow", "schedule": "linear"}},
    "sampling": {"steps": 3, "routing": "top-2"},
}


def write_run(path: Path, rows: int = 60, shape: tuple[int, ...] = SHAPE) -> Path:
    """encoded/, clusters/ and atoll.yaml as the stages before training would leave them."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "atoll.yaml").write_text(yaml.safe_dump(RUN))
    g = torch.Generator().manual_seed(0)
    cluster = torch.arange(rows) % K
    latents = (cluster.reshape(-1, 1, 1, 1) - 1.0 + 0.3 * torch.randn(rows, *shape, generator=g)).half()
    keys = [f"image-{i:03d}" for i in range(rows)]
    captions = [f"{WORDS[i % 4]} {WORDS[i // 4 % 4]}" for i in range(rows)]
    splits = ["val" if i % 10 >= 7 else "train" for i in range(rows)]
    frozen = {"codec": {"name": "pixels", "channels": 1}, "condition": RUN["condition"]}
    with ShardWriter(path / "encoded", encoded_card(**frozen)) as writer:
        writer.append(keys, captions, splits, {"latent": latents, "feature": latents.float().flatten(1)})
    assignment = hashlib.sha256(b"tiny").hexdigest()
    for k in range(K):
        mine = [i for i in range(rows) if cluster[i] == k]
        card = cluster_shards_card(**frozen, latent_shape=list(shape), assignment=assignment, cluster=k, clusters=K)
        with ShardWriter(path / "clusters" / f"cluster-{k:03d}", card) as writer:
            writer.append(
                *([column[i] for i in mine] for column in (keys, captions, splits)), {"latent": latents[mine]}
            )
    write_json(path / "clusters" / "clusters.json", clusters_card(K, assignment=assignment))
    table = pa.table({"key": keys, "cluster": cluster.numpy(), "split": splits})
    pq.write_table(table, path / "clusters" / "assignment.parquet")
    return path


@pytest.fixture
def atoll(capsys, monkeypatch, tmp_path):
    """Runs a command in this process, in tmp_path: (exit code, stdout, stderr)."""
    from atoll.cli import main

    monkeypatch.chdir(tmp_path)

    def command(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["atoll", *map(str, arguments)])
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # which main replaces
        monkeypatch.setenv("COLUMNS", "80")
        with pytest.raises(SystemExit) as end:
            main()
        return (int(end.value.code or 0), *capsys.readouterr())

    return command


@pytest.fixture
def run(tmp_path) -> Path:
    return write_run(tmp_path / "run")


@pytest.fixture
def manifest(run) -> Manifest:
    return load_manifest(run)


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory) -> Path:
    """A run whose experts, router, monolith and ensemble are there; not to be changed by a test."""
    from atoll.assemble import assemble_run
    from atoll.train.expert import train_expert, train_monolith
    from atoll.train.router import train_router

    path = write_run(tmp_path_factory.mktemp("trained") / "run")
    manifest = load_manifest(path)
    for k in range(K):
        train_expert(path, manifest, str(k))
    train_router(path, manifest)
    train_monolith(path, manifest)
    assemble_run(path, manifest)
    return path
