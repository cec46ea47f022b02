"""Images of every kind against what they must look like; and a clear line for each that cannot be used."""

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from atoll.data import containers, crop
from atoll.data.containers import Unusable
from atoll.data.image import Framing, frame

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
SQUARE = Framing(size=8, channels=3, smallest_side=1)


def save(image: Image.Image, kind: str, **options) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def smooth(width: int, height: int, seed: int = 0) -> Image.Image:
    """Random, and smooth enough for JPEG to keep."""
    noise = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int, colour: int, rows: list[bytes], *extra: bytes, pixels=None) -> bytes:
    """A PNG by hand, for what Pillow does not write."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    body = zlib.compress(b"".join(b"\0" + row for row in rows)) if pixels is None else pixels
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def published_crop(image: Image.Image, size: int) -> np.ndarray:
    """The crop as its papers tell it, said once more: halve (box) to under twice the size, bicubic, central square."""
    width, height = image.size
    while min(width, height) // 2 >= size:
        width, height = width // 2, height // 2
        image = image.resize((width, height), resample=Image.Resampling.BOX)
    if width < height:
        width, height = size, round(height * size / width)
    else:
        width, height = round(width * size / height), size
    pixels = np.asarray(image.resize((width, height), resample=Image.Resampling.BICUBIC))
    return pixels[(height - size) // 2 :, (width - size) // 2 :][:size, :size].transpose(2, 0, 1)


@pytest.mark.parametrize(
    ("width", "height"),
    [(8, 8), (13, 8), (8, 21), (16, 16), (15, 33), (37, 64), (200, 131), (131, 257), (6, 11), (5, 5), (2000, 9)],
)
@pytest.mark.parametrize("size", [8, 9])
def test_crop_is_the_published_one(width, height, size) -> None:
    source = smooth(width, height)
    found = frame(save(source, "PNG"), Framing(size, 3, 1))
    assert (found.shape, found.dtype) == ((3, size, size), np.uint8)
    assert found.flags.c_contiguous
    assert found.flags.writeable
    assert np.array_equal(found, published_crop(source, size))


def test_the_square_is_the_central_one() -> None:
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, 8:16] = [10, 20, 30]
    found = frame(save(Image.fromarray(pixels), "PNG"), SQUARE)
    assert (found.reshape(3, -1).T == [10, 20, 30]).all()


@pytest.mark.parametrize(
    ("kind", "options", "near"),
    [
        ("PNG", {}, 0),
        ("PNG", {"optimize": True}, 0),
        ("BMP", {}, 0),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("TIFF", {"compression": "tiff_adobe_deflate"}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("WEBP", {"quality": 95}, 25),
        ("AVIF", {"quality": 95}, 25),
        ("JPEG", {"quality": 95, "subsampling": 0}, 12),
        ("JPEG", {"quality": 95, "subsampling": 0, "progressive": True}, 12),
        ("JPEG", {"quality": 95, "subsampling": 0, "restart_marker_blocks": 1}, 12),
        ("GIF", {}, 40),
    ],
)
@pytest.mark.parametrize("channels", [3, 1])
def test_every_format(kind, options, near, channels) -> None:
    if kind not in Image.registered_extensions().values():
        pytest.skip(f"this Pillow has no {kind}")
    source = smooth(21, 16)
    found = frame(save(source, kind, **options), Framing(8, channels, 1)).astype(int)
    expected = published_crop(source, 8) if channels == 3 else None
    if expected is None:
        grey = published_crop(Image.merge("RGB", [source.convert("L")] * 3), 8)
        expected = grey[:1]
    assert found.shape == (channels, 8, 8)
    assert np.abs(found - expected).max() <= near


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation(kind, orientation) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = save(smooth(24, 17), kind, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert upright.size == ((24, 17) if orientation < 5 else (17, 24))
    assert np.array_equal(frame(data, SQUARE), published_crop(upright.convert("RGB"), 8))


@pytest.mark.parametrize(
    "exif", [b"", b"rubbish", b"MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 40, b"II*\0\x08\0\0\0\x01\0\x12\x01"]
)
def test_unreadable_exif_leaves_a_good_image(exif) -> None:
    source = smooth(24, 17)
    data = save(source, "JPEG", exif=b"Exif\0\0" + exif)
    assert np.array_equal(frame(data, SQUARE), frame(save(source, "JPEG"), SQUARE))


def test_colour_profiles_are_ignored() -> None:
    source, profile = smooth(16, 12), ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    assert np.array_equal(frame(save(source, "PNG", icc_profile=profile), SQUARE), frame(save(source, "PNG"), SQUARE))


RED_ROW = [bytes([0, 1] * 4)] * 8  # palette numbers of 8 x 8 pixels: every second one is 1


@pytest.mark.parametrize(
    ("data", "left", "right"),
    [
        (save(Image.new("RGBA", (8, 8), (255, 0, 0, 0)), "PNG"), (255, 255, 255), (255, 255, 255)),
        (save(Image.new("RGBA", (8, 8), (255, 0, 0, 255)), "PNG"), (255, 0, 0), (255, 0, 0)),
        (save(Image.new("RGBA", (8, 8), (0, 0, 0, 102)), "WEBP", lossless=True), (153,) * 3, (153,) * 3),
        (save(Image.new("LA", (8, 8), (0, 51)), "PNG"), (204,) * 3, (204,) * 3),
        (
            png(8, 8, 8, 3, RED_ROW, chunk(b"PLTE", bytes([0, 0, 9, 255, 0, 0])), chunk(b"tRNS", b"\x00\xff")),
            (255, 255, 255),
            (255, 0, 0),
        ),
        (png(8, 8, 8, 3, RED_ROW, chunk(b"PLTE", bytes([0, 0, 9, 255, 0, 0]))), (0, 0, 9), (255, 0, 0)),
        (png(8, 8, 8, 2, [bytes([1, 2, 3, 4, 5, 6] * 4)] * 8, chunk(b"tRNS", b"\0\1\0\2\0\3")), (255,) * 3, (4, 5, 6)),
        (png(8, 8, 8, 0, [bytes([7, 9] * 4)] * 8, chunk(b"tRNS", b"\0\7")), (255,) * 3, (9, 9, 9)),
        (png(8, 8, 16, 0, [b"\1\2\x80\x80" * 4] * 8, chunk(b"tRNS", b"\1\2")), (255,) * 3, (128,) * 3),
        (png(8, 8, 16, 4, [b"\0\0\0\0\x80\x80\xff\xff" * 4] * 8), (255,) * 3, (128,) * 3),
        (png(8, 8, 1, 0, [b"\x55"] * 8), (0,) * 3, (255,) * 3),
        (save(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"), (255, 0, 0), (255, 0, 0)),
    ],
    ids=[
        *("clear RGBA", "opaque RGBA", "WebP alpha", "LA", "clear palette entry", "palette", "clear RGB", "clear grey"),
        *("clear 16-bit grey", "16-bit LA", "1 bit", "CMYK TIFF"),
    ],
)
def test_transparent_is_white_and_every_mode_has_its_colour(data, left, right) -> None:
    found = frame(data, SQUARE)
    assert tuple(found[:, 3, 0]) == left
    assert tuple(found[:, 3, 1]) == right


def test_cmyk_jpeg_is_not_inverted() -> None:
    source = smooth(16, 12)
    found = frame(save(source.convert("CMYK"), "JPEG", quality=97), SQUARE).astype(int)
    assert np.abs(found - published_crop(source, 8)).max() < 16


@pytest.mark.parametrize(("dtype", "kind"), [("<u2", "PNG"), ("<u2", "TIFF"), (">u2", "TIFF"), ("<i4", "TIFF")])
def test_16_bits_are_scaled_not_clipped(dtype, kind) -> None:
    values = np.linspace(0, 65535, 64).round().reshape(8, 8).astype(dtype)
    found = frame(save(Image.fromarray(values), kind), Framing(8, 1, 1))
    assert np.array_equal(found[0], np.round(values / 257).astype(np.uint8))
    assert (found[0, 0, 0], found[0, -1, -1]) == (0, 255)


@pytest.mark.parametrize(
    ("pixels", "said"),
    [
        (np.full((8, 8), 0.5, np.float32), "floating-point"),
        (np.full((8, 8), 65536, np.int32), "whole numbers from 65536 to 65536"),
        (np.full((8, 8), -1, np.int32), "whole numbers from -1 to -1"),
    ],
)
def test_numbers_that_are_no_colours(pixels, said) -> None:
    with pytest.raises(Unusable, match=said):
        frame(save(Image.fromarray(pixels), "TIFF"), SQUARE)


def animation(kind: str) -> bytes:
    first, second = smooth(16, 12), smooth(16, 12, seed=1)
    return save(first, kind, save_all=True, append_images=[second])


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "AVIF", "TIFF"])
def test_animations_are_refused(kind) -> None:
    with pytest.raises(Unusable, match="an animation"):
        frame(animation(kind), SQUARE)


def test_of_a_phones_mpo_the_first_image_is_taken() -> None:
    data = animation("MPO")
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert np.array_equal(frame(data, SQUARE), frame(save(smooth(16, 12), "JPEG"), SQUARE))


IMAGE = smooth(40, 30)


def cut(kind: str, keep: float, **options) -> bytes:
    data = save(IMAGE, kind, **options)
    return data[: int(keep * len(data))]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "empty: 0 bytes"),
        (b"<!DOCTYPE html>", r"not a JPEG, .* begins with b'<!DOCTYPE ht'"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not a JPEG"),
        (b"\xff\xd8\xff", "truncated"),
        (b"\x89PNG\r\n\x1a\n", "truncated"),
        (b"GIF89a", "truncated"),
        (b"BM", "damaged: its header"),
        (b"II*\0", "cannot be decoded|damaged"),
        (cut("JPEG", 0.9), "truncated"),
        (save(IMAGE, "JPEG")[:-2], "truncated: its end of image"),
        (cut("JPEG", 0.9, progressive=True), "truncated"),
        (cut("PNG", 0.5), "truncated"),
        (save(IMAGE, "PNG")[:-12], r"truncated: its end \(IEND\)"),
        (cut("WEBP", 0.99), r"truncated: \d+ of \d+ bytes"),
        (save(IMAGE, "GIF")[:-1], "truncated: the GIF's trailer"),
        (cut("BMP", 0.9), "cannot be decoded: image file is truncated"),
        (cut("TIFF", 0.9), "truncated"),
        (png(8, 8, 8, 0, [bytes(8)] * 7), "end early"),
        (png(8, 8, 8, 0, [bytes(8)] * 9), "too many"),
        (png(8, 8, 8, 0, [], pixels=zlib.compress(bytes(72))[:-4]), "end early"),
        (png(8, 8, 8, 0, [], pixels=zlib.compress(bytes(72))[:-1] + b"!"), "incorrect data check"),
        (png(8, 8, 8, 0, [bytes(8)] * 8, chunk(b"IHDR", bytes(13))), "one header"),
        (png(8, 8, 8, 0, [bytes(8)] * 8, chunk(b"tEXt", b"a\0b")[:-1] + b"!"), "checksum of the PNG chunk at byte 33"),
        (png(8, 8, 8, 5, [bytes(8)] * 8), "cannot be decoded"),
        (save(IMAGE, "PNG").replace(b"IHDR", b"IHDX"), "checksum"),
    ],
)
def test_damage_is_named(data, said) -> None:
    with pytest.raises(Unusable, match=said) as caught:
        frame(data, SQUARE)
    assert len(str(caught.value).splitlines()) == 1


def test_a_jpeg_with_a_lost_restart_marker() -> None:
    data = save(IMAGE, "JPEG", restart_marker_blocks=2)
    frame(data, SQUARE)
    with pytest.raises(Unusable, match="restart markers"):
        frame(data.replace(b"\xff\xd0", b"\x00\x00"), SQUARE)


def test_a_jpeg_with_a_marker_inside_its_coded_data() -> None:
    """A well-formed segment of a reserved kind: libjpeg takes it for the end of the data, and fills up with grey."""
    data = save(IMAGE, "JPEG")
    middle = (data.index(b"\xff\xda") + len(data)) // 2
    with pytest.raises(Unusable, match=f"a JPEG marker that cannot be there, at byte {middle}"):
        frame(data[:middle].rstrip(b"\xff") + b"\xff\x37\0\2" + data[-2:], SQUARE)


def test_what_follows_the_end_of_an_image_is_ignored() -> None:
    for kind in ("JPEG", "PNG", "WEBP", "GIF"):
        data = save(IMAGE, kind)
        assert np.array_equal(frame(data + b"\0\xff\0trailer", SQUARE), frame(data, SQUARE))


def test_interlaced_png() -> None:
    """Adam7, of a size that leaves passes empty: one grey pixel in the first pass, the second in the sixth."""
    body = zlib.compress(b"\0\x0a" + b"\0\x14")
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 8, 0, 0, 0, 1))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    assert frame(data, Framing(1, 1, 1)).shape == (1, 1, 1)
    with pytest.raises(Unusable, match="end early"):
        frame(data.replace(chunk(b"IDAT", body), chunk(b"IDAT", zlib.compress(b"\0\x0a"))), Framing(1, 1, 1))


def test_too_small() -> None:
    framing = Framing(64, 3, 32)
    with pytest.raises(Unusable, match=r"^too small: 12 x 9 pixels, expected at least 32 on the shorter side$"):
        frame(save(smooth(12, 9), "PNG"), framing)
    with pytest.raises(Unusable, match="300 x 31 pixels"):
        frame(save(smooth(300, 31), "JPEG"), framing)
    assert frame(save(smooth(33, 32), "PNG"), framing).shape == (3, 64, 64)


@pytest.mark.parametrize("side", [12_300, 20_000, 2**31 - 1])
@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF"])
def test_giants_are_refused_before_they_are_decoded(side, kind) -> None:
    if kind == "PNG":
        data = png(side, side, 1, 0, [], pixels=zlib.compress(bytes(99)))
    elif kind == "BMP":
        data = bytearray(save(IMAGE, "BMP"))
        data[18:26] = struct.pack("<ii", side, side)
    else:
        data = bytearray(save(IMAGE, "GIF"))
        data[6:10] = struct.pack("<HH", min(side, 65535), min(side, 65535))
    with pytest.raises(Unusable, match=r"pixels, expected at most 150 million|more than 150 million"):
        frame(bytes(data), SQUARE)


def test_compressed_nothing_without_end_is_not_unpacked(monkeypatch) -> None:
    unpacked = 0

    def inflate(stream, piece, limit):
        nonlocal unpacked
        unpacked += (length := original(stream, piece, limit))
        return length

    original = containers._inflate
    monkeypatch.setattr(containers, "_inflate", inflate)
    with pytest.raises(Unusable, match="too many"):
        frame(png(8, 8, 8, 0, [], pixels=zlib.compress(bytes(50_000_000))), SQUARE)
    assert unpacked < 3_000_000


@pytest.mark.parametrize(("width", "height"), [(1, 5000), (5000, 1), (1, 1), (3, 4000)])
def test_long_and_narrow(width, height) -> None:
    assert frame(save(smooth(width, height), "PNG"), SQUARE).shape == (3, 8, 8)


def test_too_long_to_be_enlarged(monkeypatch) -> None:
    monkeypatch.setattr(crop, "MAX_PIXELS", 100_000)
    with pytest.raises(Unusable, match="too narrow: 1 x 5000 pixels cannot be enlarged to 8"):
        frame(save(smooth(1, 5000), "PNG"), SQUARE)


@pytest.mark.parametrize("error", [MemoryError(), ZeroDivisionError("by\nzero"), struct.error("short"), TypeError()])
def test_whatever_pillow_raises_is_one_line(monkeypatch, error) -> None:
    def explode(*_, **__):
        raise error

    monkeypatch.setattr(Image, "open", explode)
    with pytest.raises(Unusable, match=r"^cannot be decoded: \S.*\S$"):
        frame(save(IMAGE, "PNG"), SQUARE)


@pytest.mark.parametrize("framing", [(0, 3, 1), (8, 2, 1), (8, 3, 0)])
def test_framings_that_make_no_sense(framing) -> None:
    with pytest.raises(ValueError, match="a framing has"):
        Framing(*framing)


def test_what_pillow_logs_stays_off_the_terminal() -> None:
    """Where nobody has set up logging, Python prints warnings and errors to stderr."""
    code = (
        "import logging, atoll.data.image; logging.getLogger('PIL.TiffImagePlugin').error('more samples than allowed')"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stderr == ""


def test_it_needs_no_torch() -> None:
    modules = "atoll.data.image, atoll.runtime.process"
    code = f"import sys, {modules}; assert not {{'torch', 'pydantic', 'pyarrow'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("file", "column", "size"),
    [
        ("flowers128.parquet", "image_bytes", 128),
        ("eurosat64_0of2.parquet", "image_bytes", 64),
        ("emoji64.parquet", "image_webp", 64),
    ],
)
def test_real_images_are_taken(file, column, size) -> None:
    if not (DATA / file).is_file():
        pytest.skip(f"no {DATA / file}")
    import pyarrow.parquet as pq

    batch = next(pq.ParquetFile(DATA / file).iter_batches(150, columns=[column]))
    for data in batch[column].to_pylist():
        expected = Image.open(io.BytesIO(data)).convert("RGBA")
        white = Image.new("RGB", expected.size, "white")
        white.paste(expected, mask=expected)
        assert np.array_equal(frame(data, Framing(size, 3, 32)), np.asarray(white).transpose(2, 0, 1))
