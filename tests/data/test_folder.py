import codecs
import json
import os
import pickle
import random
from pathlib import Path

import fsspec
import pyarrow.parquet as pq
import pytest

from atoll.data.folder import Folder
from atoll.data.types import Raw, Skipped
from atoll.errors import AtollError
from atoll.manifest import DataSettings

REAL = Path(__file__).parents[2] / ".." / "shared" / "data"


def put(root, **files) -> None:
    """Files by their names, in which __ stands for / and _ for a dot."""
    for name, content in files.items():
        write(root, name.replace("__", "/").replace("_", "."), content)


def write(root, name: str, content: str | bytes) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def settings(path, **options) -> DataSettings:
    return DataSettings(source="folder", path=str(path), **options)


def read(path, **options) -> list[Raw | Skipped]:
    source = Folder(settings(path, **options))
    return [sample for block in source.blocks() for sample in source.read(block)]


def captions(path, **options) -> dict[str, str]:
    """key -> caption of the samples, all of which must be good."""
    samples = read(path, **options)
    assert not [sample for sample in samples if isinstance(sample, Skipped)]
    return {raw.key: raw.caption for raw in samples}


def lines(*records) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def test_images_with_sidecars(tmp_path) -> None:
    put(
        tmp_path, b_JPG="1", b_txt=" a  cat\n", a__z_png="2", a__z_txt="a dog\non two\r\nlines\n", c_webp="3", d_pdf="4"
    )
    put(tmp_path, _hidden_jpg="5", a__c_avif="6", a__c_Tiff="7", a__c_txt="both", lone_txt="nobody's")
    samples = read(tmp_path)
    assert [(raw.key, raw.image, raw.caption) for raw in samples] == [
        ("a/c.Tiff", b"7", "both"),
        ("a/c.avif", b"6", "both"),
        ("a/z.png", b"2", "a dog on two lines"),
        ("b.JPG", b"1", "a  cat"),
        ("c.webp", b"3", ""),
    ]


@pytest.mark.parametrize("block", [1, 2, 3, 5, 100])
def test_blocks(tmp_path, block) -> None:
    for number in range(11):
        write(tmp_path, f"{number:02d}.jpg", str(number))
    source = Folder(settings(tmp_path, block=block))
    blocks = source.blocks()
    assert blocks == source.blocks()
    assert len({part.name for part in blocks}) == len(blocks)
    found = [list(source.read(part)) for part in blocks]
    assert [len(part) for part in found] == [part.samples for part in blocks]
    assert max(map(len, found)) <= block
    assert [raw.image for part in found for raw in part] == [str(number).encode() for number in range(11)]


def test_metadata_jsonl(tmp_path) -> None:
    put(tmp_path, a_jpg="1", b_jpg="2", c_jpg="3", c_txt="a sidecar", d_jpg="4", d_txt="four", e_jpg="8", e_txt="no")
    put(tmp_path, deep__a_jpg="5", deep__in__b_jpg="6", x__named_dat="7")
    records = [{"file_name": "b.jpg", "text": "no", "caption": "two"}, {"file_name": "a.jpg", "caption": "one"}]
    records += [{"file_name": "d.jpg", "text": None}, {"file_name": "x/named.dat", "text": "seven"}]
    records += [{"file_name": "e.jpg", "text": ""}]
    write(tmp_path, "metadata.jsonl", lines(*records) + "\n\n")
    write(tmp_path, "deep/metadata.jsonl", lines({"file_name": "in/b.jpg", "text": "six"}, {"file_name": "./a.jpg"}))
    assert captions(tmp_path) == {
        "a.jpg": "one",
        "b.jpg": "two",
        "c.jpg": "a sidecar",  # no line names it
        "d.jpg": "four",  # its line has no caption
        "e.jpg": "",  # its line says that there is none
        "deep/a.jpg": "",
        "deep/in/b.jpg": "six",
        "x/named.dat": "seven",  # named, so it is an image whatever its extension
    }


