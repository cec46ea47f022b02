import io
import pickle
import random
import re
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.data.parquet import EMBED, Parquet, cut
from atoll.data.types import Raw, Skipped
from atoll.errors import AtollError
from atoll.manifest import DataSettings

REAL = Path(__file__).parents[2] / ".." / "shared" / "data"


def image_bytes(number: int) -> bytes:
    """Not an image, which sources do not look at; of a length of its own."""
    return random.Random(number).randbytes(100 + 7 * number)


def table(count: int, start: int = 0) -> pa.Table:
    numbers = range(start, start + count)
    return pa.table(
        {"label": list(numbers), "image": [image_bytes(n) for n in numbers], "caption": [f"p {n}" for n in numbers]}
    )


def settings(path, **options) -> DataSettings:
    return DataSettings(source="parquet", path=str(path), **options)


def read(path, **options) -> list[Raw | Skipped]:
    source = Parquet(settings(path, **options))
    return [sample for block in source.blocks() for sample in source.read(block)]


def one(tmp_path, columns, **options) -> list[Raw | Skipped]:
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), tmp_path / "a.parquet")
    return read(tmp_path, **options)


@pytest.mark.parametrize("block", [1, 3, 7, 10, 25, 1000])
def test_every_row_once_whatever_the_blocks(tmp_path, block) -> None:
    (tmp_path / "in").mkdir()
    pq.write_table(table(25), tmp_path / "b.parquet", row_group_size=10)
    pq.write_table(table(4, 25), tmp_path / "in" / "a.parquet")
    source = Parquet(settings(tmp_path, block=block))
    blocks = source.blocks()
    assert len({part.name for part in blocks}) == len(blocks)
    found = []
    for part in blocks:
        samples = list(source.read(part))
        assert len(samples) == part.samples <= block
        found += samples
    assert [raw.key for raw in found] == [f"b.parquet:{n}" for n in range(25)] + [f"in/a.parquet:{n}" for n in range(4)]
    for number, raw in enumerate(found):
        assert (raw.image, raw.caption) == (image_bytes(number), f"p {number}")


@given(st.lists(st.integers(0, 40), max_size=12), st.integers(1, 20))
def test_cut(groups, block) -> None:
    """Each row is in one part; parts follow one another, and are whole row groups or lie within one."""
    starts = [sum(groups[:i]) for i in range(len(groups))]
    row = 0
    for together, before, start, stop in cut(groups, block):
        assert start == row < stop <= start + block
        assert starts[together[0]] + before == start
        assert len(together) == 1 or (before, stop) == (0, start + sum(groups[i] for i in together))
        row = stop
    assert row == sum(groups)


def test_small_row_groups_are_read_together() -> None:
    assert list(cut([10, 10, 10, 5], 25)) == [((0, 1), 0, 0, 20), ((2, 3), 0, 20, 35)]
    assert list(cut([10, 15, 1], 25)) == [((0, 1), 0, 0, 25), ((2,), 0, 25, 26)]
    assert list(cut([3, 60, 0, 4], 25)) == [
        ((0,), 0, 0, 3),
        *[((1,), 25 * i, 3 + 25 * i, min(28 + 25 * i, 63)) for i in range(3)],
        ((3,), 0, 63, 67),
    ]


@pytest.mark.parametrize("kind", ["binary", "large_binary", "binary_view", "struct", "path", "dictionary"])
def test_kinds_of_columns(tmp_path, kind) -> None:
    images, captions = [image_bytes(number) for number in range(3)], pa.array(["a", "b", "c"])
    column = pa.array(images)
    if kind in ("struct", "path"):  # an Image feature of Hugging Face
        where = pa.array(["x.png", None, "z.png"])
        fields = {"bytes": column, "path": where} if kind == "path" else {"bytes": column}
        column = pa.StructArray.from_arrays(list(fields.values()), names=list(fields))
    elif kind != "dictionary":
        column = column.cast(getattr(pa, kind)())
        captions = pa.array(["a", "b", "c"], pa.string_view() if kind == "binary_view" else pa.large_string())
    else:
        captions = captions.dictionary_encode()
    found = one(tmp_path, {"n": [1, 2, 3], "x": column, "text": captions}, key="n")
    assert [(raw.image, raw.caption, raw.key) for raw in found] == list(zip(images, "abc", "123", strict=True))


