"""Wait for progress, never for a clock: no test may fail because the machine is slow or busy.

A wait ends when its condition holds. It fails at once when a process it depends on ends, and otherwise only after
`SILENCE` seconds in which nothing moved: no output, no new step, no new file. The failure shows what was written.
"""

import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

SILENCE = 900.0  # seconds without any progress, after which a wait fails
_POLL = 0.02  # seconds between two looks


class Heartbeat:
    """Tracks whether anything moved. `progress` returns any value; a change of that value is progress."""

    def __init__(self, progress: Callable[[], object]):
        self.progress = progress
        self.value = progress()
        self.moved_at = time.monotonic()

    def stopped(self) -> bool:
        """Return whether nothing has moved for SILENCE seconds."""
        now, value = time.monotonic(), self.progress()
        if value != self.value:
            self.value, self.moved_at = value, now
        return now - self.moved_at > SILENCE


def wait_until(
    condition: Callable[[], object],
    *,
    process: "subprocess.Popen[str] | None" = None,
    progress: Callable[[], object] = lambda: None,
) -> None:
    """Wait until a condition holds.

    Args:
        condition: called repeatedly, until its result is true.
        process: the wait fails if this process ends before the condition holds.
        progress: see `Heartbeat`.

    Raises:
        AssertionError: the process ended, or nothing moved for SILENCE seconds.
    """
    heartbeat = Heartbeat(progress)
    while not condition():
        if process is not None and process.poll() is not None and not condition():
            raise AssertionError(f"process ended with {process.returncode}: {process.communicate()}")
        assert not heartbeat.stopped(), f"no progress for {SILENCE:.0f} s; the last was {heartbeat.value!r}"
        time.sleep(_POLL)


def communicate(
    process: "subprocess.Popen[str]", progress: Callable[[], object] = lambda: None
) -> tuple[str | None, str | None]:
    """Wait for a process to end; its output counts as progress. Return its stdout and stderr (None: no pipe).

    Raises:
        AssertionError: nothing moved for SILENCE seconds; the process is killed. The message shows its output.
    """
    written: list[bytes | str] = []  # what the process wrote so far
    heartbeat = Heartbeat(lambda: (sum(map(len, written)), progress()))
    while True:
        try:
            return process.communicate(timeout=1)
        except subprocess.TimeoutExpired as expired:  # it goes on; nothing that it wrote is lost
            written[:] = [part for part in (expired.output, expired.stderr) if part]
        if heartbeat.stopped():
            process.kill()
            raise AssertionError(f"no progress of {process.args} for {SILENCE:.0f} s; it wrote {written}")


def run_to_end(command: Sequence[str], **options: Any) -> "subprocess.CompletedProcess[str]":
    """`subprocess.run` with captured output, whose only time limit is SILENCE seconds without output."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    stdout, stderr = communicate(process)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def run_ranks(command: Sequence[str], environments: Sequence[Mapping[str, str]], folder: Path, **options: Any) -> None:
    """Run one process per environment until all have ended with 0; what each writes goes to folder/rank-N.log.

    `options` go to Popen. A rank that fails ends the others, which would wait for it. What any rank writes is
    progress of all.

    Raises:
        AssertionError: a rank failed, or none wrote anything for SILENCE seconds. The message shows what every rank
            wrote.
    """
    logs = [folder / f"rank-{rank}.log" for rank in range(len(environments))]
    processes = []
    for log, environment in zip(logs, environments, strict=True):
        with log.open("wb") as file:
            processes.append(
                subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT, **options)
            )
    heartbeat = Heartbeat(lambda: [log.stat().st_size for log in logs])
    reason = "a rank failed"
    while None in [process.poll() for process in processes]:  # all of them, also behind one that runs
        silent = heartbeat.stopped()
        if silent:
            reason = f"no rank wrote anything for {SILENCE:.0f} s"
        for process in processes if silent or any(process.returncode for process in processes) else ():
            process.kill()
        time.sleep(_POLL)
    codes = [process.returncode for process in processes]
    ranks = enumerate(zip(codes, logs, strict=True))
    assert not any(codes), "\n".join(
        [reason, *(f"--- rank {rank} ended with {code} and wrote:\n{log.read_text()}" for rank, (code, log) in ranks)]
    )