def test_metadata_csv(tmp_path) -> None:
    put(tmp_path, a_jpg="1", b_jpg="2", c_jpg="3")
    text = 'text,file_name\r\n"one, ""two""\nthree",a.jpg\r\n\r\n,b.jpg\r\nplain,c.jpg\r\n'
    for encoded in (text.encode(), codecs.BOM_UTF8 + text.encode(), text.encode("utf-16")):
        write(tmp_path, "metadata.csv", encoded)
        assert captions(tmp_path) == {"a.jpg": 'one, "two" three', "b.jpg": "", "c.jpg": "plain"}


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_columns_by_name(tmp_path, kind) -> None:
    put(tmp_path, a_jpg="1", b_jpg="2")
    rows = [("a.jpg", "x", "train", "k1"), ("b.jpg", "y", "test", "k2")]
    names = ("file_name", "alt", "fold", "id")
    if kind == "jsonl":
        write(tmp_path, "metadata.jsonl", lines(*(dict(zip(names, row, strict=True)) for row in rows)))
    else:
        write(tmp_path, "metadata.csv", "\n".join(",".join(row) for row in (names, *rows)))
    found = read(tmp_path, caption="alt", split="fold", key="id")
    assert [(raw.key, raw.image, raw.caption, raw.split) for raw in found] == [
        ("k1", b"1", "x", "train"),
        ("k2", b"2", "y", "val"),
    ]


def test_what_metadata_says_wrong_is_skipped_and_nothing_else(tmp_path) -> None:
    put(tmp_path, a_jpg="1", b_jpg="2", c_jpg="3", d_jpg="4")
    good = [lines({"file_name": f"{name}.jpg", "text": name}) for name in "abcd"]
    bad = ['{"file_name": "b.jpg"', "[1]\n", lines({"text": "x"}), "[" * 100_000, lines({"file_name": 3})]
    bad += [lines({"file_name": "gone/x.jpg", "text": ""}), lines({"file_name": "../a.jpg"}), good[0]]
    write(tmp_path, "metadata.jsonl", "\n".join([good[0], bad[0], good[1], *bad[1:], *good[2:]]).replace("\n\n", "\n"))
    found = read(tmp_path)
    assert [(raw.key, raw.caption) for raw in found if isinstance(raw, Raw)] == [
        (f"{name}.jpg", name) for name in "abcd"
    ]
    reasons = {sample.key: sample.reason for sample in found if isinstance(sample, Skipped)}
    assert {key: reason.split(" (")[0] for key, reason in reasons.items()} == {
        "metadata.jsonl:2": "metadata: this line is no JSON",
        "metadata.jsonl:4": "metadata: this line is a list, expected an object",
        "metadata.jsonl:5": "metadata: no file_name in this line; it has text",
        "metadata.jsonl:6": "metadata: this line is no JSON",
        "metadata.jsonl:7": "metadata: no file_name in this line; it has file_name",
        "metadata.jsonl:10": "metadata: names a.jpg again",
        "gone/x.jpg": "image: metadata.jsonl:8 names gone/x.jpg, which is not there",
        "../a.jpg": "image: metadata.jsonl:9 names ../a.jpg, which is not there",
    }
    assert "first in metadata.jsonl:1" in reasons["metadata.jsonl:10"]


def test_bad_lines_of_csv(tmp_path) -> None:
    put(tmp_path, a_jpg="1", b_jpg="2")
    write(tmp_path, "metadata.csv", 'file_name,text\na.jpg,one,more\n"a.jpg"x,two\na.jpg\nb.jpg,"three')
    found = read(tmp_path)
    assert {sample.key: sample.reason.split(" (")[0] for sample in found if isinstance(sample, Skipped)} == {
        "metadata.csv:2": "metadata: this line has 3 cells, the header has 2",
        "metadata.csv:3": "metadata: this line is no CSV",
        "metadata.csv:4": "metadata: this line has 1 cells, the header has 2",
        "metadata.csv:5": "metadata: this line is no CSV",
    }
    assert [raw.image for raw in found if isinstance(raw, Raw)] == [b"1", b"2"]


