import subprocess
import sys
import unicodedata
from collections import defaultdict

import pytest
import torch

from atoll.data import build_source
from atoll.data.glyphs import DEMO, FACES, Glyphs
from atoll.errors import AtollError


@pytest.fixture(scope="module")
def demo() -> dict[str, tuple[str, str, torch.Tensor]]:
    """caption -> key, split, image [1,16,16]."""
    rows = {}
    for part in Glyphs("demo", 16).batches(300):
        for key, caption, split, image in zip(part.keys, part.captions, part.splits, part.images, strict=True):
            rows[caption] = key, split, image
    return rows


@pytest.fixture(scope="module")
def everything() -> Glyphs:
    return Glyphs("all", 16)


def test_demo_is_ascii_and_greek_in_sixteen_faces(demo) -> None:
    assert len(demo) == len(Glyphs("demo")) == 2288 == 143 * 16
    assert len({key for key, _, _ in demo.values()}) == 2288
    assert {chr(int(key.split("/")[0][2:], 16)) for key, _, _ in demo.values()} == {chr(code) for code in DEMO}


@pytest.mark.parametrize(
    ("prompt", "key"),
    [
        ("latin capital letter a, serif bold", "U+0041/serif-bold"),
        ("greek small letter omega, sans", "U+03C9/sans"),
        ("digit seven, mono italic", "U+0037/mono-italic"),
        ("ampersand, stix bold italic", "U+0026/stix-bold-italic"),
    ],
)
def test_prompts_that_a_person_types(demo, prompt, key) -> None:
    assert demo[prompt][:2] == (key, "train")


def test_every_face_has_words_of_its_own() -> None:
    assert len({face.words for face in FACES}) == len({face.file for face in FACES}) == len(FACES) == 18


def test_pictures_are_black_on_white_and_centred(demo) -> None:
    for caption, (_, _, image) in demo.items():
        assert (image.shape, image.dtype) == ((1, 16, 16), torch.float32)
        assert 0 <= image.min() < 0.75, caption
        assert image.max() == 1
        ink = (image[0] < 0.9).any(0).nonzero()
        assert abs(float(ink.float().mean() if len(ink) == 1 else (ink.min() + ink.max()) / 2) - 7.5) <= 1, caption


def test_scale_and_baseline_are_those_of_the_face(demo) -> None:
    def extent(caption: str) -> tuple[int, int]:
        ink = (demo[caption][2][0] < 0.7).any(1).nonzero()
        return int(ink.min()), int(ink.max())

    for face in ("sans", "serif bold", "mono italic", "stix"):
        capital, small = extent(f"latin capital letter x, {face}"), extent(f"latin small letter x, {face}")
        assert small[0] >= capital[0] + 2
        assert small[1] == capital[1]
        assert extent(f"latin small letter p, {face}")[1] >= capital[1] + 2
        assert extent(f"low line, {face}")[0] > capital[1]


def test_a_character_is_held_out_with_all_its_faces(demo) -> None:
    splits = defaultdict(set)
    for key, split, _ in demo.values():
        splits[key.split("/")[0]].add(split)
    assert all(len(found) == 1 for found in splits.values())
    held_out = {chr(int(code[2:], 16)) for code, found in splits.items() if found == {"val"}}
    assert held_out == set("+?Sg{Λσ")


def test_all_has_every_usable_glyph(everything) -> None:
    assert len(everything) > 50_000
    codes = {code for code, _ in everything._glyphs}
    assert {unicodedata.name(chr(code)).split()[0] for code in codes} > {"BRAILLE", "ARABIC", "CYRILLIC", "DOMINO"}
    assert not codes & {0x20, 0xA0, 0x200B, 0xE000}  # spaces and private use
    assert {FACES[number].words for _, number in everything._glyphs} == {face.words for face in FACES}
    assert everything._glyphs == sorted(set(everything._glyphs))
    held_out = sum(code % 20 == 3 for code, _ in everything._glyphs) / len(everything)
    assert 0.04 < held_out < 0.06


def test_all_have_ink(everything, monkeypatch) -> None:
    monkeypatch.setattr(everything, "_glyphs", everything._glyphs[::97])
    for part in everything.batches(200):
        assert (part.images.amin((1, 2, 3)) < 0.9).all()


def test_batches_do_not_change_what_comes(monkeypatch) -> None:
    source = Glyphs("demo", 24)
    monkeypatch.setattr(source, "_glyphs", source._glyphs[:31])
    whole = next(source.batches(31))
    parts = list(source.batches(7))
    assert [len(part) for part in parts] == [7, 7, 7, 7, 3]
    assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
    assert [key for part in parts for key in part.keys] == whole.keys
    assert whole.images.shape == (31, 1, 24, 24)


def test_config_round_trip() -> None:
    source = build_source({"name": "glyphs", "subset": "demo", "size": 20})
    assert source.config() == {"name": "glyphs", "subset": "demo", "size": 20}
    assert source.fingerprint() == build_source({"name": "glyphs"}).fingerprint()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"name": "mnist"}, "'mnist'.*'glyphs'"),
        ({"name": "glyphs", "subset": "some"}, "subset"),
        ({"name": "glyphs", "size": 4}, "size"),
        ({"name": "glyphs", "pixels": 4}, "pixels"),
    ],
)
def test_build_source_refuses(config, said) -> None:
    with pytest.raises(AtollError, match=said):
        build_source(config)


def test_without_matplotlib_the_error_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from atoll.data.glyphs import Glyphs, AtollError\n"
        "try: Glyphs()\n"
        "except AtollError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "atoll[data]" in done.stdout
