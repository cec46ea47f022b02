"""Jobs that train nothing: a few lines of Python each, in a directory of its own."""

import textwrap
from pathlib import Path

from atoll.launch.job import Job

DONE = "import pathlib, sys; pathlib.Path(sys.argv[1]).touch()"  # the result
# Runs until it is stopped; then prints that it saved. Each line is one write: a signal may arrive inside `print`.
UNTIL_STOPPED = """
    import os, signal, sys, time
    def save(*_):
        os.write(1, b"saved\\n")
        sys.exit(0)
    signal.signal(signal.SIGTERM, save)
    os.write(1, b"ready\\n")
    time.sleep(3600)
"""
# Runs `first` in its first `times` starts, then makes the result; the file `count` counts the starts.
CRASHES_FIRST = """
    import os, pathlib, signal, sys, time
    count = pathlib.Path(sys.argv[1]).with_name("count")
    before = len(count.read_text()) if count.exists() else 0
    count.write_text("x" * (before + 1))
    if before < {times}:
        {first}
    pathlib.Path(sys.argv[1]).touch()
"""


def job(directory: Path, name: str, code: str = DONE, images: float = 100.0, gpus: int = 0) -> Job:
    result = directory / name / "result"
    return Job(name, ("-c", textwrap.dedent(code), str(result)), directory / name, result, 10, images, gpus=gpus)


def crashes(directory: Path, name: str, first: str, times: int = 1) -> Job:
    return job(directory, name, CRASHES_FIRST.format(first=first, times=times))


def starts(directory: Path, name: str) -> int:
    return len((directory / name / "count").read_text())
