"""Experts that do not all fit: a store that has as many networks at hand as a budget of bytes allows.

A network in a store is at hand (on the device), in pinned host memory (where the device is a GPU, and half of the
host's memory holds it), or on disk, memory-mapped. On a CPU that leaves two: mapped, or not. What is asked first, and
what has to go, follows from what the ensemble knows:

- of the experts that a step asks, those at hand are asked first, then the others, each brought as it is needed;
- what goes first is what was not asked and is not likely to be, the least recently used first; then what is not likely
  next; then what this step has asked already; last what it still has to ask. What is being used never goes;
- on a GPU the next expert of the step is copied on a stream of its own while the last one computes; and between steps
  the experts that the router finds likely, below its routing's cut too, take the place of those it does not.

None of it changes a number: the same networks answer, and their answers are added up in the same order.
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
_LIKELY = 0.05  # the chance of being asked next from which an expert is worth a copy: it holds up those that are asked


def parse_budget(given: str | int) -> int:
    """Bytes, from "16GB" (10^9), "6GiB" (2^30), "500MB", "1.5 GB" or a plain number of them.

    Raises:
        AtollError: anything else, or nothing at all ("0GB").
    """
    text = str(given).strip()
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text, re.ASCII)
    units = {unit.upper(): factor for unit, factor in _UNITS.items()}
    size = int(float(found[1]) * units.get(found[2].upper(), 0)) if found and len(found[1]) < 30 else 0
    if size < 1:
        raise AtollError(f"memory budget {text[:40]!r}: expected a size such as 16GB, 6GiB, 500MB or a number of bytes")
    return size


def check_weights(weights: str | None) -> WeightDtype | None:
    """`weights`, if it is known (None: as they are stored). Raises AtollError otherwise, or if torchao is missing."""
    if weights is not None and weights not in get_args(WeightDtype):
        raise AtollError(f"unknown weights {weights!r}; expected {', '.join(get_args(WeightDtype))}")
    if weights == "int8":
        _quantizer()
    return cast("WeightDtype | None", weights)


def read_weights(file: Path, weights: WeightDtype | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file: memory-mapped as they are stored, or rounded to the dtype of `weights`.

    Rounded tensors are copies; the file is mapped anew for each, so that no more than one tensor of it is ever held
    beside them.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file

    if weights is None:
        return load_file(file)
    with safe_open(file, framework="pt") as stored:
        names = list(stored.keys())
    tensors = {}
    for name in names:
        with safe_open(file, framework="pt") as stored:
            tensor = stored.get_tensor(name)
            tensors[name] = tensor.to(_DTYPES[weights]) if tensor.is_floating_point() else tensor
    return tensors


def cast_weights(network: nn.Module, weights: WeightDtype | None) -> nn.Module:
    """The network itself, its weights brought to `weights`: "int8" are those of linear layers, by torchao, one scale
    per output, multiplied in bf16."""
    if weights is not None:
        network.to(_DTYPES[weights])
    if weights == "int8":
        quantize, config = _quantizer()
        quantize(network, config)
    return network.requires_grad_(False)


def bytes_of(network: object) -> int:
    """The bytes of a network's parameters and buffers; 0 of what is no `torch.nn.Module`."""
    if not isinstance(network, nn.Module):
        return 0
    return sum(part.nbytes for tensor in _tensors(network) for part in _parts(tensor))


@dataclass(frozen=True)
class Offloaded:
    """A network in a store, called like the network itself."""

    store: "ExpertCache"
    key: int

    def __call__(self, x: Tensor, time: Tensor, condition: Condition | None) -> Tensor:
        with self.store.using(self.key) as network:
            output: Tensor = network(x, time, condition)
            return output


@dataclass
class _Held:
    """A network at hand; on a GPU, with the event of its copy's end until the first use has waited for it."""

    network: nn.Module
    copied: Any = None

    def wait(self) -> None:
        if self.copied is not None:
            torch.cuda.current_stream().wait_event(self.copied)
            self.copied = None


