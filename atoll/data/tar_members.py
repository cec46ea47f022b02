"""Stream the members of a tar with the standard library, in bounded memory and time.

webdataset's own reader ends silently at a damaged header or a truncated file, yields the truncated sample, and stops at
a repeated key.
"""

import posixpath
import re
import tarfile
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import NamedTuple

from atoll.data.limits import MAX_HEADER_BYTES, MAX_IMAGE_BYTES, may_expand_to
from atoll.data.names import clean, message_of
from atoll.data.opening import open_file
from atoll.data.types import Damaged
from atoll.errors import AtollError
from atoll.storage.memory import refuse_out_of_memory

# WebDataset's rule: the key ends at the first dot of the file name. Data sets with dotted names need the last dot.
RULES = {
    "first-dot": re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL),
    "last-dot": re.compile(r"((?:.*/|)[^/]+)[.]([^./]*)", re.DOTALL),
}
_LONG_HEADERS = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)


class Member(NamedTuple):
    """A member of a tar.

    Attributes:
        key: key of its sample.
        extension: in lower case; "" if there is none.
        content: reads the content; None if it is not wanted. Call it before the next member is taken.
        reason: why it has no content: a link, or too large; "" for a plain file.
    """

    key: str
    extension: str
    content: Callable[[], bytes] | None
    reason: str = ""


class _Header(tarfile.TarInfo):
    """A header that raises if damaged; `tarfile` treats a damaged header as the end of the archive."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> "_Header":
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the end mark
            raise
        except tarfile.EmptyHeaderError:  # type: ignore[attr-defined]
            raise Damaged("it ends without a tar's end mark" if tar.offset else "it is empty") from None
        except tarfile.HeaderError as error:
            raise Damaged(f"no tar header at byte {tar.offset:,} ({message_of(error)})") from None

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        # An extended header is read into memory as a whole.
        if self.type in (*_LONG_HEADERS, tarfile.SOLARIS_XHDTYPE) and self.size > MAX_HEADER_BYTES:
            raise Damaged(f"an extended header of {self.size:,} bytes, expected at most {MAX_HEADER_BYTES:,}")
        value: tarfile.TarInfo = super()._proc_member(tar)  # type: ignore[misc]
        return value


def members(url: str, size: int, wanted: Collection[str], rule: re.Pattern[str]) -> Iterator[Member]:
    """Yield the members of a tar in order.

    Args:
        url: path or URL of the tar.
        size: bytes of the tar.
        wanted: extensions, in lower case, of the members to read.
        rule: one of `RULES`.

    Raises:
        Damaged: it cannot be read further, continues after its end mark, or unpacks to more than its size justifies.
    """
    most = may_expand_to(size)
    try:
        with open_file(url) as file, tarfile.open(fileobj=file, mode="r|*", tarinfo=_Header) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # else all headers of the tar stay in memory
                base = posixpath.basename(member.name)
                # As webdataset: __name__ holds facts about the tar, and a dot begins the names of hidden files.
                if member.isdir() or base.startswith(".") or re.match(r"__[^/]*__($|/)", member.name):
                    continue
                # A name without a dot is a key without an extension.
                match = rule.fullmatch(member.name.removeprefix("./"))
                key, extension = match.groups() if match else (member.name.removeprefix("./"), "")
                end = member.offset_data + member.size
                if end > most and not member.issparse():
                    yield Member(key, extension.lower(), None)  # its header shows that the sample before is complete
                    raise Damaged(f"{size:,} bytes unpack to {end:,} or more")
                yield _member(tar, member, key, extension.lower(), wanted)
            # Only zeros may follow the end mark; more data mean that tars were concatenated.
            while rest := tar.fileobj.read(1 << 16):
                if rest.strip(b"\0"):
                    raise Damaged("it goes on after its end mark")
                if tar.fileobj.tell() > most:
                    raise Damaged(f"{size:,} bytes unpack to {most:,} or more")
    except (Damaged, AtollError):
        raise
    except Exception as error:  # tarfile and its decompressors raise almost anything over damaged bytes
        refuse_out_of_memory(error, url)
        raise Damaged(message_of(error)) from error


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo, key: str, extension: str, wanted: Collection[str]) -> Member:
    if not member.isfile():
        kind = "a link" if member.issym() or member.islnk() else "a pipe or a device"
        return Member(key, extension, None, f"{kind} inside the tar, which is not followed")
    if member.size > MAX_IMAGE_BYTES and not member.issparse():
        return Member(key, extension, None, f"{member.size:,} bytes, expected at most {MAX_IMAGE_BYTES:,}")
    return Member(key, extension, partial(_content, tar, member) if extension in wanted else None)


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if member.issparse():
        raise Damaged(f"{clean(member.name)} is a sparse file, which no image is")
    try:
        file = tar.extractfile(member)
        content = file.read() if file is not None else b""
    except Exception as error:  # as above
        refuse_out_of_memory(error, clean(member.name), member.size)
        raise Damaged(message_of(error)) from error
    # A truncated file ends early without an error from `tarfile`.
    if len(content) != member.size:
        raise Damaged("unexpected end of data")
    return content
