"""A function in a process of its own, which may die without taking this one along.

Beside multiprocessing's, such a process imports only what the function needs (not the main module of the program, which
may be a training script with torch at its top), does not hear Ctrl-C, and ends with its parent, even with one killed by
force, and even in the middle of a call.
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
    """The process ended before it answered. Its text says how: "signal 11", "exit code 1"."""


class Remote:
    """Calls a function in a process of its own, which starts at the first call, and anew after one that crashed.

    function: anything that can be pickled, and imported there without what only this process has. Not for two threads
    at a time; only `kill` may come from another.
    """

    def __init__(self, function: Callable[[Any], Any]):
        self._function = pickle.dumps(function)
        self._process: subprocess.Popen[bytes] | None = None

    def map(self, arguments: Sequence[Any]) -> list[Any]:
        """What the function makes of each argument: its result, or the exception that it raised (not thrown here).

        Raises:
            Crashed: the process died over one of them; nothing is known of the others.
            AtollError: no process can be started.
        """
        process = self._process = self._process or self._start()
        try:
            answers: list[Any] = _ask(process, pickle.dumps(arguments, pickle.HIGHEST_PROTOCOL))
        except (EOFError, OSError, ValueError, pickle.UnpicklingError):  # ValueError: `kill` has closed the pipes
            how = _end(process)
            self._process = None
            raise Crashed(how) from None
        return answers

    def kill(self) -> None:
        """Ends the process, whatever it does. A call that waits for it in another thread raises Crashed."""
        if (process := self._process) is not None:
            process.kill()
            _end(process)

    def _start(self) -> "subprocess.Popen[bytes]":
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        process = subprocess.Popen(
            [sys.executable, "-c", _CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},  # a process is one thread's worth of work
            start_new_session=True,  # Ctrl-C reaches the parent alone
        )
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
    """The other side: answers what comes in at stdin, until that ends."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the function prints must not get between the answers
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    try:
        try:
            function, failure = pickle.load(requests), None
        except Exception as error:  # an import that fails, of whatever kind
            function, failure = None, f"{type(error).__name__}: {error}"
        _send(answers, failure)
        while True:
            _send(answers, [_outcome(function, argument) for argument in pickle.load(requests)])
    except (EOFError, BrokenPipeError, pickle.UnpicklingError):  # the parent is done, or gone
        os._exit(0)


def _end_with(parent: int) -> None:
    """A busy process would learn of its parent's death only when it answers, one that hangs never."""
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
    """Waits for a process that will not answer any more, and says how it ended."""
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
