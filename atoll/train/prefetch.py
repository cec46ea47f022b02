"""The batches of coming steps, made in a thread and moved to the device while the present one is trained on."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch
from torch import Tensor

Batch = dict[str, Tensor]  # [B, ...] each

_AHEAD = 2  # batches that wait


class Prefetcher:
    """Batches by their index; a context manager. `make` is called in one thread, in the order of the indices."""

    def __init__(self, make: Callable[[int], Batch], device: torch.device):
        self._make, self._device = make, device
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="feed")
        self._coming: dict[int, Future[Batch]] = {}

    def __enter__(self) -> "Prefetcher":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=True)

    def get(self, index: int, last: int) -> Batch:
        """The batch of this index, on the device. The ones after it, up to `last`, are begun."""
        for stale in [i for i in self._coming if not index <= i <= index + _AHEAD]:
            self._coming.pop(stale).cancel()  # training went back, or jumped
        for coming in range(index, min(index + _AHEAD, last) + 1):
            if coming not in self._coming:
                self._coming[coming] = self._thread.submit(self._pinned, coming)
        batch = self._coming.pop(index).result()
        return {name: tensor.to(self._device, non_blocking=True) for name, tensor in batch.items()}

    def _pinned(self, index: int) -> Batch:
        batch = self._make(index)
        return {name: tensor.pin_memory() for name, tensor in batch.items()} if self._device.type == "cuda" else batch