class ExpertCache:
    """Networks, of which as many are at hand as a budget allows.

    The budget counts the weights of the experts at hand and what was `reserve`d (the router's weights). It does not
    count the text encoder, the codec, activations, or, on a GPU, what lies in the host's memory. While an expert is
    rounded to another dtype, one tensor of its file comes on top; to int8, its weights in bf16. It is for one thread.

    Args:
        budget: in bytes.
        device: where the networks are used.
        prefetch: whether networks are brought before they are asked; None: on a GPU, where copies do not hold up work.

    Attributes:
        loads: how many times a network was brought.
        peak_bytes: the most bytes of networks that were at hand at one time.
    """

    def __init__(self, budget: int, device: str | torch.device = "cpu", prefetch: bool | None = None):
        self.budget, self.device = budget, torch.device(device)
        self.prefetch = self.device.type == "cuda" if prefetch is None else prefetch
        self.loads, self.peak_bytes = 0, 0
        self._reserved = 0
        self._names, self._sizes = list[str](), list[int]()
        self._fetches = list[Callable[[], nn.Module]]()
        self._held: dict[int, _Held] = {}  # the least recently used first
        self._host: dict[int, nn.Module] = {}  # pinned
        self._busy: list[int] = []
        self._still: list[int] = []  # what this step has yet to ask, in its order
        self._asked: set[int] = set()  # what this step asks
        self._selection_probs: Mapping[int, float] = {}  # of being asked in the next step
        self._stream: Any = None

    def add(self, name: str, size: int, fetch: Callable[[], nn.Module]) -> Offloaded:
        """A network of `size` bytes, which `fetch` reads from the disk into the host's memory, for inference."""
        self._names.append(name)
        self._sizes.append(size)
        self._fetches.append(fetch)
        return Offloaded(self, len(self._names) - 1)

    def reserve(self, size: int) -> None:
        """Takes bytes that are always held (the router's) out of the budget. Raises AtollError where the largest
        network does not fit into what is left of it."""
        self._reserved += size
        largest = max(range(len(self._sizes)), key=lambda key: self._sizes[key])
        least = self._reserved + self._sizes[largest]
        if least > self.budget:
            router = f" and the router {_told(self._reserved)}" if self._reserved else ""
            raise AtollError(
                f"memory budget {_told(self.budget)}: the largest expert, {self._names[largest]}, needs "
                f"{_told(self._sizes[largest])}{router}; give {_told(least)} at least, or take smaller weights (int8)"
            )

    @property
    def resident(self) -> tuple[int, ...]:
        """The keys of the networks at hand, the least recently used first."""
        return tuple(self._held)

    def plan(
        self, networks: Sequence[object], asked: Sequence[int], selection_probs: Sequence[float] = ()
    ) -> list[int]:
        """The order in which a step should ask some of an ensemble's networks: those at hand first.

        Args:
            networks: all of the ensemble's; those that are not in this store are always at hand.
            asked: the numbers of those that the step asks.
            selection_probs: how likely each is to be asked in the next step, as far as the router knows.
        """
        keys = {n: one.key for n, one in enumerate(networks) if isinstance(one, Offloaded) and one.store is self}
        order = sorted(asked, key=lambda number: number in keys and keys[number] not in self._held)
        self._still = [keys[number] for number in order if number in keys]
        self._asked = set(self._still)
        self._selection_probs = {
            keys[number]: chance for number, chance in enumerate(selection_probs) if number in keys
        }
        return order

    @contextmanager
    def using(self, key: int) -> Iterator[nn.Module]:
        """The network, brought if it is not at hand; it stays for as long as the block lasts."""
        if key in self._held:
            self._held[key] = self._held.pop(key)  # the most recently used
        elif not self._make_room(self._sizes[key]):
            names = ", ".join(self._names[busy] for busy in self._busy)
            raise AtollError(
                f"memory budget {_told(self.budget)}: no room for {self._names[key]} beside {names} in use"
            )
        else:
            self._bring(key)
        self._held[key].wait()
        self._busy.append(key)
        if key in self._still:
            self._still.remove(key)
        try:
            if self.prefetch:
                self._look_ahead()
            yield self._held[key].network
        finally:
            self._busy.remove(key)

    def _urgency(self, key: int) -> tuple[int, float]:
        """How soon a network is asked, the soonest first."""
        chance = self._selection_probs.get(key, 0.0)
        if key in self._still:
            return 0, self._still.index(key)
        if key in self._asked:
            return 1, -chance
        if chance >= _LIKELY:
            return 2, -chance
        return 3, -list(self._held).index(key)

    def _look_ahead(self) -> None:
        """Brings what is asked next, in the place of what is asked later."""
        likely = [key for key, chance in self._selection_probs.items() if chance >= _LIKELY and key not in self._asked]
        for key in sorted((*self._still, *likely), key=self._urgency):
            if key not in self._held:
                if not self._make_room(self._sizes[key], self._urgency(key)):
                    return
                self._bring(key)

    def _make_room(self, size: int, urgency: tuple[int, float] | None = None) -> bool:
        """Lets the least urgent networks go (only those less urgent than `urgency`), if that makes room for `size`."""
        free = self.budget - self._reserved - sum(self._sizes[key] for key in self._held)
        going = []
        for key in sorted(self._held.keys() - set(self._busy), key=self._urgency, reverse=True):
            if free >= size or (urgency is not None and self._urgency(key) <= urgency):
                break
            going.append(key)
            free += self._sizes[key]
        if free < size:
            return False
        for key in going:
            # On a GPU its memory is used again in the order of the stream that computes: after its copy, if that runs.
            self._held.pop(key).wait()
        return True

    def _bring(self, key: int) -> None:
        with torch.inference_mode(False):  # a network that is kept must not depend on who asked first
            network = self._host[key] if key in self._host else self._fetches[key]()
            if self.device.type == "cuda":
                network = self._pinned(key, network)
            self._held[key] = self._copied(network) if self.device.type != "cpu" else _Held(network)
        self.loads += 1
        self.peak_bytes = max(self.peak_bytes, sum(self._sizes[held] for held in self._held))

    def _pinned(self, key: int, network: nn.Module) -> nn.Module:
        """The network in pinned memory, to stay there, as long as half of the host's memory holds those that do."""
        taken = sum(self._sizes[kept] for kept in self._host)
        if key not in self._host and taken + self._sizes[key] <= _host_memory() // 2:
            self._host[key] = _moved(network, Tensor.pin_memory)
        return self._host.get(key, network)

    def _copied(self, network: nn.Module) -> _Held:
        """The network on the device. Its memory belongs to the stream that computes, which therefore may have to
        finish with what lay there before; then the copy runs beside what is asked of it next."""
        if self.device.type != "cuda":
            return _Held(_moved(network, lambda tensor: tensor.to(self.device)))
        self._stream = self._stream or torch.cuda.Stream(self.device)
        parts = [part for tensor in _tensors(network) for part in _parts(tensor)]
        places = iter([torch.empty_like(part, device=self.device) for part in parts])
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            moved = _moved(network, lambda tensor: next(places).copy_(tensor, non_blocking=True))
            return _Held(moved, self._stream.record_event())


