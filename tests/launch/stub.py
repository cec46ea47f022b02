"""Jobs that train nothing: a line of Python each, in a directory of its own."""

import textwrap
from pathlib import Path

from atoll.launch.job import Job

DONE = "import pathlib, sys; pathlib.Path(sys.argv[1]).touch()"  # the result
# Goes on until it is asked to save; then says so.
UNTIL_STOPPED = """
    import signal, sys, time
    def save(*_):
        print("saved", flush=True)
        sys.exit(0)
    signal.signal(signal.SIGTERM, save)
    print("ready", flush=True)
    time.sleep(3600)
"""
# What its first start does is given before it; every start is counted in the file `count`.
SECOND_TIME = """
    import os, pathlib, signal, sys, time
    count = pathlib.Path(sys.argv[1]).with_name("count")
    before = len(count.read_text()) if count.exists() else 0
    count.write_text("x" * (before + 1))
    if before < {times}:
        {first}
    pathlib.Path(sys.argv[1]).touch()
"""


def job(directory: Path, name: str, code: str = DONE, work: float = 100.0, gpus: int = 0) -> Job:
    result = directory / name / "result"
    return Job(name, ("-c", textwrap.dedent(code), str(result)), directory / name, result, 10, work, gpus=gpus)


def dies(directory: Path, name: str, first: str, times: int = 1) -> Job:
    return job(directory, name, SECOND_TIME.format(first=first, times=times))


def starts(directory: Path, name: str) -> int:
    return len((directory / name / "count").read_text())
