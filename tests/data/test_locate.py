import hashlib
import os
import posixpath
import socket
import subprocess
import sys
import threading

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.data.captions import check_encoding, key_of, lines_of, split_of
from atoll.data.fingerprint import fingerprint
from atoll.data.locate import locate
from atoll.data.names import clean, printable
from atoll.data.opening import TooLarge, ahead, open_file, read_file
from atoll.data.types import Unfit
from atoll.errors import AtollError
from atoll.storage.shards import split_by_hash

TAR = ("tars", (".tar",))


def put(root, *names) -> None:
    """Files whose content is their own name."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)


@pytest.fixture
def memory():
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    yield fs
    fs.store.clear()


def test_a_directory_in_order_of_the_relative_paths(tmp_path) -> None:
    put(tmp_path, "b.TAR", "a/z.tar", "a/a.tar", "a/a.txt", ".hidden.tar", ".cache/c.tar")
    files = locate(str(tmp_path), *TAR)
    assert files.sizes == {"a/a.tar": 7, "a/z.tar": 7, "b.TAR": 5}
    assert list(files.sizes) == sorted(files.sizes)
    assert [read_file(files.url(name), 99).decode() for name in files.sizes] == list(files.sizes)


def test_relative_home_and_variables(tmp_path, monkeypatch) -> None:
    put(tmp_path, "data/a.tar")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WHERE", "data")
    for path in ("data", "./data/", "~/data", "$WHERE", "${WHERE}/a.tar", "da*/a.tar", f"file://{tmp_path}/data"):
        files = locate(path, *TAR)
        assert files.root == str(tmp_path / "data") or path == "da*/a.tar", path
        assert len(files.sizes) == 1


def test_globs_files_ranges_and_lists(tmp_path) -> None:
    put(tmp_path, "x/00.tar", "x/01.tar", "x/02.tar", "y/00.tar", "x/notes.txt", "y/odd[1].bin")
    at = str(tmp_path)
    assert list(locate(f"{at}/x/*", *TAR).sizes) == ["00.tar", "01.tar", "02.tar"]
    assert list(locate(f"{at}/*/00.tar", *TAR).sizes) == ["x/00.tar", "y/00.tar"]
    assert list(locate(f"{at}/[xy]", *TAR).sizes) == ["x/00.tar", "x/01.tar", "x/02.tar", "y/00.tar"]
    assert list(locate(f"{at}/x/{{01..02}}.tar", *TAR).sizes) == ["01.tar", "02.tar"]
    # named twice counts once; a file that is named outright need not end in .tar, and may look like a glob
    files = locate((f"{at}/x", f"{at}/x/00.tar", f"{at}/y/odd[1].bin"), *TAR)
    assert list(files.sizes) == ["x/00.tar", "x/01.tar", "x/02.tar", "y/odd[1].bin"]
    assert [read_file(files.url(name), 99).decode() for name in files.sizes] == list(files.sizes)


def test_links_are_followed_and_lead_in_no_circle(tmp_path) -> None:
    put(tmp_path, "far/a.tar", "data/b.tar")
    os.symlink(tmp_path / "far", tmp_path / "data" / "near")
    os.symlink(tmp_path / "data", tmp_path / "data" / "self")
    os.symlink(tmp_path / "gone", tmp_path / "data" / "broken.tar")
    assert locate(str(tmp_path / "data"), *TAR).sizes == {"b.tar": 10, "broken.tar": 0, "near/a.tar": 9}


def test_urls(memory, tmp_path) -> None:
    for name in ("/d/00.tar", "/d/in/01.tar", "/d/.x/02.tar", "/e/03.tar", "/e/03.txt"):
        memory.pipe(name, name.encode())
    files = locate("memory://d", *TAR)
    assert (files.root, list(files.sizes)) == ("memory://d", ["00.tar", "in/01.tar"])
    assert read_file(files.url("in/01.tar"), 99) == b"/d/in/01.tar"
    assert list(locate("memory://d/0*.tar", *TAR).sizes) == ["00.tar"]
    assert list(locate("memory://*/*.tar", *TAR).sizes) == ["d/00.tar", "e/03.tar"]
    assert list(locate("memory://d/in/01.tar", *TAR).sizes) == ["01.tar"]
    both = locate(("memory://d", "memory://e/03.tar"), *TAR)
    assert list(both.sizes) == ["d/00.tar", "d/in/01.tar", "e/03.tar"]
    put(tmp_path, "a.tar")
    mixed = locate(("memory://e", str(tmp_path)), *TAR)
    assert {read_file(mixed.url(name), 99) for name in mixed.sizes} == {b"/e/03.tar", b"a.tar"}


def test_directories_only(tmp_path) -> None:
    put(tmp_path, "a.jpg", "b/a.txt")
    assert list(locate(str(tmp_path), "images").sizes) == ["a.jpg", "b/a.txt"]
    with pytest.raises(AtollError, match=r"a\.jpg: is a file; expected a directory that holds images"):
        locate(str(tmp_path / "a.jpg"), "images")


def test_variables_are_told(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.setenv("WHERE", str(tmp_path))
    for path in ("$NOWHERE/a", "$NOWHERE/*.tar", "${NOWHERE}/a"):
        with pytest.raises(
            AtollError, match=r"\$\{?NOWHERE\}? is not set in the environment; set it, or name the path"
        ):
            locate(path, "tars", (".tar",))
    with pytest.raises(AtollError, match=rf"\$WHERE/a \({tmp_path}/a\): cannot be listed \(it is not there\)"):
        locate("$WHERE/a", "tars", (".tar",))
    with pytest.raises(AtollError, match=rf"\$WHERE/\*.tar \({tmp_path}/\*.tar\): no tars found"):
        locate("$WHERE/*.tar", "tars", (".tar",))
    (tmp_path / "$NOWHERE.tar").touch()  # a strange name, but a name
    assert list(locate(str(tmp_path / "$NOWHERE.tar"), "tars", (".tar",)).sizes) == ["$NOWHERE.tar"]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("{}/none", r"none: cannot be listed \(it is not there\); expected tars"),
        ("{}/b", r"/b: no tars found; looked for \.tar in it and below, there are files: 2 of \.jpg, 1 of \.txt"),
        ("{}/b/*.tar", r"no tars found.*there is nothing"),
        (("{}/a", "{}/none"), "none: cannot be listed"),
        ("memory://none", r"memory://none: cannot be listed \(it is not there\)"),
        ("nowhere://a", r"nowhere://a: cannot be opened \(Protocol not known: nowhere\); expected a path or a URL"),
        ((), "data.path is empty; expected where tars are"),
    ],
)
def test_what_is_not_found_is_named(tmp_path, memory, path, said) -> None:
    put(tmp_path, "a/a.tar", "b/1.jpg", "b/2.jpg", "b/1.txt")
    entries = path.format(tmp_path) if isinstance(path, str) else tuple(part.format(tmp_path) for part in path)
    with pytest.raises(AtollError, match=said):
        locate(entries, *TAR)


def test_a_missing_package_is_named() -> None:
    code = (
        "import sys; sys.modules['s3fs'] = None\n"
        "from atoll.data.locate import locate, AtollError\n"
        "try: locate('s3://bucket/data', 'tars', ('.tar',))\n"
        "except AtollError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "s3://bucket/data" in done.stdout
    assert "pip install s3fs" in done.stdout


def test_any_failure_of_a_file_system_is_an_os_error(memory, monkeypatch) -> None:
    memory.pipe("/a.tar", b"a")
    monkeypatch.setattr(type(memory), "_open", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("no\n credentials")))
    with pytest.raises(OSError, match="no credentials"):
        open_file("memory://a.tar")
    monkeypatch.setattr(type(memory), "info", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("no credentials")))
    with pytest.raises(AtollError, match=r"memory://a\.tar: cannot be listed \(no credentials\)"):
        locate("memory://a.tar", *TAR)


def test_no_more_than_a_bounded_number_of_bytes_is_read(tmp_path) -> None:
    put(tmp_path, "abcdef")
    assert read_file(str(tmp_path / "abcdef"), 6) == b"abcdef"
    with pytest.raises(TooLarge, match="more than 5 bytes"):
        read_file(str(tmp_path / "abcdef"), 5)


@pytest.mark.parametrize("entry", ["pipe", "socket", "device", "link to a device"])
def test_special_files_are_named_and_not_opened(tmp_path, monkeypatch, entry) -> None:
    put(tmp_path, "data/a.tar")
    path = tmp_path / "data" / "b.tar"
    if entry == "pipe":
        os.mkfifo(path)
    elif entry == "socket":
        with socket.socket(socket.AF_UNIX) as sock:
            monkeypatch.chdir(path.parent)  # a socket's path has 108 letters at most
            sock.bind("b.tar")
    else:
        os.symlink("/dev/zero", path)
    files = locate(str(tmp_path / "data"), *TAR)
    assert files.sizes == {"a.tar": 10}
    kind = "a device" if "device" in entry else f"a {entry}"
    assert files.unopened == {"b.tar": f"{kind}, which is not opened"}
    with pytest.raises(AtollError, match=f"b.tar: is {kind}, which is not opened; expected tars"):
        locate(str(path), *TAR)
    assert locate(f"{tmp_path}/data/*.tar", *TAR).unopened == files.unopened


def test_links_that_leave_a_folder_are_named_and_not_followed(tmp_path) -> None:
    put(tmp_path, "far/a.jpg", "far/deep/b.jpg", "data/c.jpg", "data/in/d.jpg")
    data = tmp_path / "data"
    os.symlink(tmp_path / "far" / "a.jpg", data / "a.jpg")
    os.symlink(tmp_path / "far" / "deep", data / "deep")
    os.symlink("../data2", data / "sibling")  # its path begins like the folder's
    os.symlink(data / "in", data / "again")
    os.symlink("c.jpg", data / "near.jpg")
    put(tmp_path, "data2/x.jpg")
    inside = locate(str(data), "images", links="inside")
    # a directory that two names lead to is listed once, under either of them
    assert {posixpath.basename(name) for name in inside.sizes} == {"c.jpg", "d.jpg", "near.jpg"}
    assert set(inside.unopened) == {"a.jpg", "deep", "sibling"}
    assert all("a link that leaves the folder" in reason for reason in inside.unopened.values())
    everything = locate(str(data), "images", links="follow")
    assert {"a.jpg", "deep/b.jpg", "sibling/x.jpg"} <= everything.sizes.keys()
    os.symlink(data, tmp_path / "link")  # the folder itself may be a link
    assert locate(str(tmp_path / "link"), "images", links="inside").sizes.keys() >= {"c.jpg", "near.jpg"}


def test_a_gap_in_a_range_is_named(tmp_path) -> None:
    put(tmp_path, *(f"{i:05d}.tar" for i in range(10) if i not in (3, 6)))
    path = f"{tmp_path}/{{00000..00009}}.tar"
    said = r"2 of 10 are not there \(.*/00003\.tar, .*/00006\.tar\).*data\.missing_shards: skip"
    with pytest.raises(AtollError, match=said):
        locate(path, *TAR)
    files = locate(path, *TAR, gaps="skip")
    assert len(files.sizes) == 8
    assert [posixpath.basename(url) for url in files.missing] == ["00003.tar", "00006.tar"]
    with pytest.raises(AtollError, match="cannot be listed"):
        locate(f"{tmp_path}/{{1..3}}.tar", *TAR, gaps="skip")
    with pytest.raises(AtollError, match="a range of 1,000,000,001; expected at most 10,000,000"):
        locate("{0..1000000000}.tar", *TAR)


def test_ahead_keeps_the_order_and_is_bounded() -> None:
    started, most, gate = [], [], threading.Event()

    def read(number):
        started.append(number)
        gate.wait()
        return number * number

    results = ahead(read, iter(range(50)), threads=3)
    gate.set()
    for taken, result in enumerate(results):
        most.append(len(started) - taken)
        assert result == taken * taken
    assert max(most) <= 6
    assert len(started) == 50


def test_ahead_passes_errors_on() -> None:
    with pytest.raises(ZeroDivisionError):
        list(ahead(lambda number: 1 / number, [2, 1, 0], threads=2))


@pytest.mark.parametrize(
    ("value", "encoding", "caption"),
    [
        (None, "utf-8", ""),
        (b"", "utf-8", ""),
        (b" \r\n\t", "utf-8", ""),
        ("  a cat\n", "utf-8", "a cat"),
        (b"a cat \r\n\r\n  on  a mat\n", "utf-8", "a cat on  a mat"),
        ("café ☕".encode(), "utf-8", "café ☕"),
        ("café".encode("latin-1"), "latin-1", "café"),
        ("café".encode("utf-8-sig"), "latin-1", "café"),
        ("café".encode("utf-16"), "utf-8", "café"),
        (b"\xfe\xff" + "café".encode("utf-16-be"), "ascii", "café"),
        ("猫".encode("gb18030"), "gb18030", "猫"),
    ],
)
def test_captions(value, encoding, caption) -> None:
    assert " ".join(lines_of(value, encoding)) == caption


@pytest.mark.parametrize(
    ("value", "encoding", "said"),
    [
        (b"caf\xe9", "utf-8", r"caption: not utf-8 \(byte 0xe9 at 3\); save it as utf-8, or set data.encoding"),
        ("caf\udce9", "utf-8", r"not utf-8 \(byte 0xe9 at 3\)"),
        ("a \ud83d", "utf-8", r"half a character, U\+D83D, at 2"),
        (b"\xff\xfea", "utf-8", r"not utf-16 \(byte 0x61 at 2\)"),
        ("é".encode(), "ascii", r"not ascii \(byte 0xc3 at 0\)"),
        (3, "utf-8", "is int, expected text"),
        ({"a": 1}, "utf-8", "is dict, expected text, or a list of texts"),
        (b"a" * 65537, "utf-8", "caption: 65,537 bytes, expected at most 65,536"),
        ("a" * 65537, "utf-8", "caption: 65,537 bytes, expected at most 65,536"),
    ],
)
def test_what_is_no_caption(value, encoding, said) -> None:
    with pytest.raises(Unfit, match=said):
        lines_of(value, encoding)


@given(st.binary(max_size=40), st.sampled_from(["utf-8", "utf-16", "utf-7", "idna", "shift_jis", "utf-32"]))
def test_any_bytes_are_a_caption_or_unfit(data, encoding) -> None:
    try:
        caption = " ".join(lines_of(data, encoding))
    except Unfit as error:
        caption = str(error)
    assert caption == caption.strip()
    assert len(caption.splitlines()) <= 1
    caption.encode()


def test_encodings_are_checked() -> None:
    for known in ("utf-8", "latin-1", "utf-16", "cp1252", "shift_jis"):
        check_encoding(known)
    for unknown in ("utf-9", "base64", "rot13"):
        with pytest.raises(AtollError, match=f"data.encoding is '{unknown}'"):
            check_encoding(unknown)


def test_keys() -> None:
    assert (key_of("a/b.jpg"), key_of(7)) == ("a/b.jpg", "7")
    for value in (None, "", 1.5, True, b"a", "\udce9"):
        with pytest.raises(Unfit, match="key: is"):
            key_of(value)
    assert printable("caf\udce9") == "caf\\udce9"
    assert clean("café\n\x1b[31m\udce9") == "café\\n\\x1b[31m\\udce9"
    assert len(clean("a" * 10_000)) < 400


def test_splits() -> None:
    trains, held_out = ("train", b"train", "Train", " training\n"), ("test", None, 0, "trainer", "val", b"\xff")
    assert {split_of(value) for value in trains} == {"train"}
    assert {split_of(value) for value in held_out} == {"val"}
    keys = [f"{number:09d}" for number in range(20_000)]
    held_out = {key for key in keys if split_by_hash(key, 0.05) == "val"}
    assert 0.045 < len(held_out) / len(keys) < 0.055
    assert held_out < {key for key in keys if split_by_hash(key, 0.1) == "val"}  # a larger share holds the smaller one
    assert all(split_by_hash(key, 0.0) == "train" for key in keys)
    first = int(hashlib.sha256(b"a").hexdigest()[:16], 16) / 16**16
    assert (split_by_hash("a", first), split_by_hash("a", first + 1e-9)) == ("train", "val")


def test_fingerprint_tells_names_and_sizes_apart() -> None:
    files = [("a", 1), ("b", 23), ("caf\udce9", 4)]
    others = [files[:2], [("a", 12), ("b", 3)], [("ab", 1), ("", 23)], files[::-1], [("a", 12)], [("a1", 2)], []]
    assert len({fingerprint(other) for other in [files, *others]}) == 8
    assert fingerprint(iter(files)) == fingerprint(files)
