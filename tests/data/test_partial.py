"""Blocks of an unfinished encoding: damage between their writing and the sealing is noticed."""

import pytest
import torch

from atoll.data.partial import BlockRows, PartialEncoding
from atoll.errors import AtollError
from atoll.storage.shards import OTHERS, Shards, ShardWriter

TEXT = {"key": ["a", "b"], "caption": ["x", "y"], "split": ["train", "val"], OTHERS: ["", ""]}


@pytest.mark.parametrize("dropped", [set(), {1}], ids=["whole", "without a row"])
def test_a_damaged_block_is_not_sealed(tmp_path, dropped) -> None:
    (tmp_path / "partial").mkdir()
    partial = PartialEncoding(tmp_path / "partial")
    rows = BlockRows(TEXT, [b"0" * 16, b"1" * 16], {"latent": torch.randn(2, 3, 4, 5).half()})
    partial.write(0, {"": rows}, [])
    block = tmp_path / "partial" / "00000.safetensors"
    intact = block.read_bytes()
    block.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    with (
        pytest.raises(AtollError, match=r"00000\.safetensors: its contents are not .*remove 00000\.parquet"),
        ShardWriter(tmp_path / "out", {}) as writer,
    ):
        partial.add(writer, 0, TEXT, dropped)
    assert not (tmp_path / "out").exists()
    block.unlink()
    block.write_bytes(intact)
    with ShardWriter(tmp_path / "out", {}) as writer:
        partial.add(writer, 0, TEXT, dropped)
    assert len(Shards(tmp_path / "out")) == 2 - len(dropped)
