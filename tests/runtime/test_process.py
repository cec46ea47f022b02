"""Functions in a process of their own: results, raised errors, crashes, and processes that cannot start."""

import math
import os

import pytest

from atoll.errors import AtollError
from atoll.runtime.process import Crashed, Remote


def test_map_returns_results_and_raised_errors_in_order() -> None:
    remote = Remote(math.sqrt)
    try:
        results = remote.map([4.0, -1.0, 9.0])
    finally:
        remote.kill()
    assert (results[0], results[2]) == (2.0, 3.0)
    assert isinstance(results[1], ValueError)


def test_a_crash_says_how_and_the_next_call_starts_anew() -> None:
    remote = Remote(os._exit)
    try:
        for code in (3, 4):
            with pytest.raises(Crashed, match=f"exit code {code}"):
                remote.map([code])
    finally:
        remote.kill()


def test_a_function_that_cannot_be_imported_there_is_one_line() -> None:
    remote = Remote(math.sqrt)
    remote._function = b"cno_such_module\nfunction\n."  # a pickle that names a module which is not there
    with pytest.raises(AtollError, match=r"cannot be started: .*no_such_module"):
        remote.map([1.0])
