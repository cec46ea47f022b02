"""Limits on the bytes of untrusted data that are read at once, with their reasons.

A small file may unpack to a very large one, and a line may have no end. Nothing here limits the number of samples.
"""

from atoll.storage.bounds import MAX_CAPTION_BYTES as MAX_CAPTION_BYTES

MAX_CAPTIONS_BYTES = 2 * MAX_CAPTION_BYTES  # of all captions of an image: the first one, and the others
MAX_SIDECAR_BYTES = 1 << 20  # the JSON that img2dataset puts beside an image, EXIF included, has some 20,000
MAX_LINE = 1 << 20  # characters of a line of metadata
MAX_JSON_BYTES = 1 << 26  # of a metadata.json, whose parts take 20 times the space in memory; larger ones as .jsonl
MAX_IMAGE_BYTES = 1 << 29  # of an image file: the largest that is decoded has 450 MB as uncompressed RGB
MAX_HEADER_BYTES = 1 << 20  # of a tar member's extended header (names, times): a path has at most 4,096

MAX_TEXT_PAGE_BYTES = 1 << 26  # of a parquet page of text: 1,024 rows of the longest captions
MAX_EXPANSION = 200  # times the bytes on the disk; plain drawings in a compressed archive reach about 100
FREE_EXPANSION = 1 << 26  # bytes that any archive may unpack to
MAX_BATCH_BYTES = 1 << 28  # of the rows of a parquet file that are unpacked together


def may_expand_to(size: int) -> int:
    """Return the bytes that a compressed file of `size` bytes may unpack to."""
    return FREE_EXPANSION + MAX_EXPANSION * size
