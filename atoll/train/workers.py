"""Starts and supervises the processes of one island: `atoll train expert 3 --nproc 8`.

The processes read the same environment variables as under torchrun, and torchrun can start them as well. It is not used
here because it kills processes that have not saved within 30 seconds, and prints forty lines for a user's mistake.
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
from atoll.storage.layout import EXIT_CRASH, EXIT_OUT_OF_MEMORY, EXIT_USER_ERROR
from atoll.storage.memory import is_out_of_memory, one_line

_REPORT, _PARENT = "ATOLL_REPORT", "ATOLL_PARENT"  # the environment of a worker
_GRACE = 10.0  # seconds for the others to exit by themselves after one has failed
Worker = subprocess.Popen[bytes]


def is_first_process() -> bool:
    """Return whether this process prints for its island: the only process, or rank 0."""
    return os.environ.get("RANK", "0") == "0"


def is_worker() -> bool:
    """Return whether `train_together` started this process."""
    return _REPORT in os.environ


def train_together(arguments: Sequence[str], count: int) -> None:
    """Run `python -m atoll ARGUMENTS` in `count` processes that train together, and wait until they exit.

    SIGTERM and SIGINT are forwarded: the workers save and exit, and this function returns; a second signal kills them.
    The first worker prints to the terminal, the others are silent. Workers exit with this process, however it exits.

    Args:
        arguments: of the command line.
        count: number of processes.

    Raises:
        AtollError: a worker reported a user's mistake.
        SystemExit: 1, after one line on stderr, if a worker crashed or was killed.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    # This process hosts the store where they rendezvous: a free port, chosen earlier, could be taken meanwhile.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    workers: list[Worker] = []
    with tempfile.TemporaryDirectory(prefix="atoll-") as directory, _counted_signals() as stop_requests:
        reports = Path(directory)
        try:
            # Start all, then watch them until the last one exits.
            for rank in range(count):
                ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
                workers.append(_start(arguments, {**os.environ, **rendezvous, **ranks}, reports, rank))
            codes = _watch(workers, stop_requests)
        finally:
            for worker in workers:
                worker.kill()  # does nothing to a worker that has exited
                worker.wait()
        if any(code != 0 for code in codes):
            _raise_failure(codes, reports, stopped=stop_requests() > 0)


def _start(arguments: Sequence[str], environment: dict[str, str], reports: Path, rank: int) -> Worker:
    # A worker learns where to report, and whose exit to watch.
    environment = {**environment, _REPORT: str(_report(reports, rank)), _PARENT: str(os.getpid())}
    command = [sys.executable, "-m", "atoll", *arguments]
    # The first worker owns the terminal; the others write to files that are read if they fail.
    if rank == 0:
        return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
    with _report(reports, rank).open("wb") as report:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=report
        )


def _watch(workers: Sequence[Worker], stop_requests: Callable[[], int]) -> list[int | None]:
    """Wait until all workers have exited, or `_GRACE` after one failed, or until the second stop request.

    Returns:
        The exit codes, None for a worker that is still running and must be killed.
    """
    # The deadline starts with the first failure.
    stopping, deadline = False, float("inf")
    while any(worker.poll() is None for worker in workers) and time.monotonic() < deadline and stop_requests() < 2:
        # One failed worker or one signal stops all.
        failed = any(worker.returncode for worker in workers)
        if (failed or stop_requests()) and not stopping:
            stopping = True
            for worker in workers:
                worker.send_signal(signal.SIGTERM)
        if failed:
            # They may wait forever for the failed one.
            deadline = min(deadline, time.monotonic() + _GRACE)
        time.sleep(0.05)
    return [worker.poll() for worker in workers]


def _raise_failure(codes: Sequence[int | None], reports: Path, stopped: bool) -> None:
    """Report the first cause in one line: a user's mistake, lack of memory, a killed process, or a crashed one."""
    # A user's mistake explains everything else.
    count = len(codes)
    for rank, code in enumerate(codes):
        if code == EXIT_USER_ERROR and (lines := _lines(_report(reports, rank))):
            raise AtollError(lines[-1])
    # Others crash because a process is missing: one that had too little memory, or one that was killed.
    for rank, code in enumerate(codes):
        if code == EXIT_OUT_OF_MEMORY and (lines := _lines(_report(reports, rank))):
            _end(f"process {rank} of {count}: {lines[-1]}", EXIT_OUT_OF_MEMORY)
    for rank, code in enumerate(codes):
        if code is not None and code < 0 and code != -signal.SIGTERM:
            _end(f"process {rank} of {count} was killed by signal {-code}; --resume continues from the last checkpoint")
    # Before the first or after the last step: there is nothing new to save.
    if stopped:
        print("stopped outside of the training steps; --resume continues from the last checkpoint", flush=True)
        return
    # A crash is reported with the last line of its traceback.
    for rank, code in enumerate(codes):
        if code is not None and code > 0:
            lines = _lines(_report(reports, rank)) or ["no message"]
            _end(f"process {rank} of {count} exited with code {code}: {lines[-1]}")
    _end(f"one of {count} processes was ended by SIGTERM; --resume continues from the last checkpoint")


def _end(message: str, code: int = EXIT_CRASH) -> NoReturn:
    """Exit with a code that `atoll launch` tries again, unlike a user's mistake."""
    print(f"atoll: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


def _report(reports: Path, rank: int) -> Path:
    return reports / f"{rank}.txt"


def _lines(file: Path) -> list[str]:
    # A worker that was killed may have written nothing.
    text = file.read_text(errors="replace") if file.exists() else ""
    return [line.strip() for line in text.splitlines() if line.strip()]


@contextmanager
def _counted_signals() -> Iterator[Callable[[], int]]:
    """Within it, SIGTERM and SIGINT are only counted; yields a function that returns the count."""
    seen: list[int] = []
    # Both ask for the same: save and exit.
    stops = (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.signal(number, lambda signum, _: seen.append(signum)) for number in stops}
    try:
        yield lambda: len(seen)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def reporting() -> Iterator[None]:
    """In a worker, report why the training ended to the process that started it; does nothing elsewhere."""
    if _REPORT not in os.environ:
        yield
        return
    # Ctrl-C reaches the whole process group; the parent forwards it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A worker that outlives its parent would hold the GPU.
    threading.Thread(target=_exit_with, args=(int(os.environ[_PARENT]),), daemon=True).start()
    try:
        yield
    except Exception as error:
        # The report is one line for a mistake, a traceback for a crash.
        line = one_line(error)
        with Path(os.environ[_REPORT]).open("a") as report:
            report.write(f"{line}\n" if line else traceback.format_exc())
        _leave(EXIT_OUT_OF_MEMORY if is_out_of_memory(error) else EXIT_USER_ERROR if line else EXIT_CRASH)
    _leave(0)


def _leave(code: int) -> None:
    """Exit without stopping torch's other threads, which aborts occasionally."""
    # os._exit does not flush.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _exit_with(parent: int) -> None:
    """Exit when the parent is gone, so that no worker is left when the training is started again."""
    # A process whose parent dies gets another parent.
    while os.getppid() == parent:
        time.sleep(0.1)
    os._exit(EXIT_CRASH)
