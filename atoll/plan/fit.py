"""The switches that make training fit into memory, the largest batch, and the fastest combination."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal, get_args

from atoll.choices import Checkpointing
from atoll.manifest import TrainSettings
from atoll.plan.cost import (
    NetworkSizes,
    OptimizerState,
    activation_bytes,
    fixed_bytes,
    gradient_bytes,
    parameters,
    swap_bytes,
    training_flops,
)
from atoll.plan.mmdit_cost import RoutedBlocks
from atoll.plan.rules import Rules

# Memory beside weights and activations: the CUDA context with the libraries' workspaces, and gaps between tensors.
# With these values a compiled DiT-XL/2 fits batch 24 in 24 GB and 84 in 48 GB, as measured.
RESERVED = 0.5e9
FRAGMENTS = 0.02
# Estimates; they matter mostly for the order of the switches.
EAGER = 1.3  # time of a step without torch.compile over the time with it
SELECTIVE = 1.05  # relative time of a step that computes norms, GELU and modulation again
HOST_BYTES_PER_SECOND = 20e9  # copies between the GPU's memory and the CPU's: of an EMA, of swapped blocks
EMA_EVERY = 10  # steps between two updates of that EMA, as in atoll.train.state
# Kernels of one block, forward and backward, and seconds to launch one.
LAUNCHES, LAUNCHES_COMPILED, LAUNCH_SECONDS = 100, 35, 5e-6

EmaDevice = Literal["same", "cpu"]
# The values that a recipe may set.
STATES: tuple[OptimizerState, ...] = get_args(TrainSettings.model_fields["optimizer_state"].annotation)
_PLAIN_FIRST: tuple[OptimizerState, ...] = get_args(OptimizerState)


@dataclass(frozen=True)
class Switches:
    """The options that trade memory for time; each is a key of the recipe's `train` section."""

    checkpointing: Checkpointing = "none"
    optimizer_state: OptimizerState = "fp32"
    ema_device: EmaDevice = "same"
    compile: bool = True
    fused_backward: bool = False
    block_swap: int = 0

    @property
    def departures(self) -> int:
        """Distance from plain training: how much the switches change the numbers and the machine."""
        # Checkpointing changes no number, a coarser state does, so it counts double.
        state = _PLAIN_FIRST.index(self.optimizer_state)
        return 2 * state + (self.ema_device == "cpu") + get_args(Checkpointing).index(self.checkpointing)

    def __str__(self) -> str:
        # Only what departs from plain training.
        words = ["compile"] if self.compile else []
        words += [f"{self.checkpointing} checkpointing"] if self.checkpointing != "none" else []
        words += [f"{self.optimizer_state} state"] if self.optimizer_state != "fp32" else []
        words += ["EMA on CPU"] if self.ema_device == "cpu" else []
        words += ["fused backward"] if self.fused_backward else []
        words += [f"{self.block_swap} blocks swapped"] if self.block_swap else []
        return ", ".join(words) or "none"


# The rows of the batch table, from plain training to the last resort.
LADDER = (
    Switches(compile=False),
    Switches(),
    *(Switches(optimizer_state=state) for state in STATES if state != "fp32"),
    Switches(ema_device="cpu"),
    Switches(optimizer_state="8bit", ema_device="cpu"),
    Switches("selective"),
    Switches("full"),
    Switches("full", "8bit", "cpu"),
    Switches(fused_backward=True),
    Switches("full", "8bit", "cpu", fused_backward=True),
)