def test_captions_in_another_encoding_are_skipped_or_named(tmp_path) -> None:
    put(tmp_path, a_jpg="1", b_jpg="2", c_jpg="3", d_jpg="4", e_jpg="5", f_jpg="6")
    put(tmp_path, a_txt="café", b_txt="café".encode("latin-1"), c_txt="café".encode("utf-16"))
    metadata = [b'{"file_name": "d.jpg", "text": "caf\xe9"}', b'{"file_name": "e.jpg", "text": "half \\ud83d"}']
    write(tmp_path, "metadata.jsonl", b"\n".join([*metadata, b'{"file_name": "f.jpg", "text": [["a"]]}']))
    found = {sample.key: getattr(sample, "caption", None) or sample.reason for sample in read(tmp_path)}
    assert found == {
        "a.jpg": "café",
        "b.jpg": "caption: not utf-8 (byte 0xe9 at 3); save it as utf-8, or set data.encoding",
        "c.jpg": "café",
        "d.jpg": "caption: not utf-8 (byte 0xe9 at 3); save it as utf-8, or set data.encoding (metadata.jsonl:1)",
        "e.jpg": "caption: not utf-8 (half a character, U+D83D, at 5); save it as utf-8, or set data.encoding "
        "(metadata.jsonl:2)",
        "f.jpg": "caption: item 1 of its list is a list, expected text or {text, weight} (metadata.jsonl:3)",
    }
    found = {sample.key: getattr(sample, "caption", None) for sample in read(tmp_path, encoding="latin-1")}
    assert (found["b.jpg"], found["d.jpg"]) == ("café", "café")


def test_images_without_a_key_or_split_are_skipped(tmp_path) -> None:
    put(tmp_path, a_jpg="1", b_jpg="2", c_jpg="3", d_jpg="4")
    records = [{"file_name": "a.jpg", "id": 7}, {"file_name": "b.jpg", "other": 1}, {"file_name": "c.jpg", "id": None}]
    write(tmp_path, "metadata.jsonl", lines(*records))
    good, *bad = read(tmp_path, key="id")
    assert (good.key, good.image) == ("7", b"1")
    assert [(sample.key, sample.reason) for sample in bad] == [
        ("b.jpg", "no column 'id' in metadata.jsonl:2"),
        ("c.jpg", "key: is None, expected text or a whole number"),
        ("d.jpg", "metadata: no line names this image, so its key or split is unknown"),
    ]


@pytest.mark.parametrize(
    ("metadata", "options", "said"),
    [
        ({}, {"caption": "alt"}, "no column 'alt', which data.caption names; there is no metadata"),
        ({}, {"key": "id"}, "no column 'id', which data.key names; there is no metadata"),
        ({"jsonl": lines({"file_name": "a.jpg", "text": ""})}, {"split": "s"}, "no column 's'.*file_name, text"),
        ({"jsonl": lines({"file_name": "a.jpg", "text": ""})}, {"caption": "alt"}, "no column 'alt'.*file_name, text"),
        ({"csv": "name;text\na.jpg;x"}, {}, "metadata.csv: no column 'file_name'; its columns are name;text"),
        ({"csv": "file_name,text\n", "jsonl": ""}, {}, "holds both metadata.jsonl and metadata.csv; remove one"),
        ({"jsonl": codecs.BOM_UTF16_LE + b"a"}, {}, "metadata.jsonl: not utf-16"),
        ({}, {"encoding": "utf-9"}, "data.encoding is 'utf-9'"),
    ],
)
def test_errors(tmp_path, metadata, options, said) -> None:
    put(tmp_path, a_jpg="1")
    for kind, content in metadata.items():
        write(tmp_path, f"metadata.{kind}", content)
    with pytest.raises(AtollError, match=said):
        read(tmp_path, **options)


