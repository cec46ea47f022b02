"""The router's data: clusters/router if it exists, else all of encoded/; and its paths."""

import shutil

import pytest
import torch

from atoll.encoders.text import HashEncoder
from atoll.errors import AtollError
from atoll.manifest import Manifest, TrainSettings
from atoll.objective import Objective
from atoll.schedule import Cosine, Linear
from atoll.storage.artifact import read_card
from atoll.storage.cards import RouterCard
from atoll.storage.shards import Shards, ShardWriter
from atoll.train.batches import CaptionedLatents, Rows
from atoll.train.router import RouterTask, _data_set, train_router
from tests.cards import cluster_shards_card


def test_without_a_sample_the_router_reads_all_of_encoded(run) -> None:
    shards, labels, clusters, assignment = _data_set(run)
    assert (len(shards), clusters, len(assignment)) == (60, 3, 64)
    assert labels.tolist() == [i % 3 for i in range(60)]
    shutil.rmtree(run / "encoded")
    with pytest.raises(AtollError, match="encoded"):
        _data_set(run)


def test_the_routers_sample_is_sufficient(run, manifest) -> None:
    encoded = Shards(run / "encoded")
    rows = torch.arange(0, 60, 2)
    text = [[column[i] for i in rows.tolist()] for column in (encoded.keys, encoded.captions, encoded.splits)]
    columns = {"latent": encoded.read("latent", rows), "cluster": rows % 3}
    card = cluster_shards_card(assignment="a" * 64)
    del card["cluster"]
    with ShardWriter(run / "clusters" / "router", card) as writer:
        writer.append(*text, columns)
    shutil.rmtree(run / "encoded")
    (run / "clusters" / "clusters.json").unlink()
    shards, labels, clusters, assignment = _data_set(run)
    assert (len(shards), clusters, assignment) == (30, 3, "a" * 64)
    assert labels.tolist() == (rows % 3).tolist()
    assert (train_router(run, manifest) / "card.json").is_file()


def test_each_row_is_diffused_along_its_clusters_path(run) -> None:
    data = CaptionedLatents(Rows.of([Shards(run / "encoded")], "train"), HashEncoder(dim=8, length=4))
    paths = [(Cosine(), torch.tensor([0, 2])), (Linear(), torch.tensor([1]))]
    labels = torch.arange(len(data.rows.shards[0])) % 3
    task = RouterTask(torch.nn.Identity(), data, data, labels, settings=TrainSettings(batch=12), seed=0, paths=paths)
    batch, seen = task.batch(0, slice(0, 12)), []

    def module(x, t, pooled):
        seen.append(x)
        return torch.zeros(len(x), 3)

    task.losses(module, batch)
    assert set(batch["label"].tolist()) == {0, 1, 2}
    for x, x0, t, eps, label in zip(seen[0], *(batch[name] for name in ("x0", "t", "eps", "label")), strict=True):
        objective = Objective("eps", Linear() if label == 1 else Cosine())
        torch.testing.assert_close(x, objective.schedule.diffuse(x0[None].float(), eps[None], t[None])[0])


def test_the_experts_paths_are_in_the_card_and_in_the_mark(run, manifest) -> None:
    content = manifest.model_dump()
    content["router"]["path"] = "experts"
    content["experts"] = [{"cluster": k, "objective": {"prediction": "eps", "schedule": "cosine"}} for k in range(3)]
    train_router(run, manifest)
    assert "path" not in read_card(run / "router", RouterCard).plain()
    with pytest.raises(AtollError, match="other settings"):
        train_router(run, Manifest(**content))
    train_router(run, Manifest(**content), restart=True)
    assert [of for _, of in read_card(run / "router", RouterCard).plain()["path"]] == [[0], [1], [2]]
    content["experts"] = content["experts"][1:]
    with pytest.raises(AtollError, match="no expert of cluster 0"):
        train_router(run, Manifest(**content), restart=True)
