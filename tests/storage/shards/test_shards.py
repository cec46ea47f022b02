import errno
import json
import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from atoll.errors import AtollError
from atoll.storage import verified
from atoll.storage.artifact import sha256_file
from atoll.storage.cards import CardRecord
from atoll.storage.shards import INDEX, MANIFEST, Shards, ShardWriter, is_held_out, repeats

ROWS = 23


def rows(count=ROWS):
    g = torch.Generator().manual_seed(0)
    columns = {"latent": torch.randn(count, 2, 3, 5, generator=g).half(), "feature": torch.randn(count, 7, generator=g)}
    keys = [f"key-{i}" for i in range(count)]
    return (
        keys,
        [f"caption {i}, π" for i in range(count)],
        ["val" if i % 5 == 2 else "train" for i in range(count)],
        columns,
    )


class Made(CardRecord):
    made: str


def write(path, chunk=4, shard_rows=6, card=None):
    keys, captions, splits, columns = rows()
    with ShardWriter(path, card or {"made": "here"}, shard_rows) as writer:
        for i in range(0, ROWS, chunk):
            part = slice(i, i + chunk)
            writer.append(keys[part], captions[part], splits[part], {name: c[part] for name, c in columns.items()})
    return path


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "data")


def content(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_round_trip(path) -> None:
    keys, captions, splits, columns = rows()
    shards = Shards(path, verify=True)
    assert (len(shards), shards.card(Made), shards.columns) == (ROWS, Made(made="here"), ("feature", "latent"))
    assert (shards.keys, shards.captions, shards.splits) == (keys, captions, splits)
    assert shards.shape("latent") == (2, 3, 5)
    assert len(list(path.glob("*.safetensors"))) == 4
    for name, column in columns.items():
        assert torch.equal(shards.read(name, slice(None)), column)
        assert shards.read(name, slice(None)).dtype == column.dtype


@given(st.lists(st.integers(0, ROWS - 1), max_size=40))
@settings(max_examples=50)
def test_any_rows_in_any_order(path, chosen) -> None:
    chosen = torch.tensor(chosen, dtype=torch.int64)
    assert torch.equal(Shards(path).read("latent", chosen), rows()[3]["latent"][chosen])


@given(st.slices(ROWS))
@settings(max_examples=50)
def test_any_slice(path, part) -> None:
    expected = rows()[3]["feature"][torch.arange(ROWS)[list(range(ROWS))[part]]]
    assert torch.equal(Shards(path).read("feature", part), expected)


def test_splits(path) -> None:
    shards = Shards(path)
    assert shards.rows("val").tolist() == [2, 7, 12, 17, 22]
    assert sorted([*shards.rows("val").tolist(), *shards.rows("train").tolist()]) == list(range(ROWS))
    assert json.loads((path / INDEX).read_text())["splits"] == {"train": 18, "val": 5}


def test_what_is_read_may_be_changed(path) -> None:
    shards = Shards(path)
    shards.read("latent", torch.tensor([0, 1])).zero_()
    shards.read("latent", slice(0, 2)).zero_()
    assert torch.equal(shards.read("latent", slice(0, 2)), rows()[3]["latent"][:2])


def test_rows_and_columns_that_do_not_exist(path) -> None:
    shards = Shards(path)
    for wrong in ([ROWS], [-1]):
        with pytest.raises(IndexError, match=f"0..{ROWS - 1}"):
            shards.read("latent", torch.tensor(wrong))
    with pytest.raises(AtollError, match="no column 'pixels'; it has feature, latent"):
        shards.read("pixels", slice(None))


def test_bytes_are_the_same_however_the_rows_came(tmp_path, path) -> None:
    assert content(write(tmp_path / "other", chunk=11)) == content(path)
    assert Shards(tmp_path / "other").sha256 == Shards(path).sha256
    assert Shards(write(tmp_path / "third", card={"made": "there"})).sha256 != Shards(path).sha256


def test_the_writer_keeps_a_copy(tmp_path) -> None:
    column = torch.ones(3, 4)
    with ShardWriter(tmp_path / "data", {}) as writer:
        writer.append(["a", "b", "c"], [""] * 3, ["train"] * 3, {"x": column})
        column.zero_()
    assert (Shards(tmp_path / "data").read("x", slice(None)) == 1).all()


def test_a_failure_leaves_what_was_there(tmp_path, path) -> None:
    before = content(path)

    def breaks(path):
        with ShardWriter(path, {}) as writer:
            writer.append(["a"], [""], ["train"], {"x": torch.ones(1, 2)})
            raise RuntimeError("the source broke")

    for out in (path, tmp_path / "new"):
        with pytest.raises(RuntimeError, match="the source broke"):
            breaks(out)
    assert content(path) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["data"]


def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path, path, monkeypatch) -> None:
    before = content(path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("atoll.storage.shards.writer.write_bytes", full)
    with pytest.raises(AtollError, match="No space left on device"):
        write(path)
    assert content(path) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["data"]


def test_close_gives_the_index_and_writing_again_replaces(path) -> None:
    writer = ShardWriter(path, {"made": "later"})
    writer.append(["a"], ["b"], ["train"], {"x": torch.ones(1, 2)})
    index = writer.close()
    assert index.plain() == json.loads((path / INDEX).read_text())
    assert (len(Shards(path)), Shards(path).card(Made)) == (1, Made(made="later"))
    assert path.stat().st_mode & 0o777 == 0o755


def test_a_directory_of_other_things_is_not_replaced(tmp_path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(AtollError, match=r"no former result.*empty or new"):
        ShardWriter(tmp_path, {})
    assert (tmp_path / "thesis.tex").exists()


def test_rows_that_do_not_fit(tmp_path) -> None:
    one = {"x": torch.ones(1, 2)}
    with pytest.raises(ValueError, match="length"), ShardWriter(tmp_path / "a", {}) as writer:
        writer.append(["a", "b"], ["", ""], ["train", "val"], one)
    with pytest.raises(ValueError, match="test"), ShardWriter(tmp_path / "a", {}) as writer:
        writer.append(["a"], [""], ["test"], one)
    with ShardWriter(tmp_path / "b", {}) as writer:
        writer.append(["a"], [""], ["train"], one)
        with pytest.raises(ValueError, match="float64"):
            writer.append(["b"], [""], ["train"], {"x": torch.ones(1, 2).double()})
    with pytest.raises(AtollError, match="two rows have the key 'a'"), ShardWriter(tmp_path / "a", {}) as writer:
        writer.append(["b", "a", "a"], [""] * 3, ["train"] * 3, {"x": torch.ones(3, 2)})
    with pytest.raises(AtollError, match="no rows"), ShardWriter(tmp_path / "a", {}):
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["b"]


def test_a_missing_or_cut_shard_is_named_with_its_first_key(path) -> None:
    shard = path / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(AtollError, match=r"shard-00001.*'key-6'.*bytes instead of"):
        Shards(path)
    shard.unlink()
    with pytest.raises(AtollError, match=r"shard-00001.*'key-6'.*missing"):
        Shards(path)


@given(st.integers(0, 10**6), st.integers(1, 255))
@settings(max_examples=60)
def test_any_changed_byte_is_found_by_verify(path, position, change) -> None:
    files = sorted(file for file in path.iterdir() if file.name != INDEX)
    file = files[position % len(files)]
    whole = file.read_bytes()
    data = bytearray(whole)
    data[position % len(data)] ^= change
    file.write_bytes(data)
    try:
        with pytest.raises(AtollError, match=file.name):
            Shards(path, verify=True)
    finally:
        file.write_bytes(whole)


def flip(file: Path, position: int = -1) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("card", "stage"),
    [
        ({}, "encode"),
        ({"assignment": "x"}, "cluster"),
        ({"kept": "sample"}, "cluster"),
        ({"assignment": "x", "source": {"name": "experts"}}, "synthesize"),
    ],
)
def test_a_damaged_shard_is_named_before_its_rows_are_used(path, card, stage) -> None:
    edit(path, card=card)
    flip(path / "shard-00001.safetensors")
    shards = Shards(path)
    # The other shards are intact.
    assert len(shards.read("latent", slice(0, 6))) == 6
    advice = rf"its contents are not what index.json says .*`atoll {stage} --force`"
    with pytest.raises(AtollError, match=rf"shard-00001.*'key-6'.*{advice}"):
        shards.read("latent", torch.tensor([7]))
    with pytest.raises(AtollError, match="shard-00001"):
        list(Shards(path).parts())


def test_a_damaged_manifest_is_named_at_opening(path) -> None:
    flip(path / MANIFEST, 8)
    with pytest.raises(AtollError, match=rf"{MANIFEST} is corrupt: its contents are not what"):
        Shards(path)


def test_each_file_is_hashed_once_per_process_until_it_changes(path, monkeypatch) -> None:
    hashed: list[str] = []
    monkeypatch.setattr(verified, "sha256_file", lambda file: hashed.append(file.name) or sha256_file(file))
    for _ in range(2):
        shards = Shards(path)
        shards.read("latent", slice(None))
        list(shards.parts())
    assert sorted(hashed) == sorted(file.name for file in path.iterdir() if file.name != INDEX)
    shard = path / "shard-00000.safetensors"
    flip(shard)
    os.utime(shard, ns=(0, 0))
    with pytest.raises(AtollError, match="shard-00000"):
        Shards(path).read("latent", slice(0, 1))
    # A directory that was opened before notices it when it opens the shard.
    with pytest.raises(AtollError, match="shard-00000"):
        next(shards.parts())


def test_a_broken_header_is_named_without_verify(path) -> None:
    shard = path / "shard-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[8:12] = b"????"
    shard.write_bytes(data)
    shards = Shards(path)
    assert len(shards.read("latent", slice(0, 12))) == 12
    with pytest.raises(AtollError, match=r"shard-00002.*'key-12'"):
        shards.read("latent", torch.tensor([13]))


def test_a_shard_of_other_columns_is_named(path) -> None:
    shard = path / "shard-00001.safetensors"
    tensors, size = load_file(shard), shard.stat().st_size
    save_file({**tensors, "latent": tensors["latent"].transpose(1, 2).contiguous()}, shard)
    assert shard.stat().st_size == size
    entries = json.loads((path / INDEX).read_text())["shards"]
    entries[1]["sha256"] = sha256_file(shard)
    edit(path, shards=entries)
    with pytest.raises(AtollError, match=r"shard-00001.*'key-6'.*its columns are"):
        Shards(path).read("latent", torch.tensor([7]))


def test_a_broken_manifest_is_named(path) -> None:
    data = bytearray((path / MANIFEST).read_bytes())
    data[-4:] = b"\0\0\0\0"
    (path / MANIFEST).write_bytes(data)
    with pytest.raises(AtollError, match=MANIFEST):
        Shards(path)


def edit(path, **changes) -> None:
    index = {**json.loads((path / INDEX).read_text()), **changes}
    (path / INDEX).write_text(json.dumps({key: value for key, value in index.items() if value is not None}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": 2}, "format 2.*reads format 1"),
        ({"kind": "expert"}, "'expert'; expected 'shards'"),
        ({"card": None, "shards": None}, "lacks shards, card"),
        ({"rows": 22}, "do not add up to 22 rows"),
    ],
)
def test_another_index_is_refused(path, changes, said) -> None:
    edit(path, **changes)
    with pytest.raises(AtollError, match=said):
        Shards(path)


def test_no_shards_there(tmp_path, path) -> None:
    with pytest.raises(AtollError, match="not a directory of shards"):
        Shards(tmp_path)
    (path / INDEX).write_text("{")
    with pytest.raises(AtollError, match=INDEX):
        Shards(path)


def test_a_copy_elsewhere_works(tmp_path, path) -> None:
    copy = shutil.copytree(path, tmp_path / "island")
    shutil.rmtree(path)
    assert torch.equal(Shards(copy, verify=True).read("latent", slice(None)), rows()[3]["latent"])


def test_parts_are_the_shards_in_order(path) -> None:
    keys, captions, splits, columns = rows()
    start = 0
    for number, part in enumerate(Shards(path).parts()):
        here = slice(start, start + len(part))
        assert (part.number, part.start) == (number, start)
        assert (part.keys, part.captions, part.splits) == (keys[here], captions[here], splits[here])
        assert torch.equal(part.columns["latent"], columns["latent"][here])
        start += len(part)
    assert start == ROWS


def test_adopting_shards_gives_what_appending_gives(tmp_path, path) -> None:
    with ShardWriter(tmp_path / "adopted", {"made": "here"}) as writer:
        for part in Shards(path).parts():
            writer.adopt(path / f"shard-{part.number:05d}.safetensors", part.keys, part.captions, part.splits)
    assert content(tmp_path / "adopted") == content(path)
    with pytest.raises(ValueError, match="length"), ShardWriter(tmp_path / "other", {}) as writer:
        writer.adopt(path / "shard-00000.safetensors", ["a"], [""], ["train"])
    with pytest.raises(AtollError, match=INDEX), ShardWriter(tmp_path / "other", {}) as writer:
        writer.adopt(path / INDEX, ["a"], [""], ["train"])


@given(st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=9), max_size=6), st.integers(1, 9))
@settings(max_examples=100)
def test_repeats(monkeypatch, parts, at_a_time) -> None:
    monkeypatch.setattr("atoll.storage.shards.repeated._PASS", at_a_time)
    flat = [value for part in parts for value in part]
    expected = {row: flat.index(value) for row, value in enumerate(flat) if value in flat[:row]}
    assert repeats(lambda: parts, len(flat)) == expected