def selection_probs(log_p: Tensor, owners: Tensor) -> list[float]:
    """How likely each of E experts is to be asked by one of B samples at least, if each asks one cluster by chance.

    Args:
        log_p: the router's log-probabilities [B, K], also of what the routing cuts off.
        owners: 1 where an expert covers a cluster [E, K].
    """
    alone = torch.softmax(log_p, dim=1) @ owners.T  # [B, E]
    return (1 - (1 - alone.clamp(max=1)).prod(0)).tolist()


def expert_cache_of(networks: Sequence[object]) -> ExpertCache | None:
    """The store of the networks that are in one; None where all are always at hand."""
    return next((network.store for network in networks if isinstance(network, Offloaded)), None)


def _moved(network: nn.Module, move: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of the network whose tensors are what `move` makes of the network's."""
    made: dict[int, Any] = {}  # deepcopy takes what is in its memo instead of copying
    for tensor in _tensors(network):
        there = _rebuilt(tensor.data, move)
        made[id(tensor)] = nn.Parameter(there, requires_grad=False) if isinstance(tensor, nn.Parameter) else there
    return deepcopy(network, made)


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]


def _parts(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that a tensor is made of: itself, or (torchao's) its numbers and scales."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in _parts(getattr(tensor, name))]


def _rebuilt(tensor: Tensor, move: Callable[[Tensor], Tensor]) -> Tensor:
    """The same tensor of moved parts, in the order of `_parts`."""
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
    """The machine's memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _told(size: int) -> str:
    """A size as `parse_budget` reads it, rounded up: who gives so much has enough."""
    return f"{ceil(size / 1e6)}MB" if size > 1e7 else f"{ceil(size / 1e3)}KB"
