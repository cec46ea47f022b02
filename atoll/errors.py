"""The one error that users see: a single line that names what was got, what was expected, and the fix."""


class AtollError(Exception):
    """A mistake in the user's input or in a file on disk. The command line prints it and exits with code 2.

    The message may quote foreign files: characters that would break the line or control a terminal are escaped.
    """

    def __init__(self, message: str):
        super().__init__(escaped(message))


def escaped(text: str) -> str:
    """Escape what would break a line or control a terminal: foreign text may be in any message."""
    # Most texts need nothing.
    return text if text.isprintable() else "".join(map(_escaped, text))


def _escaped(letter: str) -> str:
    return letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii")