def test_repeats_does_not_take_equal_hashes_for_equal_values() -> None:
    class Same(str):
        def __hash__(self) -> int:
            return 7

        __eq__ = str.__eq__

    assert repeats(lambda: [[Same("a"), Same("b")], [Same("b")]], 3) == {2: 1}


def test_rows_held_back_are_the_same_whoever_asks(tmp_path) -> None:
    keys = [f"image-{i}" for i in range(2000)]
    splits = ["val" if i % 5 == 0 else "train" for i in range(2000)]
    for name, some in (("all", range(2000)), ("first", range(700)), ("rest", range(700, 2000))):
        with ShardWriter(tmp_path / name, {}) as writer:
            chosen = [[values[i] for i in some] for values in (keys, splits)]
            writer.append(chosen[0], [""] * len(some), chosen[1], {"latent": torch.zeros(len(some), 1)})
    everything = is_held_out([Shards(tmp_path / "all")], 0.1)
    assert torch.equal(is_held_out([Shards(tmp_path / "first"), Shards(tmp_path / "rest")], 0.1), everything)
    assert not everything[::5].any()
    assert 0.07 < everything.float().mean() / 0.8 < 0.13
    assert (everything <= is_held_out([Shards(tmp_path / "all")], 0.3)).all()
    assert is_held_out([Shards(tmp_path / "all")], 1e-9).sum() == 1


