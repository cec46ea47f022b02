"""Experts that do not all fit: a cache that keeps as many experts on the device as fit into a memory budget.

A network in the cache is resident (on the device), in pinned host memory (if the device is a GPU and half of the host's
memory holds it), or on disk, memory-mapped. On a CPU only two states remain: mapped, or not. A sampler tells the cache
which experts each step evaluates, and how likely the others are next (`ExpertCache.plan`):

- Order: resident experts of a step are evaluated first; the others are loaded one by one.
- Eviction: first the experts that are neither active nor likely, least recently used first; then the unlikely ones;
  then those that the step has evaluated already; last those that it has yet to evaluate. An expert in use stays.
- Prefetch, on a GPU: the step's next expert is copied on a separate stream while the current one computes; between
  steps, experts that the router finds likely, including those below its routing's cut, replace those it does not.

No number changes: the same networks are evaluated, and their answers are summed in the same order.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from atoll.condition import Condition
from atoll.errors import AtollError

WeightDtype = Literal["fp32", "bf16", "fp16", "int8"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.bfloat16}
_UNITS = {"": 1, "B": 1} | {p + s: b**n for n, p in enumerate("KMGT", 1) for s, b in (("B", 1000), ("iB", 1024))}
_LIKELY = 0.05  # the selection probability from which a prefetch is worth its copy, which delays the active experts


def parse_budget(budget: str | int) -> int:
    """Return bytes, from "16GB" (10^9), "6GiB" (2^30), "500MB", "1.5 GB" or a plain number of bytes.

    Raises:
        AtollError: anything else, or zero.
    """
    # A number and a unit, in any case.
    text = str(budget).strip()
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text, re.ASCII)
    units = {unit.upper(): factor for unit, factor in _UNITS.items()}
    size = int(float(match[1]) * units.get(match[2].upper(), 0)) if match and len(match[1]) < 30 else 0
    if size < 1:
        raise AtollError(f"memory budget {text[:40]!r}: expected a size such as 16GB, 6GiB, 500MB or a number of bytes")
    return size


def check_weights(weights: str | None) -> WeightDtype | None:
    """Return `weights` if it is a known dtype; None means as stored.

    Raises:
        AtollError: an unknown dtype, or int8 without torchao.
    """
    if weights is not None and weights not in get_args(WeightDtype):
        raise AtollError(f"unknown weights {weights!r}; expected {', '.join(get_args(WeightDtype))}")
    if weights == "int8":
        _quantizer()
    return cast("WeightDtype | None", weights)


def read_weights(file: Path, weights: WeightDtype | None = None) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file: memory-mapped as stored, or rounded to the dtype of `weights`.

    Rounded tensors are copies. The file is mapped again for each, so that at most one stored tensor is in memory.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file

    # As stored: the file stays mapped.
    if weights is None:
        return load_file(file)
    with safe_open(file, framework="pt") as stored:
        names = list(stored.keys())
    # Rounded: one mapping per tensor, released before the next.
    tensors = {}
    for name in names:
        with safe_open(file, framework="pt") as stored:
            tensor = stored.get_tensor(name)
            tensors[name] = tensor.to(_DTYPES[weights]) if tensor.is_floating_point() else tensor
    return tensors


def cast_weights(network: nn.Module, weights: WeightDtype | None) -> nn.Module:
    """Cast the network's weights in place, and return it.

    "int8" quantizes the weights of linear layers by torchao, with one scale per output, multiplied in bf16.
    """
    if weights is not None:
        network.to(_DTYPES[weights])
    # torchao replaces the weights of the linear layers.
    if weights == "int8":
        quantize, config = _quantizer()
        quantize(network, config)
    return network.requires_grad_(False)


def bytes_of(network: object) -> int:
    """Return the bytes of a network's parameters and buffers; 0 if it is no `torch.nn.Module`."""
    if not isinstance(network, nn.Module):
        return 0
    return sum(part.nbytes for tensor in _tensors(network) for part in _parts(tensor))


@dataclass(frozen=True)
class Offloaded:
    """A network in an expert cache, called like the network itself."""

    cache: "ExpertCache"
    key: int

    def __call__(self, x: Tensor, time: Tensor, condition: Condition | None) -> Tensor:
        with self.cache.using(self.key) as network:
            output: Tensor = network(x, time, condition)
            return output


@dataclass
class _Resident:
    """A network on the device; on a GPU, with the event at the end of its copy until the first use has waited."""

    network: nn.Module
    copied: Any = None

    def wait(self) -> None:
        if self.copied is not None:
            torch.cuda.current_stream().wait_event(self.copied)
            self.copied = None