def test_columns_by_name(tmp_path) -> None:
    columns = {
        "a": [b"a0", b"a1", b"a2"],
        "b": [b"b0", b"b1", b"b2"],
        "caption": ["x", "y", "z"],
        "alt": ["u", None, " w\n"],
        "id": ["k0", "k1", "k2"],
        "fold": ["train", "test", None],
    }
    found = one(tmp_path, columns, image="b", caption="alt", key="id", split="fold")
    assert [(raw.key, raw.image, raw.caption, raw.split) for raw in found] == [
        ("k0", b"b0", "u", "train"),
        ("k1", b"b1", "", "val"),
        ("k2", b"b2", "w", "val"),
    ]


def test_captions_in_bytes(tmp_path) -> None:
    """A column of bytes that is named as captions is not one of images."""
    columns = {"x": [b"1", b"2"], "raw": ["café".encode(), b" r "]}
    assert [(raw.image, raw.caption) for raw in one(tmp_path, columns, caption="raw")] == [(b"1", "café"), (b"2", "r")]


def test_text_in_dictionaries(tmp_path) -> None:
    words = pa.array(["train", "test", None, "train"]).dictionary_encode()
    found = one(tmp_path, {"x": [b"1", b"2", b"3", b"4"], "w": words}, caption="w", split="w")
    assert [(raw.caption, raw.split) for raw in found] == [
        ("train", "train"),
        ("test", "val"),
        ("", "val"),
        ("train", "train"),
    ]


def test_without_captions(tmp_path) -> None:
    assert [raw.caption for raw in one(tmp_path, {"x": [b"1", b"2"]})] == ["", ""]


def test_held_out_by_a_hash_of_the_key(tmp_path) -> None:
    columns = {"x": [b"1"] * 400, "id": list(range(400))}
    splits = {raw.key: raw.split for raw in one(tmp_path, columns, key="id", validation=0.25)}
    assert 60 < list(splits.values()).count("val") < 140
    turned = {name: values[::-1] for name, values in columns.items()}
    assert {raw.key: raw.split for raw in one(tmp_path, turned, key="id", validation=0.25)} == splits


def test_bad_cells_are_skipped_alone(tmp_path) -> None:
    latin = pa.Array.from_buffers(pa.string(), 6, pa.array([b"a", b"caf\xe9", b"c", b"d", b"e", b"f"]).buffers())
    images = pa.array(
        [{"bytes": b"0"}, {"bytes": b"1"}, None, {"path": "x/y.png"}, {"bytes": b"4"}, {"bytes": b"5"}],
        pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    )
    found = one(tmp_path, {"image": images, "caption": latin, "id": ["0", "1", "2", "3", None, "5"]}, key="id")
    assert [raw.key for raw in found if isinstance(raw, Raw)] == ["0", "5"]
    assert [(bad.key, bad.reason) for bad in found if isinstance(bad, Skipped)] == [
        ("1", "caption: not utf-8 (byte 0xe9 at 3); save it as utf-8, or set data.encoding (row 1 of a.parquet)"),
        ("2", "image: null"),
        ("3", f"image: a path (x/y.png), no bytes; {EMBED}"),
        ("a.parquet:4", "key: is None, expected text or a whole number"),
    ]
    assert read(tmp_path, encoding="latin-1")[1].caption == "café"


@pytest.mark.parametrize(
    ("columns", "options", "said"),
    [
        ({"a": [1], "b": ["x"]}, {}, r"no column that holds bytes; it has a \(int64\), b \(string\).*data.image"),
        ({"a": [b"x"], "b": [b"x"]}, {}, r"2 columns that hold bytes; it has a \(binary\), b \(binary\)"),
        ({"a": [b"x"]}, {"image": "b"}, r"no column 'b', which data.image names; it has a \(binary\)"),
        ({"a": [b"x"]}, {"caption": "b"}, "no column 'b', which data.caption names"),
        ({"a": [b"x"]}, {"key": "b"}, "no column 'b', which data.key names"),
        ({"a": [b"x"]}, {"split": "b"}, "no column 'b', which data.split names"),
        ({"a": [b"x"], "b": [1]}, {"image": "b"}, "column 'b' is int64, expected bytes, or a struct with bytes"),
        (
            {"a": [b"x"], "b": [1]},
            {"caption": "b"},
            r"column 'b' is int64, expected text, or a list of .*set data\.caption",
        ),
        (
            {"a": [b"x"], "caption": [[["x"]]]},
            {},
            "column 'caption' is list.*a list of lists, expected text, or a list",
        ),
        ({"a": [b"x"], "b": [1.5]}, {"key": "b"}, "column 'b' is double, expected text"),
    ],
)
def test_columns_that_do_not_fit_are_named(tmp_path, columns, options, said) -> None:
    with pytest.raises(AtollError, match=rf"^a\.parquet: .*{said}"):
        one(tmp_path, columns, **options)


