"""Decode image files to arrays: upright, opaque on white, resized and cropped to a square or a bucket.

Imports numpy and Pillow alone: it runs in worker processes, which must start fast and need no torch.

A damaged file is refused, never half decoded. Detected: any truncated file; any changed byte in a PNG (its chunks and
pixels have checksums); a broken structure (markers, restart markers, blocks) or coded data that end early in a JPEG or
GIF; anything the decoders reject. Not detected: JPEG, WebP, AVIF, GIF, BMP and most TIFF files have no checksum of
their pixels, so a changed byte that still decodes gives a changed image.

Colours are used as stored: ICC profiles are ignored, as in the pipelines of the published models (the
result would otherwise depend on the version of a colour engine). CMYK is converted without a profile, too.
"""

import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
from PIL import Image, UnidentifiedImageError

from atoll.data.containers import MAX_PIXELS, Unusable, check_container, container_of, refuse_giants
from atoll.data.crop import Box, Frames, Framing, frame_image

_WHITE = (255, 255, 255)
_ORIENTATION = 0x0112  # EXIF 2.3, 4.6.4 A: the rotation that turns the stored image upright
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Tags of TIFF 6.0, sections 8 and 19, that define how numbers map to intensity.
_BITS, _PHOTOMETRIC, _MAX_VALUE, _SAMPLE_FORMAT = 258, 262, 281, 339
_WHITE_IS_ZERO = 0
_SIGNED = 2
_DARK = 4096  # of 65535: 32-bit numbers that stay below it are more likely of 8 or 12 bits than of a nearly black image

logging.getLogger("PIL").addHandler(logging.NullHandler())  # else Pillow logs to the terminal


def frame(data: bytes, framing: Framing) -> np.ndarray:
    """Return the pixels [C, h, w] uint8 of `frames`."""
    return frames(data, framing).pixels


def frames(data: bytes, framing: Framing, focus: Box | None = None) -> Frames:
    """Decode the bytes of an image file.

    Formats: JPEG (the first image of a phone's MPO), PNG, WebP, AVIF, GIF, BMP and TIFF.

    Args:
        data: the file.
        framing: the format of the result.
        focus: what must stay inside the crop.

    Raises:
        Unusable: the file is empty, is no image, is damaged, too small, too large or animated, its pixels have no
            agreed meaning as an image (floating point, signed or 32-bit numbers), or no bucket has about its aspect.
    """
    # The first bytes decide the format; the extension of a file is not reliable.
    container = container_of(data)
    with _unusable():
        image = _decode(check_container(container, data), container, framing)
        return frame_image(_plain(image, framing.channels), framing, focus)
    raise AssertionError("either pixels or an exception")


def load_image(file: tuple[bytes, int]) -> np.ndarray:
    """Decode the bytes of an image file for a captioner: upright, opaque on white, uncropped.

    Args:
        file: the bytes, and the pixels of the longer side at most.

    Returns:
        Pixels [H, W, 3], uint8.

    Raises:
        Unusable: as `frame`, except for its size.
    """
    data, side = file
    with _unusable():
        container = container_of(data)
        image = _plain(_decode(check_container(container, data), container, Framing(1, 3, 1)), channels=3)
        image.thumbnail((side, side), Image.Resampling.LANCZOS)  # never enlarges
        return np.asarray(image)
    raise AssertionError("either pixels or an exception")


@contextmanager
def _unusable() -> Iterator[None]:
    """Raise Unusable for whatever decoders raise."""
    with warnings.catch_warnings():
        # Pillow warns about odd metadata; what matters is raised.
        warnings.simplefilter("ignore")
        try:
            yield
        except Unusable:
            raise
        except MemoryError:
            raise Unusable("cannot be decoded: it needs more memory than there is") from None
        except Exception as error:  # decoders raise nearly everything over foreign bytes
            raise Unusable(f"cannot be decoded: {_line(error)}") from error


