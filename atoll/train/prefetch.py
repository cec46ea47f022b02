"""Prefetching: the next batches are made in a thread, and moved to the device, while the current one is trained on."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch
from torch import Tensor

Batch = dict[str, Tensor]  # [B, ...] each

_AHEAD = 2  # batches that wait to be trained on


class Prefetcher:
    """Batches by their index; a context manager.

    Args:
        make: returns the batch of an index, on the CPU; called in one thread, in the order of the indices.
        device: where the batches are used.
    """

    def __init__(self, make: Callable[[int], Batch], device: torch.device):
        self._make, self._device = make, device
        # One thread: batches are made in order, and reading does not slow down the step.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._pending: dict[int, Future[Batch]] = {}

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Batches that are not started are dropped.
        self._thread.shutdown(cancel_futures=True)

    def get(self, index: int, last: int) -> Batch:
        """Return the batch of this index, on the device, and start making the next ones.

        Args:
            index: of the batch.
            last: the last index that will be used; none after it is made.
        """
        # After a rollback or a jump, batches that are not next are dropped.
        for stale in [i for i in self._pending if not index <= i <= index + _AHEAD]:
            self._pending.pop(stale).cancel()
        # Start the batches that follow, up to the last one.
        for upcoming in range(index, min(index + _AHEAD, last) + 1):
            if upcoming not in self._pending:
                self._pending[upcoming] = self._thread.submit(self._pinned, upcoming)
        # Only the copy to the device is left for this thread.
        batch = self._pending.pop(index).result()
        return {name: tensor.to(self._device, non_blocking=True) for name, tensor in batch.items()}

    def _pinned(self, index: int) -> Batch:
        """The batch in pinned memory, from which a GPU copies in the background."""
        # A copy from ordinary memory would wait for the transfer.
        batch = self._make(index)
        return {name: tensor.pin_memory() for name, tensor in batch.items()} if self._device.type == "cuda" else batch