def test_a_column_twice(tmp_path) -> None:
    with pytest.raises(AtollError, match=r"more than one column 'x', which data\.image names"):
        one(tmp_path, pa.Table.from_arrays([pa.array([b"1"]), pa.array([b"2"])], names=["x", "x"]), image="x")


def test_files_that_differ(tmp_path) -> None:
    pq.write_table(table(3), tmp_path / "a.parquet")
    pq.write_table(
        table(3).select(["image", "caption", "label"]), tmp_path / "b.parquet"
    )  # columns that are used agree
    assert len(read(tmp_path)) == 6
    pq.write_table(table(3).drop_columns("caption"), tmp_path / "b.parquet")
    with pytest.raises(AtollError, match=r"^b\.parquet: column 'caption' is missing, in a\.parquet it is string"):
        read(tmp_path)
    pq.write_table(table(3).set_column(1, "image", pa.array([1, 2, 3])), tmp_path / "b.parquet")
    with pytest.raises(AtollError, match=r"column 'image' is int64, in a\.parquet it is binary"):
        read(tmp_path)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no parquet", b"PAR1" + bytes(50) + b"\x20\0\0\0PAR1"])
def test_a_file_without_a_footer_is_one_skipped_beside_the_others(tmp_path, content) -> None:
    pq.write_table(table(3), tmp_path / "a.parquet")
    (tmp_path / "0.parquet").write_bytes(content)
    bad, *good = read(tmp_path)
    assert bad.key == "0.parquet"
    assert bad.reason.startswith("parquet: ")
    assert "\n" not in bad.reason
    assert [raw.image for raw in good] == [image_bytes(n) for n in range(3)]
    (tmp_path / "a.parquet").unlink()
    assert [sample.key for sample in read(tmp_path)] == ["0.parquet"]


def test_damage_in_the_middle_loses_what_comes_after_in_its_block_only(tmp_path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(
        table(90), file, row_group_size=30, compression="none", use_dictionary=False, write_page_checksum=True
    )
    at = file.read_bytes().index(image_bytes(40))
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)
    samples = read(tmp_path, block=30)
    numbers = [*range(30), *range(60, 90)]
    assert [raw.image for raw in samples if isinstance(raw, Raw)] == [image_bytes(number) for number in numbers]
    (bad,) = (sample for sample in samples if isinstance(sample, Skipped))
    assert bad.key == "a.parquet:30-60"
    assert "0 of 30 rows were read before that" in bad.reason
    assert "CRC" in bad.reason


def test_a_file_that_vanishes_is_skipped(tmp_path) -> None:
    pq.write_table(table(3), tmp_path / "a.parquet")
    source = Parquet(settings(tmp_path))
    (tmp_path / "a.parquet").unlink()
    (bad,) = source.read(source.blocks()[0])
    assert "No such file" in bad.reason


def test_a_footer_that_promises_endless_rows(tmp_path) -> None:
    pq.write_table(table(1), tmp_path / "a.parquet")
    source = Parquet(settings(tmp_path))
    source._files.sizes["a.parquet"] = 0
    assert "1 rows in 0 bytes" in source._footer("a.parquet").damage


def test_bounded_memory(tmp_path, monkeypatch) -> None:
    """A row group of 64 MB, in pages of 1 MB, is read in pieces."""
    largest = []

    class Watched(io.FileIO):
        def read(self, size=-1):
            data = super().read(size)
            largest.append(len(data))
            return data

    column = [random.Random(n).randbytes(1 << 16) for n in range(1024)]
    pq.write_table(pa.table({"x": column}), tmp_path / "a.parquet", compression="none", write_batch_size=16)
    source = Parquet(settings(tmp_path))
    monkeypatch.setattr("atoll.data.parquet_rows.open_file", Watched)
    before, most, rows = pa.total_allocated_bytes(), 0, 0
    for raw in source.read(source.blocks()[0]):
        assert raw.image == column[rows]
        most, rows = max(most, pa.total_allocated_bytes() - before), rows + 1
    assert rows == 1024
    assert most < 16 << 20
    assert 0 < max(largest) <= 2 << 20


