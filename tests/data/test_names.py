"""Names that print alike are one name; text files and rows find their images."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atoll.data.captions import caption_columns, caption_from_name, field_of, like_captions
from atoll.data.folder import Folder
from atoll.data.names import canonical, clean, listed
from atoll.data.sidecars import Sidecars
from atoll.data.tars import Tars
from atoll.data.types import Raw, Skipped
from atoll.manifest import DataSettings
from tests.data.test_tars import tar_bytes

COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


def read(path, **options) -> dict[str, str]:
    source = Folder(DataSettings(source="folder", path=str(path), **options))
    found = [sample for block in source.blocks() for sample in source.read(block)]
    return {sample.key: sample.caption if isinstance(sample, Raw) else sample.reason for sample in found}


@pytest.mark.parametrize(("on_disk", "in_text"), [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
def test_composed_and_decomposed_letters_are_one_name(tmp_path, on_disk, in_text) -> None:
    (tmp_path / f"{on_disk}.jpg").write_bytes(b"1")
    (tmp_path / f"{in_text}.txt").write_text("beside it")
    assert read(tmp_path) == {f"{on_disk}.jpg": "beside it"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": f"{in_text}.jpg", "text": "in the table"}))
    assert read(tmp_path) == {f"{on_disk}.jpg": "in the table"}


def test_two_images_whose_names_print_alike_are_not_mixed_up(tmp_path) -> None:
    rows = []
    for name in (COMPOSED, DECOMPOSED):
        (tmp_path / f"{name}.jpg").write_bytes(b"1")
        rows.append({"file_name": f"{name}.jpg", "text": "one" if name == COMPOSED else "apart"})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read(tmp_path) == {f"{COMPOSED}.jpg": "one", f"{DECOMPOSED}.jpg": "apart"}


def test_back_slashes_and_paths_below_the_root(tmp_path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("in/a.jpg", "in/b.jpg", "in/c.jpg", "in/d.jpg"):
        (tmp_path / name).write_bytes(b"1")
    names = ["in\\a.jpg", ".\\in\\b.jpg", str(tmp_path / "in" / "c.jpg"), "in/d"]
    rows = [{"file_name": name, "text": f"row {i}"} for i, name in enumerate(names)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert list(read(tmp_path).values()) == [f"row {i}" for i in range(4)]


def test_a_difference_in_case_is_named(tmp_path) -> None:
    (tmp_path / "IMG_1.JPG").write_bytes(b"1")
    (tmp_path / "metadata.csv").write_text("file_name,text\nimg_1.jpg,x\n")
    found = read(tmp_path, allow_uncaptioned=True)
    assert found["img_1.jpg"] == (
        "image: metadata.csv:2 names img_1.jpg, which is not there (IMG_1.JPG is: the letters differ in case, or "
        "several names print alike)"
    )


def test_a_windows_path_is_named(tmp_path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"1")
    (tmp_path / "metadata.json").write_text(json.dumps({"C:\\img\\a.jpg": {"caption": "x"}}))
    assert "make paths relative to the folder" in str(read(tmp_path, allow_uncaptioned=True))


def test_exact_names_come_before_alike_ones(tmp_path) -> None:
    """A row that only prints like an image does not take it from the row that names it."""
    (tmp_path / f"{COMPOSED}.jpg").write_bytes(b"1")
    rows = [{"file_name": f"{DECOMPOSED}.jpg", "text": "alike"}, {"file_name": f"{COMPOSED}.jpg", "text": "exact"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read(tmp_path)[f"{COMPOSED}.jpg"] == "exact"


def test_members_of_a_tar_whose_names_print_alike_are_one_sample(tmp_path) -> None:
    members = [(f"{COMPOSED}.jpg", b"1"), (f"{DECOMPOSED}.txt", b"a cup"), ("in\\b.jpg", b"2"), ("in/b.txt", b"two")]
    (tmp_path / "a.tar").write_bytes(tar_bytes(*members))
    source = Tars(DataSettings(source="webdataset", path=str(tmp_path)))
    found = [sample for block in source.blocks() for sample in source.read(block)]
    assert [sample.caption for sample in found] == ["a cup", "two"]


DOTTED = [(f"scan_v1.{i:03d}.{kind}", b"%d" % i) for i in range(4) for kind in ("jpg", "txt")]


def test_dots_in_the_names_of_a_tar(tmp_path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes(("plain.jpg", b"x"), *DOTTED))
    source = Tars(DataSettings(source="webdataset", path=str(tmp_path)))
    good, *lost = [sample for block in source.blocks() for sample in source.read(block)]
    assert good.key == "a/plain"
    assert [sample.key for sample in lost] == [f"a/scan_v1.{i:03d}" for i in range(4)]
    assert all("a dot in the name" in sample.reason and sample.failed for sample in lost)
    assert all(isinstance(sample, Skipped) and "data.key_until: last-dot" in sample.reason for sample in lost)
    settings = DataSettings(source="webdataset", path=str(tmp_path), key_until="last-dot")
    found = [sample for block in Tars(settings).blocks() for sample in Tars(settings).read(block)]
    assert [(sample.key, sample.caption) for sample in found[1:]] == [(f"a/scan_v1.{i:03d}", str(i)) for i in range(4)]


def test_an_image_that_a_dot_hides_beside_another_is_noted(tmp_path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes(("1.jpg", b"x"), ("1.seg.png", b"y"), ("1.txt", b"t")))
    source = Tars(DataSettings(source="webdataset", path=str(tmp_path)))
    (raw,) = source.read(source.blocks()[0])
    assert raw.notes == ("images beside the first of a sample, not read (1.seg)",)


@given(st.text(max_size=8))
def test_canonical_names_stay_canonical(name) -> None:
    assert canonical(canonical(name)) == canonical(name)
    assert clean(name).isprintable()


STEMS = st.text(st.sampled_from("aAbé\u0301"), min_size=1, max_size=3)


@given(st.lists(STEMS, max_size=5, unique=True), st.lists(STEMS, max_size=5, unique=True))
def test_each_image_finds_its_own_text_file_first(images, texts) -> None:
    sidecars = Sidecars([f"{text}.txt" for text in texts], [f"{image}.jpg" for image in images], ("txt",))
    for image in images:
        found = sidecars.of(f"{image}.jpg")
        if image in texts:
            assert found == (f"{image}.txt",)
        for name in found:  # never another image's own file, never one that prints otherwise
            stem = name.removesuffix(".txt")
            assert stem == image or stem not in images
            assert canonical(stem).casefold() == canonical(image).casefold()


def test_the_order_of_text_files() -> None:
    names = ["a.json", "a.jpg.txt", "a.TXT", "a.caption", "a.jpg.caption", "b.txt", "a.jpg.json"]
    sidecars = Sidecars(names, ["a.jpg", "a.png"], ("txt", "caption", "json"))
    assert sidecars.of("a.jpg") == ("a.TXT", "a.jpg.txt", "a.caption", "a.jpg.caption", "a.json", "a.jpg.json")
    assert sidecars.of("a.png") == ("a.TXT", "a.caption", "a.json")


def test_one_order_of_columns() -> None:
    assert caption_columns(["TEXT", "text", "url", "Caption", "tags"]) == ["Caption", "text", "TEXT", "tags"]
    assert like_captions(["blip_caption", "promptEn", "caption", "context", "texture", "Text2"]) == [
        "blip_caption",
        "promptEn",
    ]
    assert field_of({"caption": None, "text": "x"}, None) == "x"
    assert field_of({"tags": ["a", "b"]}, None) == "a, b"
    assert field_of({"captions": ["a", "b"]}, None) == ["a", "b"]
    assert field_of({"caption": "x", "alt": "y"}, "alt") == "y"


def test_captions_from_names() -> None:
    assert caption_from_name("20_sks_dog/red_fox.v2.jpg", "@file") == "red fox.v2"
    assert caption_from_name("deep/20_sks_dog/1.jpg", "@folder") == "sks dog"
    assert caption_from_name("1.jpg", "@folder") == ""
    assert listed(["a", "b", "c", "d\x1b"]) == "a, b, c and 1 more"


def test_a_path_that_prints_alike_is_found(tmp_path) -> None:
    (tmp_path / DECOMPOSED).mkdir()
    (tmp_path / DECOMPOSED / "a.jpg").write_bytes(b"1")
    (tmp_path / DECOMPOSED / f"{DECOMPOSED}.csv").write_text("file,text\na.jpg,x\n")
    assert read(tmp_path / COMPOSED, metadata=f"{COMPOSED}.csv") == {"a.jpg": "x"}