def test_nothing_found(tmp_path) -> None:
    put(tmp_path, a_tar="", b_tar="", c_txt="")
    with pytest.raises(AtollError, match=r"no images found; looked for \.jpg, .* there are files: 2 of \.tar, 1 of"):
        read(tmp_path)
    with pytest.raises(AtollError, match=r"a\.tar: is a file; expected a directory"):
        read(tmp_path / "a.tar")


def test_an_image_that_cannot_be_read_is_skipped(tmp_path) -> None:
    put(tmp_path, a_jpg="1", b_jpg="2", c_jpg="3", c_txt="x")
    os.symlink("nowhere", tmp_path / "d.jpg")
    source = Folder(settings(tmp_path))
    (tmp_path / "b.jpg").unlink()
    (tmp_path / "c.txt").unlink()
    good, *bad = (sample for block in source.blocks() for sample in source.read(block))
    assert good.image == b"1"
    assert [sample.key for sample in bad] == ["b.jpg", "c.jpg", "d.jpg"]
    assert bad[1].reason == "cannot be read: c.txt (No such file or directory)"


def test_a_name_that_is_no_text_is_skipped(tmp_path) -> None:
    put(tmp_path, a_jpg="1")
    try:
        Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9.jpg")).write_bytes(b"2")
    except OSError:
        pytest.skip("this file system takes no such names")
    good, bad = read(tmp_path)
    assert good.image == b"1"
    assert (bad.key, bad.reason) == ("caf\\udce9.jpg", "key: its name is not utf-8; rename it")
    Folder(settings(tmp_path)).fingerprint()


def test_held_out_by_a_hash_of_the_key(tmp_path) -> None:
    for number in range(300):
        write(tmp_path, f"{number}.jpg", "")
    splits = {raw.key: raw.split for raw in read(tmp_path, validation=0.3)}
    assert 60 < list(splits.values()).count("val") < 120
    write(tmp_path, "0/new.jpg", "")  # what is added changes nothing for the others
    again = {raw.key: raw.split for raw in read(tmp_path, validation=0.3)}
    assert splits.items() < again.items()


