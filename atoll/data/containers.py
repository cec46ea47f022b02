"""Recognise image files by their first bytes, and check their container structure before decoding.

Imports nothing but the standard library, so that worker processes start fast.
"""

import re
import struct
import zlib
from collections.abc import Callable

MAX_PIXELS = 150_000_000  # of one image: 450 MB as RGB; below the 179 million where Pillow itself refuses


class Unusable(Exception):
    """An image that cannot be used. The text is one line that names the reason."""


def container_of(data: bytes) -> str:
    """Return Pillow's name of the format, by the first bytes of a file.

    Pillow's other formats are never tried: they are no photographs, and one of them (EPS) runs a program.

    Raises:
        Unusable: the file is empty or of another format.
    """
    if not data:
        raise Unusable("empty: 0 bytes")
    for start, name in _SIGNATURES:
        if start.match(data):
            return name
    # AVIF and its relatives begin with the length of their first box.
    if data[4:8] == b"ftyp":
        return _container_of_brands(data)
    raise Unusable(f"not a JPEG, PNG, WebP, AVIF, GIF, BMP or TIFF image: it begins with {data[:12]!r}")


def check_container(container: str, data: bytes) -> bytes:
    """Check the structure of a file, and return the bytes to decode.

    Raises:
        Unusable: the file is cut short, damaged, or larger than is allowed.
    """
    check = _CHECKS.get(container)
    return data if check is None else check(data)


def refuse_giants(width: int, height: int) -> None:
    """Raise Unusable for more pixels than `MAX_PIXELS`."""
    if width * height > MAX_PIXELS:
        raise Unusable(f"too large: {width} x {height} pixels, expected at most {MAX_PIXELS // 10**6} million")


def _container_of_brands(data: bytes) -> str:
    """Return the format of an ISO base media file (ISO/IEC 14496-12, 4.3) by its major or compatible brands.

    Encoders up to about 2021 wrote AVIF files with the major brand mif1 or msf1.
    """
    size = min(int.from_bytes(data[:4], "big"), len(data), 1024)  # bytes of the box; no writer lists 250 brands
    # Bytes 12 to 15 hold a version, not a brand.
    brands = [data[8:12], *(data[at : at + 4] for at in range(16, size - 3, 4))]
    if b"avif" in brands or b"avis" in brands:
        return "AVIF"
    names = ", ".join(sorted({brand.decode("latin-1") for brand in brands if brand.isalnum()})) or "none"
    raise Unusable(f"not an AVIF image: its brands are {names}; save it as JPEG or PNG")


def _check_avif(data: bytes) -> bytes:
    """Set the major brand that Pillow's plugin expects in a file that lists avif among its compatible brands."""
    return data if data[8:12] in _AVIF_BRANDS else data[:8] + b"avif" + data[12:]


def _check_jpeg(data: bytes) -> bytes:
    """Follow the markers up to the end of image (ITU-T T.81, annex B), and return the bytes to decode.

    Where coded data run out at a marker, libjpeg only warns and paints the rest grey; where they run out at the
    end of the file, Pillow raises. So the end of image is removed from an image of one scan. It is replaced by as many
    zeros as the decoder may read ahead (libjpeg-turbo: 8 bytes, never decoded), so that a good image still loads.
    """
    at, scans = 2, 0
    while True:
        marker = _MARKER.match(data, at)
        if marker is None:
            raise Unusable("truncated" if at + 2 > len(data) else f"damaged: no JPEG marker at byte {at}")
        # Bytes after the end of image, such as a second image of an MPO, are not checked.
        if marker[1] == _END_OF_IMAGE:
            return data[: marker.start()] + bytes(16) if scans == 1 else data
        # A segment: its length counts itself.
        at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
        if at > len(data):
            raise Unusable("truncated: it ends inside its header")
        # Only an image of one scan may lose its end marker.
        scans += _SCANS.get(marker[1], 0)
        if marker[1] == _START_OF_SCAN:
            # Coded data up to the next marker: the restart markers in it must count 0, 1, ..., 7, 0, ...
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
    """Check the checksums of all chunks and of the pixels (PNG, 3rd edition, 5.3 and 10); Pillow skips some of both."""
    at, view, stream, left = 8, memoryview(data), zlib.decompressobj(), 0
    while True:
        # A chunk: length, kind, body, checksum of kind and body.
        size, kind = struct.unpack_from(">I4s", data, at) if at + 12 <= len(data) else (len(data), b"")
        end = at + 12 + size
        if end > len(data):
            raise Unusable("truncated: its end (IEND) is missing")
        if zlib.crc32(view[at + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
            raise Unusable(f"damaged: the checksum of the PNG chunk at byte {at} does not fit")
        if (kind == b"IHDR") != (at == 8):
            raise Unusable("damaged: a PNG begins with its one header (IHDR)")
        # The pixels are decompressed for their own checksum, piece by piece.
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
    """Return the bytes of the raw pixels: rows with a leading filter byte, in 7 passes if interlaced (Adam7)."""
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    refuse_giants(width, height)
    # Channels by colour type: grey, RGB, palette, grey with alpha, RGBA.
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    length = 0
    for left, top, right, down in _ADAM7 if interlaced else [(0, 0, 1, 1)]:
        # Negated floor division rounds up.
        columns, rows = -((left - width) // right), -((top - height) // down)
        length += rows * (1 + (columns * bits + 7) // 8) if columns > 0 and rows > 0 else 0
    return length


def _inflate(stream: "zlib._Decompress", piece: memoryview, limit: int) -> int:
    """Decompress a piece of a stream and return its length; stop beyond `limit` bytes."""
    length = 0
    try:
        for start in range(0, len(piece), 1 << 16):
            part: bytes | memoryview = piece[start : start + (1 << 16)]
            # Decompress at most 1 MiB at a time, so that a bomb never fills the memory.
            while part and not stream.eof and length <= limit:
                length += len(stream.decompress(part, 1 << 20))
                part = stream.unconsumed_tail
    except zlib.error as error:
        raise Unusable(f"damaged: the compressed pixels of the PNG are broken ({error})") from None
    return length


def _check_webp(data: bytes) -> bytes:
    """Check the length in the header of the RIFF container."""
    declared = 8 + int.from_bytes(data[4:8], "little")
    if declared > len(data):
        raise Unusable(f"truncated: {len(data)} of {declared} bytes")
    return data


def _check_gif(data: bytes) -> bytes:
    """Follow the blocks up to the trailer (GIF89a, section 12 on)."""
    try:
        # The header has 13 bytes, followed by the global colour table.
        at = 13 + _colours(data[10])
        while data[at] != _GIF_TRAILER:
            # Both kinds of block end in sub-blocks, which are skipped below.
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
    """Return the size in bytes of the colour table that the flags of a GIF declare."""
    return 3 << (1 + (flags & 7)) if flags & 0x80 else 0


_SIGNATURES = [
    (re.compile(pattern, re.DOTALL), name)
    for pattern, name in (
        (rb"\xff\xd8\xff", "JPEG"),
        (rb"\x89PNG\r\n\x1a\n", "PNG"),
        (rb"RIFF....WEBP", "WEBP"),
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
    "AVIF": _check_avif,
}
_AVIF_BRANDS = (b"avif", b"avis", b"mif1", b"msf1")  # major brands that Pillow opens

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
