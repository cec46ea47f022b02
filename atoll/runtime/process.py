"""Run a function in a separate process, whose crash does not end this one.

Unlike a process of multiprocessing, it imports only what the function needs (not the program's main module, which may
import torch), ignores Ctrl-C, and ends with its parent, even if the parent is killed or a call is running.
"""

import os
import pickle
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from atoll.errors import AtollError

_CHILD = "from atoll.runtime.process import serve; serve()"


class Crashed(Exception):
    """The process ended before it answered. The text says how: "signal 11", "exit code 1"."""


class Remote:
    """Calls a function in a separate process, which starts at the first call and restarts after a crash.

    Not thread-safe, except that `kill` may come from another thread.

    Args:
        function: anything that can be pickled and imported in a fresh process.
    """

    def __init__(self, function: Callable[[Any], Any]):
        self._function = pickle.dumps(function)
        self._process: subprocess.Popen[bytes] | None = None

    def map(self, arguments: Sequence[Any]) -> list[Any]:
        """Return the function's result for each argument, or the exception that it raised (returned, not raised).

        Raises:
            Crashed: the process died at one of them; the results of the others are lost.
            AtollError: no process can be started.
        """
        # Start lazily, and again after a crash.
        process = self._process = self._process or self._start()
        try:
            answers: list[Any] = _ask(process, pickle.dumps(arguments, pickle.HIGHEST_PROTOCOL))
        except (EOFError, OSError, ValueError, pickle.UnpicklingError):  # ValueError: `kill` has closed the pipes
            how = _end(process)
            self._process = None
            raise Crashed(how) from None
        return answers

    def kill(self) -> None:
        """Kill the process. A call that waits for it in another thread raises Crashed."""
        if (process := self._process) is not None:
            process.kill()
            _end(process)

    def _start(self) -> "subprocess.Popen[bytes]":
        # The child sees the same modules as this process.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        process = subprocess.Popen(
            [sys.executable, "-c", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},  # one thread per process
            start_new_session=True,  # Ctrl-C reaches the parent alone
        )
        # Send the function; the process answers with what went wrong, or None.
        try:
            failure = _ask(process, self._function)
        except (EOFError, OSError, pickle.UnpicklingError):
            failure = "it ended with " + _end(process)
        if failure is not None:
            process.kill()
            _end(process)
            raise AtollError(f"a worker process cannot be started: {failure}")
        return process


def serve() -> None:
    """The child's main loop: answer requests from stdin until it closes."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    # Redirect stdout to stderr: what the function prints must not mix with the answers.
    os.dup2(2, 1)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    try:
        # First request: the function.
        try:
            function, failure = pickle.load(requests), None
        except Exception as error:  # any failing import
            function, failure = None, f"{type(error).__name__}: {error}"
        _send(answers, failure)
        # Then lists of arguments.
        while True:
            _send(answers, [_outcome(function, argument) for argument in pickle.load(requests)])
    except (EOFError, BrokenPipeError, pickle.UnpicklingError):  # the parent has finished or died
        os._exit(0)


def _end_with(parent: int) -> None:
    """End this process when its parent has died: a busy one would notice late, a hanging one never."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(0)


def _outcome(function: Any, argument: Any) -> Any:
    try:
        return function(argument)
    except Exception as error:
        error.add_note(traceback.format_exc())  # the traceback itself cannot travel
        return error


def _send(answers: Any, value: Any) -> None:
    pickle.dump(value, answers, pickle.HIGHEST_PROTOCOL)
    answers.flush()


def _ask(process: "subprocess.Popen[bytes]", request: bytes) -> Any:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(request)
    process.stdin.flush()
    return pickle.load(process.stdout)


def _end(process: "subprocess.Popen[bytes]") -> str:
    """Wait for a process that no longer answers, and return how it ended."""
    try:
        code = process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        code = process.wait()
    for pipe in (process.stdin, process.stdout):
        try:
            if pipe is not None:
                pipe.close()
        except OSError:  # what was still to be written has no reader
            pass
    return f"signal {-code}" if code < 0 else f"exit code {code}"
