"""A sharded checkpoint of somebody else runs no code and opens no file elsewhere."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from atoll.train.sharded_reader import ShardedReader

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")
TENSORS = {
    "model.w": torch.arange(12.0).reshape(3, 4),
    "optimizer.step.w": torch.tensor(3.0),
    "codes": torch.ones(2).byte(),
}


class Call:
    """Calls a function when it is unpickled, unless that is refused."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


@pytest.fixture
def path(tmp_path) -> Path:
    checkpoint.save(dict(TENSORS), checkpoint_id=tmp_path / "x.dcp")
    return tmp_path / "x.dcp"


def load(path: Path) -> dict[str, torch.Tensor]:
    tensors = {name: torch.zeros_like(value) for name, value in TENSORS.items()}
    checkpoint.load(tensors, storage_reader=ShardedReader(path))
    return tensors


def rewrite(path: Path, change: Any) -> None:
    table = pickle.loads((path / ".metadata").read_bytes())
    (path / ".metadata").write_bytes(pickle.dumps(change(table) or table))


def test_what_was_saved_is_read_exactly(path) -> None:
    loaded = load(path)
    assert all(torch.equal(loaded[name], value) for name, value in TENSORS.items())


def test_a_function_in_the_table_is_refused_and_does_not_run(path, tmp_path) -> None:
    rewrite(path, lambda table: Call(os.mkdir, str(tmp_path / "mark")))
    with pytest.raises(CheckpointException, match=r"it names (posix|nt)\.mkdir, which could run code"):
        load(path)
    assert not (tmp_path / "mark").exists()


def test_an_entry_that_is_no_tensor_is_refused(path) -> None:
    # torch unpickles such entries without limits.
    rewrite(path, lambda table: table.state_dict_metadata.update({"model.w": BytesStorageMetadata()}))
    with pytest.raises(CheckpointException, match="BytesStorageMetadata, which could run code"):
        load(path)


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        (b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n}b.", "it changes a class or a function"),
        (pickle.dumps([1]), "it holds list, no table of tensors"),
    ],
)
def test_a_table_that_torch_does_not_write_is_refused(path, table, problem) -> None:
    (path / ".metadata").write_bytes(table)
    with pytest.raises(CheckpointException, match=problem):
        load(path)


@pytest.mark.parametrize("name", ["../other.distcp", "/etc/hostname", "__0_0.distcp/../../x"])
def test_a_file_elsewhere_is_not_opened(path, name) -> None:
    def change(table: Any) -> None:
        for place in table.storage_data.values():
            place.relative_path = name

    rewrite(path, change)
    with pytest.raises(CheckpointException, match="it names files that are no parts of a checkpoint"):
        load(path)
