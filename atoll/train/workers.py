"""The processes of one island, started and watched from one: `atoll train expert 3 --nproc 8`.

They learn of each other as torchrun would tell them, and torchrun can start them as well. It is not used here because
it kills what has not saved within 30 seconds, and tells of a mistake in forty lines.
"""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from atoll.errors import AtollError
from atoll.storage.layout import EXIT_CRASH, EXIT_USER_ERROR

_REPORT, _PARENT = "ATOLL_REPORT", "ATOLL_PARENT"  # the environment of a worker
_GRACE = 10.0  # seconds that the others get to end by themselves once one has failed
Worker = subprocess.Popen[bytes]


def is_first_process() -> bool:
    """Whether this process speaks for its island: the only one, or torchrun's rank 0."""
    return os.environ.get("RANK", "0") == "0"


def train_together(arguments: Sequence[str], count: int) -> None:
    """Runs `python -m atoll ARGUMENTS` in `count` processes that train together, and waits for their end.

    SIGTERM and SIGINT are passed on: the workers save and end, and so does this function; at the second one they are
    killed. The first worker has the terminal, the others are silent. Workers end with this process, however it ends.

    Raises:
        AtollError: the mistake that a worker told.
        SystemExit: 1, after a line about it, where a worker crashed or was killed.
    """
    from torch.distributed import TCPStore

    # This process holds the store that they meet at, so that no port is chosen that another one takes meanwhile.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    workers: list[Worker] = []
    with tempfile.TemporaryDirectory(prefix="atoll-") as directory, _counted_signals() as asked:
        reports = Path(directory)
        try:
            for rank in range(count):
                ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
                workers.append(_start(arguments, {**os.environ, **meeting, **ranks}, reports, rank))
            codes = _watch(workers, asked)
        finally:
            for worker in workers:
                worker.kill()  # nothing to one that has ended
                worker.wait()
        if any(code != 0 for code in codes):
            _raise_failure(codes, reports, stopped=asked() > 0)


def _start(arguments: Sequence[str], environment: dict[str, str], reports: Path, rank: int) -> Worker:
    environment = {**environment, _REPORT: str(_report(reports, rank)), _PARENT: str(os.getpid())}
    command = [sys.executable, "-m", "atoll", *arguments]
    if rank == 0:
        return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
    with _report(reports, rank).open("wb") as report:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=report
        )


def _watch(workers: Sequence[Worker], asked: Callable[[], int]) -> list[int | None]:
    """Waits until all have ended, or one has failed and the others had their time, or a stop was asked for twice.

    Returns the exit codes, None of one that is to be killed.
    """
    stopping, deadline = False, float("inf")
    while any(worker.poll() is None for worker in workers) and time.monotonic() < deadline and asked() < 2:
        failed = any(worker.returncode for worker in workers)
        if (failed or asked()) and not stopping:
            stopping = True
            for worker in workers:
                worker.send_signal(signal.SIGTERM)
        if failed:
            deadline = min(deadline, time.monotonic() + _GRACE)  # those that wait for the failed one wait in vain
        time.sleep(0.05)
    return [worker.poll() for worker in workers]


def _raise_failure(codes: Sequence[int | None], reports: Path, stopped: bool) -> None:
    """Tells in one line what went wrong first: a mistake, else a process that was killed, else one that crashed."""
    count = len(codes)
    for rank, code in enumerate(codes):
        if code == EXIT_USER_ERROR and (lines := _lines(_report(reports, rank))):
            raise AtollError(lines[-1])
    for rank, code in enumerate(codes):
        if code is not None and code < 0 and code != -signal.SIGTERM:
            _end(f"process {rank} of {count} was ended by signal {-code}; --resume goes on from where it saved")
    if stopped:  # while the network was built, or after the last step: there is nothing new to save
        print("stopped outside of the training steps; --resume goes on from where it saved", flush=True)
        return
    for rank, code in enumerate(codes):
        if code is not None and code > 0:
            lines = _lines(_report(reports, rank)) or ["it told nothing"]
            _end(f"process {rank} of {count} ended with code {code}: {lines[-1]}")
    _end(f"one of {count} processes was ended by SIGTERM; --resume goes on from where it saved")


def _end(what: str) -> NoReturn:
    """No mistake of the user's, and perhaps gone at the next attempt: another exit code, as `atoll launch` reads it."""
    print(f"atoll: {what}", file=sys.stderr, flush=True)
    sys.exit(EXIT_CRASH)


def _report(reports: Path, rank: int) -> Path:
    return reports / f"{rank}.txt"


def _lines(file: Path) -> list[str]:
    text = file.read_text(errors="replace") if file.exists() else ""
    return [line.strip() for line in text.splitlines() if line.strip()]


@contextmanager
def _counted_signals() -> Iterator[Callable[[], int]]:
    """Within it, SIGTERM and SIGINT are counted and do nothing else."""
    seen: list[int] = []
    stops = (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.signal(number, lambda signum, _: seen.append(signum)) for number in stops}
    try:
        yield lambda: len(seen)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def reporting() -> Iterator[None]:
    """In a worker, what ends the training is told to the process that started it; elsewhere this does nothing."""
    if _REPORT not in os.environ:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent passes on what is meant
    threading.Thread(target=_end_with, args=(int(os.environ[_PARENT]),), daemon=True).start()
    try:
        yield
    except Exception as error:
        mistake = isinstance(error, AtollError)
        with Path(os.environ[_REPORT]).open("a") as report:
            report.write(f"{error}\n" if mistake else traceback.format_exc())
        _leave(EXIT_USER_ERROR if mistake else EXIT_CRASH)
    _leave(0)


def _leave(code: int) -> None:
    """Ends without tearing down what torch has running in other threads: that aborts now and then."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _end_with(parent: int) -> None:
    """A worker whose parent was killed is killed too: whoever starts the training again must find nobody there."""
    while os.getppid() == parent:
        time.sleep(0.1)
    os._exit(EXIT_CRASH)
