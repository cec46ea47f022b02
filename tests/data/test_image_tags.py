"""Containers whose tags define the meaning of their numbers: scales of TIFF, brands of AVIF."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, features

from atoll.data.containers import Unusable
from atoll.data.image import Framing, frame

WIDTH, HEIGHT = 48, 40
FRAMING = Framing(32, 1, 8)
GREY = np.asarray(Image.fromarray(np.random.default_rng(1).integers(0, 256, (5, 6), dtype=np.uint8)).resize((48, 40)))
SHORT, LONG = 3, 4


def tiff(bits: int, photometric: int, data: bytes, order: str = "<", channels: int = 1, **tags: int) -> bytes:
    """A TIFF of one uncompressed strip. tags: more of them by their names below."""
    numbers = {"max_value": 281, "sample_format": 339, "orientation": 274}
    entries = [
        (256, SHORT, WIDTH),
        (257, SHORT, HEIGHT),
        (258, SHORT, bits),
        (259, SHORT, 1),
        (262, SHORT, photometric),
    ]
    entries += [(277, SHORT, channels), (278, SHORT, HEIGHT), (279, LONG, len(data))]
    entries += [(numbers[name], SHORT, value) for name, value in tags.items()]
    head = 8 + 2 + 12 * (len(entries) + 1) + 4
    extra = b""
    if channels > 1:  # the bits of every channel stand apart
        extra = struct.pack(f"{order}{channels}H", *[bits] * channels)
    entries.append((273, LONG, head + len(extra)))
    body = b""
    for tag, kind, value in sorted(entries):
        if tag == 258 and channels > 1:
            body += struct.pack(f"{order}HHII", tag, SHORT, channels, head)
        else:
            packed = struct.pack(f"{order}HH", value, 0) if kind == SHORT else struct.pack(f"{order}I", value)
            body += struct.pack(f"{order}HHI", tag, kind, 1) + packed
    magic = b"II*\0" if order == "<" else b"MM\0*"
    return magic + struct.pack(f"{order}IH", 8, len(entries)) + body + struct.pack(f"{order}I", 0) + extra + data


def packed_12_bits(values: np.ndarray) -> bytes:
    """Two numbers of 12 bits in three bytes."""
    pairs = values.reshape(-1, 2)
    parts = [pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255]
    return np.stack(parts, 1).astype(np.uint8).tobytes()


def expected() -> np.ndarray:
    sink = io.BytesIO()
    Image.fromarray(GREY).save(sink, "PNG")
    return frame(sink.getvalue(), FRAMING).astype(int)


SIXTEEN = GREY.astype(np.uint16) * 257
TWELVE = (GREY.astype(np.int64) * 4095 + 127) // 255


@pytest.mark.parametrize(
    "data",
    [
        tiff(8, 1, GREY.tobytes()),
        tiff(8, 0, (255 - GREY).tobytes()),
        tiff(16, 1, SIXTEEN.astype("<u2").tobytes()),
        tiff(16, 1, SIXTEEN.astype(">u2").tobytes(), ">"),
        tiff(16, 0, (65535 - SIXTEEN).astype("<u2").tobytes()),
        tiff(12, 1, packed_12_bits(TWELVE)),
        tiff(16, 1, TWELVE.astype("<u2").tobytes(), max_value=4095),
        tiff(16, 0, (4095 - TWELVE).astype("<u2").tobytes(), max_value=4095),
        tiff(16, 1, (GREY.astype(np.int64) * 1023 // 255).astype("<u2").tobytes(), max_value=1023),
        tiff(16, 1, SIXTEEN.astype("<u2").tobytes(), max_value=60000),  # a statistic
        tiff(16, 1, SIXTEEN.astype("<u2").tobytes(), max_value=4095),  # pixels exceed it: no scale
        tiff(8, 1, GREY.tobytes(), max_value=250),
    ],
)
def test_grey_tiff_has_the_brightness_that_its_tags_define(data) -> None:
    assert np.abs(frame(data, FRAMING) - expected()).max() <= 1


def test_every_16_bit_number_is_rounded_to_the_nearest_8_bit_one() -> None:
    values = np.arange(256 * 257, dtype=np.uint32)[: WIDTH * HEIGHT * 34 : 34].astype("<u2")
    data = tiff(16, 1, values.tobytes())
    pixels = frame(data, Framing(HEIGHT, 1, 8))[0]
    rounded = np.round(values.astype(float) / 257).astype(np.uint8).reshape(HEIGHT, WIDTH)
    assert np.array_equal(pixels, rounded[:, 4:44])


def test_a_turned_tiff_of_16_bits_stands_upright() -> None:
    upside_down = np.ascontiguousarray(SIXTEEN[::-1, ::-1])
    data = tiff(16, 1, upside_down.astype("<u2").tobytes(), orientation=3)
    assert np.abs(frame(data, FRAMING) - expected()).max() <= 1


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (
            tiff(12, 0, packed_12_bits(4095 - TWELVE)),
            "header is not that of a TIFF file that",
        ),
        (tiff(16, 1, (SIXTEEN // 2).astype("<i2").tobytes(), sample_format=2), "signed numbers"),
        (tiff(32, 1, GREY.astype("<u4").tobytes()), "no known scale: its 32-bit pixels reach up to 25.; save it"),
        (tiff(10, 1, bytes(HEIGHT * 60)), "header is not that of a TIFF file that"),
        (
            tiff(16, 2, np.stack([TWELVE] * 3, -1).astype("<u2").tobytes(), channels=3, max_value=4095),
            "16-bit channels reach up to 4095 of 65535",
        ),
    ],
)
def test_numbers_without_a_known_scale_are_refused(data, reason) -> None:
    with pytest.raises(Unusable, match=reason):
        frame(data, FRAMING)


def test_a_16_bit_colour_tiff_is_read() -> None:
    data = tiff(16, 2, np.stack([SIXTEEN] * 3, -1).astype("<u2").tobytes(), channels=3)
    assert np.abs(frame(data, FRAMING) - expected()).max() <= 1


def avif(quality: int = 90) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(np.stack([GREY] * 3, -1)).save(sink, "AVIF", quality=quality)
    return sink.getvalue()


@pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")
@pytest.mark.parametrize("brand", [b"avif", b"mif1", b"msf1", b"miaf"])
def test_avif_is_known_by_any_of_its_brands(brand) -> None:
    plain = avif()
    assert np.array_equal(frame(plain[:8] + brand + plain[12:], FRAMING), frame(plain, FRAMING))


def test_a_heic_image_is_refused_by_its_name() -> None:
    heic = struct.pack(">I", 24) + b"ftypmif1" + bytes(4) + b"mif1heic" + bytes(100)
    with pytest.raises(Unusable, match="not an AVIF image: its brands are heic, mif1; save it as JPEG or PNG"):
        frame(heic, FRAMING)
    with pytest.raises(Unusable, match="its brands are none"):
        frame(bytes(4) + b"ftyp" + bytes(30), FRAMING)
