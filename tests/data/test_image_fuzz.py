"""Damaged files: an image of the right shape or Unusable, never anything else; and where damage can be seen, it is."""

import io
import random
import warnings

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, features

from atoll.data.containers import Unusable
from atoll.data.image import Framing, frame

FRAMING = Framing(size=24, channels=3, smallest_side=8)
EACH = 100  # damaged files of each kind


def image() -> Image.Image:
    """Smooth, with a little noise: no two blocks are alike."""
    g = np.random.default_rng(5)
    ground = Image.fromarray(g.integers(0, 256, (5, 4, 3), dtype=np.uint8)).resize((52, 37), Image.Resampling.BICUBIC)
    return Image.fromarray(np.clip(np.asarray(ground) + g.integers(-4, 5, (37, 52, 3)), 0, 255).astype(np.uint8))


def save(source: Image.Image, kind: str, **options) -> bytes:
    sink = io.BytesIO()
    source.save(sink, kind, **options)
    return sink.getvalue()


def make() -> dict[str, bytes]:
    source, exif = image(), Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray(np.asarray(source.convert("L")).astype(np.uint16) * 257)
    files = {
        "jpeg": save(source, "JPEG", exif=exif),
        "jpeg-progressive": save(source, "JPEG", progressive=True),
        "jpeg-restarts": save(source, "JPEG", restart_marker_blocks=2),
        "jpeg-cmyk": save(source.convert("CMYK"), "JPEG"),
        "png": save(source, "PNG", exif=exif),
        "png-palette": save(source.quantize(40), "PNG", transparency=3),
        "png-16": save(deep, "PNG"),
        "png-animated": save(source, "PNG", save_all=True, append_images=[source.rotate(180)]),
        "webp": save(source, "WEBP", exif=exif),
        "webp-lossless": save(source, "WEBP", lossless=True),
        "gif": save(source, "GIF"),
        "bmp": save(source, "BMP"),
        "tiff": save(source, "TIFF"),
        "tiff-lzw": save(source, "TIFF", compression="tiff_lzw"),
        "tiff-jpeg": save(source, "TIFF", compression="jpeg"),
    }
    if features.check("avif"):
        files["avif"] = save(source, "AVIF")
    return files


FILES = make()
GOOD = {name: frame(data, FRAMING) for name, data in FILES.items() if name != "png-animated"}


def damage(data: bytes, g: random.Random) -> bytes:
    """One of the ways in which files break."""
    start = g.randrange(len(data))
    part = slice(start, start + g.choice([1, 7, 64, 500]))
    way = g.randrange(7)
    if way == 0:
        return data[:start]
    if way == 1:
        flipped = bytearray(data)
        for _ in range(g.choice([1, 1, 5, 50])):
            flipped[g.randrange(len(data))] ^= 1 << g.randrange(8)
        return bytes(flipped)
    if way == 2:
        return data[: part.start] + bytes(len(data[part])) + data[part.stop :]
    if way == 3:
        return data[: part.stop] + data[part] + data[part.stop :]
    if way == 4:
        return data[: part.start] + data[part.stop :]
    if way == 5:
        other = g.choice(list(FILES.values()))
        length = g.choice([4, 12, 40, 200])
        return other[:length] + data[length:]
    # the first bytes steer the decoder most
    head = bytearray(data)
    head[g.randrange(min(64, len(data)))] = g.randrange(256)
    return bytes(head)


def attempt(data: bytes) -> np.ndarray | None:
    """The pixels, or None for Unusable; whatever else is raised fails the test."""
    try:
        pixels = frame(data, FRAMING)
    except Unusable as unusable:
        (line,) = str(unusable).splitlines()
        assert 5 < len(line) < 250
        assert " at 0x" not in line  # where an object lies in memory: another at every run
        return None
    assert (pixels.shape, pixels.dtype) == ((3, 24, 24), np.uint8)
    return pixels


@pytest.mark.parametrize("name", FILES)
def test_a_hundred_broken_files_of_each_kind(name, capfd) -> None:
    g = random.Random(name)
    refused = 0
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(EACH):
            broken = damage(FILES[name], g)
            pixels = attempt(broken)
            refused += pixels is None
            if name in ("png", "png-palette", "png-16") and pixels is not None and broken[:8] == FILES[name][:8]:
                assert np.array_equal(pixels, GOOD[name])  # a PNG is good or refused, nothing between
    assert refused > EACH // 5
    assert warned == []
    assert capfd.readouterr() == ("", "")


def test_they_are_more_than_a_thousand() -> None:
    assert len(FILES) * EACH > 1000


@pytest.mark.parametrize("name", [name for name in FILES if name.split("-")[0] in ("jpeg", "png", "webp", "gif")])
def test_cut_anywhere_is_seen(name) -> None:
    data = FILES[name]
    ends = {*range(min(300, len(data))), *range(len(data) - 100, len(data)), *range(0, len(data), 13)}
    assert [end for end in sorted(ends) if attempt(data[:end]) is not None] == []


@pytest.mark.parametrize("name", [name for name in FILES if name.split("-")[0] in ("bmp", "tiff", "avif")])
def test_cut_where_pixels_are_lost_is_seen(name) -> None:
    """These have no end mark: the padding of the last row, or a table that nobody reads, may go unmissed."""
    data = FILES[name]
    for end in {*range(0, len(data), 29), *range(len(data) - 20, len(data))}:
        pixels = attempt(data[:end])
        assert pixels is None or np.array_equal(pixels, GOOD[name])


@pytest.mark.parametrize("name", ["png", "png-palette", "png-16"])
def test_every_changed_byte_of_a_png_is_seen(name) -> None:
    data, g = FILES[name], random.Random(1)
    for at in {*range(120), *range(len(data) - 40, len(data)), *range(120, len(data), 7)}:
        flipped = bytearray(data)
        flipped[at] ^= 1 << g.randrange(8)
        assert attempt(bytes(flipped)) is None, at


@pytest.mark.parametrize("name", ["jpeg", "jpeg-cmyk", "jpeg-restarts"])
def test_coded_data_that_end_early_before_an_end_mark(name) -> None:
    """As tools leave it that close a truncated JPEG: libjpeg paints the rest grey, and nobody hears its warning."""
    data, end = FILES[name], b"\xff\xd9"
    start = data.index(b"\xff\xda") + 20
    passed = [at for at in range(start, len(data) - 2, 3) if attempt(data[:at].rstrip(b"\xff") + end) is not None]
    assert all(at > len(data) - 30 for at in passed)  # by less than the decoder's read-ahead: unseen


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_whole_jpegs_pass_whatever_bit_they_end_at(mode, subsampling) -> None:
    source = image()
    for size in range(8, 37):
        part = source.crop((0, 0, size + 3, size)).convert(mode)
        data = save(part, "JPEG", quality=40 + size, subsampling=subsampling, optimize=size % 2 == 0)
        expected = Image.open(io.BytesIO(data)).convert("RGB")
        found = frame(data, Framing(size, 3, 1))
        assert np.array_equal(found, np.asarray(expected)[:, 1 : size + 1].transpose(2, 0, 1))


@given(st.binary(max_size=300), st.sampled_from(list(FILES)), st.integers(0, 40))
@example(b"", "png", 0)
@example(b"\xff\xd8\xff\xd9", "jpeg", 0)
@settings(max_examples=300)
def test_foreign_bytes_behind_a_true_header(tail, name, length) -> None:
    attempt(FILES[name][:length] + tail)
