"""Image files into arrays of one size: decoded whole, turned upright, put on white, cropped to a square, resized.

Imports numpy and Pillow alone: it runs in worker processes, which must start fast and need no torch.

A damaged file is refused, never half decoded. What is found: any file cut short; in a PNG any changed byte (chunks and
pixels carry checksums); in a JPEG or GIF a structure that no longer fits (markers, restart markers, blocks), or coded
data that end early; whatever the decoders themselves object to. What cannot be found: JPEG, WebP, AVIF, GIF, BMP and
most TIFF files carry no checksum of their pixels, so a changed byte there that still decodes is a changed image and
passes for a good one.

Colours are taken as the file stores them: ICC profiles are ignored, as in the pipelines of the published models (the
result would otherwise depend on the version of a colour engine). CMYK is converted without a profile, too.
"""

import io
import logging
import os
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 150_000_000  # of one image: 450 MB as RGB; below the 179 million where Pillow itself refuses
_WHITE = (255, 255, 255)
_ORIENTATION = 0x0112  # EXIF 2.3, 4.6.4 A: how the stored image must be turned to stand upright
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

logging.getLogger("PIL").addHandler(logging.NullHandler())  # else what Pillow logs goes to the terminal


class Unusable(Exception):
    """An image that cannot be used. Its text is one line that names what was found."""


@dataclass(frozen=True)
class Framing:
    """What every image becomes. size: pixels of a side. channels: 3 (RGB) or 1 (grey: ITU-R 601-2 luma).

    smallest_side: pixels; images whose shorter side has fewer are refused. Those between it and `size` are enlarged.
    """

    size: int
    channels: int
    smallest_side: int

    def __post_init__(self) -> None:
        if self.size < 1 or self.smallest_side < 1 or self.channels not in (1, 3):
            raise ValueError(f"a framing has a size and a smallest side of at least 1, and 1 or 3 channels; got {self}")