def _decode(data: bytes, container: str, framing: Framing) -> Image.Image:
    """Decode all pixels and turn the image upright; check the header first. Raises what Pillow raises."""
    try:
        # Only the detected format is tried, so that no other decoder sees the bytes.
        image: Image.Image = Image.open(io.BytesIO(data), formats=[container])
    except UnidentifiedImageError:
        raise Unusable(f"damaged: its header is not that of a {container} file that Pillow can read") from None
    except Image.DecompressionBombError:
        raise Unusable(f"too large: more than {MAX_PIXELS // 10**6} million pixels") from None
    # Check the dimensions in the header before any pixel is decoded.
    width, height = image.size
    refuse_giants(width, height)
    if min(width, height) < framing.smallest_side:
        raise Unusable(
            f"too small: {width} x {height} pixels, expected at least {framing.smallest_side} on the shorter side"
        )
    # An MPO is a JPEG with further images, such as a preview or the other eye; only the first one counts.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise Unusable("an animation, or several pages; a single image is expected")
    # libtiff writes to the descriptor itself, so redirecting sys.stderr would not help.
    with _silent_stderr() if container == "TIFF" else nullcontext():
        image.load()
    turn = _turn(image)  # read first: what converts an image drops its EXIF data
    if container == "TIFF":
        image = _tiff_in_8_bits(image)
    return image if turn is None else image.transpose(turn)


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Silence libtiff, which prints every complaint to the terminal; those that matter are raised as exceptions too."""
    terminal, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        os.close(nowhere)


def _tiff_in_8_bits(image: Image.Image) -> Image.Image:
    """Apply the tags of a TIFF: Pillow leaves 12-bit and 16-bit grey as the stored numbers.

    Full scale is the largest number of `BitsPerSample` bits. A `MaxSampleValue` of 2^n - 1 that no pixel exceeds is the
    scale of a camera with fewer bits in a 16-bit file; any other value is a statistic (TIFF 6.0, section 8).

    Raises:
        Unusable: no tag defines the scale of the numbers.
    """
    tags = image.tag_v2  # type: ignore[attr-defined]
    # Leave all that Pillow already scales, and refuse what has no defined scale.
    bits, kind = _first(tags.get(_BITS, 1)), _first(tags.get(_SAMPLE_FORMAT, 1))
    if image.mode == "F" or bits not in (8, 12, 16, 32):
        return image  # floats are refused by `_plain`; Pillow scales fewer bits itself
    if kind == _SIGNED and bits < 32:
        raise Unusable("no known scale: its pixels are signed numbers; save it with 8 or 16 bits")
    if bits == 32:  # Pillow's own mode I, which as a rule holds 16 bits: `_from_16_bits` reads these
        if 0 < (high := int(np.asarray(image).max())) < _DARK:
            raise Unusable(f"no known scale: its 32-bit pixels reach up to {high}; save it with 8 or 16 bits")
        return image
    # Full scale is 2^bits - 1, unless MaxSampleValue is a smaller 2^n - 1.
    full = 2**bits - 1
    white = _first(tags.get(_MAX_VALUE, full))
    smaller = white < full and white > 0 and white & (white + 1) == 0
    if image.mode == "L" or image.mode.startswith("I;16"):
        # 32 bits hold 65535 * 255 without overflow.
        values = np.asarray(image).astype(np.uint32)  # [H,W]
        inverted = tags.get(_PHOTOMETRIC, _WHITE_IS_ZERO) == _WHITE_IS_ZERO
        if inverted and image.mode == "L":
            values = full - values  # Pillow has inverted 8 bits already: back to the numbers that are stored
        # A pixel above MaxSampleValue disproves it as the scale.
        scale = white if smaller and int(values.max()) <= white else full
        if image.mode == "L" and scale == full:
            return image
        # Integer division with half the divisor added rounds to nearest.
        grey = (values * 255 + scale // 2) // scale
        return Image.fromarray((255 - grey if inverted else grey).astype(np.uint8))
    # Pillow has kept the upper 8 bits of each channel: with a smaller scale almost nothing is left of the image.
    if smaller and bits == 16 and image.mode in ("RGB", "RGBA") and int(np.asarray(image)[..., :3].max()) <= white >> 8:
        raise Unusable(f"too dark: its 16-bit channels reach up to {white} of {full}; save it with 8 or all 16 bits")
    return image


def _first(value: object) -> int:
    """Return the value of a tag, or the first of several; 1 if it is no number."""
    number = value[0] if isinstance(value, tuple) and value else value
    return int(number) if isinstance(number, int | float) else 1


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Return the rotation in the EXIF data; None if there is none or it cannot be read."""
    try:
        return _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except MemoryError:
        raise
    except Exception:  # as many kinds as there are broken EXIF writers
        return None


def _plain(image: Image.Image, channels: int) -> Image.Image:
    """Convert to 8 bits per channel, RGB or grey, opaque on white."""
    if image.mode == "F":
        raise Unusable("no known scale: its pixels are floating-point numbers; save it with 8 or 16 bits")
    # Order matters: reduce to 8 bits first, then remove transparency, then convert the channels.
    if image.mode.startswith("I"):
        image = _from_16_bits(image)
    if image.has_transparency_data:
        transparent = image.convert("RGBA")
        image = Image.new("RGB", image.size, _WHITE)
        # Transparent pixels have arbitrary colours; white is the background of a page.
        image.paste(transparent, mask=transparent.getchannel("A"))
    mode = "RGB" if channels == 3 else "L"
    return image if image.mode == mode else image.convert(mode)  # convert would copy it


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Round grey in 0..65535 (modes I;16, I;16B, I) to 8 bits; `convert("L")` would clip above 255 to white."""
    values = np.asarray(image)  # [H,W]
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise Unusable(f"no known scale: its pixels are whole numbers from {low} to {high}; save it with 8 or 16 bits")
    grey = (values.astype(np.uint32) + 128) // 257  # 65535 = 255 * 257
    if (clear := image.info.get("transparency")) is not None:  # PNG: this value is transparent
        grey[values == clear] = 255
    return Image.fromarray(grey.astype(np.uint8))


def _line(error: Exception) -> str:
    """Return the message of an error as one short line; its type if it has none."""
    return " ".join(str(error).split())[:160] or type(error).__name__
