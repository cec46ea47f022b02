"""Several captions of one image in a directory of shards: stored only where there are some, bounded, and drawn."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atoll.errors import AtollError
from atoll.storage.artifact import sha256_file
from atoll.storage.bounds import MAX_CAPTION_BYTES
from atoll.storage.shards import INDEX, MANIFEST, Shards, ShardWriter, choose, pack, unpack

ROWS = 12
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
WEIGHTS = st.floats(1e-12, 1e12)


def write(path: Path, others: list[str] | None = None, calls: int = 4) -> Path:
    """Write rows in several calls, as shards of five rows."""
    with ShardWriter(path, {}, shard_rows=5) as writer:
        for number in range(calls):
            rows = range(number, ROWS, calls)
            latents = torch.arange(len(rows)).reshape(-1, 1, 1, 1).half()
            texts = [f"k{row}" for row in rows], [f"caption {row}" for row in rows], ["train"] * len(rows)
            writer.append(*texts, {"latent": latents}, [others[row] for row in rows] if others else ())
    return path


def replace_column(path: Path, values: list[str | None] | pa.Array) -> None:
    """Write another column `other_captions`, as a stranger may."""
    with pq.ParquetFile(path / MANIFEST) as file:
        groups = [file.read_row_group(number) for number in range(file.num_row_groups)]
    values = values if isinstance(values, pa.Array) else pa.array(values, pa.string())
    start, written = 0, []
    for table in groups:
        if "other_captions" in table.schema.names:
            table = table.drop(["other_captions"])
        written.append(table.append_column("other_captions", values[start : start + len(table)]))
        start += len(table)
    with pq.ParquetWriter(path / MANIFEST, written[0].schema, compression="zstd") as writer:
        for table in written:
            writer.write_table(table)
    index = json.loads((path / INDEX).read_text())
    index["manifest"] |= {"bytes": (path / MANIFEST).stat().st_size, "sha256": sha256_file(path / MANIFEST)}
    (path / INDEX).write_text(json.dumps(index))


@given(st.lists(st.tuples(TEXTS, WEIGHTS)))
def test_packed_captions_come_back(others) -> None:
    assert unpack(pack(others)) == others
    assert (pack(others) == "") == (others == [])


def test_rows_with_one_caption_each_are_stored_as_before(tmp_path) -> None:
    write(tmp_path / "before")
    write(tmp_path / "now", [""] * ROWS)
    for file in (tmp_path / "before").iterdir():
        assert file.read_bytes() == (tmp_path / "now" / file.name).read_bytes()
    assert pq.read_schema(tmp_path / "now" / MANIFEST).names == ["key", "caption", "split"]
    shards = Shards(tmp_path / "now")
    assert not shards.has_several_captions
    assert shards.other_captions_of(torch.tensor([3, 1])) == [[], []]
    assert [part.others for part in shards.parts()] == [[""] * 5, [""] * 5, [""] * 2]


@pytest.mark.parametrize("late", [0, 11], ids=["first-shard", "last-shard"])
def test_an_image_with_several_captions_adds_the_column_in_any_shard(tmp_path, late) -> None:
    others = [""] * ROWS
    others[late] = pack([("another", 2.0), ("é, one more", 0.5)])
    write(tmp_path / "data", others)
    write(tmp_path / "plain")
    shards, plain = Shards(tmp_path / "data", verify=True), Shards(tmp_path / "plain")
    assert sorted(file.name for file in shards.path.iterdir()) == sorted(file.name for file in plain.path.iterdir())
    assert (shards.keys, shards.captions, shards.splits) == (plain.keys, plain.captions, plain.splits)
    row = shards.keys.index(f"k{late}")
    assert shards.other_captions_of(torch.tensor([row])) == [[("another", 2.0), ("é, one more", 0.5)]]
    assert sum(map(len, shards.other_captions_of(torch.arange(ROWS)))) == 2
    assert [text for part in shards.parts() for text in part.others if text] == [others[late]]
    with pq.ParquetFile(shards.path / MANIFEST) as file:
        assert file.num_row_groups == 3


def test_adopted_shards_bring_their_captions(tmp_path) -> None:
    others = [pack([(f"b{row}", 1.0)]) for row in range(ROWS)]
    old = Shards(write(tmp_path / "old", others, calls=1))
    with ShardWriter(tmp_path / "new", {}) as writer:
        for part in old.parts():
            file = old.path / f"shard-{part.number:05d}.safetensors"
            writer.adopt(file, part.keys, part.captions, part.splits, part.others)
    assert (tmp_path / "new" / MANIFEST).read_bytes() == (old.path / MANIFEST).read_bytes()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a", "Expecting value"),
        ('{"a": 1}', "captions as dict, expected a list"),
        ('["a"]', "'a', expected a caption and its weight"),
        ('[["a"]]', "expected a caption and its weight"),
        ("[[1, 1]]", "expected a caption and its weight"),
        ('[["a", "1"]]', "expected a caption and its weight"),
        ('[["a", true]]', "expected a caption and its weight"),
        ('[["a", 0]]', "expected a caption and its weight"),
        ('[["a", -1.5]]', "expected a caption and its weight"),
        ('[["a", NaN]]', "expected a caption and its weight"),
        ('[["a", 1e999]]', "expected a caption and its weight"),
        ('[["a", 1' + "0" * 5000 + "]]", "Exceeds the limit"),
        ('[["\\ud800", 1]]', "surrogates not allowed"),
        ("[" * 60_000, "nested too deeply"),
    ],
)
def test_a_text_that_packs_no_captions_is_named(tmp_path, text, problem) -> None:
    write(tmp_path / "data")
    replace_column(tmp_path / "data", [text] * ROWS)
    with pytest.raises(AtollError, match=rf"manifest\.parquet is corrupt: other_captions: .*{problem}"):
        Shards(tmp_path / "data").other_captions_of(torch.tensor([0]))


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (["[]"] * (ROWS - 1) + [None], "other_captions: 1 rows have none"),
        (["x" * (MAX_CAPTION_BYTES + 1)] * ROWS, "other_captions: a text of 65,537 bytes, expected at most 65,536"),
        ([f"{i}" + "a" * 5_000_000 for i in range(ROWS)], r"other_captions: \d+,\d+,\d+ bytes of 5 rows"),
        (pa.array([[["a"]]] * ROWS), "its columns are .*'other_captions': 'list"),
    ],
    ids=["null", "long", "bomb", "lists"],
)
def test_captions_that_would_fill_the_memory_are_refused(tmp_path, values, problem) -> None:
    write(tmp_path / "data")
    replace_column(tmp_path / "data", values)
    with pytest.raises(AtollError, match=rf"manifest\.parquet is corrupt: {problem}"):
        [*Shards(tmp_path / "data").parts()]
    with pytest.raises(AtollError, match=problem):
        Shards(tmp_path / "data").other_captions_of(torch.tensor([0]))


def test_captions_that_no_reader_accepts_are_not_written(tmp_path) -> None:
    with pytest.raises(AtollError, match=r"a key or caption of 65,5\d\d bytes"):
        write(tmp_path / "data", [pack([("a" * MAX_CAPTION_BYTES, 1.0)])] * ROWS)
    assert not (tmp_path / "data").exists()


@given(st.lists(WEIGHTS, max_size=6), st.integers(0, 2**53 - 1))
def test_every_draw_gives_a_caption_by_its_weight(weights, draw) -> None:
    """The caption is the one in whose part of [0, total) the draw falls."""
    others = [(str(number), weight) for number, weight in enumerate(weights, 1)]
    u = draw / 2**53
    number = int(choose("0", others, u))
    ends = [sum([1.0, *weights][: i + 1]) for i in range(len(weights) + 1)]
    below, level = (ends[number - 1] if number else 0.0), u * sum([1.0, *weights])
    assert below <= level * (1 + 1e-9)
    assert level <= ends[number] * (1 + 1e-9)


def test_captions_are_drawn_in_proportion_to_their_weights() -> None:
    drawn = [choose("a", [("b", 3.0), ("c", 0.5)], (i + 0.5) / 900) for i in range(900)]
    assert {caption: drawn.count(caption) for caption in "abc"} == {"a": 200, "b": 600, "c": 100}
