"""What the router learns from: clusters/router where it is there, else all of encoded/."""

import shutil

import pytest
import torch

from atoll.errors import AtollError
from atoll.shards import Shards, ShardWriter
from atoll.train.router import _data_set, train_router


def test_all_of_encoded(run) -> None:
    shards, labels, clusters, assignment = _data_set(run)
    assert (len(shards), clusters, len(assignment)) == (60, 3, 64)
    assert labels.tolist() == [i % 3 for i in range(60)]
    shutil.rmtree(run / "encoded")
    with pytest.raises(AtollError, match="encoded"):
        _data_set(run)


def test_the_part_that_is_set_apart_needs_nothing_beside_it(run, manifest) -> None:
    encoded = Shards(run / "encoded")
    rows = torch.arange(0, 60, 2)
    text = [[column[i] for i in rows.tolist()] for column in (encoded.keys, encoded.captions, encoded.splits)]
    columns = {"latent": encoded.read("latent", rows), "cluster": rows % 3}
    card = {"clusters": 3, "assignment": "a" * 64, **encoded.card}
    with ShardWriter(run / "clusters" / "router", card) as writer:
        writer.append(*text, columns)
    shutil.rmtree(run / "encoded")
    (run / "clusters" / "clusters.json").unlink()
    shards, labels, clusters, assignment = _data_set(run)
    assert (len(shards), clusters, assignment) == (30, 3, "a" * 64)
    assert labels.tolist() == (rows % 3).tolist()
    assert (train_router(run, manifest) / "card.json").is_file()