def frame(data: bytes, framing: Framing) -> np.ndarray:
    """The image in the bytes of a file, [C,size,size] uint8.

    Read are JPEG (of a phone's MPO the first image), PNG, WebP, AVIF, GIF, BMP and TIFF.

    Raises:
        Unusable: nothing, no image, a damaged, too small, too large or animated one, or pixels of a kind that has no
            agreed meaning as an image (floating point).
    """
    container = _container(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if (check := _CHECKS.get(container)) is not None:
                data = check(data)
            image = _decode(data, container, framing)
            image = _plain(_upright(image), framing.channels)
            image = centre_square(image, framing.size)
        except Unusable:
            raise
        except MemoryError:
            raise Unusable("cannot be decoded: it needs more memory than there is") from None
        except Exception as error:  # decoders fed with foreign bytes raise nearly everything
            raise Unusable(f"cannot be decoded: {_line(error)}") from error
    pixels = np.asarray(image).reshape(framing.size, framing.size, framing.channels)  # [H,W,C]
    return pixels.transpose(2, 0, 1).copy()  # [C,H,W]


def centre_square(image: Image.Image, size: int) -> Image.Image:
    """The central square, resized to `size` pixels of a side, as ADM and DiT prepare ImageNet.

    Halved by averaging (box filter) while the shorter side is at least twice `size`, resized bicubically until it is
    `size`, then cropped. Source: the description in Dhariwal & Nichol, 2021 (arXiv 2105.05233) and Peebles & Xie, 2023
    (arXiv 2212.09748).
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > MAX_PIXELS:
        raise Unusable(f"{image.width} x {image.height} pixels: too long and narrow to be enlarged to {size}")
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _decode(data: bytes, container: str, framing: Framing) -> Image.Image:
    """The image as stored, all its pixels read; what its header tells is judged first. Raises what Pillow raises."""
    try:
        image = Image.open(io.BytesIO(data), formats=[container])
    except UnidentifiedImageError:
        raise Unusable(f"damaged: its header is not that of a {container} file") from None
    except Image.DecompressionBombError:
        raise Unusable(f"more than the {MAX_PIXELS // 10**6} million pixels that are allowed") from None
    width, height = image.size
    _refuse_giants(width, height)
    if min(width, height) < framing.smallest_side:
        asked = f"at least {framing.smallest_side} on the shorter side are asked for"
        raise Unusable(f"{width} x {height} pixels; {asked}")
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise Unusable("an animation, or several pages; a single image is expected")
    with _silent_stderr() if container == "TIFF" else nullcontext():
        image.load()
    return image


def _refuse_giants(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise Unusable(f"{width} x {height} pixels; at most {MAX_PIXELS // 10**6} million are allowed")


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """libtiff prints every complaint to the terminal itself; those that matter come as exceptions, too."""
    terminal, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        os.close(nowhere)


def _upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF data say. Where they cannot be read, they say nothing; the pixels are good all the same."""
    try:
        turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # as many kinds as there are broken EXIF writers
        return image
    return image if turn is None else image.transpose(turn)


def _plain(image: Image.Image, channels: int) -> Image.Image:
    """Opaque on white, 8 bits a channel, RGB or grey."""
    if image.mode == "F":
        raise Unusable("its pixels are floating-point numbers, whose range nothing tells; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        image = _from_16_bits(image)
    if image.has_transparency_data:
        transparent = image.convert("RGBA")
        image = Image.new("RGB", image.size, _WHITE)
        image.paste(transparent, mask=transparent.getchannel("A"))
    mode = "RGB" if channels == 3 else "L"
    return image if image.mode == mode else image.convert(mode)  # which else would copy it


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Grey in 0..65535 (modes I;16, I;16B, I) as 8 bits, rounded; `convert("L")` would clip all above 255 to white."""
    values = np.asarray(image)  # [H,W]
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise Unusable(f"its pixels are whole numbers from {low} to {high}; save it with 8 or 16 bits")
    grey = (values.astype(np.uint32) + 128) // 257  # 65535 = 255 * 257
    if (clear := image.info.get("transparency")) is not None:  # PNG: this value is transparent
        grey[values == clear] = 255
    return Image.fromarray(grey.astype(np.uint8))


def _container(data: bytes) -> str:
    """Pillow's name of the format, by the file's first bytes. Pillow's other formats are never tried: they are no
    photographs, and one of them (EPS) runs a program."""
    if not data:
        raise Unusable("empty: 0 bytes")
    for start, name in _SIGNATURES:
        if start.match(data):
            return name
    raise Unusable(f"not a JPEG, PNG, WebP, AVIF, GIF, BMP or TIFF image: it begins with {data[:12]!r}")


def _check_jpeg(data: bytes) -> bytes:
    """Follows the markers up to the end of image (ITU-T T.81, annex B); returns what is to be decoded.

    Where coded data run out at a marker, libjpeg warns, unheard, and paints the rest grey; where they run out at the
    end of the file, Pillow raises. So an image of one scan goes without its end of image, and with as many zeros as
    the decoder may read ahead (libjpeg-turbo: 8 bytes; never to be decoded), lest it miss them in a good one.
    """
    at, scans = 2, 0
    while True:
        marker = _MARKER.match(data, at)
        if marker is None:
            raise Unusable("truncated" if at + 2 > len(data) else f"damaged: no JPEG marker at byte {at}")
        if marker[1] == _END_OF_IMAGE:
            return data[: marker.start()] + bytes(16) if scans == 1 else data
        at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
        if at > len(data):
            raise Unusable("truncated: it ends inside its header")
        scans += _SCANS.get(marker[1], 0)
        if marker[1] == _START_OF_SCAN:
            marker = _MARKER.search(data, at)
            if marker is None:
                raise Unusable("truncated: its end of image is missing")
            restarts = b"".join(_RESTART.findall(data, at, marker.start()))
            if restarts.translate(_RESTART_NUMBER) != (bytes(range(8)) * (len(restarts) // 8 + 1))[: len(restarts)]:
                raise Unusable("damaged: JPEG restart markers are missing or out of order")
            if marker[1] not in _AFTER_SCAN:
                raise Unusable(f"damaged: a JPEG marker that cannot be there, at byte {marker.start()}")
            at = marker.start()


def _check_png(data: bytes) -> bytes:
    """The checksums of every chunk and of the pixels (PNG, 3rd edition, 5.3 and 10); Pillow skips some of both."""
    at, view, stream, left = 8, memoryview(data), zlib.decompressobj(), 0
    while True:
        size, kind = struct.unpack_from(">I4s", data, at) if at + 12 <= len(data) else (len(data), b"")
        end = at + 12 + size
        if end > len(data):
            raise Unusable("truncated: its end (IEND) is missing")
        if zlib.crc32(view[at + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
            raise Unusable(f"damaged: the checksum of the PNG chunk at byte {at} does not fit")
        if (kind == b"IHDR") != (at == 8):
            raise Unusable("damaged: a PNG begins with its one header (IHDR)")
        if kind == b"IHDR":
            left = _png_length(view[at + 8 : end - 4])
        elif kind == b"IDAT":
            left -= _inflate(stream, view[at + 8 : end - 4], left)
        elif kind == b"IEND":
            break
        at = end
    if left != len(stream.flush()) or not stream.eof:
        raise Unusable("damaged: the compressed pixels of the PNG end early, or are too many")
    return data


def _png_length(header: memoryview) -> int:
    """Bytes of the pixels before compression: rows with a leading filter byte, in 7 passes where interlaced (Adam7)."""
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    _refuse_giants(width, height)
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    length = 0
    for left, top, right, down in _ADAM7 if interlaced else [(0, 0, 1, 1)]:
        columns, rows = -((left - width) // right), -((top - height) // down)
        length += rows * (1 + (columns * bits + 7) // 8) if columns > 0 and rows > 0 else 0
    return length


def _inflate(stream: "zlib._Decompress", piece: memoryview, limit: int) -> int:
    """Decompresses a piece of a stream, for its checksum; keeps nothing but the length, and stops beyond the limit."""
    length = 0
    try:
        for start in range(0, len(piece), 1 << 16):
            part: bytes | memoryview = piece[start : start + (1 << 16)]
            while part and not stream.eof and length <= limit:
                length += len(stream.decompress(part, 1 << 20))
                part = stream.unconsumed_tail
    except zlib.error as error:
        raise Unusable(f"damaged: the compressed pixels of the PNG are broken ({_line(error)})") from None
    return length


def _check_webp(data: bytes) -> bytes:
    """The length that stands in the header of its RIFF container."""
    declared = 8 + int.from_bytes(data[4:8], "little")
    if declared > len(data):
        raise Unusable(f"truncated: {len(data)} of {declared} bytes")
    return data


def _check_gif(data: bytes) -> bytes:
    """Follows the blocks up to the trailer (GIF89a, section 12 on)."""
    try:
        at = 13 + _colours(data[10])
        while data[at] != _GIF_TRAILER:
            if data[at] == _GIF_EXTENSION:
                at += 2
            elif data[at] == _GIF_IMAGE:
                at += 11 + _colours(data[at + 9])
            else:
                raise Unusable(f"damaged: no GIF block at byte {at}")
            while data[at]:  # sub-blocks of 1 to 255 bytes, ended by an empty one
                at += 1 + data[at]
            at += 1
    except IndexError:
        raise Unusable("truncated: the GIF's trailer is missing") from None
    return data


def _colours(flags: int) -> int:
    """The bytes of the table of colours that the flags of a GIF announce."""
    return 3 << (1 + (flags & 7)) if flags & 0x80 else 0


def _line(error: Exception) -> str:
    """What an error says, as a single short line; its kind where it says nothing."""
    return " ".join(str(error).split())[:160] or type(error).__name__


_SIGNATURES = [
    (re.compile(pattern, re.DOTALL), name)
    for pattern, name in (
        (rb"\xff\xd8\xff", "JPEG"),
        (rb"\x89PNG\r\n\x1a\n", "PNG"),
        (rb"RIFF....WEBP", "WEBP"),
        (rb"....ftypavi[fs]", "AVIF"),
        (rb"GIF8[79]a", "GIF"),
        (rb"BM", "BMP"),
        (rb"II\*\0|MM\0\*|II\+\0|MM\0\+", "TIFF"),
    )
]
_CHECKS: dict[str, Callable[[bytes], bytes]] = {
    "JPEG": _check_jpeg,
    "PNG": _check_png,
    "WEBP": _check_webp,
    "GIF": _check_gif,
}

# In the coded data of a JPEG, FF 00 is a stuffed FF and FF D0..D7 restarts the decoder; any number of FF may lead.
_MARKER = re.compile(rb"\xff\xff*([^\x00\xff\xd0-\xd7])", re.DOTALL)  # \xff+ would be searched 20 times slower
_RESTART = re.compile(rb"\xff([\xd0-\xd7])")
_RESTART_NUMBER = bytes((code - 0xD0) % 256 for code in range(256))
_END_OF_IMAGE, _START_OF_SCAN = b"\xd9", b"\xda"
_SCANS = {b"\xda": 1, b"\xc2": 2}  # a progressive image (SOF2) has several, and is read to its end of image anyway
# Tables, the next scan, comments and the end: DHT DAC EOI SOS DQT DNL DRI APPn COM.
_AFTER_SCAN = {bytes([code]) for code in (0xC4, 0xCC, 0xD9, 0xDA, 0xDB, 0xDC, 0xDD, *range(0xE0, 0xF0), 0xFE)}
# First column and row, and the steps to the next ones, of each pass of an interlaced PNG.
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_GIF_EXTENSION, _GIF_IMAGE, _GIF_TRAILER = 0x21, 0x2C, 0x3B
