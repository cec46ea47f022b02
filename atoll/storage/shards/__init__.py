"""Directories of shards, the data between the stages: tensor columns, a manifest, an index with all hashes.

    shard-00000.safetensors   one tensor [rows, ...] per column, memory-mapped
    manifest.parquet          key, caption, split ("train" or "val"): one line per row, in order; a row group per shard.
                              If an image has several captions: other_captions, see captions.py
    index.json                format, kind, rows, columns, bytes and sha256 of each file, the writer's card

The rows of a shard have one shape in each column. Latents of images of several sizes lie in shards of their own: the
index names the main shape, and a shard's entry the shapes of its own.

The same input gives the same bytes. A directory is written atomically. Iterating shard by shard (`Shards.parts`) takes
the memory of one shard, even for a hundred million rows.
"""

from atoll.storage.shards.captions import MAX_WEIGHT, OTHERS, Weighted, choose, pack, unpack
from atoll.storage.shards.format import INDEX, LATENTS, MANIFEST, SPLITS, TARGET, Split, refuse_foreign
from atoll.storage.shards.holdout import is_held_out
from atoll.storage.shards.reader import Shards
from atoll.storage.shards.repeated import repeats
from atoll.storage.shards.shard import Shard
from atoll.storage.shards.skip import SkipList, hash_of_keys, listed_keys
from atoll.storage.shards.split import key_fraction, split_by_hash
from atoll.storage.shards.writer import ShardWriter

__all__ = [
    "INDEX",
    "LATENTS",
    "MANIFEST",
    "MAX_WEIGHT",
    "OTHERS",
    "SPLITS",
    "TARGET",
    "Shard",
    "ShardWriter",
    "Shards",
    "SkipList",
    "Split",
    "Weighted",
    "choose",
    "hash_of_keys",
    "is_held_out",
    "key_fraction",
    "listed_keys",
    "pack",
    "refuse_foreign",
    "repeats",
    "split_by_hash",
    "unpack",
]
