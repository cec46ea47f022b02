"""A stranger's data are bounded: in memory, in what is opened, and in what reaches the terminal."""

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.data import limits, parquet_rows
from atoll.data.folder import Folder
from atoll.data.names import json_line
from atoll.data.parquet import Parquet
from atoll.data.parquet_rows import batches, plain_rows
from atoll.data.tars import Tars
from atoll.data.types import Raw, Skipped, Source
from atoll.errors import AtollError
from atoll.manifest import DataSettings
from atoll.storage import parquet_pages
from tests.data.test_tars import tar_bytes

MIB = 1 << 20


def read(source: Source) -> list[Raw | Skipped]:
    return [sample for block in source.blocks() for sample in source.read(block)]


def settings(path, source: str, **options) -> DataSettings:
    return DataSettings(source=source, path=str(path), **options)


# Parquet


def test_a_page_of_text_that_unpacks_to_too_much_is_not_unpacked(tmp_path) -> None:
    table = {"image": [b"x", b"y"], "text": ["a" * (65 * MIB), "short"]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet", compression="zstd")
    del table
    assert (tmp_path / "a.parquet").stat().st_size < MIB
    source = Parquet(settings(tmp_path, "parquet"))
    before = pa.default_memory_pool().bytes_allocated()
    peak = pa.default_memory_pool().max_memory()
    (lost,) = read(source)
    assert "column 'text' unpacks" in lost.reason
    assert pa.default_memory_pool().max_memory() == peak or pa.default_memory_pool().max_memory() < before + 50 * MIB


def test_a_long_caption_is_skipped_alone(tmp_path) -> None:
    table = {"image": [b"x", b"y", b"z"], "text": ["a", "b" * (limits.MAX_CAPTION_BYTES + 1), "c" * 65536]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    found = read(Parquet(settings(tmp_path, "parquet")))
    assert [isinstance(sample, Raw) for sample in found] == [True, False, True]
    assert found[1].reason == "caption: 65,537 bytes, expected at most 65,536"


@pytest.mark.parametrize("column", ["image", "text"])
def test_rows_that_share_a_large_value_are_read_in_small_numbers(tmp_path, monkeypatch, column) -> None:
    monkeypatch.setattr(parquet_rows, "MAX_BATCH_BYTES", 4 * MIB)
    values = {"image": [b"x"] * 40, "text": ["t"] * 40}
    values[column] = [bytes(MIB) if column == "image" else "a" * MIB] * 40
    pq.write_table(pa.table(values), tmp_path / "a.parquet", compression="zstd", dictionary_pagesize_limit=1 << 30)
    sizes = [len(batch) for batch in batches(str(tmp_path / "a.parquet"), None, ["image", "text"], ["text"])]
    assert sum(sizes) == 40
    assert max(sizes) == 3  # one entry of the dictionary has 1 MiB and 4 bytes


def test_large_plain_images_still_load(tmp_path) -> None:
    """A blank image as BMP compresses a thousandfold: small ones are no bombs."""
    pq.write_table(pa.table({"image": [bytes(4 * MIB)] * 3}), tmp_path / "a.parquet", compression="zstd")
    assert [len(raw.image) for raw in read(Parquet(settings(tmp_path, "parquet")))] == [4 * MIB] * 3


def test_metadata_in_parquet_is_bounded_too(tmp_path) -> None:
    pq.write_table(pa.table({"file_name": ["a.jpg"], "text": ["a" * (65 * MIB)]}), tmp_path / "metadata.parquet")
    (tmp_path / "a.jpg").write_bytes(b"x")
    with pytest.raises(AtollError, match=r"metadata\.parquet: cannot be read \(column 'text' unpacks"):
        Folder(settings(tmp_path, "folder"))
    (tmp_path / "metadata.parquet").unlink()
    pq.write_table(pa.table({"file_name": ["a.jpg"], "text": ["a" * 70_000]}), tmp_path / "metadata.parquet")
    (lost,) = read(Folder(settings(tmp_path, "folder")))
    assert lost.reason == "caption: 70,000 bytes, expected at most 65,536 (metadata.parquet:1)"


@pytest.mark.parametrize(
    "options", [{}, {"data_page_version": "2.0"}, {"use_dictionary": False}, {"compression": "none"}]
)
def test_the_pages_of_every_kind_of_file_are_followed(tmp_path, options) -> None:
    words = [f"word {i % 7} {i}" for i in range(5000)]
    pq.write_table(pa.table({"a": words, "b": list(range(5000))}), tmp_path / "a.parquet", row_group_size=1000,
                   data_page_size=2048, **options)  # fmt: skip
    with (tmp_path / "a.parquet").open("rb") as file, pq.ParquetFile(file) as opened:
        for group in range(5):
            chunk = opened.metadata.row_group(group).column(0)
            start = chunk.dictionary_page_offset if chunk.has_dictionary_page else chunk.data_page_offset
            pages = list(parquet_pages.pages(file, start, chunk.total_compressed_size))
            assert len(pages) > ("use_dictionary" not in options)  # a dictionary is a page of its own
            assert sum(page.unpacked for page in pages) <= chunk.total_uncompressed_size
    rows = list(plain_rows(str(tmp_path / "a.parquet"), lambda name: True))
    assert [row["a"].decode() for row in rows] == words
    assert [row["b"] for row in rows] == list(range(5000))


@given(st.binary(max_size=80))
def test_any_bytes_are_a_page_header_or_none(data) -> None:
    try:
        _, end = parquet_pages._header(data, 0)
    except (IndexError, ValueError):
        return
    assert 0 < end <= len(data)


# Tars


def bomb(name: str, size: int) -> bytes:
    return tar_bytes(("0.jpg", b"good"), (name, bytes(size)), ("9.jpg", b"good"))


@pytest.mark.parametrize(("pack", "kind"), [(gzip.compress, "tar.gz"), (bz2.compress, "tgz"), (lzma.compress, "tar")])
@pytest.mark.parametrize("name", ["1.jpg", "1.bin"])
def test_a_tar_that_unpacks_to_too_much_is_not_unpacked(tmp_path, pack, kind, name) -> None:
    (tmp_path / f"a.{kind}").write_bytes(pack(bomb(name, 96 * MIB)))
    good, lost = read(Tars(settings(tmp_path, "webdataset")))
    assert good.image == b"good"
    assert "bytes unpack to 100," in lost.reason
    assert "1 samples were read before" in lost.reason


def test_zeros_without_end_behind_a_tar(tmp_path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(tar_bytes(("0.jpg", b"good")) + bytes(160 * MIB)))
    (lost,) = read(Tars(settings(tmp_path, "webdataset")))
    assert "unpack to" in lost.reason


def test_extended_headers_are_bounded(tmp_path) -> None:
    header = tarfile.TarInfo("x" * 50)
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 40 * MIB
    content = header.tobuf(tarfile.GNU_FORMAT) + b"n" * header.size + tar_bytes(("1.jpg", b"x"))
    (tmp_path / "a.tar").write_bytes(content)
    (lost,) = read(Tars(settings(tmp_path, "webdataset")))
    assert "an extended header of 41,943,040 bytes, expected at most 1,048,576" in lost.reason


def test_links_inside_a_tar_are_named_and_not_followed(tmp_path) -> None:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for name, kind, target in (("1.jpg", tarfile.SYMTYPE, "/etc/passwd"), ("2.jpg", tarfile.FIFOTYPE, ""),
                                   ("3.jpg", tarfile.LNKTYPE, "1.jpg")):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
        for name, kind in (("4.jpg", tarfile.REGTYPE), ("4.txt", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, "/etc/passwd", 1 if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(b"x"))
    (tmp_path / "a.tar").write_bytes(sink.getvalue())
    assert {sample.key: sample.reason for sample in read(Tars(settings(tmp_path, "webdataset")))} == {
        "a/1": "image: a link inside the tar, which is not followed",
        "a/2": "image: a pipe or a device inside the tar, which is not followed",
        "a/3": "image: a link inside the tar, which is not followed",
        "a/4": "caption: txt is a link inside the tar, which is not followed",
    }


def test_long_text_in_a_tar_is_skipped_alone(tmp_path) -> None:
    members = [("1.jpg", b"x"), ("1.txt", b"a" * 70_000), ("2.jpg", b"x"), ("2.json", b'"' + b"a" * 2 * MIB + b'"')]
    (tmp_path / "a.tar").write_bytes(tar_bytes(*members, ("3.jpg", b"x")))
    one, two, three = read(Tars(settings(tmp_path, "webdataset")))
    assert one.reason == "caption: 70,000 bytes, expected at most 65,536"
    assert two.reason == "json: 2,097,154 bytes, expected at most 1,048,576"
    assert three.caption == ""


# Folders


def write(root, **files: bytes | str) -> None:
    for name, content in files.items():
        data = content.encode() if isinstance(content, str) else content
        (root / name.replace("__", "/").replace("_", ".")).write_bytes(data)


def test_pipes_and_devices_in_a_folder_are_named(tmp_path) -> None:
    write(tmp_path, a_jpg="1", b_jpg="2", c_jpg="3", c_txt="three")
    os.mkfifo(tmp_path / "a.txt")
    os.symlink("/dev/zero", tmp_path / "b.txt")
    os.mkfifo(tmp_path / "d.jpg")
    found = {
        sample.key: getattr(sample, "caption", None) or sample.reason
        for sample in read(Folder(settings(tmp_path, "folder")))
    }
    assert found["c.jpg"] == "three"
    assert found["a.jpg"] == "caption: a.txt is a pipe, which is not opened"
    assert found["b.jpg"].startswith("caption: b.txt is a link that leaves the folder")
    assert found["d.jpg"] == "image: a pipe, which is not opened"
    os.mkfifo(tmp_path / "metadata.jsonl")
    with pytest.raises(AtollError, match=r"metadata\.jsonl: is a pipe, which is not opened"):
        Folder(settings(tmp_path, "folder"))


def test_links_out_of_a_folder_are_named(tmp_path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write(tmp_path, secret_txt="a secret", far_jpg="far", metadata_jsonl='{"file_name": "a.jpg", "text": "a secret"}')
    write(data, a_jpg="1")
    os.symlink("../secret.txt", data / "a.txt")
    os.symlink(tmp_path / "far.jpg", data / "b.jpg")
    os.symlink("a.jpg", data / "c.jpg")  # within the folder
    found = {sample.key: sample for sample in read(Folder(settings(data, "folder")))}
    assert found["a.jpg"].reason.startswith("caption: a.txt is a link that leaves the folder")
    assert found["b.jpg"].reason.startswith("image: a link that leaves the folder")
    assert "data.links: follow" in found["b.jpg"].reason
    assert found["c.jpg"].image == b"1"
    followed = {sample.key: sample.caption for sample in read(Folder(settings(data, "folder", links="follow")))}
    assert followed == {"a.jpg": "a secret", "b.jpg": "", "c.jpg": ""}
    os.symlink("../metadata.jsonl", data / "metadata.jsonl")
    with pytest.raises(AtollError, match=r"metadata\.jsonl: is a link that leaves the folder"):
        Folder(settings(data, "folder"))


def test_rows_of_metadata_open_nothing_outside(tmp_path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    write(tmp_path, far_jpg="far")
    write(data, a_jpg="1")
    names = [
        "../far.jpg",
        str(tmp_path / "far.jpg"),
        "/etc/passwd",
        "a.jpg/../../far.jpg",
        "..\\far.jpg",
        "file:///etc/passwd",
    ]
    rows = [{"file_name": name, "text": "x"} for name in names]
    (data / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = read(Folder(settings(data, "folder", allow_uncaptioned=True)))
    assert [sample.key for sample in found if isinstance(sample, Raw)] == ["a.jpg"]
    assert all("which is not there" in sample.reason for sample in found if isinstance(sample, Skipped))


def test_long_sidecars_and_lines_are_skipped_alone(tmp_path) -> None:
    write(tmp_path, a_jpg="1", a_txt="a" * (2 * MIB), b_jpg="2", b_txt="b" * 65537, c_jpg="3")
    lines = ['{"file_name": "c.jpg", "text": "' + "c" * (3 * MIB) + '"}', '{"file_name": "d.jpg", "text": "four"}']
    write(tmp_path, d_jpg="4", metadata_jsonl="\n".join(lines))
    found = {
        sample.key: getattr(sample, "caption", None) or getattr(sample, "reason", "")
        for sample in read(Folder(settings(tmp_path, "folder")))
    }
    assert found["a.jpg"] == "too large: a.txt has more than 1,048,576 bytes"
    assert found["b.jpg"] == "caption: 65,537 bytes, expected at most 65,536"
    assert found["metadata.jsonl:1"] == "metadata: this line has more than 1,048,576 characters"
    assert (found["c.jpg"], found["d.jpg"]) == ("", "four")


@pytest.mark.parametrize(
    "text",
    [
        'file_name,text\na.jpg,"' + "x" * 2_000_000 + '"\nb.jpg,two\n',
        "file_name,text\na.jpg," + "x" * 2_000_000 + "\nb.jpg,two\n",
    ],
)
def test_long_cells_of_csv_are_skipped_alone(tmp_path, text) -> None:
    write(tmp_path, a_jpg="1", b_jpg="2", metadata_csv=text)
    found = read(Folder(settings(tmp_path, "folder")))
    assert {raw.key: raw.caption for raw in found if isinstance(raw, Raw)}["b.jpg"] == "two"
    assert any("this line" in sample.reason for sample in found if isinstance(sample, Skipped))


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"a":' * 100_000, "{", "[1, 2", "\ufeff", '{"images": [], "annotations": []}']
)
def test_a_json_of_another_kind_is_one_line(tmp_path, content) -> None:
    write(tmp_path, a_jpg="1", metadata_json=content)
    with pytest.raises(AtollError, match=r"^metadata\.json: ") as error:
        Folder(settings(tmp_path, "folder"))
    assert "\n" not in str(error.value)


def test_control_characters_of_names_reach_no_terminal(tmp_path) -> None:
    name = "a\x1b[2J\x9b31m\u202egpj"
    write(tmp_path, **{f"{name}_jpg": "1", f"{name}_txt": "x", f"{name}_caption": "y", f"{name}-mask_png": "2"})
    (tmp_path / f"{name}.csv").write_text(f"file,{name} caption\n1,2\n")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": f"{name}.gone", "text": "x"}))
    source = Folder(settings(tmp_path, "folder"))
    said = [*source.notes(), *(sample.reason for sample in read(source) if isinstance(sample, Skipped))]
    assert len(said) >= 3
    assert all(text.isprintable() for text in said), said
    (tmp_path / f"{name}.jpg").unlink()
    (tmp_path / f"{name}-mask.png").unlink()
    for kind in ("folder", "webdataset", "parquet"):
        with pytest.raises(AtollError) as error:
            {"folder": Folder, "webdataset": Tars, "parquet": Parquet}[kind](settings(tmp_path / name, kind))
        assert str(error.value).isprintable()


def test_lists_of_what_was_skipped_are_safe_to_print() -> None:
    for text in ("a\x1b[2J", "\x9b31m", "\u202egpj", "\U000e0041", "plain caf\u00e9 \u732b"):
        line = json_line({"key": text})
        assert line[:-1].isprintable()
        assert json.loads(line) == {"key": text}
    assert "caf\u00e9 \u732b" in line


@pytest.mark.parametrize("name", ["a_stats.json", "b.tar", "c.parquet"])
def test_pipes_beside_archives_are_not_opened(tmp_path, name) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes(("1.jpg", b"x")))
    pq.write_table(pa.table({"image": [b"x"]}), tmp_path / "a.parquet")
    os.mkfifo(tmp_path / name)
    for source, kind in ((Tars, "webdataset"), (Parquet, "parquet")):
        found = read(source(settings(tmp_path, kind)))
        assert found[0].image == b"x"
        if name.endswith(".tar" if kind == "webdataset" else ".parquet"):
            assert "it is a pipe, which is not opened" in found[1].reason
