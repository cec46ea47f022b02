"""A training that dies at a step, without a word."""

from collections.abc import Callable, Mapping
from typing import Any


class Stop(Exception):
    """The death."""


def kill_at(step: int) -> Callable[[Mapping[str, Any]], None]:
    """Return a `progress` that ends the training once a step is reported."""

    def progress(line: Mapping[str, Any]) -> None:
        if line["step"] >= step:
            raise Stop

    return progress
