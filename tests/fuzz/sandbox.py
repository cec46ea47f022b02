"""A command in a forked process, with limits on memory and processor time: what it printed, and what it used."""

import contextlib
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TRACEBACK = 70  # the exit code of a child whose exception nobody caught
CPU_SECONDS = 60  # after which the kernel ends a child; a hang is told by its own, smaller limit
ALARM_SECONDS = 600  # for a child that sleeps for ever; far above what a loaded machine needs
ADDRESSES = 16 << 30  # bytes of addresses: reserved ones count, too


@dataclass(frozen=True)
class Outcome:
    """What a command did.

    Attributes:
        code: its exit code; negative for a signal.
        error: what it wrote to standard error.
        cpu_seconds: of processor time. grown: bytes of memory at its peak above those that it began with.
    """

    code: int
    error: str
    cpu_seconds: float
    grown: int


def run(work: Callable[[], object], log: Path) -> Outcome:
    """Run `work` in a fork of this process."""
    sys.stdout.flush()
    sys.stderr.flush()
    before = _resident()
    child = os.fork()
    if child == 0:
        _child(work, log)
    _, status, usage = os.wait4(child, 0)
    grown = (usage.ru_maxrss << 10) - before
    error = log.read_text(errors="backslashreplace")
    return Outcome(os.waitstatus_to_exitcode(status), error, usage.ru_utime + usage.ru_stime, grown)


def _child(work: Callable[[], object], log: Path) -> None:
    code = TRACEBACK
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115 (for good)
        # The kernel ends a child that computes for ever, and an alarm one that waits for ever.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(ALARM_SECONDS)
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _resident() -> int:
    """Bytes of memory that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()