def rewrite_manifest(path: Path, **changes: object) -> None:
    """Write the manifest anew with other columns (None: without it), and its hash into the index."""
    with pq.ParquetFile(path / MANIFEST) as file:
        groups = [file.read_row_group(number) for number in range(file.num_row_groups)]
    for number, table in enumerate(groups):
        for name, value in changes.items():
            at = table.schema.get_field_index(name)
            column = None if value is None else pa.array([value(i) for i in range(len(table))])
            groups[number] = table = table.drop([name]) if column is None else table.set_column(at, name, column)
    with pq.ParquetWriter(path / MANIFEST, groups[0].schema, compression="zstd") as writer:
        for table in groups:
            writer.write_table(table)
    index = json.loads((path / INDEX).read_text())
    index["manifest"] |= {"bytes": (path / MANIFEST).stat().st_size, "sha256": sha256_file(path / MANIFEST)}
    (path / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"caption": None}, r".*expected the texts key, caption, split"),
        ({"caption": lambda i: i}, r"its columns are .*'caption': 'int64'"),
        ({"caption": lambda i: "a" if i else None}, r"caption: 1 rows have none"),
        ({"split": lambda i: "holiday"}, r"split: 'holiday', expected train or val"),
        ({"caption": lambda i: "a" * 100_000}, r"caption: a text of 100,000 bytes, expected at most 65,536"),
        ({"key": lambda i: f"{i}" + "a" * 5_000_000}, r"key: \d+,\d+,\d+ bytes of 6 rows"),
    ],
    ids=["none", "numbers", "null", "split", "long", "bomb"],
)
def test_a_manifest_that_no_writer_writes_is_refused(path, changes, problem) -> None:
    rewrite_manifest(path, **changes)
    with pytest.raises(AtollError, match=rf"manifest\.parquet is corrupt: {problem}"):
        [*Shards(path).parts()]
    with pytest.raises(AtollError, match=problem):
        print(*(getattr(Shards(path), f"{name}s") for name in changes))