def ladder(network: NetworkSizes, gpus: int = 1) -> tuple[Switches, ...]:
    """The rows of the batch table for a network: those of `LADDER`, and half and all of its blocks swapped.

    Several GPUs that share a batch train with neither a fused backward pass nor a swap.
    """
    if gpus > 1:
        return tuple(switches for switches in LADDER if not switches.fused_backward)
    half, swapped = max(1, network.depth // 2), Switches("full", compile=False)
    last = replace(swapped, ema_device="cpu", fused_backward=True, block_swap=network.depth)
    return (*LADDER, replace(swapped, block_swap=half), replace(swapped, block_swap=network.depth), last)


def all_switches(compiles: bool = True, fused_backward: bool = False, block_swap: int = 0) -> Iterator[Switches]:
    """Yield every combination; without `compiles` only those of eager training.

    A fused backward pass cannot clip gradients, and a swap of blocks takes time that is not measured yet: both are not
    searched for, but are on or off in all combinations.
    """
    # The checkpointing and the state come from their types, so a new value joins the search.
    choices = get_args(Checkpointing), STATES, get_args(EmaDevice)
    for checkpointing, state, ema in product(*choices):
        # What training refuses beside a swap.
        if block_swap and (checkpointing == "none" or state == "8bit"):
            continue
        for compile in (True, False) if compiles and not block_swap else (False,):
            yield Switches(checkpointing, state, ema, compile, fused_backward, block_swap)


def needed_bytes(network: NetworkSizes, rules: Rules, switches: Switches, batch: int, shards: int = 1) -> float:
    """Device bytes of training with (micro-)batches of this size, reserve included; shards: as in `fixed_bytes`."""
    # Activations grow with the batch; weights, moments and EMA do not.
    per_sample = activation_bytes(network, rules, switches.checkpointing, switches.compile)
    gradients = gradient_bytes(network, switches.fused_backward, switches.compile, switches.block_swap)
    moments, ema, swapped = switches.optimizer_state, switches.ema_device, switches.block_swap
    fixed = fixed_bytes(network, rules, moments, ema, shards, gradients=gradients, block_swap=swapped)
    return (fixed + batch * per_sample + RESERVED) / (1 - FRAGMENTS)


def largest_batch(network: NetworkSizes, rules: Rules, switches: Switches, memory: float, shards: int = 1) -> int:
    """The largest batch that fits into `memory` bytes; 0 if not even one sample does."""
    # The need is linear in the batch.
    none = needed_bytes(network, rules, switches, 0, shards)
    each = needed_bytes(network, rules, switches, 1, shards) - none
    return max(0, int((memory - none) // each))


def smallest_memory(
    network: NetworkSizes, rules: Rules, shards: int = 1, *, fused_backward: bool = False, block_swap: int = 0
) -> float:
    """Bytes below which no combination of switches fits a single sample, with the last two as in the recipe."""
    # The most economical combination decides.
    every = all_switches(fused_backward=fused_backward, block_swap=block_swap)
    return min(needed_bytes(network, rules, switches, 1, shards) for switches in every)


@dataclass(frozen=True)
class Fit:
    """A way to train a batch.

    Attributes:
        largest: the largest micro-batch that would fit.
        accumulate: backward passes per step.
        micro_batch: samples of one backward pass.
        step_seconds: predicted.
    """

    switches: Switches
    largest: int
    accumulate: int
    micro_batch: int
    step_seconds: float


def step_seconds(
    network: NetworkSizes,
    batch: int,
    accumulate: int,
    switches: Switches,
    flops: float,
    eager: float = EAGER,
    route: RoutedBlocks | None = None,
) -> float:
    """Predict the seconds of one optimiser step.

    Args:
        flops: FLOP/s of training without checkpointing, compiled (or eager if `eager` is 1).
        eager: time of an eager step over the time of a compiled one.
        route: blocks that tokens skip in a part of the steps, of which this is then the mean.
    """
    # The matrix products, and what the switches add.
    compute = batch * training_flops(network, switches.checkpointing, route) / flops
    compute *= (1 if switches.compile else eager) * (SELECTIVE if switches.checkpointing == "selective" else 1)
    # With a small micro-batch the device waits for kernel launches.
    kernels = network.depth * (LAUNCHES_COMPILED if switches.compile else LAUNCHES)
    compute = max(compute, accumulate * kernels * LAUNCH_SECONDS)
    # An EMA in the CPU's memory needs the weights copied now and then.
    copying = 4 * parameters(network) / HOST_BYTES_PER_SECOND / EMA_EVERY if switches.ema_device == "cpu" else 0.0
    # A swap waits for its copies: they are in line with the computation.
    copying += accumulate * swap_bytes(network, switches.block_swap) / HOST_BYTES_PER_SECOND
    return compute + copying


def accumulation(batch: int, largest: int) -> int:
    """The fewest equal parts of `batch` with at most `largest` samples each."""
    # Equal parts only: the mean over unequal ones would not be the batch's mean.
    return next(parts for parts in range(1, batch + 1) if batch % parts == 0 and batch // parts <= largest)


def fastest(
    network: NetworkSizes,
    rules: Rules,
    batch: int,
    memory: float,
    flops: float,
    compiles: bool = True,
    shards: int = 1,
    *,
    fused_backward: bool = False,
    block_swap: int = 0,
) -> Fit | None:
    """Find the fastest switches that train `batch` in `memory` bytes, accumulating if it does not fit at once.

    Of equally fast ones the plainest wins, then the one with the fewest accumulated parts. None: nothing fits.

    Args:
        flops: FLOP/s of training without checkpointing, compiled (or eager if `compiles` is false).
        compiles: whether torch.compile is worth it there.
        shards: GPUs that divide the weights among themselves.
        fused_backward: whether the recipe has it.
        block_swap: of the recipe.
    """
    fits = []
    # Try everything: there are a few dozen combinations.
    for switches in all_switches(compiles, fused_backward, block_swap):
        largest = largest_batch(network, rules, switches, memory, shards)
        # The fewest micro-batches that fit; a fused backward pass takes a batch at once.
        if largest >= (batch if fused_backward else 1):
            parts = accumulation(batch, largest)
            seconds = step_seconds(network, batch, parts, switches, flops, EAGER if compiles else 1.0)
            fits.append(Fit(switches, largest, parts, batch // parts, seconds))
    return min(fits, key=_preference, default=None)


def _preference(fit: Fit) -> tuple[float, int, int]:
    """The sort key. Seconds count to three digits: the estimates are no better than that."""
    # Rounded, so that a difference below the estimates' error does not decide.
    return float(f"{fit.step_seconds:.2e}"), fit.switches.departures, fit.accumulate
