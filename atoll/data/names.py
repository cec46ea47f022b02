"""Compare foreign names, and make names and messages safe to write and to show on a terminal."""

import json
import unicodedata

from atoll.errors import escaped

_REASON = 300  # characters at which foreign text in a message is cut


def canonical(name: str) -> str:
    """Normalise a name to slashes and composed letters (Unicode NFC): names that print alike become equal.

    macOS writes names decomposed, Windows writes back slashes, and both appear in metadata made elsewhere.
    """
    return unicodedata.normalize("NFC", name.replace("\\", "/"))


def printable(text: str) -> str:
    """Escape the bytes of a name that are not text (PEP 383) as \\udc.."""
    return text.encode("utf-8", "backslashreplace").decode()


def clean(text: str) -> str:
    """Make foreign text safe for a message: one line, not too long, with control characters escaped."""
    short = text if len(text) <= _REASON else text[:_REASON] + "..."
    return escaped(short)


def json_line(value: object) -> str:
    """A value as one line of JSON that is safe to print: what a terminal would act on is escaped."""
    text = json.dumps(value, ensure_ascii=False)
    if not text.isprintable():
        text = "".join(letter if letter.isprintable() else json.dumps(letter)[1:-1] for letter in text)
    return text + "\n"


def message_of(error: BaseException) -> str:
    """Return the message of an exception as one short line; its type if it has none."""
    text = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
    return clean(" ".join(text.split())) or type(error).__name__


def listed(names: list[str], most: int = 3) -> str:
    """Format some names for a message: "a, b, c and 7 more"."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(clean(name) for name in names[:most]) + more