class ExpertCache:
    """Networks, of which as many are on the device as fit into a budget. For one thread.

    The budget counts the weights of resident experts and what was `reserve`d (the router's weights). It does not count
    the text encoder, the codec, activations, or, on a GPU, host memory. While an expert is rounded to another dtype,
    one tensor of its file comes on top; while it is quantized to int8, its weights in bf16.

    Args:
        budget: bytes.
        device: where the networks are evaluated.
        prefetch: whether networks are loaded before they are needed; None: on a GPU, where copies run beside the work.

    Attributes:
        loads: the number of times a network was loaded.
        peak_bytes: the largest number of bytes that were resident at one time.
    """

    def __init__(self, budget: int, device: str | torch.device = "cpu", prefetch: bool | None = None):
        self.budget, self.device = budget, torch.device(device)
        self.prefetch = self.device.type == "cuda" if prefetch is None else prefetch
        self.loads, self.peak_bytes = 0, 0
        self._reserved = 0
        # The networks by key.
        self._names, self._sizes = list[str](), list[int]()
        self._fetches = list[Callable[[], nn.Module]]()
        # Where they are.
        self._resident: dict[int, _Resident] = {}  # least recently used first
        self._pinned: dict[int, nn.Module] = {}  # in host memory
        self._in_use: list[int] = []
        # What the sampler plans.
        self._active: set[int] = set()  # what this step evaluates
        self._pending: list[int] = []  # what this step has yet to evaluate, in its order
        self._selection_probs: Mapping[int, float] = {}  # for the next step
        self._stream: Any = None

    def add(self, name: str, size: int, fetch: Callable[[], nn.Module]) -> Offloaded:
        """Add a network of `size` bytes, which `fetch` reads from disk into host memory, for inference."""
        self._names.append(name)
        self._sizes.append(size)
        self._fetches.append(fetch)
        return Offloaded(self, len(self._names) - 1)

    def reserve(self, size: int) -> None:
        """Take bytes that are always in use (the router's) out of the budget.

        Raises:
            AtollError: the largest network does not fit into the rest of the budget.
        """
        self._reserved += size
        # One expert must fit beside what is reserved.
        largest = max(range(len(self._sizes)), key=lambda key: self._sizes[key])
        minimum = self._reserved + self._sizes[largest]
        if minimum > self.budget:
            router = f" and the router {_format_size(self._reserved)}" if self._reserved else ""
            raise AtollError(
                f"memory budget {_format_size(self.budget)}: the largest expert, {self._names[largest]}, needs "
                f"{_format_size(self._sizes[largest])}{router}; set it to at least {_format_size(minimum)}, or use "
                "smaller weights (int8)"
            )

    @property
    def resident(self) -> tuple[int, ...]:
        """The keys of the networks on the device, least recently used first."""
        return tuple(self._resident)

    def plan(
        self, networks: Sequence[object], active: Sequence[int], selection_probs: Sequence[float] = ()
    ) -> list[int]:
        """Return the order in which a step should evaluate some of an ensemble's networks: resident ones first.

        Args:
            networks: all of the ensemble's networks; those that are not in this cache are always resident.
            active: the indices of those that the step evaluates.
            selection_probs: each network's probability to be selected in the next step, as the router sees it.
        """
        # Resident ones first; Python's sort keeps the order within both halves.
        keys = {n: one.key for n, one in enumerate(networks) if isinstance(one, Offloaded) and one.cache is self}
        order = sorted(active, key=lambda index: index in keys and keys[index] not in self._resident)
        self._pending = [keys[index] for index in order if index in keys]
        self._active = set(self._pending)
        self._selection_probs = {keys[index]: p for index, p in enumerate(selection_probs) if index in keys}
        return order

    @contextmanager
    def using(self, key: int) -> Iterator[nn.Module]:
        """Load the network unless it is resident, and keep it resident while the block runs.

        Raises:
            AtollError: it does not fit beside the networks in use.
        """
        # Make the network resident, and the most recently used.
        if key in self._resident:
            self._resident[key] = self._resident.pop(key)
        elif not self._make_room(self._sizes[key]):
            names = ", ".join(self._names[other] for other in self._in_use)
            raise AtollError(
                f"memory budget {_format_size(self.budget)}: no room for {self._names[key]} beside {names} in use"
            )
        else:
            self._load(key)
        self._resident[key].wait()

        # Use it; the step's next network is copied meanwhile.
        self._in_use.append(key)
        if key in self._pending:
            self._pending.remove(key)
        try:
            if self.prefetch:
                self._prefetch_next()
            yield self._resident[key].network
        finally:
            self._in_use.remove(key)

    def _urgency(self, key: int) -> tuple[int, float]:
        """Return a sort key by how soon a network is needed, soonest first."""
        # This step's networks by their order, then likely ones by probability, then the rest by last use.
        probability = self._selection_probs.get(key, 0.0)
        if key in self._pending:
            return 0, self._pending.index(key)
        if key in self._active:
            return 1, -probability
        if probability >= _LIKELY:
            return 2, -probability
        return 3, -list(self._resident).index(key)

    def _prefetch_next(self) -> None:
        """Load the networks that are needed next, in the place of those that are needed later."""
        # The step's own networks come before likely ones of the next step.
        likely = [key for key, p in self._selection_probs.items() if p >= _LIKELY and key not in self._active]
        for key in sorted((*self._pending, *likely), key=self._urgency):
            if key not in self._resident:
                # Nothing less urgent is left to evict: stop.
                if not self._make_room(self._sizes[key], self._urgency(key)):
                    return
                self._load(key)

    def _make_room(self, size: int, urgency: tuple[int, float] | None = None) -> bool:
        """Evict the least urgent networks (only those less urgent than `urgency`) if that makes room for `size` bytes.

        Returns:
            Whether there is room now. If not, nothing was evicted.
        """
        # Choose what to evict, least urgent first, until it is enough.
        free = self.budget - self._reserved - sum(self._sizes[key] for key in self._resident)
        evicted = []
        for key in sorted(self._resident.keys() - set(self._in_use), key=self._urgency, reverse=True):
            if free >= size or (urgency is not None and self._urgency(key) <= urgency):
                break
            evicted.append(key)
            free += self._sizes[key]
        if free < size:
            return False

        # Evict it.
        for key in evicted:
            # On a GPU the memory is reused in the order of the computing stream: after the network's copy, if it runs.
            self._resident.pop(key).wait()
        return True

    def _load(self, key: int) -> None:
        """Make a network resident; there is room for it."""
        with torch.inference_mode(False):  # a cached network must not depend on the mode of its first user
            network = self._pinned[key] if key in self._pinned else self._fetches[key]()
            if self.device.type == "cuda":
                network = self._pin(key, network)
            self._resident[key] = self._to_device(network) if self.device.type != "cpu" else _Resident(network)
        self.loads += 1
        self.peak_bytes = max(self.peak_bytes, sum(self._sizes[resident] for resident in self._resident))

    def _pin(self, key: int, network: nn.Module) -> nn.Module:
        """Return the network in pinned memory, where it stays; as it is once half of the host's memory is taken."""
        # Pinned memory cannot be swapped out: half of the host's memory stays free for everything else.
        taken = sum(self._sizes[pinned] for pinned in self._pinned)
        if key not in self._pinned and taken + self._sizes[key] <= _host_memory() // 2:
            self._pinned[key] = _moved(network, Tensor.pin_memory)
        return self._pinned.get(key, network)

    def _to_device(self, network: nn.Module) -> _Resident:
        """Copy the network to the device.

        Its memory belongs to the computing stream, which may have to finish with the memory's previous content first;
        after that, the copy runs beside the stream's next work.
        """
        if self.device.type != "cuda":
            return _Resident(_moved(network, lambda tensor: tensor.to(self.device)))
        # Allocate on the computing stream, copy on one of its own.
        self._stream = self._stream or torch.cuda.Stream(self.device)
        parts = [part for tensor in _tensors(network) for part in _parts(tensor)]
        places = iter([torch.empty_like(part, device=self.device) for part in parts])
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            moved = _moved(network, lambda tensor: next(places).copy_(tensor, non_blocking=True))
            return _Resident(moved, self._stream.record_event())


