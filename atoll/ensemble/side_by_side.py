"""Experts with few rows on a CPU: several at a time, each on threads of its own.

A product of few rows cannot use all cores well: its threads wait for each other, and the operations between products
run on one. Experts do not depend on each other, so they can share the cores between them. `benchmarks/side_by_side.py`
measures up to which size this is faster.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from threading import Barrier, Lock

import torch
from torch import Tensor, nn

from atoll.ensemble.offload import Offloaded

MAX_NUMBERS = 8 * 4 * 16 * 16  # of x per expert: 8 rows of 4x16x16; measured on two cores with AMX
_LEAST_GAIN = 1.5  # all experts' rows over those of the worker with the most: below it, not worth the threads
_Call = Callable[[], Tensor]
# While workers start, torch's number of threads is theirs: a thread that reads it then would keep it.
_starting = Lock()


def can_share(networks: Sequence[object]) -> bool:
    """Return whether threads may evaluate these networks, as things are set on this one."""
    # A backward pass has threads of its own, and autocast is set for each thread.
    if len(networks) < 2 or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    # Modules on the CPU, each its own: a compiled network or one that is loaded when it is called has state.
    return len({id(network) for network in networks}) == len(networks) and all(map(_is_plain, networks))


def workers_for(numbers: Sequence[int]) -> int:
    """Return how many experts to evaluate at a time; 1: one after the other, on all threads.

    Args:
        numbers: of x, that each expert is evaluated at; none if they cannot share.
    """
    # Few rows each.
    with _starting:
        workers = min(torch.get_num_threads(), len(numbers))
    if workers < 2 or max(numbers) > MAX_NUMBERS:
        return 1
    # One expert with most of the rows would leave the other threads idle.
    loads = [sum(numbers[place] for place in part) for part in _parts(numbers, workers)]
    return workers if sum(loads) >= _LEAST_GAIN * max(loads) else 1


def share(calls: Sequence[_Call], numbers: Sequence[int], workers: int) -> list[Tensor]:
    """Evaluate the calls by several workers and return their answers, in the order of the calls.

    Args:
        calls: independent of each other.
        numbers: the size of each one, to share them evenly.
        workers: how many, at least 2; each has its part of torch's threads.

    Raises:
        Exception: what a call raised; the others have ended. On Ctrl-C they end in the background.
    """
    answers: dict[int, Tensor] = {}
    inference = torch.is_inference_mode_enabled()

    def evaluate(part: list[int]) -> None:
        # Both modes are each thread's own.
        with torch.inference_mode(inference), torch.no_grad():
            answers.update({place: calls[place]() for place in part})

    with _starting:
        pool = _pool(workers, max(1, torch.get_num_threads() // workers))
    running = [pool.submit(evaluate, part) for part in _parts(numbers, workers)]
    wait(running)
    for one in running:
        one.result()
    return [answers[place] for place in range(len(calls))]


def _is_plain(network: object) -> bool:
    """Whether a network is a module on the CPU that threads may evaluate."""
    if not isinstance(network, nn.Module) or isinstance(network, Offloaded):
        return False
    first = next(network.parameters(), None)
    return first is not None and first.device.type == "cpu"


def _parts(numbers: Sequence[int], workers: int) -> list[list[int]]:
    """Share calls between workers, the largest first, each to the worker that has least: their places."""
    parts: list[list[int]] = [[] for _ in range(workers)]
    loads = [0] * workers
    for place in sorted(range(len(numbers)), key=lambda place: -numbers[place]):
        least = loads.index(min(loads))
        parts[least].append(place)
        loads[least] += numbers[place]
    return parts


@cache
def _pool(workers: int, threads: int) -> ThreadPoolExecutor:
    """Return the workers of this process, each with so many threads of torch; the caller holds `_starting`."""
    lock, all_started, own = Lock(), Barrier(workers), torch.get_num_threads()

    def start() -> None:
        # The number belongs to a thread, except in MKL, where it is the process's. torch sets a new thread's number
        # when it is first asked for: asked for here, so that it does not undo this one later.
        with lock:
            torch.set_num_threads(threads)
            torch.get_num_threads()

    pool = ThreadPoolExecutor(workers, "side-by-side", initializer=start)
    # All workers start now, so that the process's number is set last, by whoever asked.
    wait([pool.submit(all_started.wait) for _ in range(workers)])
    torch.set_num_threads(own)
    return pool


def _forget() -> None:
    """Forget the parent's workers, and a lock that one of its threads may have held."""
    global _starting
    _starting = Lock()
    _pool.cache_clear()


# Threads do not survive a fork: a child starts its own.
os.register_at_fork(after_in_child=_forget)
