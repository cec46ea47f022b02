"""How much a zip file may unpack to: a small file of a stranger could otherwise fill the memory."""

import zipfile
from pathlib import Path

from atoll.errors import AtollError

TIMES_STORED = 2.0  # of torch.save, which does not compress; the rest is for its directory of members
TIMES_COMPRESSED = 200.0  # of numpy's savez_compressed; arrays of few different numbers reach about 100
NPZ_WRITER = "numpy.savez or savez_compressed"
_FREE = 1 << 20  # bytes that any file may unpack to


def refuse_bomb(file: Path, times: float, writer: str) -> None:
    """Raise AtollError if a zip file unpacks to more than `times` its size. Other files are not judged.

    Args:
        file: the file.
        times: `TIMES_STORED` or `TIMES_COMPRESSED`.
        writer: what writes such files, for the message: "torch.save, which stores tensors as they are".

    Raises:
        AtollError: it unpacks to more.
        OSError, zipfile.BadZipFile: it cannot be read, or its list of members is damaged.
    """
    if not zipfile.is_zipfile(file):
        return
    # Members may overlap in the file, so their sizes count one by one. Readers stop at these sizes.
    with zipfile.ZipFile(file) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > max(_FREE, times * file.stat().st_size):
        raise AtollError(f"{file}: unpacks to {unpacked:,} bytes; expected a file of {writer}")
