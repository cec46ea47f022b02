import hashlib
import pickle
import subprocess
import sys
import unicodedata
from collections import defaultdict

import numpy as np
import pytest

from atoll.data.crop import Framing
from atoll.data.glyphs import DEMO, FACES, Glyphs
from atoll.data.pool import Decoders, Framed
from atoll.data.sources import build_source
from atoll.data.types import Block, Raw
from atoll.errors import AtollError
from atoll.image_size import ImageSize
from atoll.manifest import DataSettings


def samples(source: Glyphs) -> list[Raw]:
    return [raw for block in source.blocks() for raw in source.read(block)]


@pytest.fixture(scope="module")
def demo() -> dict[str, tuple[str, str, np.ndarray]]:
    """caption -> key, split, image [1,16,16]."""
    return {raw.caption: (raw.key, raw.split, raw.image) for raw in samples(Glyphs("demo", 16))}


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


def test_images_are_black_on_white_and_centred(demo) -> None:
    for caption, (_, _, image) in demo.items():
        assert (image.shape, image.dtype) == ((1, 16, 16), np.uint8)
        assert image.min() < 0.75 * 255, caption
        assert image.max() == 255
        (ink,) = (image[0] < 0.9 * 255).any(0).nonzero()
        assert abs((ink.min() + ink.max()) / 2 - 7.5) <= 1, caption


def test_scale_and_baseline_are_those_of_the_face(demo) -> None:
    def extent(caption: str) -> tuple[int, int]:
        (ink,) = (demo[caption][2][0] < 0.7 * 255).any(1).nonzero()
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
    assert all(raw.image.min() < 0.9 * 255 for raw in samples(everything))


def test_blocks_cover_everything_once(everything) -> None:
    blocks = everything.blocks()
    assert [block.content for block in blocks[:2]] == [(0, 4096), (4096, 8192)]
    assert sum(block.samples for block in blocks) == len(everything)
    assert [a.content[1] for a in blocks[:-1]] == [b.content[0] for b in blocks[1:]]
    assert len({block.name for block in blocks}) == len(blocks)
    last = blocks[-1]
    assert len(list(everything.read(last))) == last.samples == last.content[1] - last.content[0]


def test_read_from_a_copy_elsewhere() -> None:
    source = Glyphs("demo", 24)
    copy, block = pickle.loads(pickle.dumps((source, Block("some", 3, (40, 43)))))
    here, there = list(source.read(block)), list(copy.read(block))
    assert [raw.key for raw in here] == [raw.key for raw in there]
    assert all(np.array_equal(a.image, b.image) for a, b in zip(here, there, strict=True))
    assert here[0].image.shape == (1, 24, 24)


def test_keys_captions_and_splits_are_what_they_were(demo) -> None:
    """Pixels may differ with the version of FreeType; what runs are compared by may not."""
    lines = "".join(f"{key}|{caption}|{split}\n" for caption, (key, split, _) in demo.items())
    assert hashlib.sha256(lines.encode()).hexdigest().startswith("6bc9dbe4cc810a08")


def test_config_round_trip() -> None:
    source = build_source(DataSettings(source="glyphs", subset="demo", size=20))
    assert source.config() == {"name": "glyphs", "subset": "demo", "size": 20}
    assert source.fingerprint() == build_source(DataSettings()).fingerprint()


@pytest.mark.parametrize(("options", "said"), [({"subset": "some"}, "subset"), ({"size": 4}, "size")])
def test_settings_are_checked(options, said) -> None:
    with pytest.raises(AtollError, match=said):
        Glyphs(**options)


def test_without_matplotlib_the_error_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from atoll.data.glyphs import Glyphs, AtollError\n"
        "try: Glyphs()\n"
        "except AtollError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "atoll[data]" in done.stdout


@pytest.fixture(scope="module")
def cells() -> dict[str, Raw]:
    return {raw.caption: raw for raw in samples(Glyphs("demo", 24, "cell"))}


def test_monospaced_faces_in_cells_hold_the_same_glyphs(cells) -> None:
    squares = {raw.caption: raw for raw in samples(Glyphs("demo", 24))}
    assert cells.keys() == squares.keys()
    for caption, raw in cells.items():
        mono = " mono" in caption
        assert raw.image.shape == ((1, 24, 16) if mono else (1, 24, 24)), caption
        assert (raw.key, raw.split) == (squares[caption].key, squares[caption].split)
        # The feature network reads a square either way.
        square = raw.square if mono else raw.image
        assert square is not None
        assert np.array_equal(square, squares[caption].image)
        if mono:
            # Nothing is cut off: as much ink as in the square, up to the rounding of the canvas.
            assert abs(float(raw.image.mean()) * 16 + 255 * 8 - float(square.mean()) * 24) < 60, caption


def test_cells_have_the_sizes_that_buckets_must_list() -> None:
    data = {"source": "glyphs", "size": 24, "tiles": "cell"}
    source = build_source(DataSettings(**data, buckets={"sizes": ["24x24", "16x24"]}))
    assert source.config() == {"name": "glyphs", "subset": "demo", "size": 24, "tiles": "cell"}
    for buckets in (None, {}, {"sizes": ["24x24", "12x24"]}):
        with pytest.raises(AtollError, match=r"the sizes 24x24 and 16x24; set data.buckets: \{sizes: \[24x24, 16x24\]"):
            build_source(DataSettings(**data, buckets=buckets))
    with pytest.raises(AtollError, match=r"data.size 16, tiles cell: .* a multiple of 3"):
        Glyphs("demo", 16, "cell")


def test_grey_glyphs_for_a_codec_of_three_channels() -> None:
    raw = next(iter(Glyphs("demo", 24, "cell").read(Block("some", 1, (7, 8)))))
    framing = Framing(24, 3, 12, (ImageSize(24, 24), ImageSize(24, 16)))
    with Decoders(framing, 0) as decoders:
        (framed,) = decoders.frames([raw])
    assert isinstance(framed, Framed)
    assert np.array_equal(framed.pixels, raw.image.repeat(3, axis=0))
