"""SIGTERM and SIGINT end a training in order: they are recorded, and acted upon between two computations."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from atoll.train.island import Island


class Interrupted(Exception):
    """SIGTERM or SIGINT arrived; the state is saved."""


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Within it, SIGTERM and SIGINT are only recorded; yields a function that returns whether one arrived."""
    # The handler only records; a step or a write is never interrupted.
    received: list[int] = []
    previous = {
        number: signal.signal(number, lambda signum, _: received.append(signum))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def stoppable(network: Callable[..., Tensor], island: Island, stopped: Callable[[], bool]) -> Callable[..., Tensor]:
    """Return the network as a function that raises Interrupted once a signal has arrived.

    For what follows the last step: the last checkpoint is complete then, and a resumed training repeats it.

    Args:
        network: any function of tensors.
        island: the processes that evaluate it together; each calls it equally often.
        stopped: whether a signal arrived in this process.
    """

    def evaluate(*arguments: Any) -> Tensor:
        # A signal may reach one process only; all must stop at the same evaluation.
        if island.any(stopped()):
            raise Interrupted("stopped after the last step, before the measurements at the end; continue with --resume")
        return network(*arguments)

    return evaluate
