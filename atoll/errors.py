"""The one error that users see: a single line that says what was got, what was expected, and the fix."""


class AtollError(Exception):
    """A mistake in the user's input or in what is on disk. The command line prints it and exits with code 2."""