def test_the_longest_caption_is_read_though_all_rows_repeat_it(tmp_path) -> None:
    keys, _, splits, columns = rows()
    with ShardWriter(tmp_path / "data", {"made": "here"}) as writer:
        writer.append(keys, ["é" * 32_768] * ROWS, splits, columns)
    assert Shards(tmp_path / "data").captions == ["é" * 32_768] * ROWS


def test_a_caption_that_no_reader_accepts_is_not_written(tmp_path) -> None:
    keys, captions, splits, columns = rows()
    with pytest.raises(AtollError, match=r"a key or caption of 65,538 bytes"), ShardWriter(tmp_path / "data", {}) as w:
        w.append(keys, ["é" * 32_769, *captions[1:]], splits, columns)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("change", ["manifest", "twice"])
def test_an_index_whose_hashes_leave_a_file_out_is_refused(path, change) -> None:
    index = json.loads((path / INDEX).read_text())
    if change == "manifest":
        shutil.copy(path / MANIFEST, path / "other.parquet")
        index["manifest"]["file"] = "other.parquet"
    else:
        index["shards"][1] = index["shards"][0]
    (path / INDEX).write_text(json.dumps(index))
    with pytest.raises(AtollError, match=r"names another manifest than manifest\.parquet, or a shard twice"):
        Shards(path)
