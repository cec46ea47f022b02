"""The one error that users see: a single line that says what was got, what was expected, and the fix."""


class AtollError(Exception):
    """A mistake in the user's input or in what is on disk. The command line prints it and exits with code 2.

    What it quotes may come from foreign files: letters that would break the line, or command a terminal, are shown
    by their escapes.
    """

    def __init__(self, message: str):
        super().__init__(message if message.isprintable() else "".join(map(_printable, message)))


def _printable(letter: str) -> str:
    return letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii")