def test_fingerprint_is_of_all_that_is_read_and_of_nothing_else(tmp_path) -> None:
    put(tmp_path, a_jpg="1", a_txt="x", b_jpg="2", README_md="hello")
    write(tmp_path, "metadata.jsonl", lines({"file_name": "b.jpg", "text": "two"}))
    prints = [Folder(settings(tmp_path)).fingerprint()]
    for name in ("a.jpg", "a.txt", "b.jpg", "metadata.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write("\n")
        prints.append(Folder(settings(tmp_path)).fingerprint())
    assert len(set(prints)) == 5
    put(tmp_path, README_md="hello again", b_txt="not read, as metadata names b.jpg", c_txt="")
    assert Folder(settings(tmp_path)).fingerprint() == prints[-1]


def test_elsewhere(tmp_path) -> None:
    """A source and a block can be sent to another process, with nothing of the other blocks."""
    for number in range(2000):
        write(tmp_path, f"{number:04d}.jpg", str(number))
    write(tmp_path, "0007.txt", "seven")
    source = Folder(settings(tmp_path, block=10))
    sent = pickle.dumps((source, source.blocks()[0]))
    assert len(sent) < 3_000
    copy, block = pickle.loads(sent)
    assert [(raw.image, raw.caption) for raw in copy.read(block)][7] == (b"7", "seven")


def test_relative_paths_hold_elsewhere(tmp_path, monkeypatch) -> None:
    put(tmp_path, in__a_jpg="1")
    monkeypatch.chdir(tmp_path)
    source = Folder(settings("in"))
    monkeypatch.chdir("/")
    (raw,) = source.read(source.blocks()[0])
    assert (raw.key, raw.image) == ("a.jpg", b"1")
    assert source.config()["path"] == "in"


def test_urls_and_lists(tmp_path) -> None:
    fs = fsspec.filesystem("memory")
    for number in range(40):  # more than are fetched at a time
        fs.pipe(f"/data/in/{number:02d}.jpg", str(number).encode())
    fs.pipe("/data/in/03.txt", b"three")
    fs.pipe("/data/metadata.jsonl", b'{"file_name": "in/05.jpg", "text": "five"}')
    fs.pipe("/more/x.jpg", b"x")
    try:
        found = read("memory://data")
        assert [raw.image for raw in found] == [str(number).encode() for number in range(40)]
        assert (found[3].caption, found[5].caption, found[6].caption) == ("three", "five", "")
        data = DataSettings(source="folder", path=("memory://data", "memory://more"))
        both = Folder(data)
        assert both.config()["path"] == ["memory://data", "memory://more"]
        assert [entry.key for entry in both.blocks()[0].content][-2:] == ["data/in/39.jpg", "more/x.jpg"]
        assert list(both.read(both.blocks()[0]))[5].caption == "five"
    finally:
        fs.store.clear()


def test_fuzz(tmp_path) -> None:
    """Mutated metadata raises nothing but AtollError, and every image is given or skipped, once."""
    for number in range(8):
        write(tmp_path, f"{number}.jpg", str(number))
    records = [{"file_name": f"{number}.jpg", "text": f"café {number}"} for number in range(8)]
    files = {
        "metadata.jsonl": lines(*records).encode(),
        "metadata.csv": ("file_name,text\n" + "".join(f'{n}.jpg,"café {n}"\n' for n in range(8))).encode(),
    }
    for seed in range(400):
        chance, name = random.Random(seed), ["metadata.jsonl", "metadata.csv"][seed % 2]
        data = bytearray(files[name])
        for _ in range(chance.choice([1, 1, 3, 10])):
            at, size = chance.randrange(len(data) + 1), chance.choice([1, 1, 5, 40])
            data[at : at + size] = chance.choice([chance.randbytes(size), bytes(size), b"", b"\n", b'"', b"\\ud800"])
        (tmp_path / name).write_bytes(data if chance.random() < 0.8 else data[: chance.randrange(len(data) + 1)])
        try:
            found = read(tmp_path)
        except AtollError as error:
            told = str(error)
            found = []
            reasons = ("file_name", "utf-16", "no row of the metadata fits an image")
            assert any(reason in told for reason in reasons) and "\n" not in told  # noqa: PT018
        keys = [sample.key for sample in found]
        assert len(set(keys)) == len(keys)
        assert not found or {f"{number}.jpg" for number in range(8)} <= set(keys)
        for sample in found:
            (sample.key + getattr(sample, "caption", "") + getattr(sample, "reason", "")).encode()
            if isinstance(sample, Raw):
                assert sample.image == sample.key[:1].encode(), seed
        (tmp_path / name).unlink()


@pytest.mark.skipif(not REAL.is_dir(), reason="the real images are not here")
def test_real_images(tmp_path) -> None:
    """Flowers, written as a Hugging Face imagefolder and read back."""
    table = pq.read_table(REAL / "flowers128.parquet", columns=["image_bytes", "caption"]).slice(0, 60).to_pylist()
    for number, row in enumerate(table):
        write(tmp_path, f"train/{number:02d}.webp", row["image_bytes"])
    rows = ({"file_name": f"train/{number:02d}.webp", "text": row["caption"]} for number, row in enumerate(table))
    write(tmp_path, "metadata.jsonl", lines(*rows))
    found = read(tmp_path)
    assert [(raw.image, raw.caption) for raw in found] == [(row["image_bytes"], row["caption"]) for row in table]