def selection_probs(per_sample: Tensor) -> list[float]:
    """Return each expert's probability to be selected by at least one sample, if each sample draws one cluster.

    Args:
        per_sample: for each sample the probability of the clusters that an expert owns [B, E].

    Returns:
        E probabilities.
    """
    # 1 - P(no sample selects it).
    return (1 - (1 - per_sample.clamp(max=1)).prod(0)).tolist()


def expert_cache_of(networks: Sequence[object]) -> ExpertCache | None:
    """Return the expert cache that the networks are in; None if all are always resident."""
    return next((network.cache for network in networks if isinstance(network, Offloaded)), None)


def _moved(network: nn.Module, move: Callable[[Tensor], Tensor]) -> nn.Module:
    """Return a copy of the network with `move` applied to its tensors."""
    # deepcopy uses the objects in its memo instead of copying: the moved tensors.
    memo: dict[int, Any] = {}
    for tensor in _tensors(network):
        moved = _rebuilt(tensor.data, move)
        memo[id(tensor)] = nn.Parameter(moved, requires_grad=False) if isinstance(tensor, nn.Parameter) else moved
    return deepcopy(network, memo)


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]


def _parts(tensor: Tensor) -> list[Tensor]:
    """Return the plain tensors that a tensor consists of: itself, or (torchao's) its values and scales."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in _parts(getattr(tensor, name))]


def _rebuilt(tensor: Tensor, move: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the same tensor with moved parts, in the order of `_parts`."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return move(tensor)
    names, context = tensor.__tensor_flatten__()
    parts = {name: _rebuilt(getattr(tensor, name), move) for name in names}
    output: Tensor = type(tensor).__tensor_unflatten__(parts, context, tensor.shape, tensor.stride())  # type: ignore[attr-defined]
    return output


def _quantizer() -> tuple[Callable[..., Any], Any]:
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError:
        raise AtollError("weights int8 need torchao: pip install 'atoll[lowbit]'") from None
    return quantize_, Int8WeightOnlyConfig()


def _host_memory() -> int:
    """Return the machine's memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _format_size(size: int) -> str:
    """Format bytes as `parse_budget` reads them, rounded up: a budget of the printed size is enough."""
    return f"{ceil(size / 1e6)}MB" if size > 1e7 else f"{ceil(size / 1e3)}KB"
