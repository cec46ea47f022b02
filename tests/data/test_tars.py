import gzip
import io
import json
import pickle
import random
import re
import tarfile
from pathlib import Path

import fsspec
import pytest

from atoll.data.tars import Tars
from atoll.data.types import Block, Raw, Skipped
from atoll.errors import AtollError
from atoll.manifest import DataSettings


def tar_bytes(*members: tuple[str, bytes], end: bool = True) -> bytes:
    """A tar as img2dataset writes it (ustar, a header of 512 bytes before each member)."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        whole = tar.offset
    return sink.getvalue() if end else sink.getvalue()[:whole]


def image_bytes(number: int) -> bytes:
    """Not an image, which sources do not look at; of a length of its own."""
    return random.Random(number).randbytes(700 + 61 * number)


def members(count: int, start: int = 0) -> list[tuple[str, bytes]]:
    """What img2dataset writes: 000000000.jpg, .json, .txt, ..."""
    found = []
    for number in range(start, start + count):
        key, caption = f"{number:09d}", f"image {number}"
        found += [
            (f"{key}.jpg", image_bytes(number)),
            (f"{key}.json", json.dumps({"caption": f"json {number}", "key": key, "part": "test"}).encode()),
            (f"{key}.txt", caption.encode()),
        ]
    return found


def settings(path, **options) -> DataSettings:
    return DataSettings(source="webdataset", path=str(path), **options)


def read(path, **options) -> list[Raw | Skipped]:
    source = Tars(settings(path, **options))
    return [sample for block in source.blocks() for sample in source.read(block)]


def one(tmp_path, *found: tuple[str, bytes], **options) -> list[Raw | Skipped]:
    (tmp_path / "a.tar").write_bytes(tar_bytes(*found))
    return read(tmp_path, **options)


def test_what_img2dataset_writes(tmp_path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "00001.tar").write_bytes(tar_bytes(*members(2)))  # the same names as in the other tar
    (tmp_path / "00000.tar").write_bytes(tar_bytes(*members(3)))
    (tmp_path / "00000_stats.json").write_text('{"count": 5, "successes": 3, "failed_to_download": 2}')
    (tmp_path / "00000.parquet").write_bytes(b"beside it, not read")
    source = Tars(settings(tmp_path))
    blocks = source.blocks()
    assert [(block.name, block.samples) for block in blocks] == [("00000", 3), ("deep/00001", None)]
    assert blocks == source.blocks()
    found = [list(source.read(block)) for block in blocks]
    assert [[raw.key for raw in part] for part in found] == [
        ["00000/000000000", "00000/000000001", "00000/000000002"],
        ["deep/00001/000000000", "deep/00001/000000001"],
    ]
    for part in found:
        for number, raw in enumerate(part):
            assert (raw.image, raw.caption) == (image_bytes(number), f"image {number}")


def test_as_webdataset_reads_it(tmp_path) -> None:
    web = pytest.importorskip("webdataset.tariterators")
    found = [("./x/1.JPG", b"a"), ("./x/1.txt", b"t"), ("2.b.png", b"b"), ("3.png", b"c"), ("__meta__", b"?")]
    (tmp_path / "a.tar").write_bytes(tar_bytes(*found, (".DS_Store", b"?"), ("._5.jpg", b"?"), *members(2)))
    with (tmp_path / "a.tar").open("rb") as file:
        theirs = list(web.group_by_keys(web.tar_file_expander([{"url": "", "stream": file}])))
    expected = {f"a/{s['__key__'].removeprefix('./')}": s.get("jpg", s.get("png")) for s in theirs}
    ours = {sample.key: getattr(sample, "image", None) for sample in read(tmp_path)}
    assert (expected.pop("a/2"), ours.pop("a/2.b")) == (None, None)  # its extension is b.png: lost by the rule
    assert ours == expected
    assert list(ours)[:2] == ["a/x/1", "a/3"]


def test_caption_and_image_by_extension(tmp_path) -> None:
    found = [("1.mask.png", b"m"), ("1.png", b"p"), ("1.webp", b"w"), ("1.cls", b"7"), ("1.txt", b"text")]
    found += [("1.json", b'{"caption": "json", "CAPTION": 3}')]
    assert [(raw.image, raw.caption) for raw in one(tmp_path, *found)] == [(b"p", "text")]
    (raw,) = one(tmp_path, *found, image="webp", caption="cls")
    assert (raw.image, raw.caption) == (b"w", "7")
    (raw,) = one(tmp_path, *found, image=".mask.png", caption="json")
    assert (raw.image, raw.caption) == (b"m", "json")
    (raw,) = one(tmp_path, *found, caption="CAPTION")  # a field of the json
    assert isinstance(raw, Skipped)
    assert raw.reason == "caption: is int, expected text, or a list of texts"
    (raw,) = one(tmp_path, *found, caption="none")  # neither a member nor a field
    assert raw.caption == ""
    assert raw.notes[0].startswith("captions that were not read: no none, which data.caption names, in samples")


def test_splits_and_keys(tmp_path) -> None:
    found = members(400)
    splits = {raw.key: raw.split for raw in one(tmp_path, *found, validation=0.25)}
    assert 60 < list(splits.values()).count("val") < 140
    shuffled = [found[3 * i : 3 * i + 3] for i in random.Random(0).sample(range(400), 400)]
    again = one(tmp_path, *(member for group in shuffled for member in group), validation=0.25)
    assert {raw.key: raw.split for raw in again} == splits
    assert {raw.split for raw in one(tmp_path, *found[:9], split="part")} == {"val"}
    assert [raw.key for raw in one(tmp_path, *found[:6], key="key")] == ["000000000", "000000001"]


@pytest.mark.parametrize(
    ("found", "options", "key", "said"),
    [
        ([("1.txt", b"only"), ("1.cls", b"0")], {}, "a/1", r"image: none among its members \(txt, cls\).*jpg"),
        ([("README", b"x")], {}, "a/README", "members .no extension."),
        ([("1.jpg", b"x"), ("1.txt", b"caf\xe9")], {}, "a/1", r"caption: not utf-8 \(byte 0xe9 at 3\)"),
        ([("1.jpg", b"x"), ("1.json", b"{")], {}, "a/1", "json: cannot be parsed"),
        ([("1.jpg", b"x"), ("1.json", b"[" * 100_000)], {}, "a/1", "json: cannot be parsed"),
        ([("1.jpg", b"x"), ("1.json", b"[]")], {}, "a/1", "json: is a list, expected an object"),
        ([("1.jpg", b"x"), ("1.json", b'{"caption": 3}')], {}, "a/1", "caption: is int"),
        ([("1.jpg", b"x"), ("1.txt", b""), ("1.json", b'{"a": 3}')], {"split": "b"}, "a/1", "no field 'b'; it has a"),
        ([("1.jpg", b"x"), ("1.json", b'{"k": null}')], {"key": "k"}, "a/1", "key: is None"),
        ([("caf\udce9.jpg", b"x")], {}, "a/caf\\udce9", "not utf-8; rename"),
        ([("1.jpg", b"x")], {"image": "png"}, "a/1", r"\(jpg\); expected png"),
    ],
)
def test_a_bad_sample_is_skipped_alone(tmp_path, found, options, key, said) -> None:
    good = ("9.png", b"good"), ("9.json", b'{"a": "train", "b": "train", "k": "9"}')
    bad, last = one(tmp_path, *found, *good, **options)
    assert isinstance(bad, Skipped)
    assert bad.key == key
    assert re.search(said, bad.reason), bad.reason
    assert isinstance(last, Raw)
    assert last.image == b"good"


def test_the_second_of_two_keys_is_skipped(tmp_path) -> None:
    pair, other = [("1.jpg", b"x"), ("1.txt", b"first")], [("2.jpg", b"y")]
    again = [("1.jpg", b"z"), ("1.txt", b"second")]
    for found in ([*pair, *again, *other], [*pair, *other, *again]):
        samples = one(tmp_path, *found)
        assert [raw.caption for raw in samples if isinstance(raw, Raw) and raw.key == "a/1"] == ["first"]
        (skipped,) = (sample for sample in samples if isinstance(sample, Skipped))
        assert skipped.key == "a/1"
        assert "twice in its tar (again with jpg, txt)" in skipped.reason
        assert len(samples) == 3


def boundaries() -> tuple[bytes, list[int]]:
    """A tar of 4 samples, and where the header after each sample begins."""
    ends = [len(tar_bytes(*members(count), end=False)) for count in (1, 2, 3, 4)]
    return tar_bytes(*members(4)), ends


def test_a_cut_gives_what_is_complete_before_it(tmp_path) -> None:
    whole, ends = boundaries()
    good = {f"a/{number:09d}": image_bytes(number) for number in range(4)}
    # at every boundary of 512 bytes, and one byte beside it
    for cut in sorted({max(0, at + beside) for at in range(0, ends[-1] + 513, 512) for beside in (-1, 0, 1)}):
        (tmp_path / "a.tar").write_bytes(whole[:cut])
        samples = read(tmp_path)
        # a sample is complete once the next header, or the end mark, tells that it has no more members
        complete = sum(cut >= end + 512 for end in ends)
        assert [raw.key for raw in samples if isinstance(raw, Raw)] == list(good)[:complete], cut
        assert all(raw.image == good[raw.key] and raw.caption for raw in samples if isinstance(raw, Raw))
        lost = [sample for sample in samples if isinstance(sample, Skipped)]
        assert len(lost) == (complete < 4), cut
        for sample in lost:
            assert sample.key == "a"
            assert f"{complete} samples were read before" in sample.reason


@pytest.mark.parametrize("filling", [b"\0", b"\xff", b"garbage "])
def test_a_damaged_header_does_not_end_the_tar_in_silence(tmp_path, filling) -> None:
    whole, ends = boundaries()
    broken = whole[: ends[1]] + (filling * 512)[:512] + whole[ends[1] + 512 :]
    (tmp_path / "a.tar").write_bytes(broken)
    *good, last = read(tmp_path)
    # whether the header of the next sample is damaged, or of another member of this one, cannot be known
    assert [raw.image for raw in good] == [image_bytes(0)]
    assert isinstance(last, Skipped)
    assert "1 samples were read before" in last.reason


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is empty"),
        (b"no tar at all", "no tar header at byte 0"),
        (b"\x1f\x8b", "tar: "),
        (b"BZh91AY&SY", "tar: "),
        (b"\xfd7zXZ\0", "tar: "),
        (bytes(1024), "it holds no samples"),
        (tar_bytes(("__meta__", b"")), "it holds no samples"),
    ],
)
def test_a_tar_that_is_none_is_one_skipped_beside_the_others(tmp_path, content, said) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    (tmp_path / "b.tar").write_bytes(tar_bytes(*members(1)))
    bad, good = read(tmp_path)
    assert bad.key == "a"
    assert said in bad.reason
    assert good.key == "b/000000000"


def test_a_tar_that_vanishes_is_skipped(tmp_path) -> None:
    (tmp_path / "a.tar").write_bytes(b"")
    source = Tars(settings(tmp_path))
    (tmp_path / "a.tar").unlink()
    (lost,) = source.read(source.blocks()[0])
    assert "No such file" in lost.reason


def test_sparse_members_are_not_blown_up(tmp_path) -> None:
    header = bytearray(tar_bytes(("1.jpg", bytes(512)))[:512])
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[386:410] = b"00000000000\0" + b"00000001000\0"
    header[483:495] = b"77777777777\0"  # 8 GiB of zeros
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "a.tar").write_bytes(bytes(header) + bytes(512) + bytes(1024))
    (lost,) = read(tmp_path)
    assert "sparse" in lost.reason


def test_compressed(tmp_path) -> None:
    packed = gzip.compress(tar_bytes(*members(3)))
    (tmp_path / "a.tar.gz").write_bytes(packed)
    samples = read(tmp_path)
    assert [raw.key for raw in samples] == [f"a.tar.gz/{number:09d}" for number in range(3)]
    assert [raw.image for raw in samples] == [image_bytes(number) for number in range(3)]
    (tmp_path / "a.tar.gz").write_bytes(packed[: len(packed) // 2])
    *good, lost = read(tmp_path)
    assert isinstance(lost, Skipped)
    assert [raw.image for raw in good] == [image_bytes(number) for number in range(len(good))]


def test_streamed(tmp_path, monkeypatch) -> None:
    """No more than one sample and a buffer are read before the first sample is given."""
    (tmp_path / "a.tar").write_bytes(tar_bytes(*[(f"{n}.jpg", bytes(200_000)) for n in range(20)]))
    source, opened = Tars(settings(tmp_path)), []

    def open_file(url):
        opened.append(Path(url).open("rb"))  # noqa: SIM115
        return opened[-1]

    monkeypatch.setattr("atoll.data.tar_members.open_file", open_file)
    samples = source.read(source.blocks()[0])
    next(samples)
    assert opened[0].tell() < 500_000
    samples.close()
    assert opened[0].closed


def test_elsewhere(tmp_path) -> None:
    """A source and a block can be sent to another process; nothing else goes along."""
    for number in range(50):
        (tmp_path / f"{number:05d}.tar").write_bytes(tar_bytes(*members(1, number)))
    source = Tars(settings(tmp_path))
    sent = pickle.dumps((source, source.blocks()[7]))
    assert len(sent) < 3_000
    copy, block = pickle.loads(sent)
    (raw,) = copy.read(block)
    assert (raw.key, raw.image) == ("00007/000000007", image_bytes(7))
    assert type(block) is Block


def test_urls() -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe("/tars/00000.tar", tar_bytes(*members(2)))
    fs.pipe("/tars/00000_stats.json", b'{"successes": 2}')
    try:
        source = Tars(settings("memory://tars"))
        (block,) = source.blocks()
        assert (block.name, block.samples) == ("00000", 2)
        assert [raw.image for raw in source.read(block)] == [image_bytes(0), image_bytes(1)]
    finally:
        fs.store.clear()


@pytest.mark.parametrize("stats", ["", "[]", '{"successes": -1}', '{"successes": "3"}', '{"count": true}', "\udce9"])
def test_odd_stats_are_no_count(tmp_path, stats) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes(*members(1)))
    (tmp_path / "a_stats.json").write_bytes(stats.encode("utf-8", "surrogateescape"))
    assert Tars(settings(tmp_path)).blocks()[0].samples is None


def test_config_and_fingerprint(tmp_path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes(*members(1)))
    source = Tars(settings(tmp_path, caption="cls"))
    assert source.config() == {
        "name": "webdataset",
        "path": str(tmp_path),
        "image": None,
        "caption": "cls",
        "key": None,
        "split": None,
        "validation": 0.01,
        "encoding": "utf-8",
    }
    before = source.fingerprint()
    (tmp_path / "a_stats.json").write_text("{}")
    assert Tars(settings(tmp_path)).fingerprint() == before
    (tmp_path / "b.tar").write_bytes(b"")
    assert Tars(settings(tmp_path)).fingerprint() != before


def test_errors(tmp_path) -> None:
    with pytest.raises(AtollError, match=r"no tars found; looked for \.tar, \.tar\.gz"):
        Tars(settings(tmp_path))
    with pytest.raises(AtollError, match=r"data\.encoding is 'utf-9'"):
        Tars(settings(tmp_path, encoding="utf-9"))


def test_fuzz(tmp_path) -> None:
    """Mutated and cut tars raise nothing; each sample of a cut tar is an original, and none comes twice."""
    whole, _ = boundaries()
    originals = {f"a/{number:09d}": (image_bytes(number), f"image {number}") for number in range(4)}
    for seed in range(400):
        chance = random.Random(seed)
        data, cut = bytearray(whole), seed % 2 == 0
        if cut:
            data = data[: chance.randrange(len(data))]
        else:
            for _ in range(chance.choice([1, 3, 20])):
                at, size = chance.randrange(len(data)), chance.choice([1, 1, 8, 600])
                data[at : at + size] = chance.choice([chance.randbytes(size), bytes(size), b""])
        if seed % 8 == 7:
            data = bytearray(gzip.compress(bytes(data), 1))
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        (tmp_path / "a.tar").write_bytes(data)
        samples = read(tmp_path)
        good = [sample for sample in samples if isinstance(sample, Raw)]
        assert len({raw.key for raw in good}) == len(good)
        assert all("\n" not in sample.reason for sample in samples if isinstance(sample, Skipped))
        if cut:
            assert all((raw.image, raw.caption) == originals[raw.key] for raw in good)
        else:
            assert len(good) == 4 or len(samples) > len(good), seed
