"""Caption conventions: the column names to look for, in order of preference, and how values become text.

The same order holds for the columns of tables, the fields of JSON files and the columns of parquet. docs/data.md lists
the conventions of other projects that it covers.
"""

import re
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterable, Mapping
from typing import Any

from atoll.data.limits import MAX_CAPTION_BYTES
from atoll.data.names import clean, message_of, printable
from atoll.data.types import Oversized, Unfit
from atoll.errors import AtollError
from atoll.storage.shards import Split

# Names of columns and fields that hold captions, the preferred ones first; upper and lower case do not matter.
COLUMNS = (
    *("caption", "text", "txt", "prompt", "description", "title", "alt_text", "alt"),
    *("captions", "texts", "prompts", "descriptions", "tags"),
)
# Extensions of files beside images that hold captions, the preferred ones first; so "a.txt" or "a.jpg.txt" for a.jpg.
SIDECARS = ("txt", "caption", "captions", "text", "prompt", "tags", "json")
# Values of data.caption that select the name of the file ("red_fox_2.jpg") or of its directory instead of a column.
FROM_FILE, FROM_FOLDER = "@file", "@folder"

# Words in a column name that suggest captions; used only for notes, never to choose a column.
_CAPTION_WORDS = {"caption", "captions", "prompt", "prompts", "text", "texts", "description", "descriptions"}
_MAX_KEY = 4096  # characters: as many as a path has


def caption_columns(names: Iterable[str]) -> list[str]:
    """Return the names that usually hold captions, preferred first; exact case comes before other cases."""
    # False sorts before True, so "caption" precedes "Caption". The name itself makes the order total.
    by_rank = sorted((COLUMNS.index(name.lower()), name not in COLUMNS, name) for name in names if is_usual(name))
    return [name for _, _, name in by_rank]


def is_usual(name: str) -> bool:
    """Return whether a column of this name is read as captions when the settings name none."""
    return name.lower() in COLUMNS


def like_captions(names: Iterable[str]) -> list[str]:
    """Return the names that suggest captions but are not usual ones, such as blip_caption or prompt_en."""
    return [name for name in names if not is_usual(name) and _CAPTION_WORDS & set(_words(name))]


def _words(name: str) -> list[str]:
    """Split a name into lower-case words: blip_caption -> blip, caption; promptEn -> prompt, en."""
    return [word.lower() for word in re.split(r"[\W_]+|(?<=[a-z])(?=[A-Z])", name)]


def field_of(record: Mapping[str, Any], column: str | None) -> Any:
    """Return the caption of a record: the field `column`, else the first usual field that is not null."""
    if column is not None:
        return joined_tags(column, record.get(column))
    # A null in the preferred column falls through to the next one.
    for name in caption_columns(record):
        if (value := joined_tags(name, record[name])) is not None:
            return value
    return None


def joined_tags(name: str, value: Any) -> Any:
    """Return a list of texts in a column called tags as one caption, None if it is empty; any other value as it is."""
    if name.lower() != "tags" or not isinstance(value, list):
        return value
    if all(isinstance(tag, str) for tag in value):
        return ", ".join(value) or None
    return b", ".join(value) if all(isinstance(tag, bytes) for tag in value) else value


def lines_of(value: object, encoding: str) -> list[str]:
    """Return the stripped, non-empty lines of text in a cell or a file; no lines for None.

    Bytes are decoded with `encoding`, unless they start with a byte order mark of utf-8 or utf-16.

    Raises:
        Unfit: the value is too long, or is not text; the message names the first bad byte.
    """
    if value is None:
        return []
    if isinstance(value, Oversized):
        raise _too_long(value)
    if isinstance(value, bytes):
        _check_length(len(value))
        # A byte order mark is evidence; the setting is only a default.
        codec = encoding_of(value, encoding)
        try:
            value = value.decode(codec)
        except UnicodeDecodeError as error:
            raise _not_text(codec, f"byte 0x{error.object[error.start]:02x} at {error.start}") from None
        # Codecs such as utf-16 and punycode raise the plain UnicodeError, which has no byte position.
        except UnicodeError as error:
            raise _not_text(codec, message_of(error)) from None
    if not isinstance(value, str):
        raise Unfit(f"caption: is {type(value).__name__}, expected text, or a list of texts")
    _check_length(len(value))
    try:
        # Python strings may hold lone surrogates, which no file format can store.
        value.encode()
    except UnicodeEncodeError as error:
        code = ord(value[error.start])  # U+DC80 to U+DCFF stand for bytes, see PEP 383
        what = f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"half a character, U+{code:04X},"
        raise _not_text(encoding, f"{what} at {error.start}") from None
    return [line for line in map(str.strip, value.splitlines()) if line]


def _too_long(size: int) -> Unfit:
    return Unfit(f"caption: {size:,} bytes, expected at most {MAX_CAPTION_BYTES:,}")


def _check_length(size: int) -> None:
    if size > MAX_CAPTION_BYTES:
        raise _too_long(size)


def _not_text(encoding: str, what: str) -> Unfit:
    return Unfit(f"caption: not {encoding} ({what}); save it as utf-8, or set data.encoding")


def encoding_of(start: bytes, encoding: str) -> str:
    """Return the encoding of a text by its first bytes: that of the byte order mark, else `encoding`."""
    if start.startswith(BOM_UTF8):
        return "utf-8-sig"
    return "utf-16" if start.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) else encoding


def check_encoding(encoding: str) -> None:
    """Raise AtollError if Python knows no text encoding of this name."""
    try:
        b"a".decode(encoding)
    except LookupError:
        raise AtollError(f"data.encoding is {encoding!r}, which is no text encoding; try utf-8 or latin-1") from None
    except UnicodeError:
        pass  # utf-16 has no character of one byte


def caption_from_name(name: str, what: str) -> str:
    """Return the caption in a path, like kohya's class tokens and the file name modes of OneTrainer and SimpleTuner.

    Args:
        name: the path of the image, with slashes.
        what: `FROM_FILE`: the file's name, or `FROM_FOLDER`: its directory's, without kohya's number of repeats
            ("20_sks dog"). Underscores become spaces.
    """
    # kohya names folders "<repeats>_<text>", such as "20_sks dog".
    *folders, file = name.split("/")
    folder = re.sub(r"^\d+_", "", folders[-1]) if folders else ""
    text = file.rsplit(".", 1)[0] if what == FROM_FILE else folder
    return " ".join(text.replace("_", " ").split())


def key_of(value: object) -> str:
    """Return the key in a cell: text unchanged, a whole number as digits. Raises Unfit for anything else."""
    # bool and Oversized are kinds of int, but no keys.
    if isinstance(value, int) and not isinstance(value, bool | Oversized):
        return str(value)
    # Keys appear in reports and file lists, so they must print as they are.
    if not isinstance(value, str) or value == "" or printable(value) != value or len(value) > _MAX_KEY:
        raise Unfit(f"key: is {clean(repr(value))}, expected text or a whole number")
    return value


def split_of(value: object) -> Split:
    """Return the split that a cell names: "train" or "training" trains, anything else is held out."""
    # A bad byte gives an unknown word, which holds the sample out: the safe side.
    word = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    return "train" if isinstance(word, str) and word.strip().lower() in ("train", "training") else "val"