def test_elsewhere(tmp_path) -> None:
    """A source and a block can be sent to another process; nothing else goes along."""
    for number in range(50):
        pq.write_table(table(2, number), tmp_path / f"{number:05d}.parquet")
    source = Parquet(settings(tmp_path))
    sent = pickle.dumps((source, source.blocks()[7]))
    assert len(sent) < 3_000
    copy, block = pickle.loads(sent)
    assert [raw.image for raw in copy.read(block)] == [image_bytes(7), image_bytes(8)]


def test_urls() -> None:
    fs = fsspec.filesystem("memory")
    sink = pa.BufferOutputStream()
    pq.write_table(table(5), sink)
    fs.pipe("/data/train.parquet", sink.getvalue().to_pybytes())
    try:
        samples = read("memory://data", block=2)
        assert [raw.image for raw in samples] == [image_bytes(number) for number in range(5)]
        assert samples[3].key == "train.parquet:3"
    finally:
        fs.store.clear()


def test_config_and_fingerprint(tmp_path) -> None:
    pq.write_table(table(5), tmp_path / "a.parquet")
    source = Parquet(settings(tmp_path, image="image", validation=0.5))
    assert source.config() == {
        "name": "parquet",
        "path": str(tmp_path),
        "image": "image",
        "caption": None,
        "key": None,
        "split": None,
        "validation": 0.5,
        "encoding": "utf-8",
    }
    assert source.fingerprint() == Parquet(settings(tmp_path / "a.parquet")).fingerprint()
    pq.write_table(table(6), tmp_path / "a.parquet")
    assert Parquet(settings(tmp_path)).fingerprint() != source.fingerprint()


@pytest.mark.parametrize(
    "options", [{}, {"compression": "none", "use_dictionary": False}, {"data_page_version": "2.0"}]
)
def test_fuzz(tmp_path, options) -> None:
    """Mutated and cut files raise nothing but AtollError; with checksums, each sample that comes is an original."""
    (tmp_path / "in").mkdir()
    pq.write_table(table(40), tmp_path / "whole", row_group_size=10, write_page_checksum=True, **options)
    whole = (tmp_path / "whole").read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    originals = {(image_bytes(number), f"p {number}") for number in range(40)}
    damaged_columns: list[int] = []
    for seed in range(150):
        chance = random.Random(seed)
        data, kind = bytearray(whole), seed % 3
        if kind == 0:
            data = data[: chance.randrange(len(data))]
        else:
            low, high = (0, footer) if kind == 1 else (footer, len(data))
            for _ in range(chance.choice([1, 3, 20])):
                at, size = chance.randrange(low, high), chance.choice([1, 1, 8, 100])
                data[at : at + size] = (chance.randbytes(size) if chance.random() < 0.7 else bytes(size))[: high - at]
        (tmp_path / "in" / "a.parquet").write_bytes(data)
        try:
            samples = read(tmp_path / "in", block=15)
        except AtollError:
            damaged_columns += [kind]
            continue
        good = [sample for sample in samples if isinstance(sample, Raw)]
        assert len(samples) <= 8 * len(data)
        assert all("\n" not in sample.reason for sample in samples if isinstance(sample, Skipped))
        assert len(good) == 40 or len(samples) > len(good) or kind == 2
        if kind != 2:
            assert all((raw.image, raw.caption) in originals for raw in good), seed
    assert set(damaged_columns) <= {2}  # only a damaged footer can name other columns


@pytest.mark.skipif(not REAL.is_dir(), reason="the real images are not here")
@pytest.mark.parametrize(
    ("path", "options", "rows", "held_out", "caption", "magic"),
    [
        ("emoji64.parquet", {"split": "split"}, 10_507, 650, "hash sign, noto style", b"RIFF"),
        ("eurosat64_*.parquet", {}, 27_000, None, "a satellite photo of annual crop land", b"\xff\xd8\xff"),
        ("flowers128.parquet", {}, 3_670, None, "a photo of a dandelion", b"RIFF"),
    ],
)
def test_real_images(path, options, rows, held_out, caption, magic) -> None:
    source = Parquet(settings(REAL / path, **options))
    blocks = source.blocks()
    assert sum(block.samples for block in blocks) == rows
    found = [sample for block in blocks for sample in source.read(block)]
    assert all(isinstance(sample, Raw) and sample.image.startswith(magic) and sample.caption for sample in found)
    assert len({raw.key for raw in found}) == rows
    assert found[0].caption == caption
    assert [raw.split for raw in found].count("val") == held_out if held_out else True
    assert all(re.fullmatch(r".*\.parquet:\d+", raw.key) for raw in found)
